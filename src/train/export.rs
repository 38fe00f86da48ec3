//! A run's weights as a checkpoint folder that `gen --model` reads and the binary embeds.

use std::collections::BTreeMap;
use std::path::Path;

use super::run::Run;
use crate::checkpoint::{IMAGE_TOKENIZER, Inventory, TRANSFORMER, Weights, load, quantise};
use crate::error::{Error, Result};
use crate::generate::Sampling;
use crate::io::output;
use crate::tokenizer::ImageTokenizer;

/// The file of the text tokenizer.
const TEXT: &str = "tokenizer.json";

/// Writes `config.json`, `tokenizer.json`, `model.safetensors` and `image_tokenizer.safetensors` (matrices as
/// bytes) to `out`.
/// The decoder is the third stage's if its weights are there.
///
/// Errors: [`crate::error::Kind::Model`] for a run without one of these files.
pub fn export(run: &Run, out: &Path, sampling: Sampling) -> Result<()> {
    if let Some(path) = [TEXT, TRANSFORMER, IMAGE_TOKENIZER].map(|name| run.file(name)).iter().find(|p| !p.exists()) {
        return Err(Error::model(format!("{} is missing", path.display())).hint("nextflow train --help"));
    }
    std::fs::create_dir_all(out)?;
    for name in [TRANSFORMER, IMAGE_TOKENIZER] {
        let mut small = BTreeMap::new();
        for (key, tensor) in load(&run.file(name))? {
            // Codes are compared by distance, so the codebook keeps more digits.
            if tensor.rank() > 1 && tensor.elem_count() > 4096 && !key.starts_with("quantize.") {
                quantise(&mut small, key, &tensor)?;
            } else {
                small.insert(key, tensor);
            }
        }
        crate::checkpoint::save(&out.join(name), small, None)?;
    }
    let (last, asked) = (run.recipe.tokenizer_final(), Weights::inventory());
    ImageTokenizer::load(&asked, &last)?;
    let has_last = Inventory::open(&run.file(IMAGE_TOKENIZER))?.compare(&asked).is_complete();
    let tokenizer = if has_last { last } else { run.recipe.tokenizer.clone() };
    let config = run.recipe.model(tokenizer, sampling);
    let json = serde_json::to_string_pretty(&config).map_err(|e| Error::usage(e.to_string()))?;
    output::write(&out.join("config.json"), (json + "\n").as_bytes())?;
    std::fs::copy(run.file(TEXT), out.join(TEXT))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::Backbone;
    use crate::checkpoint::Source;
    use crate::generate::ModelConfig;

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
