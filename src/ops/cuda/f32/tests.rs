//! Values and gradients against the CPU's kernels, where there is a GPU: as `bf16/tests.rs`.

use candle_core::{Device, Result, Tensor, Var};

use crate::ops::testing::random;
use crate::ops::{
    Mask, add_conv2d, attention, conv2d, gelu_erf, gelu_tanh, group_norm, layer_norm, linear, quick_gelu, rms_norm,
    rope, select, swiglu, upsampled_conv2d,
};
#[cfg(feature = "train")]
use crate::train::loss::cross_entropy;

/// Compares a function of trainable tensors, and every gradient, on a GPU and on the CPU.
#[track_caller]
fn same(what: &str, inputs: &[&Var], function: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    let gpu = crate::device::cuda(0)?;
    let run = |device: &Device| -> Result<Vec<Tensor>> {
        let vars = inputs.iter().map(|v| Var::from_tensor(&v.to_device(device)?)).collect::<Result<Vec<_>>>()?;
        let y = function(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>())?;
        let weights = random(y.shape().clone(), 99).to_device(device)?;
        let grads = (&y * weights)?.sum_all()?.backward()?;
        let grads =
            vars.iter().map(|v| grads.get(v).cloned().ok_or_else(|| candle_core::Error::Msg("no gradient".into())));
        let all = std::iter::once(Ok(y.detach())).chain(grads);
        all.map(|t| t?.to_device(&Device::Cpu)).collect()
    };
    let norm = |t: &Tensor| t.flatten_all()?.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
    for (i, (got, want)) in run(&gpu)?.iter().zip(&run(&Device::Cpu)?).enumerate() {
        assert_eq!(got.dims(), want.dims(), "{what}: {i}");
        let (error, scale) = (norm(&(got - want)?)?, norm(want)?);
        eprintln!("{what}: {i}: {:.1e}", error / scale);
        assert!(error <= 1e-4 * scale, "{what}: {i} is off by {error} of {scale}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_rows_train() -> Result<()> {
    for (rows, width) in [(1, 32), (77, 256), (5, 100)] {
        let (x, y, w, b) =
            (random((3, rows, width), 1), random((3, rows, width), 2), random(width, 3), random(width, 4));
        let name = |op: &str| format!("{op} of {rows} x {width}");
        same(&name("rms_norm"), &[&x, &w], |v| rms_norm(&v[0], &v[1], 1e-6))?;
        same(&name("layer_norm"), &[&x, &w, &b], |v| layer_norm(&v[0], &v[1], &v[2], 1e-6))?;
        same(&name("swiglu"), &[&x, &y], |v| swiglu(&v[0], &v[1]))?;
        same(&name("gelu_tanh"), &[&x], |v| gelu_tanh(&v[0]))?;
        same(&name("gelu_erf"), &[&x], |v| gelu_erf(&v[0]))?;
        same(&name("quick_gelu"), &[&x], |v| quick_gelu(&v[0]))?;
        let (w, bias) = (random((2 * width, width), 5), random(2 * width, 6));
        same(&name("linear"), &[&x, &w, &bias], |v| linear(&v[0], &v[1], Some(&v[2])))?;
        same(&name("linear without bias"), &[&x, &w], |v| linear(&v[0], &v[1].narrow(0, 3, width)?, None))?;
        #[cfg(feature = "train")]
        let targets: Vec<u32> = (0..3 * rows).map(|i| (i * 37 % width) as u32).collect();
        #[cfg(feature = "train")]
        same(&name("cross_entropy"), &[&x], |v| cross_entropy(&v[0].flatten_to(1)?, &targets))?;
        same(&name("select"), &[&x], |v| {
            let ids: Vec<u32> = (0..400).map(|i| (i * i % (3 * rows)) as u32).collect();
            select(&v[0].flatten_to(1)?, &Tensor::new(ids, v[0].device())?)
        })?;
    }
    for shape in [vec![7, 16], vec![3, 7, 16]] {
        let (x, angles) = (random((3, 7, 5, 32), 1), random(shape, 2).as_detached_tensor());
        same("rope", &[&x], |v| {
            let angles = angles.to_device(v[0].device())?;
            rope(&v[0], &angles.cos()?, &angles.sin()?)
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_attention_trains() -> Result<()> {
    for (b, t, s, heads, kv, d) in
        [(3, 45, 45, 8, 2, 32), (2, 64, 64, 1, 1, 128), (1, 5, 70, 4, 4, 8), (2, 1, 1, 2, 1, 4)]
    {
        let (q, k, v) = (random((b, t, heads, d), 1), random((b, s, kv, d), 2), random((b, s, kv, d), 3));
        let scale = (d as f32).powf(-0.5);
        // A row of each mask that sees nothing.
        let kept = |n: usize| (0..n).map(move |i| u8::from((i * 7 % 11 > 3 || i % s == 0) && (i / s) % t != 3));
        for (name, mask) in [("all", None), ("one mask", Some(vec![t, s])), ("a mask each", Some(vec![b, t, s]))] {
            same(&format!("attention of {t} over {s}, {name}"), &[&q, &k, &v], |x| {
                let mask = mask
                    .as_ref()
                    .map(|dims| Tensor::from_iter(kept(dims.iter().product()), x[0].device())?.reshape(dims.clone()));
                let mask = mask.transpose()?;
                attention(&x[0], &x[1], &x[2], mask.as_ref().map_or(Mask::None, Mask::Kept), scale)
            })?;
        }
        same(&format!("attention of {t} over {s}, causal"), &[&q, &k, &v], |x| {
            attention(&x[0], &x[1], &x[2], Mask::Causal, scale)
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_images_train() -> Result<()> {
    let (x, base) = (random((3, 12, 10, 14), 1), random((3, 20, 10, 14), 2));
    for (k, stride, padding) in
        [(3, 1, [1; 4]), (3, 2, [0, 1, 0, 1]), (1, 1, [0; 4]), (1, 2, [0; 4]), (5, 3, [2, 0, 1, 1])]
    {
        let (w, b) = (random((20, 12, k, k), 3), random(20, 4));
        same(&format!("conv2d {k}, {stride}"), &[&x, &w, &b], |v| conv2d(&v[0], &v[1], Some(&v[2]), stride, padding))?;
        if k == 3 && stride == 1 {
            same("add_conv2d", &[&base, &x, &w, &b], |v| add_conv2d(&v[0], &v[1], &v[2], &v[3]))?;
            same("upsampled_conv2d", &[&x, &w, &b], |v| upsampled_conv2d(&v[0], &v[1], &v[2]))?;
        }
    }
    let (w, b) = (random(12, 5), random(12, 6));
    for (groups, silu) in [(1, false), (3, true), (12, true), (4, false)] {
        let norm = |v: &[Tensor]| group_norm(&v[0], &v[1], &v[2], groups, 1e-6, silu);
        same(&format!("group_norm of {groups}"), &[&x, &w, &b], norm)?;
    }
    Ok(())
}
