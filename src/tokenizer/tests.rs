//! Every stage of the two public tokenizers at tiny widths, against the reference's own numbers.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::pixels;

/// A tiny tokenizer with the reference's weights, and what the reference made of two images.
pub(super) struct Tiny {
    pub(super) tokenizer: ImageTokenizer,
    golden: HashMap<String, Tensor>,
    scales: Vec<(usize, usize)>,
}

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenflow").join(name)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(data(name), &Device::Cpu).unwrap()
}

fn weights(name: &str) -> Weights {
    Weights::from_safetensors(&[data(name)], DType::F32, &Device::Cpu).unwrap()
}

fn tiny(preset: Preset, name: &str, sides: &[usize], change: impl FnOnce(&mut TokenizerConfig)) -> Tiny {
    let mut config = preset.config;
    for cnn in [&mut config.encoder, &mut config.decoder] {
        *cnn = CnnConfig { ch: 32, ch_mult: vec![1, 1, 1, 1, 2], num_res_blocks: 1, z_channels: 16, ..cnn.clone() };
    }
    config.codebook.size = 64;
    let vit = VitConfig { hidden_size: 48, num_attention_heads: 3, native_grid: 4, ..config.semantic };
    config.semantic = vit;
    let heads = Some(3);
    config.semantic_decoder =
        SemanticDecoderConfig { depth: 2, num_attention_heads: heads, intermediate_size: Some(192), out_dim: None };
    change(&mut config);
    let tokenizer = ImageTokenizer::load(&weights(&format!("{name}.weights.safetensors")), &config).unwrap();
    let scales = sides.iter().map(|&side| (side, side)).collect();
    Tiny { tokenizer, golden: tensors(&format!("{name}.io.safetensors")), scales }
}

/// CLIP's encoder, run on 5x5 patches with a 4x4 table.
pub(super) fn clipb() -> Tiny {
    tiny(Preset::clipb_32k_enhanced(), "tok_clipb_tiny", &[1, 2, 3, 5], |config| {
        config.semantic.num_hidden_layers = 2;
        config.semantic.intermediate_size = 192;
        config.semantic_decoder.out_dim = Some(32);
        config.decoder.num_res_blocks = 2;
    })
}

/// SigLIP's encoder on 60 px, whose last 4 it drops; `side` is that of the images that come out.
pub(super) fn siglip(side: Option<usize>) -> Tiny {
    tiny(Preset::siglip_32k(), "tok_siglip_tiny", &[1, 2, 3, 4], |config| {
        config.semantic.num_hidden_layers = 3;
        config.semantic.intermediate_size = 80;
        config.image_size = side;
    })
}

impl Tiny {
    pub(super) fn golden(&self, name: &str) -> &Tensor {
        &self.golden[name]
    }

    /// Fails unless `got` is the golden tensor to `tolerance`; (B, h, w, C) is compared as
    /// (B, C, h, w).
    pub(super) fn holds(&self, name: &str, got: &Tensor, tolerance: f32) {
        let want = self.golden(name);
        let got = match got.rank() == 4 && got.dims() != want.dims() {
            true => got.permute((0, 3, 1, 2)).unwrap(),
            false => got.clone(),
        };
        close(name, &got, want, tolerance);
    }

    fn grid(&self) -> (usize, usize) {
        *self.scales.last().unwrap()
    }

    /// The reference's codes of an image, by scale.
    fn codes(&self, image: usize) -> Vec<Vec<Code>> {
        let codes = |si: usize| {
            let codes = self.golden(&format!("s{si}_indices")).get(image).unwrap();
            codes.to_vec1::<i64>().unwrap().into_iter().map(|c| c as Code).collect()
        };
        (0..self.scales.len()).map(codes).collect()
    }
}

fn close(name: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{name}: shape");
    let difference = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    let difference = difference.to_scalar::<f32>().unwrap();
    assert!(difference <= tolerance, "{name}: off by {difference}");
}

const FEATURES: f32 = 2e-4;
const PIXELS: f32 = 1e-3;

/// Without a size of its own SigLIP's tokenizer takes images of any grid, at the pixel decoder's
/// resolution.
#[test]
fn any_grid_comes_back_in_its_own_size() {
    let tiny = siglip(None);
    let (scales, size) = ([(1, 1), (2, 3)], (2 * 16, 3 * 16));
    let image = Tensor::zeros((1, 3, size.0, size.1), DType::F32, &Device::Cpu).unwrap();
    let codes = tiny.tokenizer.encode(&image, &scales).unwrap().remove(0).codes;
    assert_eq!(tiny.tokenizer.decode(&codes, &scales).unwrap().dims(), [3, size.0, size.1]);
    let broken = (image / 0.0).unwrap();
    assert_eq!(tiny.tokenizer.encode(&broken, &scales).unwrap_err().exit_code(), 5);
}

fn encoding_holds(tiny: &Tiny) {
    let (tokenizer, image) = (&tiny.tokenizer, tiny.golden("image"));
    let hidden = tokenizer.semantic.forward(image).unwrap();
    tiny.holds("sem_hidden", &hidden, FEATURES);
    tiny.holds("sem_feat", &tokenizer.semantic_half(tiny.golden("sem_hidden"), tiny.grid()).unwrap(), FEATURES);
    let pixels = tokenizer.seen_by(tokenizer.config.encoder.stride(), image).unwrap();
    tiny.holds("pix_in", &pixels, FEATURES);
    tiny.holds("pix_enc", &tokenizer.encoder.forward(tiny.golden("pix_in")).unwrap(), FEATURES);
    tiny.holds("pix_feat", &tokenizer.pixel_half(image).unwrap(), FEATURES);
    tiny.holds("fused", &tokenizer.features(image).unwrap(), FEATURES);
    let encoded = tokenizer.encode(image, &tiny.scales).unwrap();
    for (i, encoded) in encoded.iter().enumerate() {
        assert_eq!(encoded.codes, tiny.codes(i));
        let all = tiny.golden("indices").get(i).unwrap().to_vec1::<i64>().unwrap();
        assert!(encoded.codes.concat().iter().map(|&c| c as i64).eq(all));
        let f = tokenizer.quantizer().to_tensor(encoded.f_hat.clone(), tiny.grid()).unwrap();
        let want = tiny.golden("final_quantize").narrow(0, i, 1).unwrap();
        close("final_quantize", &f.permute((0, 3, 1, 2)).unwrap(), &want, FEATURES);
    }
}

/// The quantiser alone, fed the reference's features, scale by scale.
fn quantising_holds(tiny: &Tiny) {
    let (quantizer, (h, w)) = (tiny.tokenizer.quantizer(), tiny.grid());
    let table = Tensor::from_slice(quantizer.table(), (64, 40), &Device::Cpu).unwrap();
    close("semantic", &table.narrow(1, 0, 32).unwrap(), tiny.golden("codebook_semantic_norm"), 1e-6);
    close("pixel", &table.narrow(1, 32, 8).unwrap(), tiny.golden("codebook_pixel_norm"), 1e-6);
    for image in 0..2 {
        let rows = |name: &str| -> Vec<f32> {
            let x = tiny.golden(name).get(image).unwrap().permute((1, 2, 0)).unwrap();
            x.flatten_all().unwrap().to_vec1().unwrap()
        };
        let near = |name: &str, got: &[f32], want: &[f32]| {
            assert_eq!(got.len(), want.len(), "{name}");
            let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= FEATURES, "{name}: off by {off}");
        };
        let fused = rows("fused");
        let mut pooled = vec![Vec::new(); tiny.scales.len()];
        let encoded = quantizer.encode(&fused, &tiny.scales, None, |si, z, _| pooled[si].extend_from_slice(z));
        assert_eq!(encoded.codes, tiny.codes(image));
        for (si, codes) in encoded.codes.iter().enumerate() {
            near("residual_down", &pooled[si], &rows(&format!("s{si}_residual_down")));
            near("codes", &quantizer.entries(codes), &rows(&format!("s{si}_codes")));
            let step = GridResampling::bicubic(tiny.scales[si], (h, w)).apply(&quantizer.entries(codes), 40);
            near("codes_up", &step, &rows(&format!("s{si}_codes_up")));
            let so_far = quantizer.accumulate(&encoded.codes[..=si], &tiny.scales, (h, w));
            let residual: Vec<f32> = fused.iter().zip(&so_far).map(|(f, s)| f - s).collect();
            near("residual_after", &residual, &rows(&format!("s{si}_residual_after")));
            // Distances between unit halves: 2 - 2 cos each.
            let unit = Quantizer::from_table(quantizer.config(), pooled[si].clone(), &Device::Cpu).unwrap();
            let distance = |(z, c): (&[f32], &Code)| -> f32 {
                z.iter().zip(quantizer.entry(*c)).map(|(a, b)| (a - b) * (a - b)).sum()
            };
            let distances: Vec<f32> = unit.table().chunks_exact(40).zip(codes).map(distance).collect();
            let want = tiny.golden(&format!("s{si}_d_best")).get(image).unwrap().to_vec1::<f32>().unwrap();
            near("d_best", &distances, &want);
        }
    }
}

/// From the reference's F, and from its codes alone.
fn decoding_holds(tiny: &Tiny) {
    let tokenizer = &tiny.tokenizer;
    let f = tiny.golden("final_quantize").permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
    let semantic = f.narrow(3, 0, 32).unwrap().contiguous().unwrap();
    tiny.holds("sem_dec_hidden", &tokenizer.semantic_decoder.forward(&semantic).unwrap(), FEATURES);
    tiny.holds("sem_recon", &tokenizer.decode_semantic(&f).unwrap(), FEATURES);
    let pixel = tiny.golden("final_quantize").narrow(1, 32, 8).unwrap().contiguous().unwrap();
    tiny.holds("post_quant", &tokenizer.images.post_quant_conv.forward(&pixel).unwrap(), FEATURES);
    tiny.holds("pix_dec", &tokenizer.images.decoder.forward(tiny.golden("post_quant")).unwrap(), PIXELS);
    for image in 0..2 {
        let decoded = tokenizer.decode(&tiny.codes(image), &tiny.scales).unwrap();
        let f = tokenizer.decode_features(&f.narrow(0, image, 1).unwrap()).unwrap();
        close("codes against F", &decoded, &f.squeeze(0).unwrap(), 1e-4);
    }
}

/// What comes out for each image when the last `without` scales are left out.
fn images(tiny: &Tiny, without: usize) -> Tensor {
    let image = |i: usize| {
        let codes = tiny.codes(i);
        tiny.tokenizer.decode(&codes[..codes.len() - without], &tiny.scales).unwrap()
    };
    Tensor::stack(&[image(0), image(1)], 0).unwrap()
}

#[test]
fn clipb_encodes_as_the_reference() {
    encoding_holds(&clipb());
    quantising_holds(&clipb());
}

#[test]
fn clipb_decodes_as_the_reference() {
    let tiny = clipb();
    decoding_holds(&tiny);
    tiny.holds("image_recon", &images(&tiny, 0), PIXELS);
    tiny.holds("image_recon_without_last_scale", &images(&tiny, 1), PIXELS);
}

/// The images of TokenFlow-t2i's three runs, whose tokenizer is this one.
#[test]
fn t2i_images_decode_as_the_reference() {
    let tiny = clipb();
    for run in ["nocfg_greedy", "cfg7p5_greedy", "cfg7p5_refine2"] {
        let golden = tensors(&format!("t2i_tiny_{run}.io.safetensors"));
        for row in 0..2 {
            let of = |name: &str| golden[name].get(row).unwrap();
            let all = of("codes").to_vec1::<i64>().unwrap();
            let mut rest = all.iter().map(|&c| c as Code);
            let codes: Vec<Vec<Code>> = tiny.scales.iter().map(|(h, w)| rest.by_ref().take(h * w).collect()).collect();
            let image = tiny.tokenizer.decode(&codes, &tiny.scales).unwrap();
            close(run, &image, &of("image_float"), PIXELS);
            let bytes = of("image_u8").flatten_all().unwrap().to_vec1::<u8>().unwrap();
            assert_eq!(pixels::to_image(&of("image_float"), pixels::TOKENFLOW_GREY).unwrap().as_raw(), &bytes, "{run}");
        }
    }
}

#[test]
fn siglip_encodes_as_the_reference() {
    let tiny = siglip(Some(60));
    let semantic = &tiny.tokenizer.semantic;
    tiny.holds("sem_embeddings", &semantic.embeddings(tiny.golden("image")).unwrap(), FEATURES);
    encoding_holds(&tiny);
    quantising_holds(&tiny);
}

#[test]
fn siglip_decodes_as_the_reference() {
    let tiny = siglip(Some(60));
    decoding_holds(&tiny);
    tiny.holds("image_recon", &images(&tiny, 0), PIXELS);
    let tiny = siglip(None);
    tiny.holds("pix_dec", &images(&tiny, 0), PIXELS);
    // The reference always resizes to 384; of that the data has rows 5, 21, ... and columns 3, 19,
    // ...
    let sample = |x: Tensor| {
        let at = |first: u32| Tensor::arange_step(first, 384, 16, &Device::Cpu).unwrap();
        x.index_select(&at(5), 2).unwrap().index_select(&at(3), 3).unwrap()
    };
    let tiny = siglip(Some(384));
    tiny.holds("image_recon_384_sub16", &sample(images(&tiny, 0)), PIXELS);
    tiny.holds("image_recon_without_last_scale", &sample(images(&tiny, 1)), PIXELS);
}

/// Against transformers' `Siglip2VisionModel`: the stored grid, a wide, a larger and a smaller one.
#[test]
fn siglip2_naflex_reads_any_grid() {
    let golden = tensors("tok_siglip2_tiny.safetensors");
    let weights = weights("tok_siglip2_tiny.safetensors").pp("vision_model");
    let config = VitConfig {
        hidden_size: 48,
        intermediate_size: 80,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        native_grid: 4,
        ..VitConfig::siglip2_so400m_naflex()
    };
    let normed = SemanticEncoder::load(&weights, &config).unwrap();
    let penultimate = VitConfig { features: VitFeatures::Penultimate, ..config };
    let penultimate = SemanticEncoder::load(&weights, &penultimate).unwrap();
    for (h, w) in [(4, 4), (3, 5), (6, 7), (2, 3)] {
        let want = |name: &str| golden[&format!("{h}x{w}.{name}")].unsqueeze(0).unwrap();
        let image = ((want("image").to_dtype(DType::F32).unwrap() / 127.5).unwrap() - 1.0).unwrap();
        close("embeddings", &normed.embeddings(&image).unwrap(), &want("embeddings"), FEATURES);
        close("features", &normed.forward(&image).unwrap(), &want("features"), FEATURES);
        close("penultimate", &penultimate.forward(&image).unwrap(), &want("penultimate"), FEATURES);
    }
    assert!(normed.forward(&Tensor::zeros((1, 3, 15, 32), DType::F32, &Device::Cpu).unwrap()).is_err());
}

#[test]
fn codes_that_do_not_fit_are_refused() {
    let tiny = clipb();
    let decode = |codes: &[Vec<Code>]| tiny.tokenizer.decode(codes, &tiny.scales).map(drop);
    let good = tiny.codes(0);
    assert!(decode(&good).is_ok() && decode(&good[..2]).is_ok());
    let mut far = good.clone();
    far[2][4] = 64;
    assert!(decode(&far).unwrap_err().to_string().contains("scale 3 has code 64, but there are 64 codes"));
    assert!(decode(&[vec![0], vec![0; 3]]).unwrap_err().to_string().contains("scale 2 (2x2) has 3 codes"));
    assert!(decode(&[good.clone(), good].concat()).is_err());
}

#[test]
fn impossible_configs_are_refused() {
    let fine = Preset::clipb_32k_enhanced().config;
    let refused = |change: fn(&mut TokenizerConfig)| {
        let mut config = fine.clone();
        change(&mut config);
        ImageTokenizer::load(&Weights::inventory(), &config).is_err()
    };
    assert!(refused(|c| c.semantic.num_attention_heads = 0));
    assert!(refused(|c| c.semantic.num_attention_heads = 7));
    assert!(refused(|c| c.semantic.patch_size = 0));
    assert!(refused(|c| c.semantic.num_hidden_layers = 0));
    assert!(refused(|c| c.semantic.num_hidden_layers = 1 << 60));
    assert!(refused(|c| c.semantic_decoder.depth = 1 << 60));
    assert!(refused(|c| c.image_size = Some(1 << 60)));
    assert!(refused(|c| c.semantic_decoder.num_attention_heads = Some(0)));
    assert!(refused(|c| c.encoder.ch_mult.clear()));
    assert!(refused(|c| c.decoder.patch = 0));
    assert!(refused(|c| c.decoder.ch_mult = vec![1, 2]));
    assert!(refused(|c| c.codebook.size = 0));
    assert!(refused(|c| c.codebook.size = 1 << 40));
}
