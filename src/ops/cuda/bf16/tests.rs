//! Against the CPU in f32, where there is a GPU: `cargo test --release --features cuda --lib
//! on_a_gpu -- --ignored`.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Result, Shape, Tensor};

use crate::backbone::presets::QWEN2_5_VL_7B;
use crate::backbone::{Backbone, BackboneConfig, Cache, Context, InputMode, Position, Rope, Step, rope as positions};
use crate::checkpoint::Weights;
use crate::generate::next_input::NextInput;
use crate::generate::onecat::{Guided, OneCatRows};
use crate::generate::sampler::{self, SampleParams};
use crate::generate::{Sampling, Sequences};
use crate::onecat::prompt::Piece;
use crate::onecat::{Drawing, OneCatConfig, Reading, ReadingParts, Trunk};
use crate::ops::{
    Mask, WeightMatrix, add_conv2d, add_linear, attention, attention_rows, conv2d, group_norm, linear, project_heads,
    quantize, rms_norm, rope, swiglu, testing, upsampled_conv2d,
};
use crate::tokenizer::{CodebookConfig, ImageTokenizer, Quantizer};
use crate::vision::Patches;

/// The same bf16 numbers: as f32 on the CPU, and on the GPU.
fn both(shape: impl Into<Shape>, seed: u64) -> Result<[Tensor; 2]> {
    let gpu = gpu()?;
    let half = random(shape, seed).to_dtype(DType::BF16)?;
    Ok([half.to_dtype(DType::F32)?, half.to_device(&gpu)?])
}

/// No variable: the kernels support none.
fn random(shape: impl Into<Shape>, seed: u64) -> Tensor {
    testing::random(shape, seed).as_detached_tensor()
}

fn gpu() -> Result<Device> {
    crate::device::cuda(0)
}

/// Fails unless the norm of the difference is below a hundredth of the norm.
#[track_caller]
fn close(what: &str, gpu: &Tensor, cpu: &Tensor) -> Result<()> {
    let gpu = gpu.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    assert_eq!(gpu.dims(), cpu.dims(), "{what}");
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
    let (error, scale) = (norm(&(gpu - cpu)?)?, norm(cpu)?);
    eprintln!("{what}: {:.1e}", error / scale);
    assert!(error < 1e-2 * scale, "{what}: off by {error} of {scale}");
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_norms_and_activations() -> Result<()> {
    for (rows, hidden) in [(1, 64), (5, 3584), (300, 896)] {
        let ([x, gx], [w, gw]) = (both((rows, hidden), 1)?, both(hidden, 2)?);
        close(&format!("rms_norm {rows}x{hidden}"), &rms_norm(&gx, &gw, 1e-6)?, &rms_norm(&x, &w, 1e-6)?)?;
        let [up, gup] = both((rows, hidden), 3)?;
        close(&format!("swiglu {rows}x{hidden}"), &swiglu(&gx, &gup)?, &swiglu(&x, &up)?)?;
        let [joint, gjoint] = both((2, rows, 2 * hidden), 4)?;
        let halves = |t: &Tensor| swiglu(&t.narrow(2, 0, hidden)?, &t.narrow(2, hidden, hidden)?);
        close(&format!("swiglu of halves {rows}x{hidden}"), &halves(&gjoint)?, &halves(&joint)?)?;
    }
    for (b, c, h, w, groups) in [(1, 64, 16, 24, 16), (2, 32, 8, 8, 32), (3, 96, 5, 7, 4), (1, 256, 128, 128, 32)] {
        let ([x, gx], [scale, gscale], [shift, gshift]) = (both((b, c, h, w), 4)?, both(c, 5)?, both(c, 6)?);
        assert_eq!(super::supports_group_norm(&gx, &gscale, &gshift, groups), (c / groups) % 8 == 0, "{c} channels");
        for silu in [false, true] {
            let got = group_norm(&gx, &gscale, &gshift, groups, 1e-6, silu)?;
            close(&format!("group_norm {c}x{h}x{w}"), &got, &group_norm(&x, &scale, &shift, groups, 1e-6, silu)?)?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_rotations() -> Result<()> {
    for (b, t, heads, d) in [(1, 1, 4, 32), (2, 70, 28, 128)] {
        let [x, gx] = both((b, t, heads, d), 1)?;
        let angles = random((b, t, d / 2), 2);
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let moved = |t: &Tensor| t.to_device(gx.device());
        close(&format!("rope {d}"), &rope(&gx, &moved(&cos)?, &moved(&sin)?)?, &rope(&x, &cos, &sin)?)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_attention() -> Result<()> {
    for (heads, kv, d) in [(8, 2, 32), (14, 2, 64), (28, 4, 128), (4, 4, 128)] {
        for (b, t, s) in [(1, 1, 1), (2, 1, 300), (1, 64, 64), (2, 100, 333), (1, 700, 700)] {
            let [q, gq] = both((b, t, heads, d), 1)?;
            let ([k, gk], [v, gv]) = (both((b, s + 9, kv, d), 2)?, both((b, s + 9, kv, d), 3)?);
            // A view of a cache that has more room.
            let view = |x: &Tensor| x.narrow(1, 0, s);
            for mask in [Mask::None, Mask::Causal] {
                let scale = (d as f32).powf(-0.5);
                let got = attention(&gq, &view(&gk)?, &view(&gv)?, mask, scale)?;
                let want = attention(&q, &view(&k)?, &view(&v)?, mask, scale)?;
                close(&format!("attention {d}, {t} over {s}, {mask:?}"), &got, &want)?;
            }
        }
    }
    Ok(())
}

/// Rows with caches of different lengths, and more rows than one launch supports.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_projected_heads_and_their_attention() -> Result<()> {
    for (rows, heads, kv, d, tokens) in [(2, 28, 4, 128, 70), (19, 8, 2, 32, 9), (3, 14, 2, 64, 1)] {
        let all = (heads + 2 * kv) * d;
        let ([x, gx], [bias, gbias]) = (both((rows, tokens, all), 1)?, both(all, 2)?);
        let angles = random((rows, tokens, d / 2), 3);
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let moved = |t: &Tensor| t.to_device(gx.device());
        let caches = |seed: u64| -> Result<Vec<[Tensor; 2]>> {
            (0..rows as u64).map(|r| both((1, 300, kv, d), 100 * seed + r)).collect()
        };
        let (keys, values) = (caches(1)?, caches(2)?);
        let length = |r: usize| 17 + 13 * r;
        let ends: Vec<_> = (0..rows).map(|r| (&keys[r][1], &values[r][1], length(r))).collect();
        let q = project_heads(&gx, Some(&gbias), (&moved(&cos)?, &moved(&sin)?), &ends)?.expect("a kernel");

        let y = x.broadcast_add(&bias)?.reshape((rows, tokens, heads + 2 * kv, d))?;
        let want = rope(&y.narrow(2, 0, heads)?.contiguous()?, &cos, &sin)?;
        close(&format!("queries of {rows} rows"), &q, &want)?;
        let (k, v) = (rope(&y.narrow(2, heads, kv)?.contiguous()?, &cos, &sin)?, y.narrow(2, heads + kv, kv)?);
        let mut seen = (Vec::new(), Vec::new());
        for r in 0..rows {
            for (cache, new) in [(&keys[r], &k), (&values[r], &v)] {
                cache[0].slice_set(&new.narrow(0, r, 1)?.contiguous()?, 1, length(r))?;
                close(&format!("cache of row {r}"), &cache[1], &cache[0])?;
            }
            let first = |cache: &Tensor| cache.narrow(1, 0, length(r) + tokens);
            seen.0.push((first(&keys[r][0])?, first(&values[r][0])?));
            seen.1.push((first(&keys[r][1])?, first(&values[r][1])?));
        }
        for mask in [Mask::None, Mask::Causal] {
            let (got, want) = (attention_rows(&q, &seen.1, mask, 0.1)?, attention_rows(&want, &seen.0, mask, 0.1)?);
            close(&format!("attention of {rows} rows, {mask:?}"), &got, &want)?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_blocks() -> Result<()> {
    let (gpu, w) = (gpu()?, random((320, 512), 1));
    let values = w.flatten_all()?.to_vec1::<f32>()?;
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K] {
        let [cpu, gpu] =
            [&Device::Cpu, &gpu].map(|device| quantize(&values, (320, 512), dtype, device).map(WeightMatrix::from));
        let (cpu, gpu) = (cpu?, gpu?);
        for inputs in [1, 5, 70] {
            let [x, gx] = both((2, inputs, 512), 2)?;
            let [bias, gbias] = both(320, 3)?;
            let what = format!("{inputs} inputs of {dtype:?}");
            close(&what, &gpu.linear(&gx, Some(&gbias))?, &cpu.linear(&x, Some(&bias))?)?;
            let (part, gpart) = (cpu.narrow(40, 200)?, gpu.narrow(40, 200)?);
            close(&format!("{what}, some rows"), &gpart.linear(&gx, None)?, &part.linear(&x, None)?)?;
        }
        let ids = Tensor::new(&[0u32, 319, 7], &Device::Cpu)?;
        close(&format!("rows of {dtype:?}"), &gpu.select(&ids)?, &cpu.select(&ids)?)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_products_are_added() -> Result<()> {
    for (rows, out, inner) in [(1, 3584, 3584), (130, 896, 4864)] {
        let ([x, gx], [w, gw], [y, gy]) =
            (both((2, rows, inner), 1)?, both((out, inner), 2)?, both((2, rows, out), 3)?);
        let want = (y + linear(&x, &w, None)?)?;
        close("x + y wᵀ", &add_linear(gy, &gx, &WeightMatrix::Dense(gw), None)?, &want)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_convolutions() -> Result<()> {
    for (b, c, o, h, w, k) in [
        (1, 64, 32, 100, 72, 3),
        (2, 8, 256, 9, 13, 1),
        (1, 256, 3, 33, 20, 3),
        (1, 72, 520, 5, 6, 3),
        (2, 128, 300, 19, 21, 3),
        (1, 64, 256, 8, 16, 1),
        (1, 64, 72, 5, 6, 3),
    ] {
        let ([x, gx], [kernels, gkernels], [bias, gbias]) =
            (both((b, c, h, w), 1)?, both((o, c, k, k), 2)?, both(o, 3)?);
        let pad = [k / 2; 4];
        assert!(super::supports_conv2d(&gx, &gkernels, &gbias, 1, pad), "the kernel supports {c} channels");
        let what = format!("{c} to {o} channels of {h}x{w}");
        let (got, want) = (conv2d(&gx, &gkernels, Some(&gbias), 1, pad)?, conv2d(&x, &kernels, Some(&bias), 1, pad)?);
        close(&format!("conv2d, {what}"), &got, &want)?;
        let [base, gbase] = both((b, o, h, w), 4)?;
        let (got, want) = (add_conv2d(&gbase, &gx, &gkernels, &gbias)?, add_conv2d(&base, &x, &kernels, &bias)?);
        close(&format!("conv2d added, {what}"), &got, &want)?;
        let (got, want) = (upsampled_conv2d(&gx, &gkernels, &gbias)?, upsampled_conv2d(&x, &kernels, &bias)?);
        close(&format!("conv2d of twice the size, {what}"), &got, &want)?;
    }
    Ok(())
}

/// A whole pixel decoder like the public tokenizer's: convolutions, norms, attention and
/// upsampling.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_pixels() -> Result<()> {
    let config = crate::tokenizer::Preset::clipb_32k_enhanced().config;
    let load = |device: &Device| ImageTokenizer::load(&Weights::synthetic(DType::F32, device), &config);
    let f = random((1, 4, 6, config.codebook.dim()), 1);
    let want = load(&Device::Cpu)?.decode_features(&f)?;
    let gpu = gpu()?;
    close("pixels", &load(&gpu)?.decode_features(&f.to_device(&gpu)?)?, &want)
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_codes_are_those_of_the_cpu() -> Result<()> {
    let (tokens, columns) = (300, 32768);
    let [logits, glogits] = both((2, tokens, columns), 1)?;
    for (temperature, top_k, top_p) in
        [(0.0, None, 1.0), (1.0, Some(600), 0.95), (0.7, Some(50), 1.0), (1.3, Some(1), 0.9)]
    {
        let sampling = Sampling { temperature, top_k, top_p, ..Sampling::default() };
        for guidance in [0.0, 2.5] {
            let params = SampleParams { sampling: &sampling, guidance, seeds: &[7], scale: 3, pass: 0 };
            let codes =
                |logits: &Tensor| sampler::sample(logits, &params, 11).expect("finite logits").get(0)?.to_vec1::<u32>();
            let (got, want) = (codes(&glogits)?, codes(&logits)?);
            let same = got.iter().zip(&want).filter(|(a, b)| a == b).count();
            eprintln!("temperature {temperature}, top-k {top_k:?}, guidance {guidance}: {same} of {tokens} codes");
            // Where rounding decides between two codes, either is right.
            assert!(same * 100 >= tokens * 99, "{same} of {tokens}");
        }
    }
    let broken = Tensor::full(f32::NAN, (1, 3, 64), glogits.device())?.to_dtype(DType::BF16)?;
    let sampling = Sampling { top_k: Some(5), ..Sampling::default() };
    let params = SampleParams { sampling: &sampling, guidance: 0.0, seeds: &[1], scale: 0, pass: 0 };
    let marked = sampler::sample(&broken, &params, 4).expect("codes").to_vec2::<u32>()?;
    assert_eq!(marked, [[sampler::NON_FINITE; 3]]);
    Ok(())
}

/// The input of the next scale for two images; the code that marks non-finite logits is looked up
/// as zeros.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_next_inputs() -> Result<()> {
    let config = CodebookConfig { size: 512, semantic_dim: 32, pixel_dim: 8, w_sem: 1.0, w_pix: 1.0, l2_norm: true };
    let table = random((512, 40), 1).flatten_all()?.to_vec1::<f32>()?;
    let gpu = gpu()?;
    let [q, gq] = [&Device::Cpu, &gpu].map(|device| Quantizer::from_table(&config, table.clone(), device));
    let codes: Vec<u32> = (0..2 * 20 * 13).map(|i| i * 37 % 512).collect();
    let codes = Tensor::from_vec(codes, (2, 20 * 13), &Device::Cpu)?;
    for mode in [InputMode::Residual, InputMode::Cumulative] {
        let input = |q| NextInput::of_table(q, mode, &[(20, 13), (24, 16)]);
        let want = input(q.as_ref().expect("a table")).next(&codes, 1)?;
        let got = input(gq.as_ref().expect("a table")).next(&codes.to_device(&gpu)?, 1)?;
        close(&format!("next input, {mode:?}"), &got, &want)?;
    }
    let marked = Tensor::new(&[[sampler::NON_FINITE]], &gpu)?;
    assert_eq!(gq?.lookup(&marked)?.abs()?.sum_all()?.to_scalar::<f32>()?, 0.0);
    Ok(())
}

/// Hidden states after one layer of the 7B shape and after four: a prompt, and a scale after it.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_layers_of_the_7b_shape() -> Result<()> {
    let gpu = gpu()?;
    for layers in [1, 4] {
        let config = BackboneConfig { vocab_size: 64, num_hidden_layers: layers, ..QWEN2_5_VL_7B };
        let (prompt, grid) = (20, (16, 16));
        let text: Vec<Position> = (0..prompt).map(positions::text_position).collect();
        let scale: Vec<Position> = positions::grid_positions(prompt, grid, 64.0).collect();
        let hidden = |device: &Device, dtype: DType| -> Result<Vec<Tensor>> {
            let backbone = Backbone::load(&Weights::synthetic(dtype, device), &config)?;
            let cache = || Cache::new(&config, prompt + scale.len(), dtype, device);
            let mut caches = [cache()?, cache()?];
            let mut pass = |count: usize, positions: &[Position], step| {
                let x = random((2, count, config.hidden_size), count as u64).to_dtype(DType::BF16)?;
                let x = x.to_device(device)?.to_dtype(dtype)?;
                let rope = Rope::new(&config, &[positions; 2], device)?;
                backbone.forward(&x, &rope, Context::Cached { caches: &mut caches, step })
            };
            Ok(vec![pass(prompt, &text, Step::Text)?, pass(scale.len(), &scale, Step::Scale)?])
        };
        let (got, want) = (hidden(&gpu, DType::BF16)?, hidden(&Device::Cpu, DType::F32)?);
        for (name, (got, want)) in ["prompt", "scale"].into_iter().zip(got.iter().zip(&want)) {
            close(&format!("{layers} layers, {name}"), got, want)?;
        }
    }
    Ok(())
}

/// Features of a picture, a prompt around it, and a scale after them: the three experts of
/// OneCAT-3B's shape.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_experts_of_onecat() -> Result<()> {
    let gpu = gpu()?;
    let mut config = OneCatConfig::onecat_3b();
    (config.transformer.num_hidden_layers, config.transformer.vocab_size) = (1, 64);
    let grid = (8, 12);
    let pixels = 3 * (2 * config.patch_size).pow(2);
    let values: Vec<f32> = (0..grid.0 * grid.1 * pixels).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
    let run = |device: &Device, dtype: DType| -> Result<Vec<(&str, Tensor)>> {
        let weights = Weights::synthetic(dtype, device);
        let trunk = Trunk::load(&weights, &config)?;
        let reading = Reading::load(&weights, &config, ReadingParts { pictures: true, head: true })?;
        let drawing = Drawing::load(&weights, &config)?;
        let features = reading.features(&[Patches { values: values.clone(), tokens: grid }])?;
        let words = |from: u32| Piece::Tokens((from..from + 9).collect());
        let edit = reading.prefix(&trunk, &[words(0), Piece::Picture, words(20)], Some(&features))?;
        let text = reading.prefix(&trunk, &[words(0)], None)?;
        let scales = [(1, 1), (6, 6)];
        let (mut rows, first) = OneCatRows::start(&trunk, &drawing, &[&edit, &text], 1, Guided::Edit(1.0), &scales)?;
        let codes = random((1, 36, config.bits), 5).to_device(device)?;
        let second = rows.forward(1, &codes, Step::Scale)?;
        let logits = rows.logits(&second)?;
        Ok(vec![("features", features), ("the first code", first), ("a scale", second), ("its logits", logits)])
    };
    let (got, want) = (run(&gpu, DType::BF16)?, run(&Device::Cpu, DType::F32)?);
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        close(name, got, want)?;
    }
    Ok(())
}
