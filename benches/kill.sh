#!/usr/bin/env bash
# A batch of images that is killed at random moments and resumed until it is done: nothing may be lost, doubled, half
# written or left over. Needs bash and coreutils.
#
#   benches/kill.sh [IMAGES [KILLS [NEXTFLOW]]]     by default 1000 images, 100 kills, target/release/nextflow
set -euo pipefail
images=${1:-1000} kills=${2:-100} nextflow=${3:-$(dirname "$0")/../target/release/nextflow}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

for ((i = 0; i < images; i++)); do
  printf '{"prompt": "a red circle", "seed": %d, "draft": 2, "out": "%d/%04d.png"}\n' "$i" $((i % 7)) "$i"
done > "$dir/jobs.jsonl"
draw() { "$nextflow" gen --jsonl "$dir/$1" --out-dir "$dir/$2" --resume > "$dir/told" 2> "$dir/errors"; }
now() { date +%s%N; }
temporary() { find "$dir/out" -name '.nextflow-*' 2> /dev/null | wc -l; }

# A kill comes, on average, after the start and the images of one kill's share.
head -n $((images / kills + 1)) "$dir/jobs.jsonl" > "$dir/share.jsonl"
before=$(now)
draw share.jsonl share
share=$((($(now) - before) / 1000))

killed=0 ended=0 left=0
while ((killed < kills)); do
  "$nextflow" gen --jsonl "$dir/jobs.jsonl" --out-dir "$dir/out" --resume > /dev/null 2>&1 &
  run=$!
  delay=$((RANDOM * 2 * share / 32768))
  sleep "$(printf '%d.%06d' $((delay / 1000000)) $((delay % 1000000)))"
  if kill -9 "$run" 2> /dev/null; then killed=$((killed + 1)); else ended=$((ended + 1)); fi
  wait "$run" 2> /dev/null || true
  left=$((left + $(temporary)))
  # All is drawn: begin again, so that kills still hit drawing.
  if [ "$(find "$dir/out" -name '*.png' 2> /dev/null | wc -l)" -ge "$images" ]; then
    find "$dir/out" -name '*[05].png' -delete
  fi
done
draw jobs.jsonl out
lines=$(wc -l < "$dir/told")

# The same batch without an interruption: every seed gives the same bytes again.
draw jobs.jsonl whole
differences=$(diff -rq "$dir/whole" "$dir/out" || true)
count() { grep -c "$1" <<< "$differences" || true; }
found=$(find "$dir/out" -name '*.png' | wc -l)
echo "$images images, $killed kills, $ended runs over before their kill, $left temporary files seen after kills"
echo "$found found, $(count "Only in $dir/whole") lost, $(count "Only in $dir/out") too many, $(count ' differ$') half or" \
  "different, $(temporary) temporary files left, $lines lines told by the last run"
[ -z "$differences" ] && [ "$found" -eq "$images" ] && [ "$lines" -eq "$images" ] && [ "$(temporary)" -eq 0 ]
