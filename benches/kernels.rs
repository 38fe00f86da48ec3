//! The kernels one by one, at nano's sizes and at those of a large model: products in operations a
//! second, the others in numbers a second.
//!
//! `cargo bench --bench kernels` or, for some of them, `cargo bench --bench kernels -- product`

use candle_core::quantized::{GgmlDType, QMatMul};
use candle_core::{Device, Module, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nextflow::generate::Sampling;
use nextflow::generate::sampler::{self, SampleParams};
use nextflow::ops::{self, Int8Matrix, Mask, WeightMatrix};
use nextflow::rng::{Rng, Stream};
use nextflow::tokenizer::{CodebookConfig, Quantizer};

fn values(count: usize) -> Vec<f32> {
    let rng = Rng::new(1, 0, Stream::Train, 0);
    (0..count as u64).map(|i| rng.normal(i) as f32).collect()
}

fn random(shape: &[usize]) -> Tensor {
    Tensor::from_vec(values(shape.iter().product()), shape, &Device::Cpu).expect("random values")
}

/// Gate and up of nano, of Qwen2.5-0.5B and of its 3B: for a word, for the smallest grids of two
/// rows, and for many tokens; and the same products by candle's `QMatMul`.
fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("product");
    for (rows, columns) in [(768, 256), (4864, 896), (11008, 2048)] {
        let weights = values(rows * columns);
        let blocks = |dtype| ops::quantize(&weights, (rows, columns), dtype, &Device::Cpu).expect("blocks");
        let block = |dtype| blocks(dtype).into();
        let types = [("q8_0", GgmlDType::Q8_0), ("q4_0", GgmlDType::Q4_0), ("q4_K", GgmlDType::Q4K)];
        let types = types.into_iter().filter(|(_, dtype)| columns % dtype.block_size() == 0);
        let mut kinds: Vec<(&str, WeightMatrix)> =
            vec![("f32", WeightMatrix::Dense(random(&[rows, columns]))), ("bf16", block(GgmlDType::BF16))];
        kinds.extend(types.clone().map(|(name, dtype)| (name, block(dtype))));
        let candle =
            |(name, dtype)| (format!("{name} by QMatMul"), QMatMul::from_qtensor(blocks(dtype)).expect("blocks"));
        let candle: Vec<(String, QMatMul)> = types.map(candle).collect();
        if Int8Matrix::supports(columns) {
            let bytes = (0..rows * columns).map(|i| (i % 251) as u8).collect();
            let bytes = Int8Matrix::new(bytes, &vec![0.01; rows], (rows, columns)).expect("bytes");
            kinds.push(("bytes", WeightMatrix::Int8(bytes)));
        }
        for inputs in [1, 2, 4, 8, 32, 64, 512] {
            let x = random(&[inputs, columns]);
            group.throughput(Throughput::Elements((2 * inputs * rows * columns) as u64));
            for (kind, w) in &kinds {
                let id = BenchmarkId::new(*kind, format!("{inputs}x{columns}x{rows}"));
                group.bench_function(id, |b| b.iter(|| w.linear(&x, None).expect("a product")));
            }
            for (kind, w) in &candle {
                let id = BenchmarkId::new(kind, format!("{inputs}x{columns}x{rows}"));
                group.bench_function(id, |b| b.iter(|| w.forward(&x).expect("a product")));
            }
        }
    }
}

/// A scale against the cache, and a prompt: (queries, keys, heads, their size, groups, causal).
fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    for (t, s, heads, d, kv, causal) in
        [(64, 230, 8, 32, 8, false), (1024, 2240, 28, 128, 4, false), (512, 512, 14, 64, 2, true)]
    {
        let (q, k) = (random(&[1, t, heads, d]), random(&[1, s, kv, d]));
        group.throughput(Throughput::Elements((4 * t * s * heads * d / if causal { 2 } else { 1 }) as u64));
        let mask = if causal { Mask::Causal } else { Mask::None };
        let name = format!("{t} on {s}, {heads} heads of {d}{}", if causal { ", causal" } else { "" });
        group.bench_function(name, |b| b.iter(|| ops::attention(&q, &k, &k, mask, 0.1).expect("attention")));
    }
}

/// What stands between the products, for the last grid of two rows of nano.
fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    let (x, wide, norm) = (random(&[2, 64, 256]), random(&[2, 64, 768]), random(&[256]));
    let (heads, angles) = (random(&[2, 64, 8, 32]), random(&[2, 64, 16]));
    group.throughput(Throughput::Elements(x.elem_count() as u64));
    group.bench_function("rms_norm", |b| b.iter(|| ops::rms_norm(&x, &norm, 1e-6).expect("a norm")));
    group.bench_function("add", |b| b.iter(|| ops::add(&x, &x).expect("a sum")));
    group.bench_function("rope", |b| b.iter(|| ops::rope(&heads, &angles, &angles).expect("a rotation")));
    group.throughput(Throughput::Elements(wide.elem_count() as u64));
    group.bench_function("swiglu", |b| b.iter(|| ops::swiglu(&wide, &wide).expect("a gate")));
}

/// Of the image decoder: (channels in and out, side of the map).
fn pixels(c: &mut Criterion) {
    let mut group = c.benchmark_group("pixels");
    for (from, to, side) in [(256, 256, 8), (128, 128, 16), (64, 64, 32), (32, 32, 128)] {
        let (x, w) = (random(&[1, from, side, side]), random(&[to, from, 3, 3]));
        group.throughput(Throughput::Elements((2 * 9 * from * to * side * side) as u64));
        let id = BenchmarkId::new("conv2d", format!("{from}-{to} on {side}x{side}"));
        group.bench_function(id, |b| b.iter(|| ops::conv2d(&x, &w, None, 1, [1; 4]).expect("a convolution")));
    }
    let (x, w) = (random(&[1, 64, 32, 32]), random(&[64]));
    group.throughput(Throughput::Elements(x.elem_count() as u64));
    group.bench_function("group_norm", |b| b.iter(|| ops::group_norm(&x, &w, &w, 16, 1e-6, true).expect("a norm")));
}

/// Drawing the codes of the last grid, and finding those of an image.
fn codes(c: &mut Criterion) {
    let mut group = c.benchmark_group("codes");
    let logits = random(&[2, 64, 2048]);
    for (name, top_k, top_p) in [("all", None, 1.0), ("of 600", Some(600), 0.95), ("of 50", Some(50), 0.9)] {
        let sampling = Sampling { temperature: 0.5, top_k, top_p, ..Sampling::default() };
        let params = SampleParams { sampling: &sampling, guidance: 1.5, seeds: &[1], scale: 7, pass: 0 };
        group.throughput(Throughput::Elements(64));
        group.bench_function(format!("sample, {name}"), |b| {
            b.iter(|| sampler::sample(&logits, &params, 0).expect("codes"))
        });
    }
    let config = CodebookConfig { size: 2048, semantic_dim: 8, pixel_dim: 16, w_sem: 0.25, w_pix: 1.0, l2_norm: false };
    let book = Quantizer::from_table(&config, values(2048 * 24), &Device::Cpu).expect("a codebook");
    let scales: Vec<(usize, usize)> = (1..=8).map(|side| (side, side)).collect();
    let features = values(64 * 24);
    group.throughput(Throughput::Elements(204));
    group.bench_function("quantise", |b| b.iter(|| book.encode(&features, &scales, None, |_, _, _| {})));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = products, attention, elementwise, pixels, codes
}
criterion_main!(benches);
