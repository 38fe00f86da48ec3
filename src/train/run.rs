//! A training run: a folder with the recipe, the weights so far and the state to resume from.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{Device, Var};

use super::recipe::Recipe;
use crate::checkpoint::Weights;
use crate::error::{Error, Kind, Result};
use crate::rng::fnv1a;

/// Where the metadata of weights name the part of the training that they are of.
const PART: &str = "part";

/// A folder and its recipe.
pub struct Run {
    folder: PathBuf,
    /// The trained parts.
    pub recipe: Recipe,
    /// What trains.
    pub device: Device,
}

impl Run {
    /// Opens `folder`, made if need be, with the recipe in its `recipe.json`, or nano's, to train
    /// on a device.
    ///
    /// Errors: those of [`Recipe::open`].
    pub fn open(folder: &Path, device: Device) -> Result<Self> {
        // TF32 keeps 10 bits of what goes into a product; the transformer's on a CPU may keep
        // bf16's 7.
        #[cfg(feature = "cuda")]
        candle_core::cuda_backend::set_gemm_reduced_precision_f32(device.is_cuda());
        std::fs::create_dir_all(folder)?;
        let recipe = Recipe::open(&folder.join("recipe.json"))?;
        Ok(Self { folder: folder.to_path_buf(), recipe, device })
    }

    /// The seed of the draws of a part of the training (a step of `nextflow train`, stage or part,
    /// by its name): no two learn from the same samples.
    pub fn seed(&self, part: &str) -> u64 {
        self.recipe.seed ^ fnv1a(part)
    }

    /// A file of the run.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What `build` makes of trainable weights that start from those of `files` that exist, and
    /// these weights by key. A later file wins, and an exported checkpoint's files will do.
    ///
    /// Errors: a file that is broken, and [`Kind::Model`] for weights of other shapes than the
    /// recipe's.
    pub fn load<T>(
        &self,
        files: &[&Path],
        build: impl FnOnce(&Weights) -> candle_core::Result<T>,
    ) -> Result<(T, BTreeMap<String, Var>)> {
        let mut known = BTreeMap::new();
        for file in files.iter().filter(|f| f.exists()) {
            known.extend(crate::checkpoint::load(file)?);
        }
        let weights = Weights::trainable_from(known, self.recipe.seed, &self.device);
        let unlike = |e: candle_core::Error| match Error::from(e) {
            e if e.kind == Kind::Failure => {
                let message =
                    format!("the weights in {} do not fit its recipe.json: {}", self.folder.display(), e.message);
                Error::model(message).hint("--run FOLDER, with this recipe.json in a new folder, starts again")
            }
            e => e,
        };
        let built = build(&weights).map_err(unlike)?;
        Ok((built, weights.vars()))
    }

    /// Writes the weights of a part of the training to a file of the run, with the part's name.
    pub fn save(&self, name: &str, part: &str, vars: &BTreeMap<String, Var>) -> Result<()> {
        let tensors = vars.iter().map(|(key, var)| (key.clone(), var.as_tensor().clone())).collect();
        crate::checkpoint::save(&self.file(name), tensors, Some(HashMap::from([(PART.into(), part.into())])))
    }

    /// Checks that a part of the training may go on from its state, whose values take the place of
    /// those in a file of the run.
    ///
    /// Errors: usage, if another part has gone on from these since.
    pub fn check_last_part(&self, name: &str, part: &str) -> Result<()> {
        let Some(other) = self.last_part(name)?.filter(|last| last != part) else { return Ok(()) };
        let message = format!("the part {other} continues from weights that the part {part} would change");
        Err(Error::usage(message).hint(format!("--part {part}-more goes on from {other}")))
    }

    /// The part of the training that last [saved](Self::save) a file of the run, where the file is
    /// there and tells.
    pub fn last_part(&self, name: &str) -> Result<Option<String>> {
        let path = self.file(name);
        if path.exists() { Ok(crate::checkpoint::metadata(&path)?.remove(PART)) } else { Ok(None) }
    }
}
