//! Finds the files of the model that `--model` names: built in, in a folder, or on the hub.

use std::path::{Path, PathBuf};

use super::ModelArgs;
use super::download::Download;
use crate::checkpoint::{Source, TRANSFORMER};
use crate::codes::TokenizerSource;
use crate::error::{Error, Result};
use crate::generate::{self, infinity};
#[cfg(feature = "hub")]
use crate::hub;
use crate::onecat;
use crate::z_image;

impl ModelArgs {
    /// The value of `--model`; none means the built-in model.
    fn name(&self) -> Option<&str> {
        self.model.as_deref().filter(|m| !m.is_empty())
    }

    /// Where the model's files are; those of the hub are in its cache afterwards.
    ///
    /// Errors: [`crate::error::Kind::Model`] if there is no such model, and those of a download.
    pub fn source(&self) -> Result<Source> {
        let Some(name) = self.name() else { return Source::parse(None) };
        // A path may hold a colon of its own.
        let (base, choice) = if Path::new(name).exists() { (name, None) } else { infinity::split(name) };
        #[cfg(feature = "hub")]
        if let Some(id) = hub_id(base)? {
            if id.is(z_image::HUB) {
                return Err(refines(base));
            }
            return match id.is(infinity::HUB) {
                true => super::hub::fetch_infinity(&id, choice, self.offline),
                false if choice.is_some() => Err(no_choice(base)),
                false => self.fetch(&id),
            };
        }
        let source = Source::parse(Some(base))?;
        let Source::Folder(folder) = &source else { return choice.map_or(Ok(source), |_| Err(no_choice(base))) };
        if source.has_file(z_image::INDEX) && !source.has_file("config.json") {
            return Err(refines(base));
        }
        // Our config.json names the family; public ones are missing, or name none.
        if choice.is_none() && source.has_file("config.json") && source.has(TRANSFORMER) {
            return match onecat::is_config(&source.read_config()?) {
                true => generate::onecat::in_folder(folder, infinity_cache()),
                false => Ok(source),
            };
        }
        match infinity::in_folder(folder, choice, text_encoder().as_deref())? {
            Some(parts) => Ok(parts),
            None if choice.is_some() => Err(no_choice(base)),
            None => Ok(source),
        }
    }

    /// The image tokenizer of a model, of a file, or the only one of Infinity in a folder.
    ///
    /// Errors: as [`Self::source`].
    pub fn tokenizer(&self) -> Result<TokenizerSource> {
        match self.name().map(Path::new) {
            Some(file) if file.is_file() => TokenizerSource::of_file(file),
            // A folder with nothing but image tokenizers is no model.
            Some(folder) if folder.is_dir() && !folder.join(TRANSFORMER).exists() => {
                match TokenizerSource::of_folder(folder)? {
                    Some(codec) => Ok(codec),
                    None => TokenizerSource::of_model(self.source()?),
                }
            }
            _ => TokenizerSource::of_model(self.source()?),
        }
    }

    /// Whether nothing may be downloaded.
    pub(super) fn is_offline(&self) -> bool {
        #[cfg(feature = "hub")]
        return self.offline;
        #[cfg(not(feature = "hub"))]
        true
    }

    #[cfg(feature = "hub")]
    fn fetch(&self, id: &hub::Id) -> Result<Source> {
        let mut progress = super::hub::progress(false)?;
        // Others may have fetched a part of it, or a download was cut.
        let whole = |folder: &Path| Source::Folder(folder.into()).find(TRANSFORMER).is_ok();
        let folder = hub::fetch(id, None, whole, self.offline, &mut progress)?;
        super::hub::borrow_tokenizer(&folder, self.offline, &mut progress)?;
        Ok(Source::Folder(folder))
    }
}

/// The files of the refiner `name`: a folder, or a model of the hub. With `dry` those that are
/// missing in the cache are listed and not downloaded.
///
/// Errors: as [`ModelArgs::source`]; a model of the hub that is no refiner is refused before it is
/// downloaded.
#[cfg_attr(not(feature = "hub"), allow(unused_variables))]
pub(super) fn refiner(name: &str, offline: bool, dry: bool) -> Result<(Option<Source>, Vec<Download>)> {
    #[cfg(feature = "hub")]
    if let Some(id) = hub_id(name)? {
        return super::hub::fetch_refiner(&id, offline, dry);
    }
    match Source::parse(Some(name))? {
        Source::Embedded => Err(Error::usage(format!("{name} refines its own images only: --refine"))
            .hint(format!("--refiner {}", z_image::HUB))),
        source => Ok((Some(source), Vec::new())),
    }
}

/// The error of a model that draws nothing here but refines what others draw.
fn refines(name: &str) -> Error {
    Error::usage(format!("{name} refines what another model draws")).hint(format!("--refiner {name}"))
}

/// The error of a model that is none of several.
fn no_choice(name: &str) -> Error {
    Error::usage(format!("{name} holds one model, and none by the name after the colon"))
        .hint(format!("--model {name}"))
}

/// Infinity's text encoder in the hub's cache, if it is there.
pub(super) fn text_encoder() -> Option<PathBuf> {
    #[cfg(feature = "hub")]
    return hub::Cache::from_env().ok()?.snapshot(&infinity::TEXT_HUB.parse().ok()?);
    #[cfg(not(feature = "hub"))]
    None
}

/// The cached hub folder of Infinity, whose image tokenizer OneCAT draws with.
pub(super) fn infinity_cache() -> Option<PathBuf> {
    #[cfg(feature = "hub")]
    return hub::Cache::from_env().ok()?.snapshot(&infinity::HUB.parse().ok()?);
    #[cfg(not(feature = "hub"))]
    None
}

/// The hub model that `name` means, if it is no file or folder: OWNER/NAME, or an address on the
/// hub.
///
/// Errors: usage, for an address that is not of a model on the hub; [`crate::error::Kind::Model`]
/// for a name in a folder that is there and has no such model.
#[cfg(feature = "hub")]
fn hub_id(name: &str) -> Result<Option<hub::Id>> {
    if Path::new(name).exists() {
        return Ok(None);
    }
    if name.contains("://") {
        return name.parse().map(Some);
    }
    let Ok(id) = name.parse::<hub::Id>() else { return Ok(None) };
    match Path::new(name).parent().filter(|p| !p.as_os_str().is_empty() && p.is_dir()) {
        Some(folder) => Err(Error::model(format!("the folder {} has no model {name}", folder.display()))
            .hint(format!("--model hf://{id} means the one on the hub; nextflow models list shows local models"))),
        None => Ok(Some(id)),
    }
}
