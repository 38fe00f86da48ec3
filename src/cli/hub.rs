//! Downloads from the hub: their progress, and Infinity, of whose files only those of one model are
//! needed.

use std::io::Write;
use std::path::Path;

use super::download::Download;
use crate::checkpoint::{self, Source};
use crate::error::{Error, Result};
use crate::generate::infinity::{self, HUB, TEXT_HUB, VARIANTS, Variant};
use crate::generate::{onecat, tokenflow};
use crate::hub::{self, Cache, Client, Event, Id, size};
use crate::terminal;
use crate::z_image;

/// Of the text encoder, beside its weights.
const TEXT_FILES: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors.index.json"];

/// The chosen model, or the only one in the cache. Missing files are downloaded, after a line with
/// their size.
///
/// Errors: usage, without a choice; those of a download.
pub(super) fn fetch_infinity(id: &Id, choice: Option<&'static Variant>, offline: bool) -> Result<Source> {
    let here: Vec<&'static Variant> = match Cache::from_env()?.snapshot(id) {
        Some(folder) => VARIANTS.iter().filter(|variant| is_here(&folder, variant)).collect(),
        None => Vec::new(),
    };
    let variant = match (choice, &here[..]) {
        (Some(choice), _) => choice,
        (None, [one]) => *one,
        (None, []) => return Err(infinity::choose(HUB, &[])),
        (None, several) => return Err(infinity::choose(HUB, several)),
    };
    if !here.iter().any(|known| known.name == variant.name) && !offline {
        let _ = writeln!(std::io::stderr(), "{}", terminal::clean(&variant.sizes()));
    }
    let mut progress = progress(false)?;
    let mut folder = None;
    for file in files(id, variant, offline, &mut progress)? {
        let there = |folder: &Path| folder.join(&file).exists();
        folder = Some(hub::fetch(id, Some(&file), there, offline, &mut progress)?);
    }
    let folder = folder.ok_or_else(|| Error::model(format!("{id} has no files")))?;
    let text = text(offline, &mut progress)?;
    let source = infinity::in_folder(&folder, Some(variant), Some(&text))?;
    source.ok_or_else(|| {
        Error::model(format!("{id} holds no {}", variant.title)).hint(format!("nextflow models rm {id}"))
    })
}

/// The folder of a refiner, in the cache or downloaded; with `dry` nothing is downloaded, but
/// listed. What is no refiner is refused by its smallest file.
///
/// Errors: those of a download, and a model that is no refiner.
pub(super) fn fetch_refiner(id: &Id, offline: bool, dry: bool) -> Result<(Option<Source>, Vec<Download>)> {
    let whole = |folder: &Path| z_image::is_whole(&Source::Folder(folder.into()));
    if let Some(folder) = Cache::from_env()?.snapshot(id).filter(|folder| whole(folder)) {
        return Ok((Some(Source::Folder(folder)), Vec::new()));
    }
    let mut progress = progress(false)?;
    if dry && !offline {
        let files = Client::from_env()?.files(id, &mut progress)?;
        let files: Vec<_> = files.into_iter().map(|(name, bytes)| Download { name, bytes }).collect();
        return match files.iter().any(|file| file.name == z_image::INDEX) {
            true => Ok((None, files)),
            false => Err(z_image::no_refiner(&id.to_string(), "it has no model_index.json")),
        };
    }
    let index = |folder: &Path| folder.join(z_image::INDEX).exists();
    if !offline {
        let folder = hub::fetch(id, Some(z_image::INDEX), index, false, &mut progress)?;
        z_image::check_class(&Source::Folder(folder))?;
    }
    let folder = hub::fetch(id, None, whole, offline, &mut progress)?;
    Ok((Some(Source::Folder(folder)), Vec::new()))
}

/// Whether a snapshot has a model, but for its image tokenizer.
fn is_here(folder: &Path, variant: &Variant) -> bool {
    let file = Path::new(variant.transformer);
    let place = folder.join(file.parent().unwrap_or(Path::new("")));
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    checkpoint::files_with(&place, &name, |_| true).is_ok_and(|files| files.iter().all(|file| file.exists()))
}

/// The files of a model: its transformer, in shards that an index names, and its image tokenizer.
fn files(id: &Id, variant: &Variant, offline: bool, progress: hub::Observer) -> Result<Vec<String>> {
    let mut files = match variant.transformer.strip_suffix("model.safetensors") {
        None => vec![variant.transformer.to_string()],
        Some(place) => {
            let index = format!("{}.index.json", variant.transformer);
            let folder = hub::fetch(id, Some(&index), |folder| folder.join(&index).exists(), offline, progress)?;
            let shards = checkpoint::shard_names(&folder.join(&index), |_| true)?;
            shards.into_iter().map(|shard| format!("{place}{shard}")).collect()
        }
    };
    files.push(variant.tokenizer.into());
    Ok(files)
}

/// The folder with the text encoder; of its shards those that hold the encoder.
fn text(offline: bool, progress: hub::Observer) -> Result<std::path::PathBuf> {
    let id: Id = TEXT_HUB.parse()?;
    let mut fetch = |file: &str| hub::fetch(&id, Some(file), |folder| folder.join(file).exists(), offline, progress);
    let mut folder = None;
    for file in TEXT_FILES {
        folder = Some(fetch(file)?);
    }
    let folder = folder.ok_or_else(|| Error::model(format!("{id} has no files")))?;
    let encoder = |key: &str| key.starts_with("encoder.") || key == "shared.weight";
    for shard in checkpoint::shard_names(&folder.join(TEXT_FILES[2]), encoder)? {
        fetch(&shard)?;
    }
    Ok(folder)
}

/// Puts the image tokenizer of a model that was published without one into the model's folder.
///
/// Errors: those of a download. Offline, OneCAT loads without it: chat needs none.
pub(super) fn borrow_tokenizer(folder: &Path, offline: bool, progress: hub::Observer) -> Result<()> {
    if let Some((other, file)) = tokenflow::tokenizer_elsewhere(&Source::Folder(folder.into())) {
        hub::borrow(folder, &other.parse()?, file, offline, progress)?;
    }
    if onecat::needs_tokenizer(folder) {
        let borrowed = hub::borrow(folder, &onecat::TOKENIZER_HUB.parse()?, onecat::TOKENIZER, offline, progress);
        return if offline { Ok(()) } else { borrowed };
    }
    Ok(())
}

/// Prints the progress of a download to stderr: what it waits for, and a line per tenth of a file.
/// Ctrl-C stops it.
pub(super) fn progress(quiet: bool) -> Result<impl FnMut(Event) -> Result<()>> {
    let stop = terminal::interrupts()?;
    let mut last = (String::new(), 0);
    Ok(move |event: Event| {
        if stop.check().is_break() {
            return Err(terminal::interrupted());
        }
        let (text, tenth) = match event {
            Event::Status(text) => (text, 0),
            Event::Progress { name, done, total } => (name, 1 + u128::from(done) * 10 / u128::from(total.max(1))),
            Event::Tick => return Ok(()),
        };
        if quiet || (last.0 == text && last.1 == tenth) {
            return Ok(());
        }
        last = (text.into(), tenth);
        match event {
            Event::Progress { name, done, total } => {
                terminal::note(&format!("{name}: {} of {}", size(done), size(total)));
            }
            _ => terminal::note(text),
        }
        Ok(())
    })
}
