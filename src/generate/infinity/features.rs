//! Features of prompts that need not be encoded again: files of safetensors, whose keys are the
//! prompts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::rng::fnv1a;

/// What `--text-features` names.
#[derive(Clone, Debug)]
pub enum FeatureStore {
    /// All prompts in one file.
    File(PathBuf),
    /// A file for every prompt, for processes that share them.
    Folder(PathBuf),
}

impl FeatureStore {
    /// A folder, or a file that may not exist yet.
    pub fn at(path: &Path) -> Self {
        match path.is_dir() {
            true => Self::Folder(path.into()),
            false => Self::File(path.into()),
        }
    }

    /// The features (tokens, width) of those of the prompts that it holds.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a file that is broken, or was made by another text
    /// encoder.
    pub fn read(&self, prompts: &[&str], width: usize) -> Result<BTreeMap<String, Tensor>> {
        let mut known = BTreeMap::new();
        match self {
            Self::File(path) if path.exists() => known = checkpoint::load(path)?,
            Self::File(_) => {}
            Self::Folder(folder) => {
                for prompt in prompts {
                    let path = Self::place(folder, prompt);
                    if path.exists() {
                        known.append(&mut checkpoint::load(&path)?);
                    }
                }
            }
        }
        known.retain(|prompt, _| prompts.contains(&&**prompt));
        for (prompt, features) in &known {
            if features.rank() != 2 || features.dims()[1] != width || features.dims()[0] == 0 {
                let message = format!("the features of {prompt:?} have the shape {:?}", features.dims());
                return Err(Error::model(message).hint(format!(
                    "--text-features ANOTHER: they are (tokens, {width}) for the text encoder of this model"
                )));
            }
        }
        Ok(known)
    }

    /// Adds the features of prompts.
    pub fn add(&self, new: &BTreeMap<String, Tensor>) -> Result<()> {
        let plain = |(prompt, features): (&String, &Tensor)| {
            Ok((prompt.clone(), features.to_device(&Device::Cpu)?.to_dtype(DType::F32)?))
        };
        let new: BTreeMap<String, Tensor> = new.iter().map(plain).collect::<candle_core::Result<_>>()?;
        match self {
            Self::File(path) => {
                let mut all = if path.exists() { checkpoint::load(path)? } else { BTreeMap::new() };
                all.extend(new);
                checkpoint::save(path, all, None)
            }
            Self::Folder(folder) => new.into_iter().try_for_each(|(prompt, features)| {
                let path = Self::place(folder, &prompt);
                checkpoint::save(&path, BTreeMap::from([(prompt, features)]), None)
            }),
        }
    }

    fn place(folder: &Path, prompt: &str) -> PathBuf {
        folder.join(format!("{:016x}.safetensors", fnv1a(prompt)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_there() {
        let place = tempfile::tempdir().unwrap();
        for path in [place.path().join("features.safetensors"), place.path().into()] {
            let store = FeatureStore::at(&path);
            let features = |n: f32| Tensor::full(n, (3, 4), &Device::Cpu).unwrap();
            assert!(store.read(&["a cat"], 4).unwrap().is_empty());
            for (prompt, n) in [("a cat", 1.0), ("\"红\" \n", 2.0), ("a cat", 3.0)] {
                store.add(&BTreeMap::from([(prompt.to_string(), features(n))])).unwrap();
            }
            let read = store.read(&["a cat", "a dog", "\"红\" \n"], 4).unwrap();
            let first = |t: &Tensor| t.to_vec2::<f32>().unwrap()[0][0];
            assert_eq!(
                read.iter().map(|(k, t)| (k.as_str(), first(t))).collect::<Vec<_>>(),
                [("\"红\" \n", 2.0), ("a cat", 3.0)]
            );
            assert_eq!(store.read(&["a cat"], 5).unwrap_err().exit_code(), 3);
        }
    }
}
