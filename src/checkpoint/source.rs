//! A place that holds a whole model.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};

use super::archive::{self, Archive};
use super::embedded;
use super::shards;
use super::weights::{Fault, Weights};
use crate::error::{Error, Kind, Result};
use crate::text::Text;

/// How many faults of a file a message spells out.
const SHOWN: usize = 5;

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The model in the binary itself.
    Embedded,
    /// A model folder, as described in [`crate::checkpoint`].
    Folder(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("the built-in model"),
            Self::Folder(path) => path.display().fmt(f),
        }
    }
}

impl Source {
    /// The value of `--model`: a folder that exists, or the built-in model if none is given.
    pub fn parse(model: Option<&str>) -> Result<Self> {
        let Some(model) = model else { return Ok(Self::Embedded) };
        let path = PathBuf::from(model);
        if path.is_dir() {
            return Ok(Self::Folder(path));
        }
        let what = if path.exists() { "is not a folder" } else { "does not exist" };
        let hint = match path.parent().filter(|_| path.is_file()) {
            Some(parent) if parent.as_os_str().is_empty() => "--model .".into(),
            Some(parent) => format!("--model {}", parent.display()),
            None => "leave out --model to draw with the built-in model, or: nextflow gen --model FOLDER".into(),
        };
        Err(Error::model(format!("--model {model} {what}")).hint(hint))
    }

    /// The content of `config.json`.
    pub fn read_config(&self) -> Result<serde_json::Value> {
        self.read_json("config.json")
    }

    /// Whether there is a file of this name.
    pub fn has_file(&self, file: &str) -> bool {
        match self {
            Self::Embedded => embedded::file(file).is_some(),
            Self::Folder(folder) => folder.join(file).is_file(),
        }
    }

    /// The content of a small file of JSON.
    pub fn read_json(&self, file: &str) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.bytes(file)?).map_err(|e| {
            Error::model(format!("{file} of {self} is not JSON: {e}"))
                .hint("copy the file from its origin again, or name another model: nextflow gen --model FOLDER")
        })
    }

    /// The text tokenizer of `tokenizer.json` or, where there is none, of SentencePiece's `tokenizer.model`.
    pub fn text(&self) -> Result<Text> {
        let sentencepiece = match self {
            Self::Folder(folder) => !folder.join("tokenizer.json").exists() && folder.join("tokenizer.model").exists(),
            Self::Embedded => false,
        };
        let text = match sentencepiece {
            true => Text::from_sentencepiece(&self.bytes("tokenizer.model")?),
            false => Text::from_bytes(&self.bytes("tokenizer.json")?),
        };
        text.map_err(|e| Error { message: format!("{} (of {self})", e.message), ..e })
    }

    /// Builds a part of the model from a file of weights or its shards, as `dtype` on `device`. Tensors that nothing asks for are
    /// ignored.
    ///
    /// `build` runs twice: at first without reading a tensor, to compare all keys and shapes with the file's header.
    ///
    /// Errors: [`Kind::Model`] if the file is broken or does not fit, [`Kind::Memory`] if it does not fit in memory.
    pub fn load<T>(
        &self,
        file: &str,
        dtype: DType,
        device: &Device,
        build: impl Fn(&Weights) -> candle_core::Result<T>,
    ) -> Result<T> {
        let archives = match self {
            Self::Embedded => vec![self.archive(file)?],
            Self::Folder(folder) => {
                shards::find(folder, file)?.iter().map(|path| Archive::open(path)).collect::<Result<_>>()?
            }
        };
        from_archives(&self.name(file), "config.json", archives, dtype, device, build)
    }

    /// Whether there is something that [`Source::load`] would read for `file`.
    pub fn has(&self, file: &str) -> bool {
        match self {
            Self::Embedded => embedded::file(file).is_some(),
            Self::Folder(folder) => shards::find(folder, file).is_ok_and(|files| files.iter().all(|f| f.exists())),
        }
    }

    /// Whether every file that [`Source::load`] would read for `file` is there.
    ///
    /// Errors: those of [`Source::load`], for a file that is not.
    pub fn find(&self, file: &str) -> Result<()> {
        match self {
            Self::Embedded => Ok(()),
            Self::Folder(folder) => shards::find(folder, file)?.iter().try_for_each(|f| archive::open(f).map(drop)),
        }
    }

    /// Whether what [`Source::load`] would read for `file` is GGUF, whose weights stay in the type that they have there.
    pub fn is_gguf(&self, file: &str) -> bool {
        let gguf = |files: Vec<PathBuf>| files.iter().all(|f| f.extension().is_some_and(|e| e == "gguf"));
        matches!(self, Self::Folder(folder) if shards::find(folder, file).is_ok_and(gguf))
    }

    /// Bytes of the program itself that hold the model's weights.
    pub fn embedded_bytes(&self) -> u64 {
        let bytes = |name: &str| embedded::file(name).map_or(0, |bytes| bytes.len() as u64);
        match self {
            Self::Embedded => bytes("model.safetensors") + bytes("image_tokenizer.safetensors"),
            Self::Folder(_) => 0,
        }
    }

    /// Copies a file, or its shards and their index, into a folder.
    pub fn copy(&self, file: &str, folder: &Path) -> Result<()> {
        let Self::Folder(from) = self else { return archive::write(&folder.join(file), self.embedded(file)?) };
        let index = from.join(format!("{file}.index.json"));
        for path in shards::find(from, file)?.into_iter().chain(Some(index).filter(|i| i.exists())) {
            let to = path.file_name().map(|name| folder.join(name)).unwrap_or_else(|| folder.to_path_buf());
            std::fs::copy(&path, &to).map_err(|e| {
                let message = format!("cannot copy {} to {}: {e}", path.display(), folder.display());
                Error::new(Kind::Failure, message).hint("check free space: df -h")
            })?;
        }
        Ok(())
    }

    /// An embedded file.
    pub(super) fn archive(&self, file: &str) -> Result<Archive> {
        Archive::from_bytes(self.name(file), self.embedded(file)?)
    }

    /// How messages call a file.
    fn name(&self, file: &str) -> String {
        match self {
            Self::Embedded => format!("{file} of {self}"),
            Self::Folder(folder) => folder.join(file).display().to_string(),
        }
    }

    fn embedded(&self, file: &str) -> Result<&'static [u8]> {
        embedded::file(file).ok_or_else(|| {
            Error::model("this build of nextflow has no built-in model").hint("nextflow gen --model FOLDER")
        })
    }

    fn bytes(&self, file: &str) -> Result<Cow<'static, [u8]>> {
        let Self::Folder(folder) = self else { return self.embedded(file).map(Cow::Borrowed) };
        Ok(archive::read_json(&folder.join(file))?.into())
    }
}

/// As [`Source::load`], from the one file `path`; a message about what does not fit names `layout`.
pub fn load_file<T>(
    path: &Path,
    layout: &str,
    dtype: DType,
    device: &Device,
    build: impl Fn(&Weights) -> candle_core::Result<T>,
) -> Result<T> {
    from_archives(&path.display().to_string(), layout, vec![Archive::open(path)?], dtype, device, build)
}

fn from_archives<T>(
    name: &str,
    layout: &str,
    archives: Vec<Archive>,
    dtype: DType,
    device: &Device,
    build: impl Fn(&Weights) -> candle_core::Result<T>,
) -> Result<T> {
    let archives: Vec<_> = archives.into_iter().map(Arc::new).collect();
    let plan = Weights::plan(archives.clone(), dtype);
    let planned = build(&plan).map(drop);
    let problems = plan.problems();
    if !problems.is_empty() {
        return Err(misfit(name, layout, &problems, planned.is_err()));
    }
    planned.map_err(|e| failure(name, e))?;
    build(&Weights::from_archives(archives, dtype, device)).map_err(|e| failure(name, e))
}

/// One sentence about a file that does not fit its config or layout; `cut` says that the check gave up early.
fn misfit(name: &str, layout: &str, problems: &[(String, Fault)], cut: bool) -> Error {
    let count = |is: fn(&Fault) -> bool, what: &str| match problems.iter().filter(|(_, f)| is(f)).count() {
        0 => None,
        n => Some(format!("{n} {what}")),
    };
    let counts = [
        count(|f| matches!(f, Fault::Missing), "missing"),
        count(|f| matches!(f, Fault::Shape { .. }), "wrongly shaped"),
        count(|f| matches!(f, Fault::Type(_)), "of another type"),
    ];
    let counts: Vec<String> = counts.into_iter().flatten().collect();
    let mut shown: Vec<String> = problems.iter().take(SHOWN).map(|(key, fault)| format!("{key}: {fault}")).collect();
    if problems.len() > SHOWN {
        shown.push(format!("and {} more", problems.len() - SHOWN));
    }
    let least = if cut { "at least " } else { "" };
    let message = format!("{name} does not fit {layout}, tensors {least}{}: {}", counts.join(", "), shown.join("; "));
    Error::model(message).hint("nextflow gen --model FOLDER, with all files in FOLDER from one checkpoint")
}

/// A failure to build: the devices' allocators tell of their exhaustion in words only.
fn failure(name: &str, error: candle_core::Error) -> Error {
    let text = error.to_string();
    let lower = text.to_lowercase().replace('_', " ");
    if lower.contains("out of memory") || lower.contains("memory allocation failed") {
        return Error::new(Kind::Memory, format!("not enough memory for {name}: {text}")).hint("--device cpu");
    }
    Error::model(format!("cannot load {name}: {text}")).hint("nextflow gen --model FOLDER with another checkpoint")
}
