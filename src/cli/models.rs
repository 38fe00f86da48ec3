//! `nextflow models`: the models that are here, and how to get, check and remove others.

use clap::builder::FalseyValueParser;
use clap::{Args, Subcommand};

use super::hub::progress;
use crate::checkpoint::{NANO, Source};
use crate::error::{Error, Kind, Result};
use crate::generate::infinity;
use crate::hub::{Cache, Cached, Client, Id, size};
use crate::terminal;

/// Flags of `nextflow models`.
#[derive(Args, Debug)]
pub struct ModelsArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the built-in model and those in the Hugging Face cache
    List {
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Download a model, or resume its download
    Pull {
        /// OWNER/NAME, OWNER/NAME@REVISION, or the address of its page;
        /// FoundationVision/Infinity:2b for one of several
        #[arg(value_name = "ID")]
        model: String,
        /// Download only these files, and the small ones beside them
        #[arg(value_name = "FILE")]
        files: Vec<String>,
        #[arg(long, hide = true, env = "HF_HUB_OFFLINE", value_parser = FalseyValueParser::new())]
        offline: bool,
        /// Print results and errors only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Check the files of a model against their hashes
    Verify {
        /// OWNER/NAME
        #[arg(value_name = "ID")]
        model: String,
    },
    /// Delete a model from the cache
    Rm {
        /// OWNER/NAME
        #[arg(value_name = "ID")]
        model: String,
    },
}

/// Runs `nextflow models`.
pub(super) fn run(args: &ModelsArgs) -> Result<()> {
    let cache = Cache::from_env()?;
    match &args.action {
        Action::List { json } => list(&cache, *json),
        Action::Pull { model, files, offline, quiet } => pull(&cache, model, files, *offline, *quiet),
        Action::Verify { model } => verify(&cache, &model.parse()?),
        Action::Rm { model } => {
            let id: Id = model.parse()?;
            let bytes = cache.remove(&id)?;
            terminal::emit(format!("removed {id}, {} freed\n", size(bytes)).as_bytes()).map(drop)
        }
    }
}

fn pull(cache: &Cache, model: &str, files: &[String], offline: bool, quiet: bool) -> Result<()> {
    let (name, choice) = infinity::split(model);
    let (id, file) = Id::with_file(name)?;
    if offline {
        return Err(Error::usage(format!("{id} is to be downloaded, but HF_HUB_OFFLINE or --offline forbids it"))
            .hint(format!("HF_HUB_OFFLINE=0 nextflow models pull {id}")));
    }
    let files: Vec<String> = files.iter().cloned().chain(file).collect();
    // It holds several models.
    if id.is(infinity::HUB) && files.is_empty() {
        return super::hub::fetch_infinity(&id, choice, false).map(drop);
    }
    let mut progress = progress(quiet)?;
    let folder = Client::from_env()?.pull(&id, &files, cache, &mut progress)?;
    if files.is_empty() {
        super::hub::borrow_tokenizer(&folder, false, &mut progress)?;
    }
    terminal::emit_path(&folder).map(drop)
}

fn list(cache: &Cache, json: bool) -> Result<()> {
    let models = cache.list()?;
    let built_in = Source::Embedded.embedded_bytes();
    if json {
        let nano = Cached { id: NANO.into(), commits: Vec::new(), bytes: built_in };
        let all: Vec<Cached> = Some(nano).filter(|_| built_in > 0).into_iter().chain(models).collect();
        return terminal::emit_json(&all).map(drop);
    }
    let mut text = if built_in > 0 { format!("{NANO} · {} · built in\n", size(built_in)) } else { String::new() };
    for model in models {
        let commits: Vec<&str> = model.commits.iter().map(|c| c.get(..7).unwrap_or(c)).collect();
        text += &format!(
            "{} · {} · {}\n",
            terminal::clean(&model.id),
            size(model.bytes),
            terminal::clean(&commits.join(", "))
        );
    }
    terminal::emit(text.as_bytes()).map(drop)
}

fn verify(cache: &Cache, id: &Id) -> Result<()> {
    let verdict = cache.verify(id, &mut progress(false)?)?;
    let bad: Vec<String> = verdict.corrupt.iter().chain(&verdict.missing).map(|p| p.display().to_string()).collect();
    if !bad.is_empty() {
        return Err(Error::model(format!("{id} is damaged: {}", bad.join(", ")))
            .hint(format!("nextflow models rm {id} && nextflow models pull {id}")));
    }
    if verdict.sound == 0 {
        let why = match verdict.unhashed {
            0 => "the cache has no files of it".to_string(),
            n => format!("{n} files in the cache have no hash from the hub"),
        };
        return Err(Error::new(Kind::Failure, format!("nothing of {id} could be checked: {why}"))
            .hint(format!("nextflow models rm {id} && nextflow models pull {id}")));
    }
    let text = match verdict.unhashed {
        0 => format!("{id}: {} files sound\n", verdict.sound),
        n => format!("{id}: {} files sound, {n} without a hash could not be checked\n", verdict.sound),
    };
    terminal::emit(text.as_bytes()).map(drop)
}
