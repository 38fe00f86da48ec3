//! Where the files of a model are: Infinity is published as a transformer, an image tokenizer and,
//! elsewhere, a text encoder.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::variants::{HUB, TEXT_HUB, VARIANTS, Variant};
use crate::checkpoint::{self, IMAGE_TOKENIZER, Inventory, Parts, Source, TRANSFORMER};
use crate::error::{Error, Result};
use crate::infinity::InfinityConfig;
use crate::io::input::quoted;
use crate::t5::{TEXT_CONFIG, TEXT_ENCODER, TEXT_WORDS};
use crate::tokenizer::{BitPreset, BitTokenizerConfig};

/// The family's name in the `config.json` of our model folders; the public files name none.
const FAMILY: &str = "infinity";
/// Folders beside the transformer, or in it, where the text encoder may be.
const TEXT_FOLDERS: [&str; 4] = ["text_encoder", "flan-t5-xl", "../flan-t5-xl", "."];

/// Whether a `config.json` is that of a model of this family.
pub fn is_config(config: &Value) -> bool {
    config.get("model_type").and_then(Value::as_str) == Some(FAMILY)
}

/// The `config.json` of a model folder of ours.
pub fn config(variant: Option<&Variant>) -> Value {
    json!({ "model_type": FAMILY, "variant": variant.map(|variant| variant.name) })
}

/// The released model that a config names.
pub(super) fn variant(config: &Value) -> Option<&'static Variant> {
    Variant::named(config.get("variant")?.as_str()?)
}

/// A name with one of the released models behind a colon, as `FOLDER:2b`.
pub fn split(name: &str) -> (&str, Option<&'static Variant>) {
    match name.rsplit_once(':').and_then(|(name, variant)| Some((name, Variant::named(variant)?))) {
        Some((name, variant)) => (name, Some(variant)),
        None => (name, None),
    }
}

/// The error of a choice that has not been made, or cannot be.
pub fn choose(name: &str, found: &[&Variant]) -> Error {
    let all: Vec<&Variant> = if found.is_empty() { VARIANTS.iter().collect() } else { found.to_vec() };
    let names: Vec<String> =
        all.iter().map(|variant| format!("\n  {name}:{} - {}", variant.name, variant.sizes())).collect();
    Error::usage(format!("{name} holds {} models: which one?{}", all.len(), names.concat()))
        .hint(format!("--model {name}:{}", all[0].name))
}

/// The model in a folder with public files of Infinity; nothing if there are none. `text` is a
/// folder with the text encoder, if one is known elsewhere.
///
/// Errors: several models without a `choice`, and files that are missing or do not belong together.
pub fn in_folder(folder: &Path, choice: Option<&'static Variant>, text: Option<&Path>) -> Result<Option<Source>> {
    let here = |variant: &&Variant| {
        folder.join(variant.transformer).exists() || folder.join(format!("{}.index.json", variant.transformer)).exists()
    };
    let found: Vec<&'static Variant> = VARIANTS.iter().filter(here).collect();
    let shown = folder.display().to_string();
    let (transformer, variant) = match (choice, &found[..]) {
        (Some(choice), _) => (folder.join(choice.transformer), Some(choice)),
        (None, [one]) => (folder.join(one.transformer), Some(*one)),
        (None, [_, ..]) => return Err(choose(&shown, &found)),
        (None, []) => match tuned(folder)? {
            Some((path, variant)) => (path, variant),
            None => return Ok(None),
        },
    };
    let tokenizer = tokenizer(folder, &transformer, variant)?;
    let mut files = vec![(TRANSFORMER, vec![transformer]), (IMAGE_TOKENIZER, vec![tokenizer])];
    let text = TEXT_FOLDERS.iter().map(|name| folder.join(name)).chain(text.map(PathBuf::from)).find(|f| is_t5(f));
    if let Some(text) = text {
        files.push((TEXT_CONFIG, vec![text.join("config.json")]));
        files.push((TEXT_WORDS, vec![text.join("tokenizer.json")]));
        let encoder = |key: &str| key.starts_with("encoder.") || key == "shared.weight";
        files.push((TEXT_ENCODER, checkpoint::files_with(&text, "model.safetensors", encoder)?));
    }
    let name = match choice {
        Some(choice) => format!("{shown}:{}", choice.name),
        None => shown,
    };
    Ok(Some(Source::Parts(Parts { name, folder: folder.into(), config: config(variant), files })))
}

/// Whether a folder holds T5, or a part of it.
fn is_t5(folder: &Path) -> bool {
    let config = || Source::Folder(folder.into()).read_config().ok();
    let kind = |config: Value| Some(config.get("model_type")?.as_str()? == "t5");
    folder.join("tokenizer.json").exists() && config().and_then(kind) == Some(true)
}

/// A transformer by another name, such as a fine-tuned one.
fn tuned(folder: &Path) -> Result<Option<(PathBuf, Option<&'static Variant>)>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(None) };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for file in files.into_iter().filter(|file| file.extension().is_some_and(|kind| kind == "pth") && file.is_file()) {
        // Unreadable files are of another kind, or are reported when they are loaded.
        let Ok(weights) = Inventory::open(&file) else { continue };
        if InfinityConfig::is(&weights) {
            let shape = InfinityConfig::of(&weights, &file.display().to_string())?;
            return Ok(Some((file, Variant::of_shape(&shape))));
        }
    }
    Ok(None)
}

/// The image tokenizer beside a transformer: that of the released model, or one with as many bits.
fn tokenizer(folder: &Path, transformer: &Path, variant: Option<&Variant>) -> Result<PathBuf> {
    let own = variant.map(|variant| folder.join(variant.tokenizer));
    if let Some(own) = own.as_ref().filter(|own| own.exists()) {
        return Ok(own.clone());
    }
    let published: Vec<String> = BitPreset::all().iter().map(BitPreset::file).collect();
    let mut others = Vec::new();
    for entry in std::fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        let weights = path.extension().is_some_and(|kind| kind == "pth" || kind == "pt" || kind == "safetensors");
        if weights && path != transformer && path.is_file() && Inventory::open(&path).is_ok_and(|i| is_tokenizer(&i)) {
            others.push(path);
        }
    }
    others.sort();
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // One that was published for another transformer is the wrong one, even if it has the shape.
    match (others.iter().find(|path| !published.contains(&name(path))), variant) {
        (Some(other), _) => Ok(other.clone()),
        (None, Some(variant)) => {
            let there = match others.first() {
                Some(other) => format!("; {} belongs to another", name(other)),
                None => String::new(),
            };
            let message = format!(
                "{} needs {}, the image tokenizer that it was trained with, in {}{there}",
                variant.title,
                variant.tokenizer,
                folder.display()
            );
            Err(Error::model(message).hint(download(HUB, variant.tokenizer, folder)))
        }
        (None, None) => Err(Error::model(format!("{} holds no image tokenizer of Infinity", folder.display()))
            .hint(download(HUB, VARIANTS[1].tokenizer, folder))),
    }
}

fn is_tokenizer(weights: &Inventory) -> bool {
    BitTokenizerConfig::of_weights(weights).is_some()
}

/// The command that puts a file of the hub into a folder.
fn download(hub: &str, file: &str, folder: &Path) -> String {
    format!("hf download {hub} {file} --local-dir {}", quoted(folder))
}

/// The error of a model without a text encoder.
pub fn no_text_encoder(source: &Source) -> Error {
    let folder = match source {
        Source::Parts(parts) => parts.folder.join("flan-t5-xl"),
        Source::Folder(folder) => folder.join("text_encoder"),
        Source::Embedded => PathBuf::from("flan-t5-xl"),
    };
    Error::model(format!("{source} has no text encoder")).hint(format!(
        "nextflow models pull {TEXT_HUB}, or hf download {TEXT_HUB} --local-dir {}, or --text-features FILE",
        quoted(&folder)
    ))
}
