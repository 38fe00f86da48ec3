//! Inside the pixel branch: the reference's probes of some layers' outputs.

use candle_core::Tensor;

use super::super::tests::{Tiny, clipb, siglip};
use super::{CnnConfig, DOWNSAMPLING_PADDING};

/// The first channels of a probe, of which every `step`th row and column is stored.
fn probe(x: &Tensor, like: &Tensor, step: usize) -> Tensor {
    let at = |n: usize| Tensor::arange_step(0u32, n as u32, step as u32, x.device()).unwrap();
    let (_, c, h, w) = x.dims4().unwrap();
    let x = x.narrow(1, 0, like.dim(1).unwrap().min(c)).unwrap().contiguous().unwrap();
    x.index_select(&at(h), 2).unwrap().index_select(&at(w), 3).unwrap()
}

fn holds(tiny: &Tiny, name: &str, x: &Tensor, step: usize) {
    let name = format!("dbg_{name}");
    tiny.holds(&name, &probe(x, tiny.golden(&name), step), 2e-4);
}

fn probes_hold(tiny: &Tiny) {
    let encoder = &tiny.tokenizer.encoder;
    let mut x = encoder.conv_in.forward(tiny.golden("pix_in")).unwrap();
    holds(tiny, "enc_conv_in", &x, 4);
    holds(tiny, "enc_level0_res0", &encoder.levels[0].res[0].forward(&x).unwrap(), 4);
    for (i, level) in encoder.levels.iter().enumerate() {
        x = level.forward(&x).unwrap();
        if let Some(down) = &level.resize {
            x = down.forward_strided(&x, 2, DOWNSAMPLING_PADDING).unwrap();
        }
        if i == 0 {
            holds(tiny, "enc_level0_down", &x, 4);
        }
    }
    holds(tiny, "enc_level4_attn0", &x, 1);
    holds(tiny, "enc_mid2", &encoder.mid.forward(&x).unwrap(), 1);
    let decoder = &tiny.tokenizer.images.decoder;
    let x = decoder.conv_in.forward(tiny.golden("post_quant")).unwrap();
    holds(tiny, "dec_conv_in", &x, 1);
    let x = decoder.mid.forward(&x).unwrap();
    holds(tiny, "dec_mid2", &x, 1);
    let x = decoder.levels[0].forward(&x).unwrap();
    holds(tiny, "dec_block0_up", &decoder.levels[0].resize.as_ref().unwrap().forward_upsampled(&x).unwrap(), 1);
}

#[test]
fn layers_equal_the_reference() {
    probes_hold(&clipb());
    probes_hold(&siglip(None));
}

#[test]
fn groups_that_divide_no_channels_are_refused() {
    let config = CnnConfig { ch: 32, ch_mult: vec![1, 2], num_res_blocks: 1, z_channels: 8, groups: 16, patch: 1 };
    assert!(config.check().is_ok());
    for groups in [0, 7] {
        assert!(CnnConfig { groups, ..config.clone() }.check().is_err());
    }
    assert!(CnnConfig { ch_mult: vec![1, 0], ..config }.check().is_err());
}
