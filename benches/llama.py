"""llama.cpp's words, for `peer.py words`: a GGUF file of Qwen2.5-0.5B's shape with random weights, and a run of it by the
libraries of a build (libllama, libggml and its CPU backends in one folder, as in its releases, in `build/bin`, or in the
npm package `@node-llama-cpp/linux-x64`).

The interface is llama.h's, by ctypes. Its structs of parameters are passed as they are returned, so their fields need not
be known.
"""

import ctypes
import os
import time

SHAPE = {"layers": 24, "hidden": 896, "inner": 4864, "heads": 14, "kv_heads": 2, "vocab": 151936}
# Rows that are drawn; the others repeat them, as in `nextflow bench --synthetic`.
DRAWN = 64


def write(path, quant):
    """A file with matrices in blocks of `quant`, or of Q8_0 where q4_K's 256 do not divide the columns."""
    import gguf
    import numpy as np

    random, s = np.random.default_rng(0), SHAPE
    types = {"f32": "F32", "bf16": "BF16", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_K": "Q4_K"}
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(4096)
    writer.add_embedding_length(s["hidden"])
    writer.add_block_count(s["layers"])
    writer.add_feed_forward_length(s["inner"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(s["vocab"])
    writer.add_tokenizer_model("no_vocab")

    def matrix(name, rows, columns):
        kind = getattr(gguf.GGMLQuantizationType, types[quant])
        if kind.name == "Q4_K" and columns % 256:
            kind = gguf.GGMLQuantizationType.Q8_0
        numbers = random.standard_normal((DRAWN, columns), np.float32) * columns**-0.5
        if kind.name == "Q4_K":
            # The package does not quantise to it: any bytes are numbers, beside scales that keep them small.
            blocks = random.integers(0, 256, (DRAWN, columns // 256, 144), np.uint8)
            scales = np.array([columns**-0.5 / 256, columns**-0.5 / 64], np.float16)
            blocks[:, :, :4] = np.frombuffer(scales.tobytes(), np.uint8)
            few = blocks.reshape(DRAWN, -1)
        else:
            few = gguf.quants.quantize(numbers, kind)
        writer.add_tensor(name, np.resize(few, (rows, few.shape[1])), raw_dtype=kind)

    def vector(name, size, value):
        writer.add_tensor(name, np.full(size, value, np.float32))

    hidden, inner, keys = s["hidden"], s["inner"], s["hidden"] // s["heads"] * s["kv_heads"]
    matrix("token_embd.weight", s["vocab"], hidden)
    vector("output_norm.weight", hidden, 1)
    for i in range(s["layers"]):
        vector(f"blk.{i}.attn_norm.weight", hidden, 1)
        vector(f"blk.{i}.ffn_norm.weight", hidden, 1)
        for name, rows in ("q", hidden), ("k", keys), ("v", keys):
            matrix(f"blk.{i}.attn_{name}.weight", rows, hidden)
            vector(f"blk.{i}.attn_{name}.bias", rows, 0)
        matrix(f"blk.{i}.attn_output.weight", hidden, hidden)
        matrix(f"blk.{i}.ffn_gate.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_up.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Params(ctypes.Structure):
    """A struct of parameters, which is shorter than this and lies in memory whatever its fields are."""

    _fields_ = [("bytes", ctypes.c_char * 1024)]


class Batch(ctypes.Structure):
    _fields_ = [("tokens", ctypes.c_int32), ("arrays", ctypes.c_void_p * 6)]


def library(folder, name):
    """The library of a folder that the other libraries need: without a version, or with any."""
    found = sorted(f for f in os.listdir(folder) if f.startswith(f"{name}.") and ".so" in f)
    return ctypes.CDLL(os.path.join(folder, found[0]), ctypes.RTLD_GLOBAL)


def run(folder, path, threads, prompt, words):
    """Seconds of a prompt and of the words after it, after a first run that is not counted."""
    folder = os.path.abspath(folder)
    library(folder, "libggml-base")
    ggml, llama = library(folder, "libggml"), library(folder, "libllama")
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    for set_log in ggml.ggml_log_set, llama.llama_log_set:
        set_log(silent, None)
    ggml.ggml_backend_load_all_from_path(folder.encode())
    llama.llama_model_default_params.restype = llama.llama_context_default_params.restype = Params
    llama.llama_model_load_from_file.restype = llama.llama_init_from_model.restype = ctypes.c_void_p
    llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
    llama.llama_init_from_model.argtypes = [ctypes.c_void_p, Params]
    llama.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    llama.llama_batch_get_one.restype = Batch
    llama.llama_batch_get_one.argtypes = [ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]
    llama.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    llama.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    llama.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    llama.llama_free.argtypes = [ctypes.c_void_p]
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    for _ in range(2):
        params = llama.llama_context_default_params()
        # The first fields are the lengths of the context, of a logical and of a physical batch.
        ctypes.cast(ctypes.byref(params), ctypes.POINTER(ctypes.c_uint32))[0] = max(2 * (prompt + words), 256)
        context = llama.llama_init_from_model(model, params)
        llama.llama_set_n_threads(context, threads, threads)

        def decode(tokens):
            array = (ctypes.c_int32 * len(tokens))(*tokens)  # The batch points to it.
            if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
                raise SystemExit("llama.cpp cannot decode")
            logits = llama.llama_get_logits_ith(context, -1)
            return logits[0]

        started = time.perf_counter()
        decode(list(range(prompt)))
        read = time.perf_counter()
        for i in range(words):
            decode([i])
        done = time.perf_counter()
        llama.llama_free(context)
    return read - started, done - read
