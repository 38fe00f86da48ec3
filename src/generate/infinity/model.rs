//! A loaded model. Its text encoder is loaded for the prompts and dropped before the transformer
//! comes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::features::FeatureStore;
use super::files::no_text_encoder;
use super::lattice;
use super::rows::InfinityRows;
use super::setup::InfinitySetup;
use crate::checkpoint::{IMAGE_TOKENIZER, Source, TRANSFORMER, WeightType, Weights};
use crate::error::{Error, Kind, Result};
use crate::generate::next_input::NextInput;
use crate::generate::{Batch, Event, Observer, draw_codes, notify};
use crate::infinity::Infinity;
use crate::memory;
use crate::t5::TextEncoder;
use crate::tokenizer::{Code, ImageDecoder};

/// Transformer and image tokenizer, and the features of the prompts.
#[derive(Debug)]
pub struct InfinityModel {
    setup: InfinitySetup,
    transformer: Infinity,
    images: ImageDecoder,
    texts: Mutex<Texts>,
    /// How long the text encoder took, its loading among it.
    encoding: Duration,
}

/// Features of prompts, (tokens, text_width) each.
#[derive(Debug)]
struct Texts {
    known: BTreeMap<String, Tensor>,
    /// Loaded again for later prompts, and kept in memory.
    encoder: Option<TextEncoder>,
    source: Source,
    device: Device,
    weights: Option<WeightType>,
    store: Option<FeatureStore>,
    width: usize,
}

impl Texts {
    /// Makes sure that the features of prompts are known. With `last` no more are expected: the
    /// encoder goes.
    fn encode(&mut self, setup: &InfinitySetup, prompts: &[&str], last: bool) -> Result<()> {
        let missing = |known: &BTreeMap<String, Tensor>| -> Vec<String> {
            let mut missing: Vec<&str> =
                prompts.iter().copied().filter(|prompt| !known.contains_key(*prompt)).collect();
            missing.sort_unstable();
            missing.dedup();
            missing.into_iter().map(String::from).collect()
        };
        if let Some(store) = &self.store {
            let unknown = missing(&self.known);
            self.known.extend(store.read(&unknown.iter().map(String::as_str).collect::<Vec<_>>(), self.width)?);
        }
        let unknown = missing(&self.known);
        if unknown.is_empty() {
            return Ok(());
        }
        if setup.text.is_none() {
            return Err(no_text_encoder(&self.source));
        }
        if self.encoder.is_none() {
            self.encoder = Some(TextEncoder::load(&self.source, &self.device, self.weights)?);
        }
        let Some(encoder) = &mut self.encoder else { return Ok(()) };
        let encode = |prompt: String| encoder.encode(&prompt).map(|features| (prompt, features));
        let new: BTreeMap<String, Tensor> = unknown.into_iter().map(encode).collect::<Result<_>>()?;
        if let Some(store) = &self.store {
            store.add(&new)?;
        }
        self.known.extend(new);
        if last {
            self.encoder = None;
            memory::give_back();
        }
        Ok(())
    }

    fn of(&self, prompt: &str) -> Result<Tensor> {
        let features = self.known.get(prompt).cloned();
        features.ok_or_else(|| Error::new(Kind::Failure, format!("{prompt:?} was not encoded")))
    }
}

impl InfinityModel {
    /// Encodes the `prompts`, negative ones included, and loads the drawing networks onto `device`,
    /// the transformer's blocks as `weights`, by default f32 on a CPU and bf16 elsewhere.
    /// `features` is a cache of encoded prompts, to which new ones are added.
    pub fn load(
        source: &Source,
        setup: &InfinitySetup,
        (device, weights): (&Device, Option<WeightType>),
        prompts: &[&str],
        features: Option<&Path>,
    ) -> Result<Self> {
        let mut texts = Texts {
            known: BTreeMap::new(),
            encoder: None,
            source: source.clone(),
            device: device.clone(),
            weights,
            store: features.map(FeatureStore::at),
            width: setup.transformer.text_width,
        };
        let started = Instant::now();
        texts.encode(setup, prompts, true)?;
        let encoding = started.elapsed();
        let (dtype, matrices) = source.placed(TRANSFORMER, weights, device);
        let build = |w: &Weights| Infinity::load(&w.with_matrices(matrices), &setup.transformer);
        let transformer = source.load(TRANSFORMER, dtype, device, build)?;
        let images = |w: &Weights| ImageDecoder::load_bits(w, &setup.tokenizer);
        let images = source.load(IMAGE_TOKENIZER, DType::F32, device, images)?;
        Ok(Self { setup: setup.clone(), transformer, images, texts: Mutex::new(texts), encoding })
    }

    /// How long the text encoder took for the prompts, its loading among it.
    pub fn encoding(&self) -> Duration {
        self.encoding
    }

    /// Shapes and settings.
    pub fn setup(&self) -> &InfinitySetup {
        &self.setup
    }

    /// Pixels from the codes of all scales, or of a prefix of them.
    pub fn decode(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<RgbImage> {
        self.images.decode_image(codes, scales)
    }

    /// As [`crate::generate::Model::draw_batch`].
    pub fn draw_batch(
        &self,
        prompts: &[&str],
        negative: Option<&str>,
        batch: Batch,
        observe: Observer,
    ) -> Result<Vec<RgbImage>> {
        let scales = batch.scales;
        let texts = self.texts(prompts, negative, batch)?;
        let tokens = texts[..prompts.len()].iter().map(|text| text.dims()[0]).sum();
        let ImageDecoder::Bits(bits) = &self.images else {
            return Err(Error::model("Infinity draws bits, its image tokenizer has a codebook"));
        };
        let lattice =
            lattice(scales).ok_or_else(|| Error::new(Kind::Failure, format!("{scales:?} are no scales of a ratio")))?;
        let (rows, hidden) = InfinityRows::start(&self.transformer, batch.sampling, &texts, scales, lattice)?;
        notify(observe, Event::Prompt { tokens })?;
        let images = draw_codes(rows, hidden, NextInput::of_bits(bits.quantizer(), scales), batch, observe)?;
        notify(observe, Event::Decode)?;
        images.iter().map(|codes| self.decode(codes, scales)).collect()
    }

    /// Features of the texts of all rows: the prompts', then those that guidance leads away from.
    fn texts(&self, prompts: &[&str], negative: Option<&str>, batch: Batch) -> Result<Vec<Tensor>> {
        let mut store = self.texts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let all: Vec<&str> = prompts.iter().copied().chain(negative).collect();
        store.encode(&self.setup, &all, false)?;
        let most = self.setup.transformer.max_tokens;
        let of = |prompt: &str| {
            let features = store.of(prompt)?;
            Ok(features.narrow(0, 0, features.dim(0)?.min(most))?)
        };
        let mut texts = prompts.iter().map(|prompt| of(prompt)).collect::<Result<Vec<_>>>()?;
        if batch.sampling.guided_scales(batch.scales.len()) > 0 {
            let away = match negative {
                Some(negative) => vec![of(negative)?; prompts.len()],
                None => {
                    let learned = |text: &Tensor| self.transformer.unconditional(text.dim(0)?);
                    texts.iter().map(learned).collect::<candle_core::Result<_>>()?
                }
            };
            texts.extend(away);
        }
        Ok(texts)
    }
}
