#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: checks numbers against the CPU, then times the 7B shape, then PyTorch on the same shape,
# and prints one table. Needs a CUDA toolkit (nvcc), and for the comparison a Python with torch.
#
#   bash benches/gpu.sh [FOLDER FOR LOGS]
set -euo pipefail
cd "$(dirname "$0")/.."
logs=${1:-target/gpu}
mkdir -p "$logs"
python=${PYTHON:-python3}
bench() { ./target/release/nextflow bench --synthetic nextflow-7b --device cuda --json "$@"; }

nvidia-smi | tee "$logs/machine.txt"
cargo build --release --features cuda
cargo test --release --features cuda --lib on_a_gpu -- --ignored --nocapture --test-threads 1 2>&1 | tee "$logs/numbers.txt"

for side in 256 512 1024; do
  bench --size "${side}x$side" --images 6 | tee "$logs/$side.json"
done
bench --size 1024x1024 --images 50 > "$logs/growth.json"
bench --size 1024x1024 --images 4 --cfg-until 16 > "$logs/1024-cfg-until-16.json"
bench --size 1024x1024 --images 4 --draft 1 > "$logs/1024-draft-1.json"
bench --size 256x256 --images 4 --batch 8 > "$logs/256-batch-8.json"
bench --size 1024x1024 --images 4 --batch 4 > "$logs/1024-batch-4.json"

if "$python" -c 'import torch' 2> /dev/null; then
  for side in 256 512 1024; do
    "$python" benches/peer.py 7b --size "$side" --graphs --compile --nextflow target/release/nextflow \
      2>&1 | tee "$logs/peer-$side.txt" || echo "PyTorch failed at $side"
  done
else
  echo "no torch in $python: no comparison (PYTHON=... names another)"
fi

"$python" - "$logs" << 'TABLE'
import json, sys
from pathlib import Path

logs = Path(sys.argv[1])
print(f"{'':24}{'seconds':>9}{'floor':>9}{'share':>8}{'GB kept':>9}")
for name in ["256", "512", "1024", "1024-cfg-until-16", "1024-draft-1", "256-batch-8", "1024-batch-4"]:
    r = json.loads((logs / f"{name}.json").read_text())
    share = r["floor_seconds"] / r["image_seconds"]
    print(f"{name:24}{r['image_seconds']:9.3f}{r['floor_seconds']:9.3f}{share:8.0%}{(r['peak_bytes'] or 0) / 1e9:9.1f}")
growth = json.loads((logs / "growth.json").read_text())["growth_bytes"]
print(f"growth over 50 images: {growth / 1e6:+.1f} MB")
TABLE
