//! What `--refiner` adds to the plan of a request: size, passes, memory and downloads.

use candle_core::Device;
use serde::Serialize;

use super::download::Download;
use super::refiner::PictureRefiner;
use super::request::Request;
use crate::error::Result;
use crate::generate::{Size, cost};
use crate::z_image::{Memory, SMALLEST};

/// Tokens of the chat template around a prompt.
const TEMPLATE_TOKENS: usize = 8;

/// What a refiner adds to a plan.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Refining {
    refiner: String,
    strength: f64,
    passes: usize,
    memory: Memory,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    downloads: Vec<Download>,
    /// (width, height) of the refined image.
    #[serde(skip)]
    pub size: (u32, u32),
}

impl PictureRefiner {
    /// What refining an image takes that was drawn in (width, height) pixels, by a prompt of
    /// `text_tokens` tokens.
    pub(super) fn plan(&self, drawn: (u32, u32), asked: Size, text_tokens: usize, device: &Device) -> Result<Refining> {
        let size = self.size(drawn, asked);
        Ok(Refining {
            refiner: self.name.clone(),
            strength: self.strength,
            passes: self.config.schedule.passes(self.strength),
            memory: self.config.memory(size, text_tokens + TEMPLATE_TOKENS, device)?,
            downloads: self.downloads.clone(),
            size,
        })
    }
}

impl Request {
    /// The grids (height, width) of the images to draw. A size that only the refiner makes is drawn
    /// in the nearest ratio.
    ///
    /// Errors: usage, for a size that neither makes.
    pub fn grids(&self) -> Result<Vec<(usize, usize)>> {
        let drawn = self.config.grids(self.size, &self.sampling);
        let ratio = match self.size {
            Size::Pixels { width, height } if self.refiner.is_some() && width.min(height) >= SMALLEST.into() => {
                height as f64 / width as f64
            }
            _ => return drawn,
        };
        match drawn {
            Err(_) if (0.249..=4.001).contains(&ratio) => self.config.grids(Size::Ratio(ratio), &self.sampling),
            drawn => drawn,
        }
    }

    /// What refining images takes that are drawn in (width, height) pixels; nothing without a
    /// refiner.
    ///
    /// Errors: shapes that no network has.
    pub fn refining(&self, drawn: (u32, u32)) -> Result<Option<Refining>> {
        let plan = |refiner: &PictureRefiner| refiner.plan(drawn, self.size, self.tokens, &self.device);
        self.refiner.as_ref().map(plan).transpose()
    }

    /// The peak of the whole run, where drawing takes `peak` bytes, and a hint for where that is too
    /// much: `smaller`, if it is drawing that takes the most.
    ///
    /// Errors: as [`Self::refining`].
    pub fn limit<'a>(&self, drawn: (u32, u32), peak: u64, smaller: &'a str) -> Result<(u64, &'a str)> {
        let refining = self.refining(drawn)?.map_or(0, |refining| refining.peak());
        match refining > peak {
            true => Ok((refining, "a smaller --size, or leave out --refiner")),
            false => Ok((peak, smaller)),
        }
    }
}

impl Refining {
    /// Bytes at the peak of refining: drawing is over by then.
    pub fn peak(&self) -> u64 {
        cost::PROGRAM + self.memory.text.max(self.memory.refining)
    }

    /// The phases, by name.
    pub fn phases(&self) -> [(&'static str, u64); 2] {
        let with = |bytes: u64| bytes + cost::PROGRAM;
        [("then the refiner's text", with(self.memory.text)), ("refining", with(self.memory.refining))]
    }

    /// A line of the plan.
    pub fn line(&self) -> String {
        let mut text = format!(
            "refined by {} in {} passes (strength {})\n",
            crate::terminal::clean(&self.refiner),
            self.passes,
            self.strength
        );
        if !self.downloads.is_empty() {
            let bytes: u64 = self.downloads.iter().filter_map(|file| file.bytes).sum();
            text += &format!("{} files to download, {:.1} GB:\n", self.downloads.len(), bytes as f64 / 1e9);
            for Download { name, bytes } in &self.downloads {
                let size = bytes.map_or(String::new(), |bytes| format!(" ({:.1} MB)", bytes as f64 / 1e6));
                text += &format!("  {}{size}\n", crate::terminal::clean(name));
            }
        }
        text
    }
}
