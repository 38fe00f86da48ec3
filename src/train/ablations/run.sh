#!/bin/sh
# The paper's ablations at a quarter of nano's transformer: each changes one thing of the recipe, and learns the same compositions
# in the same number of steps, with seeds 1 to 3. What is in src/train/ablations/results.csv has been done and is not done again;
# several of these may run at once.
#
#   sh src/train/ablations/run.sh runs/ablations
#
# It needs the picture library, and runs/nano/semantic.safetensors for the comparison of codebooks, which trains image
# tokenizers of its own.
set -eu
runs=$1
nextflow=${NEXTFLOW:-target/release/nextflow}
here=$(dirname "$0")
results=$here/results.csv # variant, seed, mean of the six categories in percent, PSNR in dB of a codebook of its own
taken=
trap '[ -z "$taken" ] || rmdir "$taken"' EXIT
trap 'exit 130' INT TERM

# recipe NAME SEED CHANGE: a run's folder with its recipe, a sed script that changes nano's.
recipe() {
    run=$runs/$1-$2
    mkdir -p "$run"
    sed -e 's/"hidden_size": 256/"hidden_size": 128/' -e 's/"intermediate_size": 768/"intermediate_size": 384/' \
        -e 's/"num_hidden_layers": 6/"num_hidden_layers": 4/' -e 's/"num_attention_heads": 8/"num_attention_heads": 4/' \
        -e "s/\"seed\": 1/\"seed\": $2/" -e "$3" "$here/../nano.json" > "$run/recipe.json"
    cp assets/nano/tokenizer.json "$run/"
}

train() {
    "$nextflow" train --run "$run" --device cpu "$@" 2>> "$run/log"
}

# take NAME SEED: fails if that has been done, or another process does it.
take() {
    ! grep -q "^$1,$2," "$results" || return 1
    mkdir -p "$runs"
    mkdir "$runs/$1-$2.taken" 2>/dev/null || return 1
    taken=$runs/$1-$2.taken
}

# draw NAME SEED SUITES: learns to draw, is measured, and is recorded.
draw() {
    name=$1,$2
    shift 2
    train transformer --things 0 --scenes 4000 --several 0 --oblong 0 --steps 700 --batch 16 --lr 0.004 --warmup 30
    train export "$run/export"
    "$nextflow" eval --model "$run/export" --suite "$@" --json 2>> "$run/log" > "$run/eval.json"
    score=$(grep -o '"score":{"share":[0-9.]*' "$run/eval.json" | awk -F: '{ sum += $NF } END { printf "%.1f", 100 * sum / NR }')
    psnr=$(grep -o '"psnr":[0-9.]*' "$run/eval.json" | awk -F: 'NR == 1 { printf "%.2f", $2 }')
    echo "$name,$score,$psnr" >> "$results"
    rmdir "$taken"
    taken=
}

# transformer NAME SEED CHANGE: with nano's image tokenizer.
transformer() {
    take "$1" "$2" || return 0
    recipe "$@"
    cp assets/nano/image_tokenizer.safetensors "$run/"
    draw "$1" "$2" compositions
}

# codebook NAME SEED CHANGE PIXEL JOINT: with an image tokenizer of its own, of so many steps a stage.
codebook() {
    take "$1" "$2" || return 0
    recipe "$@"
    cp runs/nano/semantic.safetensors "$run/"
    train tokenizer --stage pixel --steps "$4" --batch 8 --lr 0.002 --weight-decay 0.01
    [ "$5" = 0 ] || train tokenizer --stage joint --steps "$5" --batch 8 --lr 0.001 --weight-decay 0.01
    draw "$1" "$2" compositions --suite reconstruction
}

for seed in 1 2 3; do
    transformer residual "$seed" ''
    transformer residual-uncorrected "$seed" 's/"fraction": 0.6/"fraction": 0.0/'
    transformer cumulative "$seed" 's/"residual"/"cumulative"/'
    transformer cumulative-uncorrected "$seed" 's/"residual"/"cumulative"/; s/"fraction": 0.6/"fraction": 0.0/'
    transformer unweighted "$seed" 's/"scale_reweight": 0.9/"scale_reweight": 0.0/'
    codebook dual "$seed" '' 450 200
    codebook single "$seed" 's/"w_sem": 0.25/"w_sem": 0.0/' 650 0
done
