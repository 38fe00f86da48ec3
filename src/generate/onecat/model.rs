//! A loaded model. [`Reading`] is loaded for the prompts and dropped before [`Drawing`] is loaded.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::rows::{Guided, OneCatRows};
use super::setup::{AROUND, KEPT, OneCatSetup};
use crate::backbone::Cache;
use crate::checkpoint::{IMAGE_TOKENIZER, Source, TRANSFORMER, WeightType, Weights};
use crate::error::{Error, Kind, Result};
use crate::generate::next_input::NextInput;
use crate::generate::{Batch, Event, Observer, draw_codes, notify};
use crate::memory;
use crate::onecat::prompt::{Marks, Row};
use crate::onecat::{Drawing, Reading, ReadingParts, Trunk, patches};
use crate::text::Text;
use crate::tokenizer::{Code, ImageDecoder};

/// Transformer and image tokenizer, and the caches of the prompts.
#[derive(Debug)]
pub struct OneCatModel {
    setup: OneCatSetup,
    trunk: Trunk,
    drawing: Drawing,
    images: ImageDecoder,
    prefixes: Mutex<Prefixes>,
    /// Time of the prompts, with the loading of [`Reading`].
    reading: Duration,
}

/// Prompts, each with its KV cache.
#[derive(Debug)]
struct Prefixes {
    known: BTreeMap<Row, Cache>,
    /// Loaded again for later prompts, and then kept.
    reading: Option<Reading>,
    text: Text,
    marks: Marks,
    /// Features (tokens, hidden) of the source of an edit.
    picture: Option<Tensor>,
    source: Source,
    device: Device,
    weights: Option<WeightType>,
}

impl Prefixes {
    /// Loads the part that reads prompts and, with `pictures`, the source of an edit.
    fn load(&self, setup: &OneCatSetup, pictures: bool) -> Result<Reading> {
        let parts = ReadingParts { pictures, head: false };
        load(&self.source, &self.device, self.weights, |w| Reading::load(w, &setup.transformer, parts))
    }

    /// Reads the rows that are not known.
    fn read(&mut self, setup: &OneCatSetup, trunk: &Trunk, rows: &[Row]) -> Result<()> {
        if rows.iter().all(|row| self.known.contains_key(row)) {
            return Ok(());
        }
        if self.reading.is_none() {
            self.reading = Some(self.load(setup, self.picture.is_some())?);
        }
        let Some(reading) = &self.reading else { return Ok(()) };
        if self.known.values().map(Cache::len).sum::<usize>() > KEPT {
            self.known.clear();
        }
        for row in rows {
            if !self.known.contains_key(row) {
                let pieces = self.marks.prompt(&self.text, &setup.transformer.system, row)?;
                let cache = reading.prefix(trunk, &pieces, self.picture.as_ref())?;
                self.known.insert(row.clone(), cache);
            }
        }
        Ok(())
    }

    /// Whether the caches of all rows are small enough to be kept.
    fn are_few(&self, rows: &[Row]) -> Result<bool> {
        let mut tokens = 0;
        for row in rows {
            if let Row::Draw(prompt) | Row::Edit(prompt) = row {
                tokens += self.text.encode(prompt)?.len() + AROUND;
            }
        }
        Ok(tokens <= KEPT)
    }
}

fn load<T>(
    source: &Source,
    device: &Device,
    weights: Option<WeightType>,
    build: impl Fn(&Weights) -> candle_core::Result<T>,
) -> Result<T> {
    let (dtype, matrices) = source.placed(TRANSFORMER, weights, device);
    source.load(TRANSFORMER, dtype, device, |w| build(&w.with_matrices(matrices)))
}

impl OneCatModel {
    /// Reads `prompts` and loads the part that draws onto `device`, the transformer as `weights`,
    /// by default f32 on a CPU and bf16 elsewhere. With an `edit`, a picture that is edited into
    /// images of so many scales, the prompts are instructions.
    ///
    /// Errors: files that are missing, broken or do not fit, and a picture that is too narrow.
    pub fn load(
        source: &Source,
        setup: &OneCatSetup,
        (device, weights): (&Device, Option<WeightType>),
        prompts: &[&str],
        edit: Option<(&RgbImage, usize)>,
    ) -> Result<Self> {
        let started = Instant::now();
        let (text, marks) = setup.read_text(source)?;
        let (source, device) = (source.clone(), device.clone());
        let trunk = load(&source, &device, weights, |w| Trunk::load(w, &setup.transformer))?;
        let mut prefixes =
            Prefixes { known: BTreeMap::new(), reading: None, text, marks, picture: None, source, device, weights };
        let reading = prefixes.load(setup, edit.is_some())?;
        let mut rows: Vec<Row> = prompts.iter().map(|prompt| Row::Draw(prompt.to_string())).collect();
        match edit {
            Some((image, scales)) => {
                let patches = patches::reference(&setup.transformer, image, scales)?;
                prefixes.picture = Some(reading.features(&[patches])?);
                rows.extend(prompts.iter().map(|prompt| Row::Edit(prompt.to_string())));
                rows.push(Row::Nothing);
            }
            None => rows.push(Row::Draw(String::new())),
        }
        prefixes.reading = Some(reading);
        if prefixes.are_few(&rows)? {
            prefixes.read(setup, &trunk, &rows)?;
            prefixes.reading = None;
            memory::give_back();
        }
        let reading = started.elapsed();
        let Prefixes { source, device, .. } = &prefixes;
        let drawing = load(source, device, weights, |w| Drawing::load(w, &setup.transformer))?;
        let images = |w: &Weights| ImageDecoder::load_bits(w, &setup.tokenizer);
        let images = source.load(IMAGE_TOKENIZER, DType::F32, device, images)?;
        Ok(Self { setup: setup.clone(), trunk, drawing, images, prefixes: Mutex::new(prefixes), reading })
    }

    /// Time of the prompts, with the loading of [`Reading`].
    pub fn reading(&self) -> Duration {
        self.reading
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
        let mut rows: Vec<Row> = prompts.iter().map(|prompt| Row::Draw(prompt.to_string())).collect();
        if batch.sampling.guided_scales(batch.scales.len()) > 0 {
            rows.extend(vec![Row::Draw(negative.unwrap_or_default().into()); prompts.len()]);
        }
        self.draw(&rows, prompts.len(), Guided::Text, batch, observe)
    }

    /// Edits the loaded picture by each of the instructions, with the seed at its index.
    ///
    /// Errors: as [`crate::generate::Model::draw`], and usage without a picture.
    pub fn edit_batch(&self, instructions: &[&str], batch: Batch, observe: Observer) -> Result<Vec<RgbImage>> {
        let weight = batch.sampling.image_cfg();
        let rows = |row: fn(String) -> Row| instructions.iter().map(move |text| row(text.to_string()));
        let mut all: Vec<Row> = rows(Row::Edit).collect();
        if weight != 0.0 {
            all.extend(rows(Row::Draw));
        }
        if batch.sampling.guided_scales(batch.scales.len()) > 0 {
            all.extend(vec![Row::Nothing; instructions.len()]);
        }
        self.draw(&all, instructions.len(), Guided::Edit(weight), batch, observe)
    }

    fn draw(
        &self,
        rows: &[Row],
        images: usize,
        guided: Guided,
        batch: Batch,
        observe: Observer,
    ) -> Result<Vec<RgbImage>> {
        let ImageDecoder::Bits(bits) = &self.images else {
            return Err(Error::model("OneCAT draws bits, its image tokenizer has a codebook"));
        };
        let scales = batch.scales;
        let (rows, hidden, tokens) = {
            let mut prefixes = self.prefixes.lock().unwrap_or_else(PoisonError::into_inner);
            prefixes.read(&self.setup, &self.trunk, rows)?;
            let known = rows.iter().map(|row| prefixes.known.get(row));
            let known = known.collect::<Option<Vec<&Cache>>>();
            let known = known.ok_or_else(|| Error::new(Kind::Failure, "a prompt was not read"))?;
            let tokens = known[..images].iter().map(|cache| cache.len() - 1).sum();
            let (rows, hidden) = OneCatRows::start(&self.trunk, &self.drawing, &known, images, guided, scales)?;
            (rows, hidden, tokens)
        };
        notify(observe, Event::Prompt { tokens })?;
        let images = draw_codes(rows, hidden, NextInput::of_bits(bits.quantizer(), scales), batch, observe)?;
        notify(observe, Event::Decode)?;
        images.iter().map(|codes| self.decode(codes, scales)).collect()
    }
}
