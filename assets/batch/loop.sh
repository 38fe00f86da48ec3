#!/usr/bin/env bash
# One image per line of a prompt file, one process per image: the simplest batch.
#   bash assets/batch/loop.sh prompts.txt pictures
# Images that exist are skipped, so an interrupted run continues where it stopped. A model that takes
# longer to load than to draw is better served by `nextflow gen --prompt-file` (see README).
set -euo pipefail
prompts=${1:?usage: loop.sh PROMPTS FOLDER} folder=${2:?usage: loop.sh PROMPTS FOLDER}
mkdir -p "$folder"
n=0
while IFS= read -r prompt || [[ -n $prompt ]]; do
  n=$((n + 1))
  [[ -n $prompt ]] || continue
  image=$(printf '%s/%04d.png' "$folder" "$n")
  [[ -e $image ]] || nextflow gen --prompt="$prompt" --seed "$n" -o "$image" -q
done <"$prompts"
