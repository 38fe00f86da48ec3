//! What decided an image, as text in its PNG.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::generate::{Guidance, Job};

/// Everything that decided an image; the `nextflow` text chunk of its PNG, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PngInfo {
    /// The prompt.
    pub prompt: String,
    /// The negative prompt, if it was not the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative: Option<String>,
    /// Decides all randomness.
    pub seed: u64,
    /// WIDTHxHEIGHT in pixels.
    pub size: String,
    /// Grids (height, width) coarse to fine.
    pub scales: Vec<(usize, usize)>,
    /// Guidance.
    pub cfg: f64,
    /// 0 means argmax.
    pub temperature: f64,
    /// The meaning of `cfg`, if it is not VAR's.
    #[serde(default, skip_serializing_if = "is_default")]
    pub guidance: Guidance,
    /// Guidance of every scale, in place of `cfg`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cfg_scales: Vec<f64>,
    /// The temperature of every scale, in place of `temperature`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub temperature_scales: Vec<f64>,
    /// Weight of an edit's words without its image, beside `cfg`, if the model has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_cfg: Option<f64>,
    /// Blocks before the end at which guidance was applied inside the network, if it was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cfg_layers: Vec<usize>,
    /// `None` keeps all codes.
    pub top_k: Option<usize>,
    /// 1 keeps all codes.
    pub top_p: f64,
    /// How many of the first scales were guided, if not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cfg_until: Option<usize>,
    /// How many scales were left out at the end, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<usize>,
    /// Passes over every scale but the first, if more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passes: Option<u8>,
    /// The model's text before the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thought: Option<String>,
    /// The files of the images that it changes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    /// Steps of the refiner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine: Option<usize>,
    /// Another model that refined it, as it was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refiner: Option<String>,
    /// How much of it that model drew anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine_strength: Option<f64>,
    /// Guidance led away from any image, not from one with the same sources.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub free: bool,
    /// Drawn in a conversation, which is not stored.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub conversation: bool,
    /// The model's name.
    pub model: String,
    /// Of this program.
    pub version: String,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl PngInfo {
    /// The settings of `job` as drawn by `model` at (width, height) pixels.
    pub fn new(job: &Job, model: &str, (width, height): (u32, u32)) -> Self {
        Self {
            prompt: job.prompt.clone(),
            negative: job.negative.clone(),
            seed: job.seed,
            size: format!("{width}x{height}"),
            scales: job.scales.clone(),
            cfg: job.sampling.cfg,
            temperature: job.sampling.temperature,
            guidance: job.sampling.guidance,
            cfg_scales: job.sampling.cfg_scales.clone(),
            temperature_scales: job.sampling.temperature_scales.clone(),
            cfg_layers: job.sampling.cfg_layers.clone(),
            image_cfg: job.sampling.image_cfg,
            top_k: job.sampling.top_k,
            top_p: job.sampling.top_p,
            cfg_until: job.sampling.cfg_until,
            draft: Some(job.sampling.draft).filter(|&n| n > 0),
            passes: Some(job.sampling.passes(1) as u8).filter(|&n| n > 1),
            refine: Some(job.sampling.refine).filter(|&n| n > 0),
            refiner: None,
            refine_strength: None,
            thought: None,
            sources: Vec::new(),
            free: false,
            conversation: false,
            model: model.into(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// The settings in a PNG of [`encode`]; none in others.
    pub fn of_png(png: &[u8]) -> Option<Self> {
        serde_json::from_str(&text(&info(png)?, "nextflow")?).ok()
    }

    /// The same in the form that other tools read: the prompt, then one line of `Key: value` pairs
    /// (A1111).
    fn parameters(&self) -> String {
        let some = |key: &str, n: Option<usize>| n.map(|n| format!(", {key}: {n}")).unwrap_or_default();
        // Numbers of a list have no commas between them, which separate settings.
        let list = |key: &str, numbers: &[f64]| match numbers {
            [] => String::new(),
            numbers => format!(", {key}: {}", numbers.iter().map(f64::to_string).collect::<Vec<_>>().join(" ")),
        };
        let top_k = some("Top-k", self.top_k);
        let passes = some("CFG until scale", self.cfg_until)
            + &some("Scales left out", self.draft)
            + &some("Passes", self.passes.map(usize::from))
            + &some("Refiner steps", self.refine)
            + &list("CFG of scales", &self.cfg_scales)
            + &list("Temperature of scales", &self.temperature_scales);
        let negative = self.negative.as_ref().map(|text| format!("Negative prompt: {text}\n")).unwrap_or_default();
        // A name with a separator in it is quoted, as A1111 does.
        let model = match self.model.contains([',', ':', '\n', '"']) {
            true => serde_json::Value::from(self.model.as_str()).to_string(),
            false => self.model.clone(),
        };
        format!(
            "{}\n{negative}Steps: {}, Sampler: NextFlow, CFG scale: {}, Seed: {}, Size: {}, Model: {model}, Temperature: {}{top_k}, \
             Top-p: {}{passes}, Version: nextflow {}",
            self.prompt,
            self.scales.len(),
            self.cfg,
            self.seed,
            self.size,
            self.temperature,
            self.top_p,
            self.version
        )
    }
}

/// The PNG of `image`, with `settings` in the text chunks `parameters` and `nextflow`. Same input,
/// same bytes.
pub fn encode(image: &RgbImage, settings: &PngInfo) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::new(Kind::Failure, format!("cannot encode the PNG: {e}"));
    let json = serde_json::to_string(settings).map_err(|e| failed(&e))?;
    let write = || -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        // The default level takes 94 ms instead of 3 for 768x512 pixels, and does not make drawn
        // images smaller.
        encoder.set_compression(png::Compression::Fast);
        for (key, text) in [("parameters", settings.parameters()), ("nextflow", json.clone())] {
            match is_latin1(&text) {
                true => encoder.add_text_chunk(key.into(), text)?,
                false => encoder.add_itxt_chunk(key.into(), text)?,
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(image.as_raw())?;
        writer.finish()?;
        Ok(bytes)
    };
    write().map_err(|e| failed(&e))
}

/// Whether a tEXt chunk may hold `text`: Latin-1 without controls but newlines.
fn is_latin1(text: &str) -> bool {
    text.chars().all(|c| matches!(c, '\n' | ' '..='~' | '\u{a0}'..='\u{ff}'))
}

/// The most bytes of a text.
const MAX_TEXT: usize = 1 << 20;

/// The header of a PNG with its text chunks, before or after the pixels; none if it is no PNG.
fn info(png: &[u8]) -> Option<png::Info<'static>> {
    let mut reader = png::Decoder::new(io::Cursor::new(png)).read_info().ok()?;
    // A file that is cut off still has the chunks before the cut.
    let _ = reader.finish();
    Some(reader.info().clone())
}

/// The text of a keyword, if there is one and it is not longer than [`MAX_TEXT`]. A few megabytes
/// that are compressed may hold some billions.
fn text(info: &png::Info, keyword: &str) -> Option<String> {
    if let Some(utf8) = info.utf8_text.iter().rfind(|chunk| chunk.keyword == keyword) {
        let mut utf8 = utf8.clone();
        utf8.decompress_text_with_limit(MAX_TEXT).ok()?;
        return utf8.get_text().ok();
    }
    if let Some(latin1) = info.compressed_latin1_text.iter().rfind(|chunk| chunk.keyword == keyword) {
        let mut latin1 = latin1.clone();
        latin1.decompress_text_with_limit(MAX_TEXT).ok()?;
        return latin1.get_text().ok();
    }
    info.uncompressed_latin1_text.iter().rfind(|chunk| chunk.keyword == keyword).map(|chunk| chunk.text.clone())
}

/// A description of a file without [`PngInfo`], if it names its software.
pub fn stranger(file: &[u8]) -> Option<String> {
    let Some(info) = info(file) else { return Some("is no PNG, or a damaged one".into()) };
    let has = |keyword: &str| text(&info, keyword).is_some();
    if has("nextflow") {
        return Some("has settings that this version of nextflow cannot read".into());
    }
    let parameters = text(&info, "parameters");
    let program = match parameters.as_deref() {
        _ if has("workflow") => Some("ComfyUI"),
        _ if text(&info, "prompt").is_some_and(|json| json.trim_start().starts_with('{')) => Some("ComfyUI"),
        _ if has("invokeai_metadata") || has("sd-metadata") || has("Dream") => Some("InvokeAI"),
        _ if has("fooocus_scheme") => Some("Fooocus"),
        Some(text) if text.contains("sui_image_params") => Some("SwarmUI"),
        Some(text) if text.contains("Version: nextflow") => {
            return Some("was drawn by nextflow, but its settings were taken out, all but A1111's parameters".into());
        }
        Some(_) => Some("A1111's web UI or one that writes its parameters"),
        None => None,
    };
    if let Some(program) = program {
        return Some(format!("was drawn by another program, {program}"));
    }
    let software = text(&info, "Software")?.chars().take(60).collect::<String>();
    Some(format!("was written by another program, {software}, and holds no nextflow settings"))
}

/// The largest PNG that [`is_whole_png`] reads, in bytes.
const MAX_PNG: u64 = 1 << 30;

/// Whether a file is a PNG from its first chunk to its last, with the right check sums.
pub fn is_whole_png(path: &Path) -> bool {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path).and_then(|file| file.take(MAX_PNG).read_to_end(&mut bytes))?;
        io::Result::Ok(bytes)
    };
    let Ok(bytes) = read() else { return false };
    let Some(mut rest) = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n") else { return false };
    let (mut first, mut pixels) = (true, false);
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        // Its name and its data.
        let Some((chunk, after)) = after.split_at_checked(u32::from_be_bytes(*length) as usize + 4) else {
            return false;
        };
        let Some((sum, after)) = after.split_first_chunk::<4>() else { return false };
        if crc32fast::hash(chunk) != u32::from_be_bytes(*sum) || first != chunk.starts_with(b"IHDR") {
            return false;
        }
        pixels |= chunk.starts_with(b"IDAT");
        if chunk == b"IEND" {
            return pixels;
        }
        (rest, first) = (after, false);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::Sampling;

    fn settings(prompt: &str) -> PngInfo {
        let sampling = Sampling { cfg: 2.5, top_k: Some(100), top_p: 0.95, ..Sampling::default() };
        let (prompt, negative) = (prompt.into(), None);
        let job = Job { prompt, negative, scales: vec![(1, 1), (1, 2)], sampling, seed: 42 };
        PngInfo::new(&job, "nano", (32, 16))
    }

    #[test]
    fn settings_come_back_from_the_png() {
        let image = RgbImage::from_fn(32, 16, |x, y| image::Rgb([x as u8, y as u8, 7]));
        for prompt in ["a red apple", "un café", "红苹果 \u{1b}[1m", "two\nlines, \"quoted\": yes"] {
            let settings = settings(prompt);
            let png = encode(&image, &settings).unwrap();
            assert_eq!(png, encode(&image, &settings).unwrap());
            assert_eq!(image::load_from_memory(&png).unwrap().to_rgb8(), image);
            assert_eq!(PngInfo::of_png(&png).unwrap(), settings);
            let parameters = text(&info(&png).unwrap(), "parameters").unwrap();
            let rest = "\nSteps: 2, Sampler: NextFlow, CFG scale: 2.5, Seed: 42, Size: 32x16, Model: nano, ";
            assert!(parameters.starts_with(&format!("{prompt}{rest}")), "{parameters}");
        }
        assert!(PngInfo::of_png(b"no PNG").is_none());
        // What is compressed is read up to a megabyte.
        for (length, read) in [(1 << 16, true), (1 << 24, false)] {
            let mut settings = settings("");
            settings.prompt = "猫".repeat(length / 3);
            let mut png = Vec::new();
            let mut writer = png::Encoder::new(&mut png, 1, 1).write_header().unwrap();
            let mut chunk = png::text_metadata::ITXtChunk::new("nextflow", serde_json::to_string(&settings).unwrap());
            chunk.compressed = true;
            writer.write_text_chunk(&chunk).unwrap();
            writer.write_image_data(&[0]).unwrap();
            writer.finish().unwrap();
            assert_eq!(PngInfo::of_png(&png).is_some(), read);
        }
        let mut plain = Vec::new();
        image.write_to(&mut io::Cursor::new(&mut plain), image::ImageFormat::Png).unwrap();
        assert!(PngInfo::of_png(&plain).is_none());
    }
    /// A PNG of one pixel with texts before its pixels and behind them: the kind of a chunk, its
    /// keyword and its text.
    fn with(before: &[(char, &str, &str)], behind: &[(char, &str, &str)]) -> Vec<u8> {
        use png::text_metadata::{ITXtChunk, TEXtChunk, ZTXtChunk};
        let mut png = Vec::new();
        let mut writer = png::Encoder::new(&mut png, 1, 1).write_header().unwrap();
        let write = |writer: &mut png::Writer<_>, chunks: &[(char, &str, &str)]| {
            for (kind, key, text) in chunks {
                let mut utf8 = ITXtChunk::new(*key, *text);
                utf8.compressed = true;
                let written = match kind {
                    't' => writer.write_text_chunk(&TEXtChunk::new(*key, *text)),
                    'z' => writer.write_text_chunk(&ZTXtChunk::new(*key, *text)),
                    _ => writer.write_text_chunk(&utf8),
                };
                written.unwrap();
            }
        };
        write(&mut writer, before);
        writer.write_image_data(&[0]).unwrap();
        write(&mut writer, behind);
        writer.finish().unwrap();
        png
    }

    #[test]
    fn text_is_found_compressed_and_behind_the_pixels() {
        let settings = settings("un café");
        let json = serde_json::to_string(&settings).unwrap();
        for kind in ['t', 'z', 'i'] {
            let chunk = [(kind, "nextflow", &*json)];
            assert_eq!(PngInfo::of_png(&with(&chunk, &[])).unwrap(), settings);
            assert_eq!(PngInfo::of_png(&with(&[], &chunk)).unwrap(), settings);
        }
        assert!(PngInfo::of_png(&with(&[('z', "nextflow", &" ".repeat(1 << 24))], &[])).is_none());
    }

    #[test]
    fn other_programs_are_named() {
        let says = |texts: &[(&str, &str)]| {
            let texts: Vec<_> = texts.iter().map(|(key, text)| ('t', *key, *text)).collect();
            stranger(&with(&texts, &[])).unwrap_or_default()
        };
        for (texts, part) in [
            (&[("prompt", "{\"3\": {}}"), ("workflow", "{}")][..], "ComfyUI"),
            (&[("parameters", "a cat\nSteps: 20, Sampler: Euler a")], "A1111"),
            (&[("parameters", "a cat\nSteps: 8, Sampler: NextFlow, Version: nextflow 0.1.0")], "were taken out"),
            (&[("invokeai_metadata", "{}")], "InvokeAI"),
            (&[("Software", "GIMP 3.0")], "was written by another program, GIMP 3.0"),
            (&[("nextflow", "{\"version\": \"9\"}")], "this version of nextflow cannot read"),
        ] {
            assert!(says(texts).contains(part), "{texts:?}: {}", says(texts));
        }
        assert_eq!(says(&[("Comment", "mine")]), "");
        assert!(stranger(b"\xff\xd8\xff").unwrap().contains("no PNG"));
    }

    #[test]
    fn a_whole_png_is_known_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let whole = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            is_whole_png(&path)
        };
        let png = encode(&RgbImage::new(16, 16), &settings("a cat")).unwrap();
        assert!(whole(&png) && whole(&[&png[..], b"more"].concat()));
        assert!((0..png.len()).all(|cut| !whole(&png[..cut])));
        for at in (0..png.len()).step_by(7) {
            let mut damaged = png.clone();
            damaged[at] ^= 0x10;
            assert!(!whole(&damaged), "{at}");
        }
        assert!(!whole(b"<html>") && !is_whole_png(folder.path()) && !is_whole_png(&folder.path().join("none")));
    }
}
