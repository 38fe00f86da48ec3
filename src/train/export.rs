//! A run's weights as a checkpoint folder that `gen --model` reads and the binary embeds.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;

use super::run::Run;
use crate::checkpoint::{IMAGE_TOKENIZER, Inventory, REFINER, Source, TRANSFORMER, Weights, load, quantise};
use crate::error::{Error, Result};
use crate::generate::{ModelConfig, Sampling};
use crate::io::output;
use crate::tokenizer::{ImageTokenizer, TokenizerConfig};

/// The file of the text tokenizer.
const TEXT: &str = "tokenizer.json";

/// Writes `config.json`, `tokenizer.json`, `model.safetensors`, `image_tokenizer.safetensors` and,
/// if it was trained, `refiner.safetensors` (matrices as bytes) to `out`. The decoder is the third
/// stage's if its weights are there. Of a run that has trained nothing but a refiner, it is added
/// to the model that is in `out`. Whether images are refined by default (`sampling.refine`) is not
/// decided here.
///
/// Errors: [`crate::error::Kind::Model`] for a run without one of these files.
pub fn export(run: &Run, out: &Path, sampling: Sampling) -> Result<()> {
    let refines = run.file(REFINER).exists();
    if refines && ![TRANSFORMER, IMAGE_TOKENIZER].iter().any(|name| run.file(name).exists()) {
        return add_refiner(run, out);
    }
    if let Some(path) = [TEXT, TRANSFORMER, IMAGE_TOKENIZER].map(|name| run.file(name)).iter().find(|p| !p.exists()) {
        return Err(Error::model(format!("{} is missing", path.display())).hint("nextflow train --help"));
    }
    std::fs::create_dir_all(out)?;
    for name in [TRANSFORMER, IMAGE_TOKENIZER].into_iter().chain(refines.then_some(REFINER)) {
        write_int8(&run.file(name), &out.join(name))?;
    }
    let mut config = run.recipe.model(tokenizer_config(run)?, sampling);
    if refines {
        config.refiner = Some(run.recipe.refiner.clone());
    }
    write_config(&config, out)?;
    std::fs::copy(run.file(TEXT), out.join(TEXT))?;
    Ok(())
}

/// The shape of the run's image tokenizer: with the third stage's decoder if its weights are there.
fn tokenizer_config(run: &Run) -> Result<TokenizerConfig> {
    let (last, requested) = (run.recipe.tokenizer_final(), Weights::inventory());
    ImageTokenizer::load(&requested, &last)?;
    let has_last = Inventory::open(&run.file(IMAGE_TOKENIZER))?.compare(&requested).is_complete();
    Ok(if has_last { last } else { run.recipe.tokenizer.clone() })
}

/// The run's image tokenizer as it is exported.
pub fn image_tokenizer(run: &Run) -> Result<ImageTokenizer> {
    let weights = Weights::from_safetensors(&[run.file(IMAGE_TOKENIZER)], DType::F32, &run.device)?;
    Ok(ImageTokenizer::load(&weights, &tokenizer_config(run)?)?)
}

/// Adds the refiner to the model in `out`.
fn add_refiner(run: &Run, out: &Path) -> Result<()> {
    let mut config = ModelConfig::read(&Source::Folder(out.into()))?;
    config.refiner = Some(run.recipe.refiner.clone());
    write_int8(&run.file(REFINER), &out.join(REFINER))?;
    write_config(&config, out)
}

fn write_config(config: &ModelConfig, out: &Path) -> Result<()> {
    let json = serde_json::to_string_pretty(config).map_err(|e| Error::usage(e.to_string()))?;
    output::write(&out.join("config.json"), (json + "\n").as_bytes())
}

/// Copies weights, with large matrices and filters as bytes.
fn write_int8(from: &Path, to: &Path) -> Result<()> {
    let mut small = BTreeMap::new();
    for (key, tensor) in load(from)? {
        // Codes are compared by distance, so the codebook keeps more digits.
        if tensor.rank() > 1 && tensor.elem_count() > 4096 && !key.starts_with("quantize.") {
            quantise(&mut small, key, &tensor)?;
        } else {
            small.insert(key, tensor);
        }
    }
    crate::checkpoint::save(to, small, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::Backbone;

    #[test]
    fn the_decoder_is_the_one_whose_weights_are_there() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut run = crate::train::tests::run(&folder)?;
        run.recipe.name = "pico".into();
        let (_, weights) = run.load(&[], |w| Backbone::load(w, &run.recipe.backbone))?;
        run.save(TRANSFORMER, "full", &weights)?;
        std::fs::write(run.file(TEXT), include_bytes!("../../assets/nano/tokenizer.json"))?;
        for (stage, tokenizer) in [("joint", run.recipe.tokenizer.clone()), ("decoder", run.recipe.tokenizer_final())] {
            let (_, weights) = run.load(&[], |w| ImageTokenizer::load(w, &tokenizer))?;
            run.save(IMAGE_TOKENIZER, stage, &weights)?;
            let out = folder.path().join(stage);
            export(&run, &out, Sampling::default())?;
            let source = Source::Folder(out);
            let config = ModelConfig::read(&source)?;
            assert_eq!((config.name.as_str(), &config.tokenizer), ("pico", &tokenizer));
            let (_, fit) = config.compare(&source)?;
            assert!(fit.is_complete() && fit.unknown.is_empty(), "{fit:?}");
        }
        Ok(())
    }
}
