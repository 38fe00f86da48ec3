//! `nextflow assemble`: NextFlow before its training, of a public transformer and a public image
//! tokenizer.

use std::path::{Path, PathBuf};

use clap::Args;

use super::ModelArgs;
use crate::backbone::Backbone;
use crate::chat::{self, QwenConfig};
use crate::checkpoint::{self, TRANSFORMER, Weights};
use crate::codes::TokenizerSource;
use crate::error::{Error, Result};
use crate::generate::ModelConfig;
use crate::io::output;
use crate::terminal;

/// Flags of `nextflow assemble`.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  nextflow assemble --backbone Qwen/Qwen2.5-VL-7B-Instruct --tokenizer tokenflow_siglip_32k.pt \
                        -o stage0\n  nextflow info stage0"
)]
pub struct AssembleArgs {
    /// Qwen2.5-VL: a folder, or OWNER/NAME on the Hugging Face hub
    #[arg(long, value_name = "FOLDER|ID")]
    pub backbone: String,
    /// Image tokenizer: a TokenFlow file, or the folder or hub ID of a model that has one
    #[arg(long, value_name = "FILE|FOLDER|ID")]
    pub tokenizer: String,
    /// New model folder; must not exist
    #[arg(short, long = "output", value_name = "FOLDER")]
    pub out: PathBuf,
    /// Random seed of the connector and of the rows for image codes
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Download nothing: use the cache only
    #[cfg(feature = "hub")]
    #[arg(long, env = "HF_HUB_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub offline: bool,
}

/// Runs `nextflow assemble`.
pub(super) fn run(args: &AssembleArgs) -> Result<()> {
    let of = |name: &str| ModelArgs {
        model: Some(name.into()),
        #[cfg(feature = "hub")]
        offline: args.offline,
    };
    if args.out.exists() {
        return Err(Error::usage(format!("{} exists already", args.out.display())).hint("-o ANOTHER_FOLDER"));
    }
    let source = of(&args.backbone).source()?;
    let config = source.read_config()?;
    if let Some(family) = chat::other_family(&config) {
        return Err(chat::unknown_family(&source, family));
    }
    if !chat::is_qwen(&config) {
        return Err(Error::model(format!("{source} is not Qwen2.5-VL")).hint("--backbone Qwen/Qwen2.5-VL-7B-Instruct"));
    }
    let tokenizer: TokenizerSource = of(&args.tokenizer).tokenizer()?;
    let name = Path::new(&args.out).file_name().unwrap_or_default().to_string_lossy();
    let config = ModelConfig::nextflow(&name, QwenConfig::read(&source)?.backbone, tokenizer.tokenflow()?.clone());
    let requested = Weights::inventory();
    Backbone::load(&requested, &config.backbone)?;
    let tied = config.backbone.tie_word_embeddings;
    // Without a tie the head has rows already, to which those of the codes are added.
    let fresh = |key: &str| {
        key.starts_with("model.mm_projector.") || key == "model.scale_embed" || tied && key == "lm_head.weight"
    };
    terminal::interrupts_after(checkpoint::abandon)?;
    checkpoint::whole_folder(&args.out, |part| {
        let json = serde_json::to_string_pretty(&config).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        output::write(&part.join("config.json"), (json + "\n").as_bytes())?;
        for file in ["tokenizer.json", "generation_config.json"] {
            if source.has_file(file) {
                source.copy(file, file, part)?;
            }
        }
        tokenizer.copy(part)?;
        checkpoint::extend(&source, TRANSFORMER, &requested, fresh, args.seed, &part.join(TRANSFORMER))
    })?;
    terminal::emit_path(&args.out).map(drop)
}
