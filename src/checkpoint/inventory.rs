//! What files of weights hold, by their headers alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;
use serde::Serialize;

use super::archive::Archive;
use super::header::{Fault, Stored};
use super::weights::{Request, Weights, check};
use super::{Source, layout};
use crate::error::{Error, Result};

/// The tensors of some files.
#[derive(Debug)]
pub struct Inventory {
    archives: Vec<Archive>,
}

/// One file in numbers.
#[derive(Clone, Debug, Serialize)]
pub struct FileSummary {
    /// As messages call it.
    pub name: String,
    /// Tensors.
    pub tensors: usize,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Elements by type as stored.
    pub dtypes: BTreeMap<String, u64>,
}

/// How files compare with the tensors that a model loads; sorted lists of keys.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Fit {
    /// Loaded by the model, but missing in the files.
    pub missing: Vec<String>,
    /// There in another shape, or of a type that is not read.
    pub misshapen: Vec<String>,
    /// In the files, but not loaded by the model.
    pub unknown: Vec<String>,
}

impl Fit {
    /// Whether the model can be loaded.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.misshapen.is_empty()
    }
}

impl Inventory {
    /// The file of weights at `path`, or all of them in the folder `path`.
    ///
    /// Errors: a file that is broken.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            let mut archives = vec![Archive::open(path)?];
            layout::publish(&mut archives)?;
            return Ok(Self { archives });
        }
        let mut files = BTreeSet::new();
        for entry in std::fs::read_dir(path)? {
            let file = entry?.path();
            let kind = file.extension().and_then(|e| e.to_str());
            // Other .bin files are settings of a trainer.
            let pytorch = file.file_stem().and_then(|s| s.to_str()).is_some_and(|s| s.starts_with("pytorch_model"));
            let weights = matches!(kind, Some("safetensors" | "pt" | "pth" | "gguf")) || kind == Some("bin") && pytorch;
            if weights && file.is_file() {
                files.insert(file);
            }
        }
        let mut archives = files.iter().map(|f| Archive::open(f)).collect::<Result<Vec<_>>>()?;
        layout::publish(&mut archives)?;
        Ok(Self { archives })
    }

    /// The files of `file` in a model (see [`Source::load`]).
    pub fn of(source: &Source, file: &str) -> Result<Self> {
        Ok(Self { archives: source.archives(file)? })
    }

    /// Whether any file has a tensor of this key.
    pub fn has(&self, key: &str) -> bool {
        self.archives.iter().any(|a| a.entry(key).is_some())
    }

    /// The shape of the tensor of this key, if there is one.
    pub fn shape(&self, key: &str) -> Option<&[usize]> {
        self.archives.iter().rev().find_map(|archive| archive.entry(key)).map(|entry| &entry.shape[..])
    }

    /// Bytes that are stored of what `model`, an [inventory](Weights::inventory), was asked for.
    pub fn bytes_of(&self, model: &Weights) -> u64 {
        let stored = |key: &String| self.archives.iter().rev().find_map(|archive| archive.entry(key));
        model.requests().keys().filter_map(stored).map(|entry| entry.length).sum()
    }

    /// Why no config can fit these files: their layout or encoding is not read.
    pub fn unread(&self) -> Option<Error> {
        layout::unread(&self.archives)
    }

    /// Every file in numbers.
    pub fn files(&self) -> Vec<FileSummary> {
        let summary = |archive: &Archive| {
            let mut summary = FileSummary {
                name: archive.name().to_string(),
                tensors: 0,
                parameters: 0,
                bytes: 0,
                dtypes: BTreeMap::new(),
            };
            for (_, entry) in archive.tensors() {
                let elements = entry.shape.iter().map(|&d| d as u64).product::<u64>();
                summary.tensors += 1;
                summary.parameters += elements;
                summary.bytes += entry.length;
                let scaled = entry.stored == Stored::Plain(Dtype::U8);
                let dtype = if scaled { "scaled U8".to_string() } else { entry.stored.to_string() };
                *summary.dtypes.entry(dtype).or_default() += elements;
            }
            summary
        };
        self.archives.iter().map(summary).collect()
    }

    /// Compares all files with the tensors of `model`, an [inventory](Weights::inventory) that a
    /// model was built on.
    pub fn compare(&self, model: &Weights) -> Fit {
        let (requested, mut fit) = (model.requests(), Fit::default());
        for (key, Request { shape, required, .. }) in &requested {
            match check(&self.archives, key, shape) {
                Err((_, Fault::Missing)) if !required && !self.has(key) => {}
                // Tensors that are not loaded may have any type.
                Err((_, Fault::Type(_))) if !required => {}
                Err((key, Fault::Missing)) => fit.missing.push(key),
                Err((key, fault)) => fit.misshapen.push(format!("{key}: {fault}")),
                Ok(_) => {}
            }
        }
        let keys = self.archives.iter().flat_map(|a| a.tensors().map(|(key, _)| key.clone()));
        fit.unknown = keys.filter(|key| !requested.contains_key(key)).collect();
        fit.unknown.sort();
        fit
    }
}
