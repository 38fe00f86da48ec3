"""Attention and convolution of src/ops/cuda beside PyTorch's, on an NVIDIA GPU: numbers first, then TFLOP/s.

    python benches/gpu_kernels.py

Compiles the kernels with nvcc (NVCC or the path), launches them through the driver and holds them to PyTorch in f32: they
may be off by a hundredth of the result's norm. Then it times them with events, the median of ten, beside FlashAttention,
cuDNN's attention and cuDNN's convolutions. Shapes are those of the last scales of `nextflow-7b` and of its pixels.
"""

import ctypes
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SOURCES = Path(__file__).resolve().parent.parent / "src/ops/cuda/bf16"
CAPABILITY = torch.cuda.get_device_capability()
HOPPER = CAPABILITY == (9, 0)
driver = ctypes.CDLL("libcuda.so.1")


def ok(result):
    if result:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(text.value)


class Kernel:
    """A function of a .cu file, with so many bytes of dynamic shared memory."""

    def __init__(self, source, name, shared):
        number = "".join(map(str, CAPABILITY)) + ("a" if "hopper" in source else "")
        target = f"arch=compute_{number},code=sm_{number}"
        with tempfile.TemporaryDirectory() as folder:
            cubin = os.path.join(folder, "kernel.cubin")
            nvcc = [os.environ.get("NVCC", "nvcc"), "-cubin", "-O3", "-std=c++17", f"-gencode={target}", "-o", cubin]
            subprocess.run([*nvcc, str(SOURCES / source)], check=True)
            image = Path(cubin).read_bytes()
        self.module, self.function, self.shared = ctypes.c_void_p(), ctypes.c_void_p(), shared
        ok(driver.cuModuleLoadData(ctypes.byref(self.module), image))
        ok(driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, name.encode()))
        ok(driver.cuFuncSetAttribute(self.function, 8, shared))  # The most dynamic shared memory.

    def __call__(self, grid, threads, *arguments):
        def value(a):
            if a is None or isinstance(a, torch.Tensor):
                return ctypes.c_void_p(0 if a is None else a.data_ptr())
            return {int: ctypes.c_int, float: ctypes.c_float}.get(type(a), lambda a: a)(a)

        values = [value(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values])
        grid = [*grid, 1, 1][:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        ok(driver.cuLaunchKernel(self.function, *grid, threads, 1, 1, self.shared, stream, pointers, None))


def tensor_map(x, sizes, box):
    """Boxes of a contiguous bf16 tensor, innermost dimension first, in rows of 128 bytes whose chunks trade places."""
    room, n = ctypes.create_string_buffer(256), len(sizes)
    at = (ctypes.addressof(room) + 127) & ~127
    strides = [2 * math.prod(sizes[:i]) for i in range(1, n)]
    array = lambda kind, values: (kind * len(values))(*values)
    ok(driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), 9, n, ctypes.c_void_p(x.data_ptr()), array(ctypes.c_uint64, sizes),
        array(ctypes.c_uint64, strides), array(ctypes.c_uint32, box), array(ctypes.c_uint32, [1] * n), 0, 3, 2, 0,
    ))  # bf16, no interleaving, 128 bytes swizzled, 128 bytes promoted in L2, zeros outside.
    return ctypes.string_at(at, 128)


class Rows(ctypes.Structure):
    _fields_ = [("k", ctypes.c_void_p * 16), ("v", ctypes.c_void_p * 16), ("length", ctypes.c_int * 16)]


class HopperRows(ctypes.Structure):
    _fields_ = [("k", ctypes.c_ubyte * 1024), ("v", ctypes.c_ubyte * 1024), ("length", ctypes.c_int * 32)]


def attention(kernel, hopper, q, ks, vs, causal):
    """What launches it, and its result (rows, tokens, heads, 128)."""
    (rows, tokens, heads, d), kv = q.shape, ks[0].shape[1]
    batch, out = HopperRows() if hopper else Rows(), torch.full_like(q, math.nan)
    for i, (k, v) in enumerate(zip(ks, vs)):
        for x, field in (k, batch.k), (v, batch.v):
            if hopper:
                ctypes.memmove(ctypes.addressof(field) + 128 * i, tensor_map(x, [d, kv, len(x)], [64, 1, 128]), 128)
            else:
                field[i] = x.data_ptr()
        batch.length[i] = len(k)
    tile, threads = (128, 384) if hopper else (64, 128)
    grid = -(-tokens * (heads // kv) // tile), kv, rows
    return lambda: kernel(grid, threads, q, batch, out, tokens, heads, kv, d**-0.5, int(causal)), out


def convolution(kernel, x, w, bias, base=None, up=0):
    """As above, by the kernels of every GPU or, for a pair of them and of Hopper's, by whichever our program takes."""
    (images, h, wide, channels), (outputs, side) = x.shape, w.shape[:2]
    h, wide = h << up, wide << up
    out = torch.full((images, h, wide, outputs), math.nan, device="cuda", dtype=x.dtype)
    if isinstance(kernel, Kernel):
        boxes = (x, [channels, wide, h, images], [64, 16, 8, 1]), (w, [w[0].numel(), outputs], [64, 256])
        maps = [(ctypes.c_ubyte * 128)(*tensor_map(*box)) for box in boxes]
        grid = images * -(-h // 8) * -(-wide // 16), -(-outputs // 256)
        return lambda: kernel(grid, 384, *maps, bias, base, out, h, wide, channels, outputs, side), out
    at_once = 256 if outputs > 32 else 32
    grid, pixels = (-(-images * h * wide // 128), -(-outputs // at_once)), images * h * wide
    arguments = x, w, bias, base, out, pixels, h, wide, channels, outputs, side, up
    return lambda: kernel[at_once](grid, 256, *arguments), out


def error(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def check(what, launch, out, want):
    launch()
    off = error(out, want)
    print(f"{what}: {off:.1e}")
    if not off < 1e-2:
        sys.exit(f"{what} is wrong")


def milliseconds(run):
    run()
    run()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def row(what, tflop, runs):
    cells = []
    for name, run in runs.items():
        try:
            ms = milliseconds(run)
            cells.append(f"{name} {ms:.3f} ms, {1e3 * tflop / ms:.0f} TFLOP/s")
        except RuntimeError as failure:
            cells.append(f"{name} failed: {str(failure)[:60]}")
    print(f"{what:28}" + "; ".join(cells), flush=True)


def random(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def reference(q, ks, vs, causal):
    rows = []
    for q, k, v in zip(q.float(), ks, vs):
        k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[2] ** -0.5
        if causal:
            i, j = torch.arange(len(q), device="cuda")[:, None], torch.arange(k.shape[1], device="cuda")
            scores = scores.masked_fill(j > i + k.shape[1] - len(q), -1e30)
        rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.stack(rows)


def main():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(torch.cuda.get_device_name(), torch.__version__)
    kernels = {"any GPU's": (Kernel("attention.cu", "attention_bf16_d128", 5 * 64 * 256), False)}
    convolutions = {"any GPU's": {n: Kernel("conv.cu", f"conv_bf16_{n}", 2 * (128 + n) * 128) for n in (256, 32)}}
    if HOPPER:
        kernels["Hopper's"] = Kernel("attention_hopper.cu", "attention_hopper_d128", 5 * 128 * 256 + 64), True
        convolutions["Hopper's"] = Kernel("conv_hopper.cu", "conv_hopper", 4 * (384 * 128 + 16))

    for tokens, keys, heads, kv in (1, 1, 28, 4), (1, 300, 28, 4), (64, 64, 28, 4), (100, 333, 28, 4), (700, 700, 4, 4):
        q = random(2, tokens, heads, 128)
        ks, vs = ([random(keys + 5 * i, kv, 128) for i in range(2)] for _ in range(2))
        for causal in False, True:
            for name, (kernel, hopper) in kernels.items():
                what = f"attention {tokens} over {keys}, causal {causal}, {name}"
                check(what, *attention(kernel, hopper, q, ks, vs, causal), reference(q, ks, vs, causal))
    shapes = [
        (1, 16, 16, 64, 256, 3, 0, 0), (2, 13, 9, 64, 72, 3, 0, 1), (1, 20, 12, 256, 512, 3, 1, 0),
        (1, 16, 16, 8, 256, 1, 0, 0), (1, 30, 17, 256, 3, 3, 0, 0), (2, 8, 8, 512, 256, 1, 0, 1),
        (2, 19, 21, 128, 300, 3, 0, 1),
    ]
    for images, h, wide, channels, outputs, side, up, added in shapes:
        x, w, bias = random(images, h, wide, channels), random(outputs, side, side, channels) * 0.05, random(outputs)
        base = random(images, h << up, wide << up, outputs) if added else None
        first, last = (0, 3, 1, 2), (0, 2, 3, 1)
        image = F.interpolate(x.permute(first).float(), scale_factor=1 << up, mode="nearest")
        want = F.conv2d(image, w.permute(first).float(), bias.float(), padding=side // 2).permute(last)
        want = want if base is None else want + base.float()
        for name, kernel in convolutions.items():
            if not isinstance(kernel, Kernel) or (channels % 64 == 0 and outputs > 32 and not up):
                what = f"convolution {images}x{h}x{wide}, {channels} to {outputs}, {name}"
                check(what, *convolution(kernel, x, w, bias, base, up), want)

    for tokens, keys in (256, 700), (1024, 3300), (2304, 6000), (4096, 10101):
        q = random(2, tokens, 28, 128)
        ks, vs = ([random(keys, 4, 128) for _ in range(2)] for _ in range(2))
        runs = {name: attention(kernel, hopper, q, ks, vs, False)[0] for name, (kernel, hopper) in kernels.items()}
        qs, k, v = q.transpose(1, 2), torch.stack(ks).transpose(1, 2), torch.stack(vs).transpose(1, 2)
        for backend in SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION:
            def run(backend=backend):
                with sdpa_kernel(backend):
                    F.scaled_dot_product_attention(qs, k, v, enable_gqa=True)
            runs[backend.name] = run
        row(f"attention {tokens} over {keys}", 2 * 4 * tokens * keys * 28 * 128 / 1e12, runs)
    torch.backends.cudnn.benchmark = True
    pixels = (64, 1024, 1024), (128, 1024, 512), (256, 512, 512), (512, 256, 256), (1024, 256, 256), (1024, 256, 3)
    for side, channels, outputs in pixels:
        x, w, bias = random(1, side, side, channels), random(outputs, 3, 3, channels) * 0.05, random(outputs)
        runs = {name: convolution(kernel, x, w, bias)[0] for name, kernel in convolutions.items()
                if outputs > 32 or not isinstance(kernel, Kernel)}
        image, weights = x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2)
        runs["cuDNN"] = lambda: F.conv2d(image, weights, bias, padding=1)
        row(f"{side}x{side}, {channels} to {outputs}", 2 * side * side * 9 * channels * outputs / 1e12, runs)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
