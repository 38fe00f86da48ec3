//! Weights of a larger model that begin with those of a smaller one.

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, View, serialize_to_file};

use super::Source;
use super::archive::Archive;
use super::header::{Stored, dims};
use super::init::Init;
use super::trainable::initial;
use super::weights::{Request, Weights};
use crate::error::{Error, Result};

/// Spread of new rows in a table that has others: the initializer_range of Qwen2.5.
const NEW_ROWS: Init = Init::Normal { std: 0.02 };

/// A tensor to write, made when its turn comes: no more than one is ever in memory.
struct Extended<'a> {
    key: String,
    requested: Request,
    archive: Option<&'a Archive>,
    dtype: Dtype,
    seed: u64,
    /// Why it could not be read.
    failure: &'a RefCell<Option<String>>,
}

impl Extended<'_> {
    fn tensor(&self) -> candle_core::Result<Tensor> {
        let shape = self.requested.shape.as_slice();
        let dtype = if self.dtype == Dtype::BF16 { DType::BF16 } else { DType::F32 };
        let new =
            |shape: &[usize], init| initial(&self.key, shape.into(), init, self.seed, &Device::Cpu)?.to_dtype(dtype);
        let Some(archive) = self.archive else { return new(shape, self.requested.init) };
        let old = archive.read(&self.key, dtype, &Device::Cpu)?;
        match shape[0] - old.dim(0)? {
            0 => Ok(old),
            rows => Tensor::cat(&[&old, &new(&[&[rows], &shape[1..]].concat(), NEW_ROWS)?], 0),
        }
    }
}

impl View for &Extended<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.requested.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = self.tensor().and_then(|tensor| match self.dtype {
            Dtype::BF16 => {
                let numbers = tensor.flatten_all()?.to_vec1::<half::bf16>()?;
                Ok(numbers.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
            _ => Ok(tensor.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
        });
        Cow::Owned(bytes.unwrap_or_else(|e| {
            self.failure.borrow_mut().get_or_insert(e.to_string());
            Vec::new()
        }))
    }

    fn data_len(&self) -> usize {
        self.requested.shape.iter().product::<usize>() * if self.dtype == Dtype::BF16 { 2 } else { 4 }
    }
}

/// Writes to `path` what `asked`, the [inventory](Weights::inventory) of the larger model, asks
/// for: tensors of `file` of `source` as they are, with new rows after them where more are asked
/// for, and new ones where `fresh` lets there be none. Numbers are bf16 if the source's are, else
/// f32; new ones depend on `seed` and the key alone.
///
/// Errors: `Kind::Model` for a source that does not fit, `Kind::Failure` if the file cannot be
/// written.
pub fn extend(
    source: &Source,
    file: &str,
    requested: &Weights,
    fresh: impl Fn(&str) -> bool,
    seed: u64,
    path: &Path,
) -> Result<()> {
    let archives = source.archives(file)?;
    let misfit =
        |what: String| Error::model(format!("{source}: {what}")).hint("nextflow info FOLDER lists what it has");
    let failure = RefCell::new(None);
    let mut tensors: Vec<Extended> = Vec::new();
    let mut narrow = true;
    for (key, requested) in requested.requests() {
        let found = archives.iter().rev().find_map(|archive| Some((archive, archive.entry(&key)?)));
        match found {
            None if fresh(&key) => {}
            None => return Err(misfit(format!("{key} is missing"))),
            Some((archive, entry)) => {
                let fits = entry.shape.len() == requested.shape.len()
                    && entry.shape[1..] == requested.shape[1..]
                    && entry.shape.first() <= requested.shape.first();
                if !fits || archive.readable(&key, entry).is_err() {
                    let (found, expected) = (dims(&entry.shape), dims(&requested.shape));
                    return Err(misfit(format!("{key} is {found} of {}, {expected} are needed", entry.stored)));
                }
                narrow &= entry.stored == Stored::Plain(Dtype::BF16);
            }
        }
        let archive = found.map(|(archive, _)| archive);
        tensors.push(Extended { key, requested, archive, dtype: Dtype::F32, seed, failure: &failure });
    }
    if narrow {
        tensors.iter_mut().for_each(|tensor| tensor.dtype = Dtype::BF16);
    }
    let named = tensors.iter().map(|tensor| (tensor.key.as_str(), tensor));
    let written = serialize_to_file(named, None, path);
    match failure.into_inner() {
        Some(e) => Err(misfit(e)),
        None => written.map_err(|e| Error::unwritten(path, &e).because(e)),
    }
}
