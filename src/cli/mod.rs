//! The command line: clap types and one file per command.
//!
//! A new command is a file with its `XArgs` and `run(&XArgs) -> Result<()>`, and a line each in the
//! list of modules, in [`Command`] and in [`run`]. Results go out through `terminal::emit`,
//! `emit_path` or `emit_json`, all else through a [`terminal::Console`]; refusals are an [`Error`]
//! of one sentence with a hint that is an exact command. Tests run the real binary, in tests/.

mod args;
mod assemble;
mod bench;
mod chat;
mod completions;
mod decode;
mod delivery;
mod download;
mod edit;
mod encode;
mod eval;
mod r#gen;
#[cfg(feature = "hub")]
mod hub;
mod info;
mod model;
#[cfg(feature = "hub")]
mod models;
mod per_scale;
mod quantize;
mod refiner;
mod refining;
mod request;
mod run;
#[cfg(feature = "train")]
mod train;

pub use args::{
    DeviceArgs, DrawArgs, LoadArgs, ModelArgs, OutputArgs, PromptArgs, RefinerArgs, ReportArgs, SamplingArgs,
};
pub use eval::EvalArgs;
pub use r#gen::GenArgs;

use std::ffi::OsString;

use clap::error::{ContextKind, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};

use crate::error::{Error, Result};
use crate::io::input;
use crate::terminal;

/// Draw images from a terminal with NextFlow.
#[derive(Debug, Parser)]
#[command(name = "nextflow", version, about, arg_required_else_help = false)]
pub struct Cli {
    /// Print the causes of an error
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Draw images from prompts
    Gen(GenArgs),
    /// Edit images by instruction
    Edit(edit::EditArgs),
    /// Chat about images, and draw in conversation
    Chat(chat::ChatArgs),
    /// Convert an image to codes
    Encode(encode::EncodeArgs),
    /// Convert codes to an image
    Decode(decode::DecodeArgs),
    /// Describe a model or a weights file
    Info(info::InfoArgs),
    /// Measure speed and memory, with random weights
    Bench(bench::BenchArgs),
    /// Write a smaller copy of a model
    Quantize(quantize::QuantizeArgs),
    /// Build an untrained NextFlow from Qwen2.5-VL and an image tokenizer
    Assemble(assemble::AssembleArgs),
    /// List, download, check and remove models
    #[cfg(feature = "hub")]
    Models(models::ModelsArgs),
    /// Score a model: compositions, dialogues, recognition, reconstruction
    Eval(EvalArgs),
    /// Print a shell completion script
    Completions(completions::CompletionsArgs),
    /// Train nano, step by step
    #[cfg(feature = "train")]
    Train(train::TrainArgs),
}

/// Parses `args`, the program's name first. `None` if they ask for help or the version, which is
/// printed.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Option<Cli>> {
    let args = with_dashes(args.collect());
    match Cli::try_parse_from(&args) {
        Ok(cli) => Ok(Some(cli)),
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

/// Options whose value is free text, by their long names.
const WORDS: [(&str, &str); 5] = [
    ("-p", "--prompt"),
    ("--prompt", "--prompt"),
    ("-n", "--negative"),
    ("--negative", "--negative"),
    ("--system", "--system"),
];

/// Rewrites text that begins with a dash (`-p "-a cat"`, `"-a cat"`), so that clap does not parse
/// it as flags. Names of flags stay flags.
fn with_dashes(args: Vec<OsString>) -> Vec<OsString> {
    let name = args.get(1).and_then(|name| name.to_str()).filter(|name| ["gen", "edit", "chat"].contains(name));
    let mut cli = Cli::command();
    cli.build();
    let Some(command) = name.and_then(|name| cli.find_subcommand(name)) else { return args };
    // The flag that an argument is, and whether it takes its value from the next one.
    let flag = |arg: &str| {
        let (name, attached) = arg.split_once('=').map_or((arg, false), |(name, _)| (name, true));
        let found = command.get_arguments().find(|flag| match name.strip_prefix("--") {
            Some(long) => flag.get_long() == Some(long),
            None => flag.get_short().is_some_and(|short| name.strip_prefix('-').is_some_and(|n| n.starts_with(short))),
        })?;
        let takes = found.get_action().takes_values();
        Some(takes && !attached && (name.starts_with("--") || name.len() == 2))
    };
    let is_words = |arg: &str| arg.len() > 1 && arg.starts_with('-') && arg != "--";
    let (mut out, mut held, mut takes) = (Vec::new(), None, false);
    let mut rest = args.into_iter();
    out.extend(rest.by_ref().take(2));
    while let Some(arg) = rest.next() {
        let Some(text) = arg.to_str() else {
            (takes, _) = (false, out.push(arg));
            continue;
        };
        if text == "--" {
            out.push(arg);
            out.extend(rest.by_ref());
            break;
        }
        let spaced = text.contains(char::is_whitespace);
        match out.last().and_then(|last| last.to_str()).filter(|_| takes) {
            Some(last) if is_words(text) && (spaced || flag(text).is_none()) => {
                match WORDS.iter().find(|(name, _)| *name == last) {
                    Some((_, long)) => {
                        let joined = format!("{long}={text}").into();
                        out.pop();
                        out.push(joined);
                    }
                    None => out.push(arg),
                }
                takes = false;
            }
            // The option has its value, or clap reports that it has none.
            Some(_) => (takes, _) = (flag(text).unwrap_or(false), out.push(arg)),
            None if is_words(text) && spaced && flag(text).is_none() => held = Some(arg),
            None => (takes, _) = (flag(text).unwrap_or(false), out.push(arg)),
        }
    }
    if let Some(words) = held {
        let at = out.iter().position(|arg| arg == "--").unwrap_or_else(|| {
            out.push("--".into());
            out.len() - 1
        });
        out.insert(at + 1, words);
    }
    out
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

/// clap's paragraphs as one sentence and one hint, which names the command and its subcommand.
fn one_sentence(error: &clap::Error, typed: &[&str]) -> Error {
    let text = error.render().to_string();
    // The other tips explain how to pass what was not meant.
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: ")).filter(|tip| tip.contains("similar"));
    let (mut at, mut command) = (Cli::command(), String::from("nextflow"));
    for name in typed {
        if let Some(named) = at.find_subcommand(name).cloned() {
            command = format!("{command} {name}");
            at = named;
        }
    }
    let sentence = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => format!("{command} needs a subcommand"),
        _ => text.split("\n\n").next().unwrap_or_default().trim_start_matches("error:").into(),
    };
    let unknown = error.get(ContextKind::InvalidArg).map(ToString::to_string).filter(|_| {
        error.kind() == ErrorKind::UnknownArgument
            && ["nextflow gen", "nextflow edit", "nextflow chat"].contains(&&*command)
    });
    let hint =
        match (tip, unknown.and_then(|arg| typed.iter().find(|typed| typed.len() > 2 && typed.starts_with(&arg)))) {
            (Some(tip), _) => tip.into(),
            (None, Some(words)) => {
                format!("{command} --help, or if this is text: {command} -- {}", input::quoted_words(words))
            }
            (None, None) => format!("{command} --help"),
        };
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
    fn words_may_begin_with_a_dash() {
        let written = |args: &[&str]| {
            let args = ["nextflow"].iter().chain(args).map(OsString::from).collect();
            let out: Vec<String> = with_dashes(args).into_iter().map(|arg| arg.into_string().unwrap()).collect();
            out[1..].join(" | ")
        };
        for (args, out) in [
            (&["gen", "-p", "-a cat", "-o", "x.png"][..], "gen | --prompt=-a cat | -o | x.png"),
            (&["gen", "--prompt", "-cat"], "gen | --prompt=-cat"),
            (&["gen", "-p", "a", "-n", "--b c"], "gen | -p | a | --negative=--b c"),
            (&["gen", "-a cat", "--seed", "1"], "gen | --seed | 1 | -- | -a cat"),
            (&["gen", "- a cat", "-q"], "gen | -q | -- | - a cat"),
            (&["chat", "-i", "a.png", "-what is it?"], "chat | -i | a.png | -- | -what is it?"),
            (&["chat", "hi", "--system", "-be brief"], "chat | hi | --system=-be brief"),
            // What is a flag stays one.
            (&["gen", "-p", "--json"], "gen | -p | --json"),
            (&["gen", "-p", "-q"], "gen | -p | -q"),
            (&["gen", "-pa cat", "--prompt=-a b"], "gen | -pa cat | --prompt=-a b"),
            (&["gen", "-", "--cfg", "-1"], "gen | - | --cfg | -1"),
            (&["gen", "-p", "-", "-o", "-"], "gen | -p | - | -o | -"),
            (&["gen", "--out-dir", "- x", "-p", "a"], "gen | --out-dir | - x | -p | a"),
            (&["gen", "--", "-a cat", "-p"], "gen | -- | -a cat | -p"),
            (&["gen", "-cat"], "gen | -cat"),
            (&["info", "-a b"], "info | -a b"),
        ] {
            assert_eq!(written(args), out, "{args:?}");
        }
        assert!(fails(&["gen", "-cat"]).hint.unwrap().ends_with("nextflow gen -- -cat"));
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
        assert_eq!(fails(&["models"]).message, "nextflow models needs a subcommand");
        #[cfg(feature = "hub")]
        assert_eq!(fails(&["models", "rm"]).hint.unwrap(), "nextflow models rm --help");
    }
}
