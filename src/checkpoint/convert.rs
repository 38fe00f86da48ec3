//! A model folder in another weight type.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device};

use super::weights::{Weights, fitting};
use super::{Inventory, Source, WeightType, archive};
use crate::error::{Error, Result};
use crate::io::input::quoted;
use crate::io::output;
use crate::ops;

/// Writes the model at `source` to `folder`, which must not exist: the transformer, of which
/// `asked` is the [inventory](Weights::inventory), as `model.gguf` with its
/// [matrices](Weights::matrix) as `weights`, and `others`, as the files of an image tokenizer, as
/// they are.
///
/// The folder appears whole or not at all. Errors: `Kind::Usage` if it exists, `Kind::Model` for a
/// source that does not fit, `Kind::Failure` if it cannot be written.
pub fn quantise(
    source: &Source,
    requested: &Weights,
    weights: WeightType,
    others: &[&str],
    folder: &Path,
) -> Result<()> {
    whole_folder(folder, |part| {
        let tensors = blocks(source, "model.safetensors", requested, weights)?;
        write_gguf(&part.join("model.gguf"), &tensors)?;
        for name in SMALL {
            if source.has_file(name) {
                source.copy(name, name, part)?;
            }
        }
        others.iter().try_for_each(|file| source.copy(file, file, part))
    })
}

/// Writes a GGUF file.
///
/// Errors: `Kind::Failure` if it cannot be written.
pub fn write_gguf(path: &Path, tensors: &[(String, QTensor)]) -> Result<()> {
    let pairs: Vec<(&str, &QTensor)> = tensors.iter().map(|(key, tensor)| (key.as_str(), tensor)).collect();
    let unwritten = |e: &dyn std::fmt::Display| Error::unwritten(path, e);
    let mut file = BufWriter::new(File::create(path).map_err(|e| unwritten(&e))?);
    let architecture = Value::String("nextflow".into());
    gguf_file::write(&mut file, &[("general.architecture", &architecture)], &pairs).map_err(|e| unwritten(&e))?;
    file.into_inner().map_err(|e| unwritten(&e))?.sync_all().map_err(|e| unwritten(&e))
}

/// Writes those tensors of a file of `source` that are `asked` for as safetensors of a type: of a
/// dump of a training, the weights.
///
/// Errors: as [`blocks`], and `Kind::Failure` if it cannot be written.
pub fn extract(source: &Source, file: &str, requested: &Weights, dtype: DType, path: &Path) -> Result<()> {
    let tensors = blocks(source, file, requested, WeightType::F32)?;
    let plain = |(key, tensor): (String, QTensor)| Ok((key, tensor.dequantize(&Device::Cpu)?.to_dtype(dtype)?));
    archive::save(path, tensors.into_iter().map(plain).collect::<candle_core::Result<_>>()?, None)
}

/// Files that a model folder may have beside weights.
const SMALL: [&str; 9] = [
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
];

/// Where a folder is being made.
static PART: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Removes what [`whole_folder`] has not finished, when the process is to end.
pub fn abandon() {
    if let Some(part) = PART.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = fs::remove_dir_all(part);
    }
}

/// Creates `folder`, which must not exist, whole or not at all: `fill` writes into a temporary one.
///
/// Errors: `Kind::Usage` if it exists, `Kind::Failure` if it cannot be written, and those of
/// `fill`.
pub fn whole_folder(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if folder.exists() {
        return Err(Error::usage(format!("{} exists already", folder.display())).hint("-o ANOTHER_FOLDER"));
    }
    let parent = folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        let message = format!("cannot write {}: there is no folder {}", folder.display(), parent.display());
        return Err(Error::usage(message).hint(format!("mkdir -p {}", quoted(parent))));
    }
    output::sweep(parent);
    let part = output::TempFolder::new(parent).map_err(|e| Error::unwritten(folder, &output::reason(&e)).because(e))?;
    *PART.lock().unwrap_or_else(PoisonError::into_inner) = Some(part.path().into());
    fill(part.path())?;
    part.rename(folder).map_err(|e| Error::unwritten(folder, &e).because(e))
}

/// The tensors `asked` of a file of `source`: [matrices](Weights::matrix) in blocks of `weights`,
/// others in f32.
///
/// Errors: `Kind::Model` for a file that does not fit.
pub fn blocks(source: &Source, file: &str, requested: &Weights, weights: WeightType) -> Result<Vec<(String, QTensor)>> {
    let misfit = |what: String| Error::model(what).hint("nextflow info FOLDER lists what does not fit");
    let fit = Inventory::of(source, file)?.compare(requested);
    if let Some(key) = fit.missing.first() {
        return Err(misfit(format!("{key} is missing from {file} of {source}")));
    }
    if let Some(what) = fit.misshapen.first() {
        return Err(misfit(format!("{file} of {source} does not fit its config.json: {what}")));
    }
    let archives = source.archives(file)?;
    let mut tensors = Vec::new();
    for (key, requested) in requested.requests() {
        let Some(archive) = archives.iter().rev().find(|a| a.entry(&key).is_some()) else { continue };
        let tensor = archive.read(&key, DType::F32, &Device::Cpu).map_err(|e| misfit(e.to_string()))?;
        let blocks = match tensor.dims() {
            &[_, columns] if requested.matrix => weights.blocks().and_then(|blocks| fitting(blocks, columns)),
            _ => None,
        };
        let tensor = match (blocks, tensor.dims()) {
            (Some(blocks), &[rows, columns]) => {
                ops::quantize(&tensor.flatten_all()?.to_vec1()?, (rows, columns), blocks, &Device::Cpu)?
            }
            _ => QTensor::quantize(&tensor, GgmlDType::F32)?,
        };
        tensors.push((key, tensor));
    }
    Ok(tensors)
}
