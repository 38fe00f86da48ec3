#!/usr/bin/env bash
# The same with GNU parallel: four processes at a time, a log to resume from, failures tried again.
#   bash assets/batch/parallel.sh prompts.txt pictures
set -euo pipefail
prompts=${1:?usage: parallel.sh PROMPTS FOLDER} folder=${2:?usage: parallel.sh PROMPTS FOLDER}
mkdir -p "$folder"
# {#} is the number of the line; --resume-failed repeats only what the log does not show as drawn.
parallel --jobs "${JOBS:-4}" --joblog "$folder/joblog" --resume-failed \
  nextflow gen --prompt={} --seed '{#}' -o "$folder"/'{#}.png' --force -q :::: "$prompts"
