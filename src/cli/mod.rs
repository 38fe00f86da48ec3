//! The command line: clap types and one file per command.
//!
//! A new command is a file with its `XArgs` and `run(&XArgs) -> Result<()>`, and a line each in the list of modules, in
//! [`Command`] and in [`run`]. Results go out through `terminal::emit`, `emit_path` or `emit_json`, all else through a
//! [`terminal::Console`]; what is refused is an [`Error`] of one sentence with a hint that is an exact command. It is tested on
//! the real program, in tests/.

mod assemble;
mod bench;
mod chat;
mod completions;
mod decode;
mod device;
mod draw;
mod edit;
mod encode;
mod eval;
mod r#gen;
#[cfg(feature = "hub")]
mod infinity_hub;
mod info;
mod job_file;
mod jobs;
mod lines;
mod model;
#[cfg(feature = "hub")]
mod models;
mod per_scale;
mod plan;
mod quantize;
mod repl;
mod request;
mod think;
#[cfg(feature = "train")]
mod train;

pub use device::DeviceArgs;
pub use draw::{DrawArgs, PromptArgs};
pub use eval::EvalArgs;
pub use r#gen::GenArgs;
pub use model::ModelArgs;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use crate::error::{Error, Result};
use crate::terminal;

/// Draw images from a terminal with NextFlow.
#[derive(Debug, Parser)]
#[command(name = "nextflow", version, about, arg_required_else_help = false)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Draw images from prompts
    Gen(GenArgs),
    /// Edit images by instruction
    Edit(edit::EditArgs),
    /// Talk about images, and draw them
    Chat(chat::ChatArgs),
    /// Turn an image into codes
    Encode(encode::EncodeArgs),
    /// Turn codes into an image
    Decode(decode::DecodeArgs),
    /// Describe a model or a file of weights
    Info(info::InfoArgs),
    /// Measure speed and memory with random weights
    Bench(bench::BenchArgs),
    /// Write a smaller copy of a model
    Quantize(quantize::QuantizeArgs),
    /// Build an untrained NextFlow from Qwen2.5-VL and an image tokenizer
    Assemble(assemble::AssembleArgs),
    /// List, download, check and remove models
    #[cfg(feature = "hub")]
    Models(models::ModelsArgs),
    /// Measure a model: compositions, dialogues, recognition, reconstruction
    Eval(EvalArgs),
    /// Print the script by which a shell completes commands and flags
    Completions(completions::CompletionsArgs),
    /// Train nano, step by step
    #[cfg(feature = "train")]
    Train(train::TrainArgs),
}

/// The command that `args` asks for, the program's name first; `None` when help or the version was
/// asked for, and printed.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Option<Command>> {
    let args: Vec<OsString> = args.collect();
    match Cli::try_parse_from(&args) {
        Ok(cli) => Ok(Some(cli.command)),
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            let _ = terminal::emit(e.render().to_string().as_bytes())?;
            Ok(None)
        }
        Err(e) => {
            let typed: Vec<&str> = args.iter().skip(1).filter_map(|arg| arg.to_str()).collect();
            Err(one_sentence(&e, &typed))
        }
    }
}

/// Whether a command trains.
#[cfg_attr(not(feature = "train"), allow(unused_variables))]
pub fn trains(command: &Command) -> bool {
    #[cfg(feature = "train")]
    return matches!(command, Command::Train(_));
    #[cfg(not(feature = "train"))]
    false
}

/// Runs a command to its end.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Gen(args) => r#gen::run(&args),
        Command::Edit(args) => edit::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Encode(args) => encode::run(&args),
        Command::Decode(args) => decode::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Assemble(args) => assemble::run(&args),
        #[cfg(feature = "hub")]
        Command::Models(args) => models::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Completions(args) => completions::run(&args),
        #[cfg(feature = "train")]
        Command::Train(args) => train::run(&args),
    }
}

/// clap's paragraphs about what was typed as one sentence and one hint, which names the command and its own command.
fn one_sentence(error: &clap::Error, typed: &[&str]) -> Error {
    let text = error.render().to_string();
    // The other tips tell how to say what was not meant.
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: ")).filter(|tip| tip.contains("similar"));
    let (mut at, mut command) = (Cli::command(), String::from("nextflow"));
    for name in typed {
        if let Some(named) = at.find_subcommand(name).cloned() {
            command = format!("{command} {name}");
            at = named;
        }
    }
    let sentence = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => format!("{command} needs to be told what to do"),
        _ => text.split("\n\n").next().unwrap_or_default().trim_start_matches("error:").into(),
    };
    let hint = tip.map_or_else(|| format!("{command} --help"), String::from);
    Error::usage(sentence.split_whitespace().collect::<Vec<_>>().join(" ")).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(args: &[&str]) -> Error {
        one_sentence(&Cli::try_parse_from([&["nextflow"], args].concat()).unwrap_err(), args)
    }

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_one_line_with_a_hint() {
        for args in [
            &["gen", "-p", "x", "--seed", "y"][..],
            &["gen", "--sed", "1"],
            &["gen", "-p", "x", "--prompt-file", "y"],
            &["gen", "-p", "x", "-o", "a.png", "--out-dir", "b"],
            &["gen", "-p", "x", "--jsonl", "y"],
            &["gen", "-p", "x", "-q", "-v"],
            &["paint"],
            &[],
        ] {
            let error = fails(args);
            assert_eq!(error.exit_code(), 2);
            assert!(!error.message.is_empty() && !error.message.contains('\n'), "{args:?}: {}", error.message);
            assert!(error.hint.is_some());
        }
        assert!(fails(&["gen", "--sed", "1"]).hint.unwrap().contains("--seed"));
        assert_eq!(fails(&["gen", "-p", "x", "--seed", "y"]).hint.unwrap(), "nextflow gen --help");
        assert_eq!(fails(&[]).hint.unwrap(), "nextflow --help");
        #[cfg(feature = "hub")]
        assert_eq!(fails(&["models"]).message, "nextflow models needs to be told what to do");
        #[cfg(feature = "hub")]
        assert_eq!(fails(&["models", "rm"]).hint.unwrap(), "nextflow models rm --help");
    }
}
