#!/usr/bin/env bash
#SBATCH --job-name=nextflow
#SBATCH --array=1-8
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=01:00:00
#SBATCH --output=%x-%A-%a.log
# A SLURM array job: every task draws its share of a file of jobs, without talking to the others.
#   sbatch assets/batch/slurm.sh jobs.jsonl pictures
# Submit it again to draw what is missing. For GPUs add `#SBATCH --gres=gpu:1` and a build with
# `--features cuda`.
set -euo pipefail
jobs=${1:?usage: sbatch slurm.sh JOBS FOLDER} folder=${2:?usage: sbatch slurm.sh JOBS FOLDER}
: "${SLURM_ARRAY_TASK_ID:?submit this with sbatch}"
mkdir -p "$folder"
export RAYON_NUM_THREADS=${SLURM_CPUS_PER_TASK:-4}
nextflow gen --jsonl "$jobs" --out-dir "$folder" --resume --keep-going \
  --shard "$SLURM_ARRAY_TASK_ID/${SLURM_ARRAY_TASK_COUNT:-8}"
