"""The same model in plain PyTorch, to compare nextflow with: merged projections, F.scaled_dot_product_attention
against a preallocated cache, no mask while an image is drawn, codes drawn on the device.

    python benches/peer.py nano --nextflow target/release/nextflow
    python benches/peer.py 7b --size 512 --graphs --compile --nextflow target/release/nextflow
    python benches/peer.py words --quant q4_0 --llama FOLDER --nextflow target/release/nextflow

`nano` loads nano's weights, f32 on a CPU. First it checks that both programs draw the same image at temperature 0; if
not, it exits with 1. Then it times them in turn: a whole process that draws one image, and one more image in a process
that draws many (for nextflow `gen --count N+1` less `gen --count 1`, by N; for PyTorch N images after two that are
not counted). All read the words, draw and write PNGs. PyTorch runs twice: as it is, and with oneDNN in MKL's place.

`7b` has the shape of `nextflow bench --synthetic nextflow-7b` and random weights, bf16 on CUDA, else f32. It prints a
JSON object per variant (eager; --graphs: a CUDA graph per scale; --compile: torch.compile of the block; both), then of
every size a table: the median of warm images of both programs, pixels included, and PyTorch's first image, in which blocks compile.

`words` compares with llama.cpp instead: a prompt and words of Qwen2.5-0.5B's shape with random weights, matrices in the
same blocks. FOLDER holds a build's libraries (see llama.py). The programs run in turn, each in a process of its own.

Needs torch, for nano safetensors, tokenizers and pillow, for words gguf.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# Sides of the grids of a square image (paper, appendix A.1), and how many of them make an image of a size.
SIDES = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64]
LEVELS = {128: 8, 256: 12, 512: 16, 1024: 18}

NEXTFLOW_7B = {
    "sampling": {"cfg": 3.0, "temperature": 1.0, "top_k": 600, "top_p": 0.95},
    "backbone": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "mrope_section": [16, 24, 24], "spatial_extent": 64.0, "codebook_size": 32768, "code_dim": 40, "max_scales": 18,
    },
    "tokenizer": {
        "decoder": {
            "ch": 256, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 4, "z_channels": 256, "groups": 32, "patch": 1,
        },
        "codebook": {"size": 32768, "semantic_dim": 32, "pixel_dim": 8, "l2_norm": True},
    },
}


class Block(nn.Module):
    """Grouped-query attention and SwiGLU, each after an RMSNorm."""

    def __init__(self, c):
        super().__init__()
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = hidden // self.heads
        self.input_layernorm = nn.RMSNorm(hidden, c["rms_norm_eps"])
        self.qkv_proj = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(hidden, c["rms_norm_eps"])
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x, cos, sin, keys, values, start, pads, mask):
        """x (R, T, hidden) at the positions from `start` on; row r sees nothing before pads[r]."""
        rows, tokens, _ = x.shape
        end = start + tokens
        qkv = self.qkv_proj(self.input_layernorm(x)).view(rows, tokens, -1, self.head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 2)
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        q, k = qk.transpose(1, 2).split([self.heads, self.kv_heads], 1)
        keys[:, :, start:end] = k
        values[:, :, start:end] = v.transpose(1, 2)
        attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
        if mask is not None:
            out = attend(q, keys[:, :, :end], values[:, :, :end], mask)
        else:
            seen = [(slice(r, r + 1), slice(None), slice(pad, end)) for r, pad in enumerate(pads)]
            out = torch.cat([attend(q[at[:1]], keys[at], values[at]) for at in seen])
        x = x + self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.down_proj(F.silu(gate) * up)


class Transformer(nn.Module):
    """Hidden states of embedded tokens, and what leads to and from them."""

    def __init__(self, c):
        super().__init__()
        hidden = c["hidden_size"]
        self.embed_tokens = nn.Embedding(c["vocab_size"] + 2, hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(hidden, c["rms_norm_eps"])
        self.mm_projector = nn.Sequential(nn.Linear(c["code_dim"], hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.scale_embed = nn.Parameter(torch.zeros(c["max_scales"], hidden))
        self.lm_head = nn.Linear(hidden, c["codebook_size"], bias=False)  # Text is not drawn, so its rows are left out.
        self.blocks = list(self.layers)

    def forward(self, x, cos, sin, cache, start, pads, mask=None):
        for block, (keys, values) in zip(self.blocks, cache):
            x = block(x, cos, sin, keys, values, start, pads, mask)
        return self.norm(x)


class Packed(nn.Module):
    """A linear layer in oneDNN's layout. PyTorch multiplies f32 with MKL, which on AMD's processors is half as fast."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 128), linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Res(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, 1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, 1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    def __init__(self, inputs, outputs, blocks, groups, attend, upsample):
        super().__init__()
        self.res = nn.ModuleList(Res(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs, groups) for _ in range(blocks if attend else 0))
        self.upsample = nn.ModuleDict({"conv": nn.Conv2d(outputs, outputs, 3, padding=1)} if upsample else {})

    def forward(self, x):
        for i, res in enumerate(self.res):
            x = res(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample["conv"](F.interpolate(x, scale_factor=2, mode="nearest")) if self.upsample else x


class Decoder(nn.Module):
    """Features of the last grid to pixels."""

    def __init__(self, c):
        super().__init__()
        groups, widths = c["groups"], [c["ch"] * mult for mult in reversed(c["ch_mult"])]
        first = widths[0]
        self.conv_in = nn.Conv2d(c["z_channels"], first, 3, padding=1)
        self.mid = nn.Sequential(Res(first, first, groups), Attention(first, groups), Res(first, first, groups))
        self.conv_blocks = nn.Sequential(*(
            Level(before, width, c["num_res_blocks"] + 1, groups, attend=i == 0, upsample=i + 1 < len(widths))
            for i, (before, width) in enumerate(zip(widths[:1] + widths, widths))
        ))
        self.norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3 * c["patch"] ** 2, 3, padding=1)
        self.patch = c["patch"]

    def forward(self, z):
        x = self.conv_blocks(self.mid(self.conv_in(z)))
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)


class Tokenizer(nn.Module):
    """What drawing needs of the image tokenizer: the codebook and the way from codes to pixels."""

    def __init__(self, c):
        super().__init__()
        book = c["codebook"]
        self.embedding_vqkd = nn.Parameter(torch.empty(book["size"], book["semantic_dim"]).uniform_(-1, 1))
        self.embedding_vqgan = nn.Parameter(torch.empty(book["size"], book["pixel_dim"]).uniform_(-1, 1))
        self.post_quant_conv = nn.Conv2d(book["pixel_dim"], c["decoder"]["z_channels"], 1)
        self.decoder = Decoder(c["decoder"])
        self.l2_norm = book["l2_norm"]

    def table(self):
        halves = self.embedding_vqkd, self.embedding_vqgan
        return torch.cat([F.normalize(half, dim=-1) if self.l2_norm else half for half in halves], 1)


class Drawing:
    """Images of one prompt. `parts` draw one if called in turn; they keep what they share in tensors of fixed sizes.

    Row 0 is the prompt's, row 1 the unconditional one, padded on the left, so that both write to the same places. While
    an image is drawn each row attends to what is after its pads, without a mask.
    """

    def __init__(self, transformer, tokenizer, config, prompt, sides, sampling):
        self.transformer, self.tokenizer, self.sampling, self.sides = transformer, tokenizer, sampling, sides
        c, weight = config["backbone"], transformer.embed_tokens.weight
        device, self.dtype = weight.device, weight.dtype
        unknown = sampling.keys() - {"cfg", "cfg_until", "temperature", "top_k", "top_p"}
        if unknown or sampling["cfg"] <= 0:
            sys.exit(f"this peer knows guided sampling without {sorted(unknown)}")
        guided = sampling.get("cfg_until", len(sides))
        self.rows = [2 if si < guided else 1 for si in range(len(sides))]
        tokens = len(prompt) + 1
        self.pads, boi = [0, len(prompt)], c["vocab_size"]
        self.ids = torch.tensor([prompt + [boi], [boi] * tokens], device=device)
        i, pads = torch.arange(tokens, device=device), torch.tensor(self.pads, device=device).view(2, 1, 1, 1)
        # A pad sees pads, for its numbers must be finite.
        self.mask = (i <= i[:, None]) & ((i >= pads) | (i[:, None] < pads))
        self.starts = [0] + [tokens + sum(side * side for side in sides[1:si]) for si in range(1, len(sides) + 1)]
        self.cos, self.sin = self.rotations(c, tokens, device)
        kv = 2, c["num_key_value_heads"], self.starts[-1], c["hidden_size"] // c["num_attention_heads"]
        new = functools.partial(torch.zeros, kv, dtype=self.dtype, device=device)
        self.cache = [(new(), new()) for _ in transformer.layers]
        half = c["hidden_size"] // 2
        angles = len(sides) * 1e-4 ** (torch.arange(half, dtype=torch.float64) / half)
        length = torch.cat([angles.sin(), angles.cos()]).to(device, self.dtype)
        self.scale_rows = transformer.scale_embed[: len(sides)] + length
        self.table = tokenizer.table()
        self.entries = [None] * len(sides)
        scales = [functools.partial(self.read_scale, si) for si in range(1, len(sides))]
        self.parts = [self.read_prompt, *scales, self.decode]

    def rotations(self, c, tokens, device):
        """Cosines and sines (R, L, 1, head_dim) of all positions; the sines of the first half carry the sign."""
        half = c["hidden_size"] // c["num_attention_heads"] // 2
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(c["mrope_section"]))
        frequencies = c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        rows = []
        for pad in self.pads:
            boi = tokens - 1 - pad
            positions = [(torch.arange(tokens) - pad).clamp(min=0)[:, None].expand(-1, 3).double()]
            for si, side in enumerate(self.sides[1:], 1):
                at = c["spatial_extent"] / side * (torch.arange(side, dtype=torch.float64) + 0.5)
                t = torch.full((side * side,), float(boi + si), dtype=torch.float64)
                positions.append(torch.stack([t, at.repeat_interleave(side), at.repeat(side)], 1))
            rows.append(torch.cat(positions)[:, axis] * frequencies)
        angles = torch.stack(rows).unsqueeze(2)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
        return cos.to(device, self.dtype), sin.to(device, self.dtype)

    def forward(self, x, si, mask=None):
        rows, start, end = self.rows[si], self.starts[si], self.starts[si] + x.shape[1]
        cache = [(keys[:rows], values[:rows]) for keys, values in self.cache]
        turn = self.cos[:rows, start:end], self.sin[:rows, start:end]
        return self.transformer(x, *turn, cache, start, self.pads[:rows], mask)

    def read_prompt(self):
        self.draw(0, self.forward(self.transformer.embed_tokens(self.ids), 0, self.mask)[:, -1:])

    def read_scale(self, si):
        side = self.sides[si]
        features = F.interpolate(self.entries[si - 1], size=(side, side), mode="bicubic").flatten(2).transpose(1, 2)
        x = self.transformer.mm_projector(features.to(self.dtype)) + self.scale_rows[si]
        self.draw(si, self.forward(x.expand(self.rows[si], -1, -1), si))

    def draw(self, si, hidden):
        """The codes of a scale, kept as their entries (1, D, h, w)."""
        logits, sampling = self.transformer.lm_head(hidden).float(), self.sampling
        t = sampling["cfg"] * si / max(len(self.sides) - 1, 1)
        logits = torch.lerp(logits[1], logits[0], 1 + t) if self.rows[si] == 2 and t > 0 else logits[0]
        if sampling["temperature"] == 0:
            codes = logits.argmax(-1)
        else:
            likeliest, index = logits.topk(min(sampling["top_k"] or logits.shape[-1], logits.shape[-1]))
            p = (likeliest / sampling["temperature"]).softmax(-1)
            p = p.masked_fill(p.cumsum(-1) - p > sampling["top_p"], 0)
            # The same distribution as torch.multinomial, which checks its input and makes the host wait.
            codes = index.gather(-1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)).squeeze(-1)
        self.entries[si] = F.embedding(codes, self.table).t().reshape(1, -1, self.sides[si], self.sides[si])

    def decode(self):
        semantic, size = self.tokenizer.embedding_vqkd.shape[1], self.entries[-1].shape[2:]
        f = sum(F.interpolate(e[:, semantic:], size=size, mode="bicubic") for e in self.entries)
        f = f.to(self.tokenizer.post_quant_conv.weight.dtype)
        image = self.tokenizer.decoder(self.tokenizer.post_quant_conv(f))[0].float()
        self.image = (127.5 * image + 128).clamp(0, 255).byte().permute(1, 2, 0).contiguous()

    def run(self):
        for part in self.parts:
            part()
        return self.image.cpu()


def load_nano(folder, packed):
    """Transformer, tokenizer, config and text tokenizer of a folder with weights as bytes: (byte - 128) * KEY.scale."""
    from safetensors import safe_open
    from tokenizers import Tokenizer as Text

    def read(name, *prefixes):
        with safe_open(os.path.join(folder, name), "pt") as file:
            raw = {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}

        def value(key):
            scale = raw.get(key + ".scale")
            return raw[key] if scale is None else (raw[key].float() - 128) * scale.view(-1, *[1] * (raw[key].dim() - 1))

        return {key: value(key) for key in raw if not key.endswith(".scale")}

    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    weights = {key.removeprefix("model."): w for key, w in read("model.safetensors", "model.", "lm_head.").items()}
    for i in range(config["backbone"]["num_hidden_layers"]):
        for whole, parts in ("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ["gate", "up"]):
            module = f"layers.{i}.{whole.split('.')[0]}"
            for kind in "weight", "bias":
                found = [weights.pop(f"{module}.{part}_proj.{kind}", None) for part in parts]
                if found[0] is not None:
                    weights[f"layers.{i}.{whole}.{kind}"] = torch.cat(found)
    weights = {key.replace(".self_attn.", ".").replace(".mlp.", "."): w for key, w in weights.items()}
    weights["lm_head.weight"] = weights["lm_head.weight"][config["backbone"]["vocab_size"] + 2 :]
    pixels = read("image_tokenizer.safetensors", "quantize.", "post_quant_conv.", "decoder.")
    for half in "embedding_vqkd", "embedding_vqgan":
        pixels[half] = pixels.pop(f"quantize.{half}.weight")
    pixels.pop("quantize.codebook_used", None)
    with torch.device("meta"):
        models = Transformer(config["backbone"]), Tokenizer(config["tokenizer"])
    for model, state in zip(models, (weights, pixels)):
        model.load_state_dict(state, assign=True)
    models[1].to(memory_format=torch.channels_last)
    for module in list(models[0].modules()) if packed else []:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child))
    return *models, config, Text.from_file(os.path.join(folder, "tokenizer.json"))


def draw_nano(model, prompt, path, **sampling):
    """One image, from its words to a PNG."""
    from PIL import Image

    transformer, tokenizer, config, text = model
    ids, sampling = text.encode(prompt, add_special_tokens=False).ids, {**config["sampling"], **sampling}
    image = Drawing(transformer, tokenizer, config, ids, SIDES[: config["scales"]], sampling).run()
    Image.fromarray(image.numpy()).save(path, compress_level=1)


def difference(one, other):
    """The largest and the mean difference of two images' bytes."""
    from PIL import Image, ImageChops, ImageStat

    stat = ImageStat.Stat(ImageChops.difference(Image.open(one), Image.open(other)))
    return max(most for _, most in stat.extrema), statistics.mean(stat.mean)


def wall(*command, **environment):
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    return time.perf_counter() - started


def nano(args):
    torch.set_num_threads(args.threads)
    if args.one:
        return draw_nano(load_nano(args.model, args.packed), args.prompt, args.output)
    if not args.nextflow:
        sys.exit("--nextflow PROGRAM, or --one")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = os.path.join(folder, "ours.png"), os.path.join(folder, "theirs.png")
        gen = [args.nextflow, "gen", "--model", args.model, "-p", args.prompt, "--seed", "1", "--device", "cpu", "-q"]
        run = functools.partial(wall, RAYON_NUM_THREADS=str(args.threads))
        peer = [sys.executable, __file__, "nano", "--model", args.model, "--threads", str(args.threads),
                "-p", args.prompt, "--one", "-o", ours]
        models = {"PyTorch": load_nano(args.model, False), "with oneDNN": load_nano(args.model, True)}
        run(*gen, "--temperature", "0", "-o", theirs)
        for name, model in models.items():
            draw_nano(model, args.prompt, ours, temperature=0)
            most, mean = difference(ours, theirs)
            print(f"temperature 0, {name}: at most {most}/255 from nextflow's image, {mean:.5f} on average")
            if most > 2:
                sys.exit("they are not the same model")

        def steady(model):
            marks = []
            for _ in range(2 + args.images):
                marks.append(time.perf_counter())
                draw_nano(model, args.prompt, ours)
            return (time.perf_counter() - marks[2]) / args.images

        one, many = [*gen, "-o", theirs, "--force"], [*gen, "--out-dir", folder, "--count", str(args.images + 1)]
        wholes = lambda: [run(*one), wall(*peer), wall(*peer, "--packed")]
        wholes()
        more = lambda: [(run(*many) - run(*one)) / args.images, *map(steady, models.values())]
        rounds = [(wholes(), more()) for _ in range(args.rounds)]
    print(f"\nms, medians of {args.rounds} (lowest, highest); {args.threads} threads, f32, torch {torch.__version__}\n")
    print(f"{'':<28}" + "".join(f"{name:>32}" for name in ("nextflow", *models)))
    for name, times in zip(("a process that draws one", f"one more image (of {args.images})"), zip(*rounds)):
        columns = [[1e3 * t for t in column] for column in zip(*times)]
        medians = [statistics.median(column) for column in columns]
        cells = [f"{m:.1f} ({min(c):.1f}, {max(c):.1f}) {m / medians[0]:.2f}x" for m, c in zip(medians, columns)]
        print(f"{name:<28}" + "".join(f"{cell:>32}" for cell in cells))


def words(args):
    import llama

    if args.one:
        print(json.dumps(llama.run(args.llama, args.one, args.threads, args.prompt, args.words)))
        return
    if args.words < 1 or args.rounds < 1:
        sys.exit("at least one word and one round")
    environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}
    counts = ["--prompt", str(args.prompt), "--words", str(args.words)]
    ours = [args.nextflow, "bench", "--synthetic", "qwen2.5-0.5b", "--quant", args.quant, "--json", *counts]

    def run(command):
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "words.gguf")
        llama.write(path, args.quant)
        flags = ["--llama", args.llama, "--one", path, "--threads", str(args.threads), *counts]
        theirs = [sys.executable, os.path.abspath(__file__), "words", *flags]
        # A pair of times of each program, in every round.
        rounds = [([part["seconds"] for part in run(ours)["parts"]], run(theirs)) for _ in range(args.rounds)]
    print(f"ms, medians of {args.rounds} (lowest); {args.threads} threads, {args.quant}\n")
    print(f"{'':<16}{'nextflow':>20}{'llama.cpp':>20}{'':>8}")
    for i, name in enumerate((f"{args.prompt} of a prompt", f"{args.words} words")):
        columns = [[1e3 * times[program][i] for times in rounds] for program in range(2)]
        medians = [statistics.median(column) for column in columns]
        cells = [f"{m:.0f} ({min(c):.0f})" for m, c in zip(medians, columns)]
        print(f"{name:<16}{cells[0]:>20}{cells[1]:>20}{medians[1] / medians[0]:>7.2f}x")


def capture(parts):
    """A CUDA graph of every part, to be replayed in order."""
    graphs = [torch.cuda.CUDAGraph() for _ in parts]
    for graph, part in zip(graphs, parts):
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graph is not graphs[0] else None):
            part()
    return [graph.replay for graph in graphs]


def bench(program, device, size, images):
    """What nextflow tells of the same shape; None if it fails, and then it tells itself why."""
    command = [program, "bench", "--synthetic", "nextflow-7b", "--json", "--size", f"{size}x{size}", "--device", device]
    done = subprocess.run([*command, "--images", str(images)], stdout=subprocess.PIPE)
    return json.loads(done.stdout) if done.returncode == 0 else None


def large(args):
    device, config = torch.device(args.device), NEXTFLOW_7B
    cuda = device.type == "cuda"
    shape = {"num_hidden_layers": args.layers, "vocab_size": args.vocab, "codebook_size": args.codes}
    whole = all(config["backbone"][key] == value for key, value in shape.items())
    config["backbone"].update(shape)
    config["tokenizer"]["codebook"]["size"] = args.codes
    theirs = {}
    if args.nextflow and whole:
        # Before anything of PyTorch's takes memory.
        theirs = {size: bench(args.nextflow, args.device, size, args.runs + 1) for size in args.size}
        for size, found in theirs.items():
            print(json.dumps({"variant": "nextflow", "size": size, **(found or {})}), flush=True)
    elif args.nextflow:
        print("nextflow has the whole shape only, so it does not run", file=sys.stderr)
    with device:
        tokenizer = Tokenizer(config["tokenizer"])
        torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
        transformer = Transformer(config["backbone"])
        torch.set_default_dtype(torch.float32)
    for part in tokenizer.post_quant_conv, tokenizer.decoder:
        part.to(dtype=torch.bfloat16 if cuda else torch.float32, memory_format=torch.channels_last)
    for size in args.size:
        sides = SIDES[: LEVELS[size]]
        drawing = Drawing(transformer, tokenizer, config, list(range(16)), sides, config["sampling"])
        print("", *compare(args, drawing, size, theirs.get(size)), "", sep="\n", flush=True)
        del drawing


def compare(args, drawing, size, theirs):
    """The lines of a table of all variants."""
    transformer, cuda = drawing.transformer, drawing.cos.is_cuda
    sync = torch.cuda.synchronize if cuda else lambda: None

    def draw(parts):
        sync()
        started = time.perf_counter()
        for part in parts[:-1]:
            part()
        sync()
        drawn = time.perf_counter()
        parts[-1]()
        drawing.image.cpu()
        return time.perf_counter() - started, time.perf_counter() - drawn

    def measure(name, compiled, graphs):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        transformer.blocks = [torch.compile(b, dynamic=True) if compiled else b for b in transformer.layers]
        first, _ = draw(drawing.parts)
        parts = capture(drawing.parts) if graphs else drawing.parts
        draw(parts)
        image, decode = (statistics.median(column) for column in zip(*(draw(parts) for _ in range(args.runs))))
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {"variant": name, "size": size, "device": torch.cuda.get_device_name() if cuda else "cpu",
                "torch": torch.__version__, "image_seconds": image, "decode_seconds": decode,
                "first_image_seconds": first, "peak_bytes": peak}

    variants = {"eager": (0, 0), "graphs": (0, 1), "compile": (1, 0), "compile and graphs": (1, 1)}
    table = [f"{f'{size} px':<20}{'seconds':>10}{'decoding':>10}{'first':>10}{'peak GB':>10}{'ratio':>8}"]
    if theirs:
        table.append(f"{'nextflow':<20}{theirs['image_seconds']:>10.3f}{theirs['decode_seconds']:>10.3f}")
    for name, (compiled, graphs) in variants.items():
        if compiled > args.compile or graphs > (args.graphs and cuda):
            continue
        try:
            found = measure(name, compiled, graphs)
        except Exception as error:  # The other variants are still worth having.
            print(json.dumps({"variant": name, "error": str(error)[:500]}), flush=True)
            continue
        print(json.dumps(found), flush=True)
        peak = f"{found['peak_bytes'] / 1e9:.1f}" if cuda else ""
        ratio = f"{found['image_seconds'] / theirs['image_seconds']:.2f}x" if theirs else ""
        table.append(f"{name:<20}{found['image_seconds']:>10.3f}{found['decode_seconds']:>10.3f}"
                     f"{found['first_image_seconds']:>10.3f}{peak:>10}{ratio:>8}")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("nano", help="nano's weights on a CPU")
    sub.set_defaults(run=nano)
    sub.add_argument("--model", default="assets/nano", metavar="FOLDER")
    sub.add_argument("--nextflow", metavar="PROGRAM")
    sub.add_argument("-p", "--prompt", default="a red apple", metavar="TEXT")
    for name, default in ("images", 20), ("rounds", 5), ("threads", 2):
        sub.add_argument(f"--{name}", type=int, default=default, metavar="N")
    sub.add_argument("--one", action="store_true", help="draw one image and nothing else")
    sub.add_argument("-o", "--output", default="peer.png", metavar="FILE", help="where --one writes it")
    sub.add_argument("--packed", action="store_true", help="--one with oneDNN's products")
    sub = commands.add_parser("7b", help="the 7B shape with random weights")
    sub.set_defaults(run=large)
    sub.add_argument("--size", type=int, nargs="+", choices=[256, 512, 1024], default=[256])
    sub.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    sub.add_argument("--nextflow", metavar="PROGRAM")
    sub.add_argument("--graphs", action="store_true", help="also as CUDA graphs")
    sub.add_argument("--compile", action="store_true", help="also with compiled blocks")
    sub.add_argument("--runs", type=int, default=3, metavar="N")
    for name, key in ("layers", "num_hidden_layers"), ("vocab", "vocab_size"), ("codes", "codebook_size"):
        default = NEXTFLOW_7B["backbone"][key]
        sub.add_argument(f"--{name}", type=int, default=default, metavar="N", help="fewer, for a try without nextflow")
    sub = commands.add_parser("words", help="words from blocks, beside llama.cpp's")
    sub.set_defaults(run=words)
    sub.add_argument("--nextflow", metavar="PROGRAM", default="target/release/nextflow")
    sub.add_argument("--llama", metavar="FOLDER", required=True, help="the libraries of a build of llama.cpp")
    sub.add_argument("--quant", choices=["f32", "bf16", "f16", "q8_0", "q4_0", "q4_K"], default="q8_0")
    for name, default in ("prompt", 512), ("words", 32), ("rounds", 5), ("threads", 2):
        sub.add_argument(f"--{name}", type=int, default=default, metavar="N")
    sub.add_argument("--one", metavar="FILE", help="run llama.cpp once and nothing else")
    args = parser.parse_args()
    with torch.inference_mode():
        args.run(args)


if __name__ == "__main__":
    main()
