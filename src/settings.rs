//! What decided an image, as text in its PNG.

use std::io;

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::generate::{Guidance, Job};

/// Everything that decided an image; the `nextflow` text chunk of its PNG, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// What was asked for.
    pub prompt: String,
    /// What guidance led away from, if that was not the model's own.
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
    /// What `cfg` says, if not what VAR's does.
    #[serde(default, skip_serializing_if = "is_default")]
    pub guidance: Guidance,
    /// Guidance of every scale, in place of `cfg`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cfg_scales: Vec<f64>,
    /// The temperature of every scale, in place of `temperature`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub temperature_scales: Vec<f64>,
    /// Where within the network guidance took place, if it did: so many blocks before the end.
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
    /// What the model said first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thought: Option<String>,
    /// The files of the images that it changes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    /// Guidance led away from any image, not from one with the same sources.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub free: bool,
    /// It belongs to a conversation, which is not told.
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

impl Settings {
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
            top_k: job.sampling.top_k,
            top_p: job.sampling.top_p,
            cfg_until: job.sampling.cfg_until,
            draft: Some(job.sampling.draft).filter(|&n| n > 0),
            passes: Some(job.sampling.passes(1) as u8).filter(|&n| n > 1),
            thought: None,
            sources: Vec::new(),
            free: false,
            conversation: false,
            model: model.into(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Those in the bytes of a PNG that [`encode`] made; nothing in others.
    pub fn of_png(png: &[u8]) -> Option<Self> {
        serde_json::from_str(&text(png, "nextflow")?).ok()
    }

    /// The same in the form that other tools read: the prompt, then one line of `Key: value` pairs (A1111).
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

/// The PNG of `image`, with `settings` in the text chunks `parameters` and `nextflow`. Same input, same bytes.
pub fn encode(image: &RgbImage, settings: &Settings) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::new(Kind::Failure, format!("cannot encode the PNG: {e}"));
    let json = serde_json::to_string(settings).map_err(|e| failed(&e))?;
    let write = || -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        // The usual level takes 94 ms in place of 3 for 768x512 pixels, and makes no smaller files of what we draw.
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

/// The text of a keyword before the pixels of a PNG, if there is one and it is not longer than [`MAX_TEXT`].
fn text(png: &[u8], keyword: &str) -> Option<String> {
    let reader = png::Decoder::new(io::Cursor::new(png)).read_info().ok()?;
    let latin1 = || reader.info().uncompressed_latin1_text.iter().rfind(|chunk| chunk.keyword == keyword);
    // Others are left compressed: a few megabytes may hold some billions.
    let Some(utf8) = reader.info().utf8_text.iter().rfind(|chunk| chunk.keyword == keyword) else {
        return latin1().map(|chunk| chunk.text.clone());
    };
    let mut utf8 = utf8.clone();
    utf8.decompress_text_with_limit(MAX_TEXT).ok()?;
    utf8.get_text().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::Sampling;

    fn settings(prompt: &str) -> Settings {
        let sampling = Sampling { cfg: 2.5, top_k: Some(100), top_p: 0.95, ..Sampling::default() };
        let (prompt, negative) = (prompt.into(), None);
        let job = Job { prompt, negative, scales: vec![(1, 1), (1, 2)], sampling, seed: 42 };
        Settings::new(&job, "nano", (32, 16))
    }

    #[test]
    fn settings_come_back_from_the_png() {
        let image = RgbImage::from_fn(32, 16, |x, y| image::Rgb([x as u8, y as u8, 7]));
        for prompt in ["a red apple", "un café", "红苹果 \u{1b}[1m", "two\nlines, \"quoted\": yes"] {
            let settings = settings(prompt);
            let png = encode(&image, &settings).unwrap();
            assert_eq!(png, encode(&image, &settings).unwrap());
            assert_eq!(image::load_from_memory(&png).unwrap().to_rgb8(), image);
            assert_eq!(Settings::of_png(&png).unwrap(), settings);
            let parameters = text(&png, "parameters").unwrap();
            let rest = "\nSteps: 2, Sampler: NextFlow, CFG scale: 2.5, Seed: 42, Size: 32x16, Model: nano, ";
            assert!(parameters.starts_with(&format!("{prompt}{rest}")), "{parameters}");
        }
        assert!(Settings::of_png(b"no PNG").is_none());
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
            assert_eq!(Settings::of_png(&png).is_some(), read);
        }
        let mut plain = Vec::new();
        image.write_to(&mut io::Cursor::new(&mut plain), image::ImageFormat::Png).unwrap();
        assert!(Settings::of_png(&plain).is_none());
    }
}
