//! A run's weights as a checkpoint folder that `gen --model` reads and the binary embeds.

use std::collections::BTreeMap;
use std::path::Path;

use super::run::Run;
use super::tokenizer::Stage;
use crate::checkpoint::{load, quantise};
use crate::error::{Error, Result};
use crate::generate::Sampling;

/// Writes `config.json`, `tokenizer.json`, `model.safetensors` and `image_tokenizer.safetensors` (matrices as
/// bytes) to `out`.
/// The decoder is the third stage's if that has run.
pub fn export(run: &Run, out: &Path, sampling: Sampling) -> Result<()> {
    std::fs::create_dir_all(out)?;
    for name in ["model.safetensors", "image_tokenizer.safetensors"] {
        let path = run.file(name);
        if !path.exists() {
            return Err(Error::model(format!("{} is missing", path.display())).hint("nextflow train --help"));
        }
        let mut small = BTreeMap::new();
        for (key, tensor) in load(&path)? {
            // Codes are compared by distance, so the codebook keeps more digits.
            if tensor.rank() > 1 && tensor.elem_count() > 4096 && !key.starts_with("quantize.") {
                quantise(&mut small, key, &tensor)?;
            } else {
                small.insert(key, tensor);
            }
        }
        crate::checkpoint::save(&out.join(name), small, None)?;
    }
    let last = Stage::Decoder.state(run).exists();
    let tokenizer = if last { run.recipe.tokenizer_final() } else { run.recipe.tokenizer.clone() };
    let config = run.recipe.model(tokenizer, sampling);
    let json = serde_json::to_string_pretty(&config).map_err(|e| Error::usage(e.to_string()))?;
    crate::checkpoint::write(&out.join("config.json"), (json + "\n").as_bytes())?;
    std::fs::copy(run.file("tokenizer.json"), out.join("tokenizer.json"))?;
    Ok(())
}
