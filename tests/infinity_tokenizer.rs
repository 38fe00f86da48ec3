//! Infinity's image tokenizers against the reference's own numbers. Which there are, and their
//! shapes and images, is read from tests/data/infinity/infinity.json.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use nextflow::checkpoint::{Inventory, Weights};
use nextflow::generate::next_input::NextInput;
use nextflow::generate::ratios;
use nextflow::pixels::{self, GridResampling};
use nextflow::tokenizer::{
    BitConfig, BitDecoder, BitEncoder, BitPreset, BitTokenizerConfig, CnnConfig, CnnLayout, Code, CodeSpace,
    ImageDecoder, pack, unpack,
};
use serde::Deserialize;

mod common;

const FEATURES: f32 = 2e-4;
const PIXELS: f32 = 1e-3;

type Grid = (usize, usize);

#[derive(Deserialize)]
struct Case {
    codebook_dim: usize,
    stride: usize,
    ch: usize,
    ch_mult: Vec<usize>,
    num_res_blocks: usize,
    groups: usize,
    patchify: u8,
    images: BTreeMap<String, Picture>,
}

#[derive(Deserialize)]
struct Picture {
    token_grids: Vec<Grid>,
    code_grids: Vec<Grid>,
    pixels: Grid,
}

impl Case {
    fn config(&self) -> BitTokenizerConfig {
        let half = CnnConfig {
            ch: self.ch,
            ch_mult: self.ch_mult.clone(),
            num_res_blocks: self.num_res_blocks,
            z_channels: self.codebook_dim,
            groups: self.groups,
            patch: 1,
            layout: CnnLayout::Infinity,
        };
        let bits = BitConfig { dim: self.codebook_dim, patch: 1 + usize::from(self.patchify) };
        BitTokenizerConfig { encoder: half.clone(), decoder: half, bits }
    }
}

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/infinity").join(name)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(data(name), &Device::Cpu).unwrap()
}

fn weights(name: &str) -> PathBuf {
    data(&format!("{name}.weights.safetensors"))
}

/// Every tokenizer of the data, by name.
fn cases() -> BTreeMap<String, Case> {
    let text = std::fs::read_to_string(data("infinity.json")).unwrap();
    let all: BTreeMap<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let tokenizers =
        all.into_iter().filter(|(_, value)| value.get("codebook_dim").is_some() && value.get("images").is_some());
    let cases: BTreeMap<_, _> =
        tokenizers.map(|(name, value)| (name, serde_json::from_value(value).unwrap())).collect();
    assert!(!cases.is_empty());
    cases
}

fn close(name: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{name}: shape");
    let off = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(off <= tolerance, "{name}: off by {off}");
}

/// Channels last, (1, h, w, C), as the golden data has them.
fn channels_first(x: &Tensor) -> Tensor {
    x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap()
}

/// Codes of all scales of an image, packed from the reference's bits of tokens.
fn golden_codes(golden: &HashMap<String, Tensor>, name: &str, picture: &Picture, bits: usize) -> Vec<Vec<Code>> {
    let scale = |si: usize| {
        // Without patches those of tokens are those of cells.
        let tokens =
            golden.get(&format!("{name}.token_bits.{si}")).unwrap_or_else(|| &golden[&format!("{name}.bits.{si}")]);
        let all = tokens.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        all.chunks_exact(bits).map(pack).collect()
    };
    (0..picture.token_grids.len()).map(scale).collect()
}

fn image(golden: &HashMap<String, Tensor>, name: &str) -> RgbImage {
    let (c, h, w) = golden[&format!("{name}.image_u8")].dims3().unwrap();
    assert_eq!(c, 3);
    let bytes = golden[&format!("{name}.image_u8")].permute((1, 2, 0)).unwrap();
    RgbImage::from_raw(w as u32, h as u32, bytes.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
}

/// Both halves of a tokenizer.
struct Tokenizer {
    encoder: BitEncoder,
    decoder: BitDecoder,
}

fn load(name: &str, config: &BitTokenizerConfig) -> Tokenizer {
    let read = Weights::from_safetensors(&[weights(name)], DType::F32, &Device::Cpu).unwrap();
    let (encoder, decoder) = (BitEncoder::load(&read, config).unwrap(), BitDecoder::load(&read, config).unwrap());
    Tokenizer { encoder, decoder }
}

/// Calls `check` with every image of every tokenizer.
fn each(mut check: impl FnMut(&Tokenizer, &HashMap<String, Tensor>, &str, &Picture)) {
    for (tokenizer, case) in cases() {
        let config = case.config();
        assert_eq!(config.decoder.stride(), case.stride);
        let loaded = load(&tokenizer, &config);
        let golden = tensors(&format!("{tokenizer}.io.safetensors"));
        for (name, picture) in &case.images {
            let patched = |(h, w): &Grid| (h * config.bits.patch, w * config.bits.patch);
            assert_eq!(picture.token_grids.iter().map(patched).collect::<Vec<_>>(), picture.code_grids);
            check(&loaded, &golden, name, picture);
        }
    }
}

#[test]
fn every_stage_of_encoding_equals_the_reference() {
    each(|tokenizer, golden, name, picture| {
        let get = |part: &str| &golden[&format!("{name}.{part}")];
        let (h, w) = picture.pixels;
        let input = pixels::to_tensor(&[image(golden, name).as_raw()], h, w, &Device::Cpu).unwrap();
        let features = tokenizer.encoder.features(&input).unwrap();
        close("features", &channels_first(&features), get("features"), FEATURES);
        // The quantiser alone, of the reference's features.
        let bits = *tokenizer.encoder.quantizer().config();
        let f = get("features").permute((0, 2, 3, 1)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut residuals = Vec::new();
        let codes = tokenizer
            .encoder
            .quantizer()
            .encode(&f, &picture.token_grids, |_, residual| residuals.push(residual.to_vec()));
        for (si, (residual, (h, w))) in residuals.into_iter().zip(&picture.code_grids).enumerate() {
            let signs: Vec<u8> = residual.iter().map(|x| u8::from(*x > 0.0)).collect();
            let residual = Tensor::from_vec(residual, (1, *h, *w, bits.dim), &Device::Cpu).unwrap();
            close("residual", &channels_first(&residual), get(&format!("residual.{si}")), FEATURES);
            assert_eq!(
                signs,
                get(&format!("bits.{si}")).flatten_all().unwrap().to_vec1::<u8>().unwrap(),
                "{name}, {si}"
            );
        }
        let want = golden_codes(golden, name, picture, bits.per_token());
        assert_eq!(codes, want, "{name}");
        assert_eq!(tokenizer.encoder.encode(&input, &picture.token_grids).unwrap(), [want], "{name}");
    });
}

#[test]
fn sums_and_inputs_from_bits_equal_the_reference() {
    each(|tokenizer, golden, name, picture| {
        let (q, scales) = (tokenizer.encoder.quantizer(), &picture.token_grids);
        let codes = golden_codes(golden, name, picture, q.config().per_token());
        let (h, w) = *picture.code_grids.last().unwrap();
        let mut input = NextInput::of_bits(q, scales);
        let all = NextInput::of_bits(q, scales).all(&codes).unwrap();
        for si in 0..scales.len() {
            let sum = q.accumulate(&codes[..=si], scales).unwrap().reshape((1, h, w, q.config().dim)).unwrap();
            close("sum", &channels_first(&sum), &golden[&format!("{name}.sum.{si}")], FEATURES);
            if si > 0 {
                let want = &golden[&format!("{name}.next_input.{si}")];
                close("next input", &input.next(&q.codes(&codes[si - 1]).unwrap(), si).unwrap(), want, FEATURES);
                let flat = Tensor::from_slice(&all[si - 1], want.dims(), &Device::Cpu).unwrap();
                close("all inputs", &flat, want, FEATURES);
            }
            // Another pass would see the scale's own codes as well, which on the last grid is the
            // sum itself.
            let with = input.with(&q.codes(&codes[si]).unwrap(), si).unwrap();
            assert_eq!(with.dims(), [1, scales[si].0 * scales[si].1, q.config().per_token()]);
            if si + 1 == scales.len() && q.config().patch == 1 {
                close("with", &with, &sum.flatten(1, 2).unwrap(), FEATURES);
            }
        }
        close(
            "z",
            &channels_first(&q.accumulate(&codes, scales).unwrap().reshape((1, h, w, q.config().dim)).unwrap()),
            &golden[&format!("{name}.z")],
            FEATURES,
        );
    });
}

#[test]
fn several_images_are_summed_together_as_apart() {
    each(|tokenizer, golden, name, picture| {
        let (q, scales) = (tokenizer.encoder.quantizer(), &picture.token_grids);
        let codes = golden_codes(golden, name, picture, q.config().per_token());
        let other: Vec<Vec<Code>> = codes.iter().map(|codes| codes.iter().rev().map(|code| !code).collect()).collect();
        let both = |si: usize| Tensor::cat(&[q.codes(&codes[si]).unwrap(), q.codes(&other[si]).unwrap()], 0).unwrap();
        let (mut together, apart) = (NextInput::of_bits(q, scales), NextInput::of_bits(q, scales).all(&other).unwrap());
        for si in 1..scales.len() {
            let second = together.next(&both(si - 1), si).unwrap().get(1).unwrap().flatten_all().unwrap();
            let apart = Tensor::from_slice(&apart[si - 1], apart[si - 1].len(), &Device::Cpu).unwrap();
            close("second image", &second, &apart, 0.0);
        }
    });
}

#[test]
fn decoding_equals_the_reference() {
    each(|tokenizer, golden, name, picture| {
        let get = |part: &str| &golden[&format!("{name}.{part}")];
        let decoded = tokenizer.decoder.decode_features(&get("z").permute((0, 2, 3, 1)).unwrap()).unwrap();
        close("decoded", &decoded, get("decoded"), PIXELS);
        let codes = golden_codes(golden, name, picture, tokenizer.decoder.quantizer().config().per_token());
        close(
            "from codes",
            &tokenizer.decoder.decode(&codes, &picture.token_grids).unwrap(),
            &get("decoded").get(0).unwrap(),
            PIXELS,
        );
    });
    for (tokenizer, case) in cases() {
        let read = Weights::from_safetensors(&[weights(&tokenizer)], DType::F32, &Device::Cpu).unwrap();
        let (images, golden) =
            (ImageDecoder::load_bits(&read, &case.config()).unwrap(), tensors(&format!("{tokenizer}.io.safetensors")));
        assert_eq!(images.space(), CodeSpace::Bits(case.config().bits.per_token()));
        for (name, picture) in &case.images {
            let codes = golden_codes(&golden, name, picture, case.config().bits.per_token());
            let got = images.decode_image(&codes, &picture.token_grids).unwrap();
            let want = golden[&format!("{name}.decoded_u8_rgb")].flatten_all().unwrap().to_vec1::<u8>().unwrap();
            assert_eq!(got.as_raw().len(), want.len());
            assert!(got.as_raw().iter().zip(&want).all(|(a, b)| a.abs_diff(*b) <= 1), "{tokenizer}, {name}");
            // A prefix decodes too, and codes that do not exist are refused.
            assert_eq!(
                images.decode(&codes[..1], &picture.token_grids).unwrap().dims(),
                [3, picture.pixels.0, picture.pixels.1]
            );
            let bits = case.config().bits.per_token();
            let far = [vec![codes[0][0] | 1 << (bits % 64)]];
            assert_eq!(images.decode(&far, &picture.token_grids).is_err(), bits < 64);
            assert!(images.decode(&[vec![0; 2]], &picture.token_grids).is_err());
        }
    }
}

#[test]
fn resampling_equals_the_reference() {
    let golden = tensors("resample_ops.safetensors");
    let mut seen = 0;
    for (key, want) in &golden {
        let (kind, sizes) = key.split_once('.').unwrap();
        let input = golden[&format!("in.{sizes}")].to_dtype(DType::F32).unwrap();
        let (from, to) = (input.dims2().unwrap(), want.dims2().unwrap());
        let resampling = match kind {
            "area" => GridResampling::area(from, to),
            "trilinear" => GridResampling::bilinear(from, to),
            _ => continue,
        };
        let four = |x: &Tensor| x.unsqueeze(0).unwrap().unsqueeze(0).unwrap();
        close(key, &resampling.channels_first(&four(&input)).unwrap(), &four(want), 2e-6);
        let flat = resampling.apply(&input.flatten_all().unwrap().to_vec1::<f32>().unwrap(), 1);
        close(key, &Tensor::from_vec(flat, to, &Device::Cpu).unwrap(), want, 2e-6);
        seen += 1;
    }
    assert!(seen > 0);
}

#[test]
fn schedules_equal_the_reference() {
    #[derive(Deserialize)]
    struct Table {
        levels: BTreeMap<String, usize>,
        ratios: Vec<ratios::Ratio>,
    }
    let table: Table = serde_json::from_str(&std::fs::read_to_string(data("schedules.json")).unwrap()).unwrap();
    let mut levels: Vec<usize> = table.levels.into_values().collect();
    levels.sort_unstable();
    assert_eq!(levels, ratios::LEVELS);
    assert_eq!(format!("{:?}", table.ratios), format!("{:?}", ratios::table()));
    for ratio in ratios::table() {
        assert_eq!((ratio.scales.len(), ratio.scales[0]), (13, (1, 1)), "{}", ratio.h_over_w);
        for (i, (h, w)) in ratio.scales.iter().enumerate() {
            assert_eq!((ratio.rope_rows[i].len(), ratio.rope_columns[i].len()), (*h, *w));
        }
        assert_eq!(ratios::nearest(ratio.h_over_w).h_over_w, ratio.h_over_w);
    }
    // By linear difference, the first of equals.
    for (wanted, nearest) in [(9.0 / 16.0, 0.571), (0.9, 1.0), (1.125, 1.0), (100.0, 3.0), (0.0, 0.333)] {
        assert_eq!(ratios::nearest(wanted).h_over_w, nearest, "{wanted}");
    }
}

/// Every 13th pixel of what Pillow 13 makes of five pictures.
#[test]
fn pictures_are_cropped_as_the_reference_does() {
    let golden = tensors("preprocess_lanczos.safetensors");
    assert_eq!(golden.len(), 5 * 4);
    for (key, want) in &golden {
        let (name, size) = key.split_once('.').unwrap();
        let (width, height) = size.split_once('x').unwrap();
        let image = image::open(data(&format!("../tokenflow/preprocess/{name}.png"))).unwrap().into_rgb8();
        let got = pixels::cover_lanczos(&image, (width.parse().unwrap(), height.parse().unwrap()));
        let (rows, columns, _) = want.dims3().unwrap();
        let want = want.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        for (i, pixel) in want.chunks_exact(3).enumerate() {
            let (y, x) = (3 + 13 * (i / columns), 5 + 13 * (i % columns));
            assert_eq!(got.get_pixel(x as u32, y as u32).0, pixel, "{key} at {x}, {y} of {rows} rows");
        }
    }
    // Whatever there is covers what is asked for.
    for (width, height) in [(1, 8000), (8000, 1), (1, 1), (331, 997), (640, 427)] {
        let image = RgbImage::from_pixel(width, height, image::Rgb([10, 200, 90]));
        for size in [(256, 256), (144, 112), (1776, 592)] {
            let crop = pixels::cover_lanczos(&image, size);
            assert!(
                crop.dimensions() == size && crop.pixels().all(|p| p.0 == [10, 200, 90]),
                "{width}x{height}, {size:?}"
            );
        }
    }
}

/// Keys, shapes and types of a public checkpoint: a comment, then a line for each.
fn public_keys(file: &str) -> Keys {
    let text = std::fs::read_to_string(data(file)).unwrap();
    let line = |line: &str| {
        let mut words = line.split('\t');
        let (key, shape, dtype) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let numbers = shape.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
        (key.to_string(), (numbers.map(|n| n.parse().unwrap()).collect(), dtype.to_string()))
    };
    text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(line).collect()
}

/// A checkpoint of nothing but a header: its data is a hole that takes no room on the disk.
fn hollow(path: &Path, keys: &Keys) {
    let (mut end, mut header) = (0, serde_json::Map::new());
    for (key, (shape, dtype)) in keys {
        let (start, (dtype, width)) = (end, if dtype == "int64" { ("I64", 8) } else { ("F32", 4) });
        end += width * shape.iter().product::<usize>();
        header.insert(key.clone(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes(), &header[..]].concat()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
}

/// The shape and type of every tensor of a file.
type Keys = BTreeMap<String, (Vec<usize>, String)>;

/// The keys of every public tokenizer, as the files have them or without the extra part.
fn public_tokenizers() -> Vec<(&'static str, Keys)> {
    let f16 = public_keys("keys_infinity_vae_d32reg.txt");
    let with = |dim: usize| {
        let mut keys = f16.clone();
        for (key, (shape, _)) in &mut keys {
            match key.as_str() {
                "encoder.conv_out.conv.weight" | "encoder.conv_out.conv.bias" => shape[0] = dim,
                "decoder.conv_in.conv.weight" => shape[1] = dim,
                key if key.ends_with("lfq.mask") => shape[0] = dim,
                _ => {}
            }
        }
        keys
    };
    let patchify = public_keys("keys_infinity_vae_d56_patchify.txt");
    vec![
        ("d16", with(16)),
        ("d24", with(24)),
        ("d32reg", f16.clone()),
        ("d64", with(64)),
        ("d56_f8_14_patchify", patchify),
    ]
}

fn plain(keys: &Keys) -> Keys {
    let plain = |key: &str| {
        let mut parts: Vec<&str> = key.split('.').collect();
        let extra = parts.len().checked_sub(2).filter(|&at| parts[at] == "conv" || parts[at] == "norm");
        if let Some(at) = extra {
            parts.remove(at);
        }
        parts.join(".")
    };
    keys.iter().map(|(key, value)| (plain(key), value.clone())).collect()
}

#[test]
fn public_checkpoints_are_recognised_and_complete() {
    let dir = tempfile::tempdir().unwrap();
    for (name, keys) in public_tokenizers() {
        assert_eq!(keys.len(), if name.starts_with("d56") { 226 } else { 270 });
        for (keys, layout) in [(keys.clone(), CnnLayout::Infinity), (plain(&keys), CnnLayout::InfinityPlain)] {
            let path = dir.path().join("x.safetensors");
            hollow(&path, &keys);
            let files = Inventory::open(&path).unwrap();
            let config = BitTokenizerConfig::of_weights(&files).unwrap();
            assert_eq!((config.encoder.layout, config.cell()), (layout, 16), "{name}");
            let presets = BitPreset::of(&config);
            assert!(presets[0].name == name && presets.len() == if name == "d32reg" { 2 } else { 1 }, "{name}");
            let requested = Weights::inventory();
            BitEncoder::load(&requested, &config).unwrap();
            BitDecoder::load(&requested, &config).unwrap();
            let fit = files.compare(&requested);
            assert!(fit.is_complete() && fit.unknown.is_empty(), "{name}: {fit:?}");
        }
    }
    assert_eq!(BitPreset::all().map(|preset| preset.config.bits.per_token()), [16, 24, 32, 32, 64, 56]);
}

#[test]
fn the_datas_tokenizers_are_recognised() {
    for (name, case) in cases() {
        // Groups and patches are in no shape: those of all public tokenizers are meant.
        if (case.groups, case.stride << case.patchify) == (32, 16) {
            let files = Inventory::open(&weights(&name)).unwrap();
            assert_eq!(BitTokenizerConfig::of_weights(&files), Some(case.config()), "{name}");
        }
    }
}

#[track_caller]
fn nextflow(folder: &Path, args: &[&str]) -> std::process::Output {
    common::command(folder, args).output().unwrap()
}

#[track_caller]
fn works(folder: &Path, args: &[&str]) -> String {
    let output = nextflow(folder, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn refused(folder: &Path, code: i32, args: &[&str], parts: &[&str]) {
    let output = nextflow(folder, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: ") && parts.iter().all(|part| stderr.contains(part)), "{stderr}");
}

/// `nextflow encode` and `decode` of every image of the data, at its own schedule, in both formats.
#[test]
fn images_go_out_and_come_back() {
    for (tokenizer, case) in cases() {
        if (case.groups, case.stride << case.patchify) != (32, 16) {
            continue;
        }
        let (dir, golden) = (tempfile::tempdir().unwrap(), tensors(&format!("{tokenizer}.io.safetensors")));
        let (here, model) = (dir.path(), weights(&tokenizer));
        let (model, bits) = (model.to_str().unwrap(), case.config().bits.per_token());
        for (name, picture) in &case.images {
            image(&golden, name).save(here.join("in.png")).unwrap();
            let scales: Vec<String> = picture.token_grids.iter().map(|(h, w)| format!("{h}x{w}")).collect();
            let encode = ["encode", "in.png", "--model", model, "--scales", &scales.join(",")];
            let json: serde_json::Value = serde_json::from_str(&works(here, &encode)).unwrap();
            let want = golden_codes(&golden, name, picture, bits);
            let digits = |codes: &Vec<Code>| {
                codes.iter().map(|code| format!("{code:0n$x}", n = bits.div_ceil(4))).collect::<Vec<_>>()
            };
            assert_eq!(
                json["codes"],
                serde_json::json!(want.iter().map(digits).collect::<Vec<_>>()),
                "{tokenizer}, {name}"
            );
            assert_eq!((&json["bits"], &json["scales"]), (&bits.into(), &serde_json::json!(picture.token_grids)));
            std::fs::write(here.join("a.json"), json.to_string()).unwrap();
            works(here, &[&encode[..], &["-o", "a.safetensors", "--force"]].concat());
            let file = candle_core::safetensors::load(here.join("a.safetensors"), &Device::Cpu).unwrap();
            let (h, w) = *picture.token_grids.last().unwrap();
            let last = &file[&format!("scale.{:02}", want.len() - 1)];
            assert_eq!((last.dtype(), last.dims()), (DType::U8, &[h, w, bits][..]));
            let all: Vec<u8> = want.last().unwrap().iter().flat_map(|&code| unpack(code, bits)).collect();
            assert_eq!(last.flatten_all().unwrap().to_vec1::<u8>().unwrap(), all);
            for file in ["a.json", "a.safetensors"] {
                works(here, &["decode", file, "--model", model, "-o", "a.png", "--force"]);
                let got = image::open(here.join("a.png")).unwrap().to_rgb8().into_raw();
                let want = golden[&format!("{name}.decoded_u8_rgb")].flatten_all().unwrap().to_vec1::<u8>().unwrap();
                assert!(
                    got.len() == want.len() && got.iter().zip(&want).all(|(a, b)| a.abs_diff(*b) <= 1),
                    "{tokenizer}, {name}"
                );
            }
            works(here, &["decode", "a.json", "--scales", "1", "--model", model, "-o", "first.png", "--force"]);
            let first = image::open(here.join("first.png")).unwrap().to_rgb8();
            assert_eq!((first.height() as usize, first.width() as usize), picture.pixels);
        }
        let info = works(here, &["info", model]);
        assert!(
            info.starts_with("Infinity image tokenizer")
                && info.contains(&format!("{bits} bits for a token of 16 pixels")),
            "{info}"
        );
        assert!(info.ends_with("  complete\n"), "{info}");
        // Another model's codes, sizes that no level has, and grids that are none.
        refused(
            here,
            2,
            &["decode", "a.json", "-o", "x.png"],
            &[&format!("{bits} bits a token, but nano has a codebook of")],
        );
        refused(here, 2, &["encode", "in.png", "--model", model, "--size", "250x250"], &["250x250", "--size 256x256"]);
        for scales in ["", "1x", "1x1,0x2", "axb", "4x4,2x2", "1x1,+2x2", "1x1,400x400"] {
            refused(here, 2, &["encode", "in.png", "--model", model, "--scales", scales], &["scales"]);
        }
        refused(here, 2, &["encode", "in.png", "--scales", "1x1,2x2"], &["nano has no schedule"]);
    }
}

/// Without a schedule: the nearest ratio, at the largest level that is no larger than the picture.
#[test]
fn pictures_have_default_schedules() {
    let Some((tokenizer, _)) =
        cases().into_iter().find(|(_, case)| (case.groups, case.stride << case.patchify) == (32, 16))
    else {
        return;
    };
    let (dir, model) = (tempfile::tempdir().unwrap(), weights(&tokenizer));
    let (here, model) = (dir.path(), model.to_str().unwrap());
    for (size, flag, last, count) in [
        ((256, 256), "auto", [16, 16], 7),
        ((40, 30), "auto", [15, 20], 7),
        ((300, 200), "auto", [14, 21], 7),
        ((64, 64), "16:9", [12, 21], 7),
        ((64, 64), "336x192", [12, 21], 7),
    ] {
        RgbImage::from_pixel(size.0, size.1, image::Rgb([200, 40, 90])).save(here.join("in.png")).unwrap();
        let json = works(here, &["encode", "in.png", "--model", model, "--size", flag]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let scales = json["scales"].as_array().unwrap();
        assert_eq!((scales.len(), scales.last()), (count, Some(&serde_json::json!(last))), "{size:?}, {flag}");
    }
}

/// What a folder holds is found; of several one is to be named; what lacks a tensor is refused by
/// its name.
#[test]
fn folders_and_broken_files() {
    let (dir, Some((tokenizer, _))) = (tempfile::tempdir().unwrap(), cases().pop_first()) else { return };
    let here = dir.path();
    std::fs::create_dir(here.join("one")).unwrap();
    std::fs::copy(weights(&tokenizer), here.join("one/infinity_vae_x.safetensors")).unwrap();
    std::fs::write(here.join("one/config.json"), r#"{"model_type": "Infinity"}"#).unwrap();
    RgbImage::new(16, 16).save(here.join("in.png")).unwrap();
    works(here, &["encode", "in.png", "--model", "one", "--scales", "1x1"]);
    std::fs::copy(weights(&tokenizer), here.join("one/a second one.safetensors")).unwrap();
    refused(
        here,
        3,
        &["encode", "in.png", "--model", "one"],
        &["holds 2 image tokenizers", "--model 'one/a second one.safetensors'"],
    );
    let (_, mut keys) = public_tokenizers().swap_remove(0);
    keys.remove("encoder.mid.block_2.norm1.norm.bias");
    hollow(&here.join("broken.safetensors"), &keys);
    let what = ["does not fit Infinity's image tokenizer", "1 missing: encoder.mid.block_2.norm1.norm.bias"];
    refused(here, 3, &["encode", "in.png", "--model", "broken.safetensors", "--scales", "1x1"], &what);
    // Incomplete weights are described, and the exit code says so.
    let info = nextflow(here, &["info", "broken.safetensors"]);
    assert_eq!(info.status.code(), Some(3));
    let info = String::from_utf8(info.stdout).unwrap();
    assert!(
        info.contains("d16 (of Infinity 125M)") && info.contains("1 missing: encoder.mid.block_2.norm1.norm.bias"),
        "{info}"
    );
    // The same keys and more are Stable Diffusion's.
    let (_, keys) = public_tokenizers().swap_remove(0);
    let mut keys = plain(&keys);
    keys.insert("decoder.mid.attn_1.q.weight".into(), (vec![512, 512, 1, 1], "float32".into()));
    hollow(&here.join("sd.safetensors"), &keys);
    refused(
        here,
        3,
        &["encode", "in.png", "--model", "sd.safetensors"],
        &["no image tokenizer of TokenFlow or Infinity"],
    );
}
