//! `nextflow info`: describe a model or a weights file.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::chat::{self, ChatConfig};
use crate::checkpoint::{FileSummary, Fit, IMAGE_TOKENIZER, Inventory, NANO, Source, TRANSFORMER, Weights};
use crate::error::{Error, Result};
use crate::generate::infinity::{self, InfinitySetup, Variant};
use crate::generate::onecat::OneCatSetup;
use crate::generate::{self, ModelConfig, tokenflow};
use crate::infinity::{Infinity, InfinityConfig};
use crate::io::input::quoted;
use crate::onecat::{self, OneCatConfig, is_onecat};
use crate::t5::TextEncoder;
use crate::tokenizer::{BitDecoder, BitEncoder, BitPreset, BitTokenizerConfig};
use crate::{codes, terminal};

/// How many keys of a list are shown.
const SHOWN: usize = 5;

/// Flags of `nextflow info`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Model folder, or weights file (.safetensors, .pt, .pth or .gguf) [default: NEXTFLOW_MODEL,
    /// else the built-in model]
    #[arg(value_name = "FOLDER|FILE")]
    pub path: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// A model or file, described.
#[derive(Debug, Serialize)]
struct Info {
    /// Family of the weights.
    family: String,
    /// The checkpoint's config, or the public one that its keys belong to.
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<serde_json::Value>,
    files: Vec<FileSummary>,
    /// Vocabulary of a whole model's text tokenizer, null where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    vocab_size: Option<Option<usize>>,
    /// How the files compare with the tensors that the family's modules load; nothing for families
    /// without modules here.
    #[serde(skip_serializing_if = "Option::is_none")]
    fit: Option<Fit>,
}

/// Runs `nextflow info`.
pub(super) fn run(args: &InfoArgs) -> Result<()> {
    let named = || std::env::var_os("NEXTFLOW_MODEL").filter(|name| !name.is_empty()).map(PathBuf::from);
    let info = match &args.path.clone().or_else(named) {
        Some(path) if path == Path::new(NANO) && !path.exists() => of_model(&Source::Embedded)?,
        Some(path) => match (infinity_at(path)?, path.is_dir()) {
            (Some(source), _) => of_infinity(&source)?,
            (None, false) => of_weights(&Inventory::open(path)?)?,
            (None, true) => of_folder(path)?,
        },
        None => of_model(&Source::Embedded)?,
    };
    let _ = match args.json {
        true => terminal::emit_json(&info)?,
        false => terminal::emit(info.text().as_bytes())?,
    };
    info.check()
}

/// A folder that is not Infinity's.
fn of_folder(path: &Path) -> Result<Info> {
    match config(path)? {
        Some(config) if chat::is_qwen(&config) => of_qwen(&Source::Folder(path.into())),
        Some(config) if onecat::is_config(&config) => of_onecat(path),
        Some(config) if is_model(&config) => of_model(&Source::Folder(path.into())),
        Some(config) if chat::other_family(&config).is_some() => of_family(path, &config),
        None if is_whole(path) => {
            Err(Error::model(format!("{} holds a model, but config.json is missing", path.display()))
                .hint(format!("copy it from its origin; nextflow info {}", quoted(&path.join(TRANSFORMER)))))
        }
        _ => match Inventory::open(path)? {
            none if none.files().is_empty() => Err(Error::model(format!("{} holds no weights", path.display()))
                .hint("name a folder or file with .safetensors, .pt, .pth or .gguf")),
            weights => of_weights(&weights),
        },
    }
}

/// The model of Infinity at a path, which may name one of several behind a colon; nothing if there
/// is none.
fn infinity_at(path: &Path) -> Result<Option<Source>> {
    let text = path.to_string_lossy();
    let (folder, choice) = if path.exists() {
        (path, None)
    } else {
        let (folder, choice) = infinity::split(&text);
        (Path::new(folder), choice)
    };
    if !folder.is_dir() {
        return Ok(None);
    }
    match choice.is_none() && config(folder)?.is_some_and(|config| infinity::is_config(&config)) {
        true => Ok(Some(Source::Folder(folder.into()))),
        false => infinity::in_folder(folder, choice, super::model::text_encoder().as_deref()),
    }
}

/// Infinity's files.
fn of_infinity(source: &Source) -> Result<Info> {
    let config = InfinitySetup::read(source)?;
    let (files, fit) = config.compare(source)?;
    let vocab_size = match &config.text {
        Some(_) => TextEncoder::vocab_size(source).map(Some)?,
        None => None,
    };
    Ok(Info {
        family: config.name.clone(),
        config: Some(config.to_json()),
        files,
        vocab_size: Some(vocab_size),
        fit: Some(fit),
    })
}

/// A folder's config, if there is one.
fn config(folder: &Path) -> Result<Option<serde_json::Value>> {
    let source = Source::Folder(folder.into());
    if source.has_file("config.json") { source.read_config().map(Some) } else { Ok(None) }
}

/// Whether a folder holds a transformer and an image tokenizer, as our models do.
fn is_whole(folder: &Path) -> bool {
    let source = Source::Folder(folder.into());
    source.has(TRANSFORMER) && source.has(IMAGE_TOKENIZER)
}

/// A model of a family that is not read, by the name that its config has for it.
fn of_family(folder: &Path, config: &serde_json::Value) -> Result<Info> {
    let inventory = Inventory::open(folder)?;
    let family = chat::other_family(config).unwrap_or_default();
    let family = format!("a model of the family {family}, which is not read");
    Ok(Info { family, config: None, files: inventory.files(), vocab_size: None, fit: None })
}

/// Vocabulary of a model's text tokenizer, if it has one, limited to `most`.
fn vocab_size(source: &Source, most: usize) -> Result<Option<Option<usize>>> {
    let size = || source.text_of(most).map(|text| text.vocab_size());
    source.has_text().then(size).transpose().map(Some)
}

/// Whether a config is ours, or a public one that is read as ours.
fn is_model(config: &serde_json::Value) -> bool {
    tokenflow::is_public(config) || config.get("backbone").is_some() && config.get("tokenizer").is_some()
}

/// Qwen2.5-VL's public folder.
fn of_qwen(source: &Source) -> Result<Info> {
    let config = ChatConfig::read(source)?;
    let (files, fit) = config.compare(source)?;
    // The family of the names says more than a list of unexpected ones.
    if !fit.is_complete()
        && let Some(error) = Inventory::of(source, TRANSFORMER)?.unread()
    {
        return Err(error);
    }
    let vocab_size = vocab_size(source, config.backbone.vocab_size)?;
    let config = serde_json::json!({ "backbone": config.backbone });
    Ok(Info { family: "Qwen2.5-VL".into(), config: Some(config), files, vocab_size, fit: Some(fit) })
}

/// OneCAT's folder, with or without the image tokenizer that it draws with.
fn of_onecat(path: &Path) -> Result<Info> {
    let source = generate::onecat::in_folder(path, super::model::infinity_cache())?;
    let (config, family, (files, fit)) = match source.has(IMAGE_TOKENIZER) {
        true => {
            let setup = OneCatSetup::read(&source)?;
            let compared = setup.compare(&source)?;
            (setup.transformer, setup.name, compared)
        }
        false => {
            let config = OneCatConfig::read(&source)?;
            let compared = generate::onecat::compare_transformer(&source, &config)?;
            let family = "OneCAT without an image tokenizer: it reads and answers, but does not draw";
            (config, family.into(), compared)
        }
    };
    let vocab_size = vocab_size(&source, config.transformer.vocab_size)?;
    Ok(Info {
        family,
        config: Some(serde_json::json!({ "onecat": config.to_json() })),
        files,
        vocab_size,
        fit: Some(fit),
    })
}

/// A whole model by its config.
fn of_model(source: &Source) -> Result<Info> {
    let config = ModelConfig::read(source)?;
    let (files, fit) = config.compare(source)?;
    let (family, vocab_size) =
        (format!("NextFlow model {}", config.name), vocab_size(source, config.backbone.vocab_size)?);
    let config = serde_json::to_value(config).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
    Ok(Info { family, config: Some(config), files, vocab_size, fit: Some(fit) })
}

/// Weights without a config of ours, by their keys.
fn of_weights(inventory: &Inventory) -> Result<Info> {
    let files = inventory.files();
    if let Some(config) = BitTokenizerConfig::of_weights(inventory) {
        let requested = Weights::inventory();
        BitEncoder::load(&requested, &config)?;
        BitDecoder::load(&requested, &config)?;
        let fit = Some(inventory.compare(&requested));
        let family = format!("Infinity image tokenizer {}", bit_names(&config));
        let config = serde_json::to_value(&config).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        return Ok(Info { family, config: Some(config), files, vocab_size: None, fit });
    }
    if InfinityConfig::is(inventory) {
        let shape = InfinityConfig::of(inventory, "the file")?;
        let requested = Weights::inventory();
        Infinity::load(&requested, &shape)?;
        let name = Variant::of_shape(&shape).map_or("Infinity", |variant| variant.title);
        let (family, fit) = (format!("{name}, the transformer"), Some(inventory.compare(&requested)));
        return Ok(Info { family, config: None, files, vocab_size: None, fit });
    }
    if is_onecat(inventory) {
        let family = "OneCAT, the transformer".into();
        let Ok(config) = OneCatConfig::of(inventory, &serde_json::Value::Null) else {
            return Ok(Info { family, config: None, files, vocab_size: None, fit: None });
        };
        let requested = Weights::inventory();
        config.ask(&requested)?;
        let (json, fit) = (serde_json::json!({ "onecat": config.to_json() }), Some(inventory.compare(&requested)));
        return Ok(Info { family, config: Some(json), files, vocab_size: None, fit });
    }
    if inventory.has("quantize.embedding_vqgan.weight") {
        let (preset, fit) = codes::nearest(inventory)?;
        let config = serde_json::to_value(&preset.config).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        return Ok(Info {
            family: format!("TokenFlow image tokenizer {}", preset.name),
            config: Some(config),
            files,
            vocab_size: None,
            fit: Some(fit),
        });
    }
    let unread = inventory.unread().map(|e| e.message);
    let family = match () {
        _ if let Some(unread) = &unread => unread,
        _ if inventory.has("model.pos_1LC") || inventory.has("pos_1LC") => "TokenFlow-t2i language model",
        _ if inventory.has("visual.patch_embed.proj.weight") => "Qwen2.5-VL",
        _ if inventory.has("model.layers.0.self_attn.q_proj.bias") => "a language model of Qwen2's layout",
        _ if inventory.has("model.layers.0.self_attn.q_proj.weight") => "a language model of Llama's layout",
        _ => "weights of no family that is known here",
    };
    Ok(Info { family: family.into(), config: None, files, vocab_size: None, fit: None })
}

/// The public tokenizers of a shape, the transformers that need them, and the shape of their codes.
fn bit_names(config: &BitTokenizerConfig) -> String {
    let named = |preset: BitPreset| match preset.transformer {
        Some(transformer) => format!("{} (of {transformer})", preset.name),
        None => preset.name.to_string(),
    };
    let names: Vec<String> = BitPreset::of(config).into_iter().map(named).collect();
    let names = if names.is_empty() { "of a shape of its own".to_string() } else { names.join(" or ") };
    format!("{names}: {} bits for a token of {} pixels", config.bits.per_token(), config.cell())
}

impl Info {
    /// Errors: weights that do not fit their config.
    fn check(&self) -> Result<()> {
        let Some(fit) = self.fit.as_ref().filter(|fit| !fit.is_complete()) else { return Ok(()) };
        let faults = fit.misshapen.iter().cloned().chain(fit.missing.iter().map(|key| format!("{key}: missing")));
        let shown: Vec<String> = faults.take(SHOWN).collect();
        let (missing, misshapen) = (fit.missing.len(), fit.misshapen.len());
        let message = format!(
            "the weights do not fit the config, tensors {missing} missing, {misshapen} misshapen: {}",
            shown.join("; ")
        );
        Err(Error::model(message).hint("copy config.json and all weights from one checkpoint"))
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // Names and keys come from files. A String takes every line.
        let mut line = |l: String| {
            let _ = writeln!(text, "{}", terminal::clean(&l));
        };
        line(self.family.clone());
        if let Some(backbone) = self.config.as_ref().and_then(|c| c.get("backbone")) {
            let number = |key: &str| backbone.get(key).map(ToString::to_string).unwrap_or_default();
            line(format!(
                "  transformer: {} layers, {} wide, {} heads over {}, vocabulary {}, {} codes",
                number("num_hidden_layers"),
                number("hidden_size"),
                number("num_attention_heads"),
                number("num_key_value_heads"),
                number("vocab_size"),
                number("codebook_size")
            ));
        }
        if let Some(transformer) = self.config.as_ref().and_then(|c| c.get("transformer")) {
            let number = |key: &str| transformer.get(key).map(ToString::to_string).unwrap_or_default();
            line(format!(
                "  transformer: {} blocks, {} wide, {} heads, {} bits a token",
                number("depth"),
                number("width"),
                number("heads"),
                number("bits")
            ));
        }
        if let Some(onecat) = self.config.as_ref().and_then(|c| c.get("onecat")) {
            let number = |key: &str| onecat.get(key).map(ToString::to_string).unwrap_or_default();
            line(format!(
                "  transformer: {} layers, {} wide, {} heads over {}, {} words, {} bits a token, adapters of rank {} for {} scales",
                number("num_hidden_layers"),
                number("hidden_size"),
                number("num_attention_heads"),
                number("num_key_value_heads"),
                number("vocab_size"),
                number("bits"),
                number("adapter_rank"),
                number("adapters")
            ));
        }
        for f in &self.files {
            let dtypes: Vec<String> = f.dtypes.iter().map(|(dtype, n)| format!("{} {dtype}", grouped(*n))).collect();
            let mib = f.bytes as f64 / f64::from(1 << 20);
            line(format!("  {}: {} tensors, {} parameters, {mib:.1} MiB", f.name, f.tensors, grouped(f.parameters)));
            line(format!("    stored as {}", dtypes.join(", ")));
        }
        match self.vocab_size {
            Some(Some(size)) => line(format!("  text tokenizer: {} words", grouped(size as u64))),
            Some(None) => line("  no text tokenizer: tokenizer.json is missing".into()),
            None => {}
        }
        let Some(fit) = &self.fit else { return text };
        for (what, keys) in [("missing", &fit.missing), ("misshapen", &fit.misshapen), ("unknown", &fit.unknown)] {
            if !keys.is_empty() {
                let more =
                    if keys.len() > SHOWN { format!("; and {} more", keys.len() - SHOWN) } else { String::new() };
                let shown = keys.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("; ");
                line(format!("  {} {what}: {shown}{more}", keys.len()));
            }
        }
        if fit.is_complete() && self.vocab_size != Some(None) {
            line("  complete".into());
        }
        text
    }
}

/// 1234567 as "1,234,567".
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(n), text);
        }
    }

    #[cfg(feature = "nano")]
    #[test]
    fn the_built_in_model_is_complete_and_nothing_in_it_is_unknown() {
        let info = of_model(&Source::Embedded).unwrap();
        let fit = info.fit.as_ref().unwrap();
        assert!(fit.is_complete() && fit.unknown.is_empty(), "{fit:?}");
        let text = info.text();
        assert!(text.starts_with("NextFlow model nano\n") && text.ends_with("  complete\n"), "{text}");
    }
}
