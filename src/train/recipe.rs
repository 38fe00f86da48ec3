//! The recipe of a run: shapes and choices of every part, checked before training.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::backbone::BackboneConfig;
use crate::dataset::SIDE;
use crate::error::{Error, Result};
use crate::generate::{ConversationConfig, ModelConfig, PromptConfig, Sampling, schedule};
use crate::refiner::RefinerConfig;
use crate::tokenizer::{CnnConfig, SelfCorrection, TokenizerConfig};

/// Shapes and choices of every trained part.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model's name, as it is stored with every image.
    #[serde(default = "nano")]
    pub name: String,
    /// It learns to answer with an image of its own accord, as dialogues teach it.
    #[serde(default = "yes")]
    pub draws: bool,
    /// Seed of all initial weights and, with the name of a part of the training, of all that part
    /// draws.
    pub seed: u64,
    /// The image tokenizer as its first two stages train it.
    pub tokenizer: TokenizerConfig,
    /// The pixel decoder of the third stage; it begins as the one of the second, with blocks that
    /// do nothing yet.
    pub decoder_final: CnnConfig,
    /// The transformer.
    pub backbone: BackboneConfig,
    /// Scales of an image.
    pub scales: usize,
    /// Draws among the nearest codes while encoding for the transformer.
    pub self_correction: SelfCorrection,
    /// Exponent of the scale weights 1 / (h w)^alpha.
    pub scale_reweight: f64,
    /// The refiner.
    #[serde(default = "nano_refiner")]
    pub refiner: RefinerConfig,
}

fn nano_refiner() -> RefinerConfig {
    // Not by way of a whole recipe, whose default this is.
    let nano: serde_json::Value = serde_json::from_str(NANO).expect("nano's recipe");
    serde_json::from_value(nano["refiner"].clone()).expect("nano's refiner")
}

fn nano() -> String {
    "nano".into()
}

fn yes() -> bool {
    true
}

/// The recipe of the embedded model.
const NANO: &str = include_str!("nano.json");

impl Recipe {
    /// Reads and checks the recipe in the file `path`; where there is none, nano's is written
    /// there.
    ///
    /// Errors: usage, for a broken recipe, and for parts that do not fit each other.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            std::fs::write(path, NANO)?;
        }
        let bad = |what: String| {
            Error::usage(format!("{}: {what}", path.display()))
                .hint("correct it, or name another folder, where nano is trained: --run FOLDER")
        };
        let recipe: Self = serde_json::from_str(&std::fs::read_to_string(path)?).map_err(|e| bad(e.to_string()))?;
        recipe.check().map_err(bad)?;
        Ok(recipe)
    }

    /// The recipe of the embedded model.
    #[cfg(test)]
    pub(super) fn nano() -> Self {
        serde_json::from_str(NANO).expect("nano's recipe")
    }

    /// The image tokenizer as the third stage trains it.
    pub fn tokenizer_final(&self) -> TokenizerConfig {
        TokenizerConfig { decoder: self.decoder_final.clone(), ..self.tokenizer.clone() }
    }

    /// The config of the model with one of the image tokenizers.
    pub fn model(&self, tokenizer: TokenizerConfig, sampling: Sampling) -> ModelConfig {
        ModelConfig {
            name: self.name.clone(),
            scales: self.scales,
            grids: Vec::new(),
            sampling,
            conversation: ConversationConfig { system: String::new(), draws: self.draws, ..Default::default() },
            prompt: PromptConfig::default(),
            backbone: self.backbone.clone(),
            tokenizer,
            refiner: None,
        }
    }

    /// Errors: a value that would stop the training later, or waste it, as one sentence.
    fn check(&self) -> Result<(), String> {
        if self.backbone.code_positions.is_some() {
            return Err("backbone.code_positions cannot be trained: spatial_extent gives the positions of codes".into());
        }
        for tokenizer in [self.tokenizer.clone(), self.tokenizer_final()] {
            self.model(tokenizer, Sampling::default()).check()?;
        }
        let (encoder, semantic) = (self.tokenizer.encoder.stride(), self.tokenizer.semantic.patch_size);
        let grid = schedule::nearest(1.0).prefix(self.scales).last().map_or(0, |grid| grid.0);
        for (part, cell) in [("encoder", encoder), ("semantic", semantic)] {
            if grid * cell != SIDE {
                let image = format!("a square of {} scales has {grid} codes a side", self.scales);
                return Err(format!("{image}, of {cell} pixels by tokenizer.{part}, and pictures have {SIDE} pixels"));
            }
        }
        self.refiner.check()?;
        match self.self_correction.fraction {
            share if (0.0..=1.0).contains(&share) => Ok(()),
            share => Err(format!("self_correction.fraction {share} is not from 0 to 1")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_recipe_is_refused_when_it_is_opened_and_stays() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("recipe.json");
        Recipe::open(&path)?;
        let nano = std::fs::read_to_string(&path)?;
        for (good, bad, told) in [
            ("\"seed\"", "\"sede\"", "`sede`"),
            ("\"codebook_size\": 2048", "\"codebook_size\": 1024", "1024 codes"),
            ("\"code_dim\": 24", "\"code_dim\": 16", "16 channels"),
            ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "3 key-value heads"),
            ("\"ch_mult\": [1, 2, 2], \"num_res_blocks\": 2", "\"ch_mult\": [1, 2], \"num_res_blocks\": 2", "stride"),
            ("\"spatial_extent\": 64.0", "\"code_positions\": 204", "code_positions"),
            ("\"max_scales\": 18", "\"max_scales\": 8", "max_scales of 9"),
            ("\"scales\": 8", "\"scales\": 9", "9 scales"),
            ("\"patch_size\": 16", "\"patch_size\": 8", "tokenizer.semantic"),
            ("\"fraction\": 0.6", "\"fraction\": 60.0", "fraction 60"),
        ] {
            let text = nano.replacen(good, bad, 1);
            assert_ne!(text, nano, "{good}");
            std::fs::write(&path, &text)?;
            let error = Recipe::open(&path).unwrap_err();
            assert!(error.message.contains(told), "{}", error.message);
            assert_eq!((error.exit_code(), error.hint.is_some()), (2, true));
            assert_eq!(std::fs::read_to_string(&path)?, text);
        }
        Ok(())
    }
}
