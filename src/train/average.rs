//! The mean of two sets of weights that have one origin. What a part of the training forgets, the
//! weights before it still know, and a mean of both can do nearly all that either can (Wortsman et
//! al. 2022, "Robust fine-tuning of zero-shot models").

use std::path::Path;

use crate::checkpoint::{load, save};
use crate::error::{Error, Result};

/// Replaces the weights in `file` by a mean, in f32: `share` of those in `other`, the rest of its
/// own.
///
/// Errors: usage, for files with other tensors; [`crate::error::Kind::Model`] for files that cannot
/// be read.
pub fn average(file: &Path, other: &Path, share: f64) -> Result<()> {
    let (mut own, others) = (load(file)?, load(other)?);
    let unlike = |key: &str| {
        let message = format!("{} and {} are not of one model: {key} differs", file.display(), other.display());
        Error::usage(message).hint("name an earlier model.safetensors of the same run")
    };
    if let Some(key) = others.keys().find(|key| !own.contains_key(*key)) {
        return Err(unlike(key));
    }
    for (key, tensor) in &mut own {
        let Some(other) = others.get(key).filter(|other| other.dims() == tensor.dims()) else {
            return Err(unlike(key));
        };
        *tensor = ((&*tensor * (1.0 - share))? + (other * share)?)?;
    }
    save(file, own, None)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn means_are_of_equal_tensors() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let write = |name: &str, tensors: &[(&str, &[f32])]| -> Result<std::path::PathBuf> {
            let path = folder.path().join(name);
            let tensors = tensors.iter().map(|(key, v)| Ok((key.to_string(), Tensor::new(*v, &Device::Cpu)?)));
            save(&path, tensors.collect::<candle_core::Result<BTreeMap<_, _>>>()?, None)?;
            Ok(path)
        };
        let one = write("one", &[("a", &[1.0, 2.0]), ("b", &[0.0])])?;
        let two = write("two", &[("a", &[3.0, -2.0]), ("b", &[4.0])])?;
        average(&one, &two, 0.25)?;
        let mean = load(&one)?;
        assert_eq!(mean["a"].to_vec1::<f32>()?, [1.5, 1.0]);
        assert_eq!(mean["b"].to_vec1::<f32>()?, [1.0]);
        for other in
            [&[("a", &[3.0, -2.0][..])][..], &[("a", &[1.0]), ("b", &[4.0])], &[("a", &[3.0, 1.0]), ("c", &[4.0])]]
        {
            let before = std::fs::read(&one)?;
            let error = average(&one, &write("other", other)?, 0.5).unwrap_err();
            assert!(error.message.contains("not of one model") && error.hint.is_some(), "{}", error.message);
            assert!(before == std::fs::read(&one)?, "the file is as it was");
        }
        Ok(())
    }
}
