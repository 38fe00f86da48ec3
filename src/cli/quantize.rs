//! `nextflow quantize`: a smaller copy of a model.

use std::path::PathBuf;

use clap::Args;

use super::ModelArgs;
use crate::backbone::Backbone;
use crate::chat::{self, ChatConfig, ChatModel};
use crate::checkpoint::{self, REFINER, WeightType, Weights};
use crate::error::Result;
use crate::generate::infinity::{self, InfinitySetup};
use crate::generate::onecat::OneCatSetup;
use crate::generate::{Model, ModelConfig, tokenflow};
use crate::onecat;
use crate::terminal;

/// Flags of `nextflow quantize`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  nextflow quantize --model ByteVisionLab/TokenFlow-t2i --type q8_0 -o t2i-q8\n  \
                        nextflow gen --model t2i-q8 -p \"a red apple\"\n  \
                        nextflow quantize --model FoundationVision/Infinity:2b --type q8_0 -o infinity-2b-q8")]
pub struct QuantizeArgs {
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Type of the transformer's weights
    #[arg(long = "type", value_name = "TYPE", value_enum, default_value_t = WeightType::Q8_0)]
    pub weights: WeightType,
    /// New model folder; must not exist
    #[arg(short, long, value_name = "FOLDER")]
    pub output: PathBuf,
}

/// Runs `nextflow quantize`.
pub(super) fn run(args: &QuantizeArgs) -> Result<()> {
    let source = args.model.source()?;
    terminal::interrupts_after(checkpoint::abandon)?;
    let requested = Weights::inventory();
    let config = source.read_config()?;
    if infinity::is_config(&config) {
        InfinitySetup::read(&source)?.quantise(&source, args.weights, &args.output)?;
        return terminal::emit_path(&args.output).map(drop);
    }
    if onecat::is_config(&config) {
        OneCatSetup::read(&source)?.quantise(&source, args.weights, &args.output)?;
        return terminal::emit_path(&args.output).map(drop);
    }
    if let Some(family) = chat::other_family(&config).filter(|_| !tokenflow::is_public(&config)) {
        return Err(chat::unknown_family(&source, family));
    }
    if chat::is_qwen(&config) {
        let config = ChatConfig::read(&source)?;
        ChatModel::check(&source, &config)?;
        config.build(&requested)?;
        checkpoint::quantise_model(&source, &requested, args.weights, &[], &args.output)?;
    } else {
        let config = ModelConfig::read(&source)?;
        Model::check(&source, &config)?;
        Backbone::load(&requested, &config.backbone)?;
        let mut others = vec![config.tokenizer_file(&source)];
        others.extend(config.refiner.as_ref().filter(|_| source.has(REFINER)).map(|_| REFINER));
        checkpoint::quantise_model(&source, &requested, args.weights, &others, &args.output)?;
    }
    terminal::emit_path(&args.output).map(drop)
}
