//! A place that holds a whole model.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::archive::{self, Archive};
use super::plan::{from_archives, plan};
use super::weight_type::{Matrices, WeightType};
use super::weights::Weights;
use super::{embedded, layout, shards};
use crate::error::{Error, Kind, Result};
use crate::io::output;
use crate::ops::Int8Matrix;
use crate::text::Text;

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The model in the binary itself.
    Embedded,
    /// A model folder, as described in [`crate::checkpoint`].
    Folder(PathBuf),
    /// A model whose files have names of their own, in one folder or several.
    Parts(Parts),
}

/// Where the files of a model are that are not called as those of a model folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// The model's name: its folder, and its variant if the folder holds several.
    pub name: String,
    /// Where those files are that have no path below.
    pub folder: PathBuf,
    /// Used as `config.json`.
    pub config: serde_json::Value,
    /// The name of a file in a model folder, and its paths here: of the file itself, or of its
    /// shards.
    pub files: Vec<(&'static str, Vec<PathBuf>)>,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("the built-in model"),
            Self::Folder(path) => path.display().fmt(f),
            Self::Parts(parts) => f.write_str(&parts.name),
        }
    }
}

impl Parts {
    fn paths(&self, file: &str) -> &[PathBuf] {
        self.files.iter().find(|(name, _)| *name == file).map_or(&[], |(_, paths)| paths)
    }
}

/// The name of the built-in model.
pub const NANO: &str = "nano";

impl Source {
    /// The name of a model: a folder that exists, or the built-in model if none is given or it is
    /// called by [`NANO`].
    pub fn parse(model: Option<&str>) -> Result<Self> {
        let Some(model) = model else { return Ok(Self::Embedded) };
        let path = PathBuf::from(model);
        if path.is_dir() {
            return Ok(Self::Folder(path));
        }
        if model == NANO {
            return Ok(Self::Embedded);
        }
        let what = if path.exists() { "is not a folder" } else { "does not exist" };
        Err(Error::model(format!("the model {model} {what}")).hint(
            "name a folder with config.json and weights, or OWNER/NAME of the hub; nextflow models list shows local models",
        ))
    }

    /// The content of `config.json`.
    pub fn read_config(&self) -> Result<serde_json::Value> {
        match self {
            Self::Parts(parts) => Ok(parts.config.clone()),
            _ => self.read_json("config.json"),
        }
    }

    /// Whether there is a file of this name.
    pub fn has_file(&self, file: &str) -> bool {
        match self.path(file) {
            Some(_) if file == "config.json" && matches!(self, Self::Parts(_)) => true,
            None => embedded::file(file).is_some(),
            Some(path) => path.is_file(),
        }
    }

    /// Path of a file of the model, whether it exists or not; none for the model in the binary.
    fn path(&self, file: &str) -> Option<PathBuf> {
        match self {
            Self::Embedded => None,
            Self::Folder(folder) => Some(folder.join(file)),
            Self::Parts(parts) => Some(parts.paths(file).first().cloned().unwrap_or_else(|| parts.folder.join(file))),
        }
    }

    /// The files or shards of `file`, whether they exist or not; none for the model in the binary.
    ///
    /// Errors: an index that is broken, or names shards that are missing.
    pub fn files(&self, file: &str) -> Result<Vec<PathBuf>> {
        let Some(path) = self.path(file) else { return Ok(Vec::new()) };
        let paths = match self {
            Self::Parts(parts) if parts.paths(file).len() > 1 => parts.paths(file).to_vec(),
            _ => vec![path],
        };
        let mut files = Vec::new();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            files.append(&mut shards::find(path.parent().unwrap_or(Path::new("")), &name)?);
        }
        Ok(files)
    }

    /// The content of a small file of JSON.
    pub fn read_json(&self, file: &str) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.bytes(file)?).map_err(|e| {
            Error::model(format!("{file} of {self} is not JSON: {e}"))
                .hint("copy the file from its origin again, or name another model: --model FOLDER")
                .because(e)
        })
    }

    /// The content of a small text file in UTF-8.
    pub fn read_text(&self, file: &str) -> Result<String> {
        String::from_utf8(self.bytes(file)?.into_owned()).map_err(|_| {
            Error::model(format!("{file} of {self} is not UTF-8")).hint("copy the file from its origin again")
        })
    }

    /// The text tokenizer of `tokenizer.json` or, where there is none, of SentencePiece's
    /// `tokenizer.model`.
    pub fn text(&self) -> Result<Text> {
        let sentencepiece = !self.has_file("tokenizer.json") && self.has_file("tokenizer.model");
        let text = match sentencepiece {
            true => Text::from_sentencepiece(&self.bytes("tokenizer.model")?),
            false => Text::from_bytes(&self.bytes("tokenizer.json")?),
        };
        text.map_err(|e| Error { message: format!("{} (of {self})", e.message), ..e })
    }

    /// The same for a model with a vocabulary of `words`.
    ///
    /// Errors: [`Kind::Model`] for a tokenizer that has more.
    pub fn text_of(&self, words: usize) -> Result<Text> {
        let text = self.text()?;
        match text.vocab_size() {
            more if more > words => {
                Err(Error::model(format!("the text tokenizer of {self} has {more} tokens, its model {words}"))
                    .hint("copy tokenizer.json and config.json from the same origin again"))
            }
            _ => Ok(text),
        }
    }

    /// How the weights of `file` are stored on a device: the type of tensors and activations, and
    /// of matrices. By default f32 on a CPU and bf16 elsewhere; GGUF keeps its types, and so do
    /// bytes with a scale per row on a CPU with int8 products.
    pub fn placed(&self, file: &str, weights: Option<WeightType>, device: &Device) -> (DType, Matrices) {
        let weights = weights.filter(|_| !self.is_gguf(file));
        let multiplied = device.is_cpu() && Int8Matrix::supports(1);
        if weights.is_none() && multiplied && self.archives(file).is_ok_and(|all| all.iter().any(Archive::has_bytes)) {
            return (DType::F32, Matrices::Bytes);
        }
        weights.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu())
    }

    /// Checks that the weights of `file` can be loaded as `weights`.
    ///
    /// Errors: usage, for GGUF, which keeps its types.
    pub fn check_type(&self, file: &str, weights: Option<WeightType>) -> Result<()> {
        if weights.is_some() && self.is_gguf(file) {
            let message = format!("the weights of {self} have their type already");
            return Err(Error::usage(message).hint("leave out --quant"));
        }
        Ok(())
    }

    /// Whether the files of `file` have a tensor of this key.
    ///
    /// Errors: those of [`Source::load`], as far as headers tell.
    pub fn has_tensor(&self, file: &str, key: &str) -> Result<bool> {
        Ok(self.archives(file)?.iter().any(|archive| archive.entry(key).is_some()))
    }

    /// Builds a part of the model from a weights file or its shards, as `dtype` on `device`.
    /// Tensors that `build` does not load are ignored.
    ///
    /// `build` runs twice, first without reading a tensor, to compare all keys and shapes with the
    /// file's header.
    ///
    /// Errors: [`Kind::Model`] if the file is broken or does not fit, [`Kind::Memory`] if it does
    /// not fit in memory.
    pub fn load<T>(
        &self,
        file: &str,
        dtype: DType,
        device: &Device,
        build: impl Fn(&Weights) -> candle_core::Result<T>,
    ) -> Result<T> {
        from_archives(&self.name(file), "config.json", self.archives(file)?, dtype, device, build)
    }

    /// Checks that a part of the model can be built from `file`, as [`Source::load`] does before it
    /// reads a tensor.
    ///
    /// Errors: those of [`Source::load`], as far as headers tell.
    pub fn check<T>(&self, file: &str, build: impl Fn(&Weights) -> candle_core::Result<T>) -> Result<()> {
        plan(&self.name(file), "config.json", self.archives(file)?, DType::F32, build).map(drop)
    }

    /// How many copies of the weights are in memory, beside the binary itself: int8 weights from a
    /// file stay beside their packed layout.
    pub fn copies(&self, matrices: Matrices) -> u64 {
        if matrices == Matrices::Bytes && *self != Self::Embedded { 2 } else { 1 }
    }

    /// Whether any of the files exists that [`Source::load`] reads for `file`.
    pub fn has(&self, file: &str) -> bool {
        match self {
            Self::Embedded => embedded::file(file).is_some(),
            _ => self.files(file).is_ok_and(|files| files.iter().all(|f| f.exists())),
        }
    }

    /// Whether there is a text tokenizer.
    pub fn has_text(&self) -> bool {
        self.has_file("tokenizer.json") || self.has_file("tokenizer.model")
    }

    /// Checks that every file exists that [`Source::load`] reads for `file`.
    ///
    /// Errors: those of [`Source::load`] for a missing file.
    pub fn find(&self, file: &str) -> Result<()> {
        self.files(file)?.iter().try_for_each(|f| archive::open(f).map(drop))
    }

    /// Whether [`Source::load`] reads GGUF for `file`, whose weights keep their types.
    pub fn is_gguf(&self, file: &str) -> bool {
        self.gguf(file).is_some()
    }

    /// The path of that GGUF file.
    pub fn gguf(&self, file: &str) -> Option<PathBuf> {
        let files = self.files(file).ok()?;
        files.into_iter().next().filter(|f| f.extension().is_some_and(|e| e == "gguf"))
    }

    /// Bytes of the program itself that hold the model's weights.
    pub fn embedded_bytes(&self) -> u64 {
        let bytes = |name: &str| embedded::file(name).map_or(0, |bytes| bytes.len() as u64);
        match self {
            Self::Embedded => bytes("model.safetensors") + bytes("image_tokenizer.safetensors"),
            _ => 0,
        }
    }

    /// Copies a file, or its shards and their index, into a folder, where it is called `name`.
    pub fn copy(&self, file: &str, name: &str, folder: &Path) -> Result<()> {
        let Some(whole) = self.path(file) else { return output::write(&folder.join(name), self.embedded(file)?) };
        let from = whole.parent().unwrap_or(Path::new(""));
        let index = format!("{}.index.json", whole.file_name().unwrap_or_default().to_string_lossy());
        for path in self.files(file)?.into_iter().chain(Some(from.join(&index)).filter(|i| i.exists())) {
            let own = path.file_name().unwrap_or_default();
            let to = match path.extension() {
                _ if own == OsStr::new(&index) => folder.join(format!("{name}.index.json")),
                Some(kind) if path.file_stem() == whole.file_stem() => folder.join(name).with_extension(kind),
                _ => folder.join(own),
            };
            copy_file(&path, &to)?;
        }
        Ok(())
    }

    /// The files or shards of `file`, opened.
    pub(super) fn archives(&self, file: &str) -> Result<Vec<Archive>> {
        match self {
            Self::Embedded => Ok(vec![Archive::from_bytes(self.name(file), self.embedded(file)?)?]),
            _ => {
                let mut archives: Vec<_> = self.files(file)?.iter().map(|f| Archive::open(f)).collect::<Result<_>>()?;
                layout::publish(&mut archives)?;
                Ok(archives)
            }
        }
    }

    /// How messages call a file.
    pub(crate) fn name(&self, file: &str) -> String {
        self.path(file).map_or_else(|| format!("{file} of {self}"), |path| path.display().to_string())
    }

    fn embedded(&self, file: &str) -> Result<&'static [u8]> {
        embedded::file(file)
            .ok_or_else(|| Error::model("this build of nextflow has no built-in model").hint("--model FOLDER"))
    }

    /// The content of a small file.
    pub fn bytes(&self, file: &str) -> Result<Cow<'static, [u8]>> {
        let Some(path) = self.path(file) else { return self.embedded(file).map(Cow::Borrowed) };
        if !path.exists() {
            return Err(shards::absent(&path));
        }
        Ok(archive::read_small(&path)?.into())
    }
}

/// Copies one file.
///
/// Errors: [`Kind::Failure`] if that is not possible.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).map(drop).map_err(|e| {
        Error::new(Kind::Failure, format!("cannot copy {} to {}: {e}", from.display(), to.display()))
            .hint("check the folder's permissions and free space: df -h")
            .because(e)
    })
}

/// Copies a weights file into a folder as `name`, with the extension of its format.
///
/// Errors: [`Kind::Model`] if it cannot be read, [`Kind::Failure`] if it cannot be written.
pub fn copy_weights(file: &Path, name: &str, folder: &Path) -> Result<()> {
    copy_file(file, &folder.join(name).with_extension(archive::kind(file)?))
}
