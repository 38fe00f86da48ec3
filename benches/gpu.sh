#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: checks the kernels against the CPU, then times the shapes of the 7B model, Infinity and
# OneCAT-3B, then PyTorch on the 7B shape, and prints a table of each. Needs a CUDA toolkit (nvcc), and for the comparison a Python with torch.
#
#   bash benches/gpu.sh [FOLDER FOR LOGS]
#
# Where there is no Rust, NEXTFLOW and CHECKS name the program and its unit tests as `cargo build --release --features cuda`
# and `cargo test --release --features cuda --lib --no-run` made them elsewhere. ONLY=on_a_gpu_attention runs some checks,
# LONG=20 draws 20 images of 1024 pixels in place of 50.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=${1:-target/gpu}
mkdir -p "$logs"
rm -f "$logs"/*.json "$logs"/*.txt
python=${PYTHON:-python3}

nvidia-smi | tee "$logs/machine.txt"
checks=(--ignored --nocapture --test-threads 1 "${ONLY:-on_a_gpu}")
if [ -z "${CHECKS:-}" ]; then
  cargo build --release --features cuda
  cargo test --release --features cuda --lib -- "${checks[@]}" 2>&1 | tee "$logs/numbers.txt"
else
  "$CHECKS" "${checks[@]}" 2>&1 | tee "$logs/numbers.txt"
fi

# NAME SIDE IMAGES FLAGS...
bench() {
  local name=$1 side=$2 images=$3
  shift 3
  "${NEXTFLOW:-target/release/nextflow}" bench --synthetic nextflow-7b --device cuda --json \
    --size "${side}x$side" --images "$images" "$@" > "$logs/$name.json" || { echo "$name failed"; failed=1; }
}
failed=0
bench 256 256 50
bench 512 512 10
bench 1024 1024 "${LONG:-50}"
bench 1024-cfg-until-16 1024 4 --cfg-until 16
bench 1024-draft-1 1024 4 --draft 1
bench 256-batch-8 256 3 --batch 8
bench 256-q8_0 256 4 --quant q8_0
bench 256-q4_K 256 4 --quant q4_K

# SHAPE NAME FLAGS...
phases() {
  local shape=$1 name=$2
  shift 2
  "${NEXTFLOW:-target/release/nextflow}" bench --synthetic "$shape" --device cuda --json "$@" > "$logs/$name.json" ||
    { echo "$name failed"; failed=1; }
}
phases infinity-125m infinity-125m --size 256x256 --images 3
phases infinity-2b infinity-2b --size 1024x1024 --images 3
phases infinity-8b infinity-8b --size 1024x1024 --images 3
phases onecat-3b onecat-512 --size 512x512 --images 3
phases onecat-3b onecat-1024 --size 1024x1024 --images 3
phases onecat-3b onecat-1024-edit --size 1024x1024 --images 3 --task edit
phases onecat-3b onecat-1024-q4_K --size 1024x1024 --images 3 --quant q4_K
phases onecat-3b onecat-chat --size 512x512 --task chat

if "$python" -c 'import torch' 2> /dev/null; then
  "$python" benches/peer.py 7b --size 256 512 1024 --graphs --compile 2>&1 | tee "$logs/peer.txt" || { echo "PyTorch failed"; failed=1; }
else
  echo "no torch in $python: no comparison (PYTHON=... names another)"
fi

"$python" - "$logs" << 'TABLE'
import json, sys
from pathlib import Path

logs = Path(sys.argv[1])


def lines(name):
    path = logs / name
    return path.read_text().splitlines() if path.exists() else []


peers = {}
for line in lines("peer.txt"):
    if line.startswith("{") and "image_seconds" in (found := json.loads(line)):
        peers.setdefault(str(found["size"]), []).append(found)
names = ["256", "512", "1024", "1024-cfg-until-16", "1024-draft-1", "256-batch-8", "256-q8_0", "256-q4_K"]
columns = "seconds", "pixels", "floor", "share", "peak GB", "growth MB", "PyTorch", "ratio"
print(f"{'':20}" + "".join(f"{column:>11}" for column in columns))
for name in names:
    text = "\n".join(lines(f"{name}.json"))
    if not text:
        continue
    r = json.loads(text)
    seconds, pixels = r["image_seconds"], r["decode_seconds"] / r["batch"]
    growth = r["growth_bytes"]
    cells = [f"{seconds:.3f}", f"{pixels:.3f}", f"{r['floor_seconds']:.3f}", f"{r['share_of_floor']:.0%}"]
    cells += [f"{(r['peak_bytes'] or 0) / 1e9:.1f}", "" if growth is None else f"{growth / 1e6:+.1f}"]
    if name in peers:
        best = min(peers[name], key=lambda found: found["image_seconds"])
        cells += [f"{best['image_seconds']:.3f}", f"{best['image_seconds'] / seconds:.2f}x", " " + best["variant"]]
    print(f"{name:20}" + "".join(f"{cell:>11}" for cell in cells))

# The paper gives 2.85 s for an image of 1024 pixels and 4.61 s for an edit, on an H800.
columns = "prompt", "drawing", "floor", "share", "decoding", "peak GB", "forecast"
print(f"\n{'Infinity, OneCAT-3B':20}" + "".join(f"{column:>11}" for column in columns))
infinity = ["infinity-125m", "infinity-2b", "infinity-8b"]
for name in infinity + ["onecat-512", "onecat-1024", "onecat-1024-edit", "onecat-1024-q4_K"]:
    text = "\n".join(lines(f"{name}.json"))
    if not text:
        continue
    r = json.loads(text)
    seconds = {phase["name"]: phase["seconds"] for phase in r["phases"]}
    floor = sum(scale["floor_seconds"] for scale in r["scales"])
    # Infinity's text is read by T5.
    cells = [f"{seconds.get('prompt', seconds.get('text')):.3f}", f"{seconds['drawing']:.3f}", f"{floor:.3f}", f"{floor / seconds['drawing']:.0%}"]
    cells += [f"{seconds['decoding']:.3f}", f"{(r['peak_bytes'] or 0) / 1e9:.1f}", f"{r['forecast_bytes'] / 1e9:.1f}"]
    print(f"{name:20}" + "".join(f"{cell:>11}" for cell in cells))
text = "\n".join(lines("onecat-chat.json"))
for part in json.loads(text)["parts"] if text else []:
    print(f"chat, {part['name']:14}{part['seconds']:11.3f} s of {part['tokens']} tokens, floor {part['floor_seconds']:.3f} s")
TABLE
exit $failed
