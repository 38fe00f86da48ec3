//! `nextflow models`: the models that are here, and how to get, check and remove others.

use std::io::Write;

use clap::builder::FalseyValueParser;
use clap::{Args, Subcommand};

use crate::checkpoint::{NANO, Source};
use crate::error::{Error, Result};
use crate::generate::infinity;
use crate::hub::{Cache, Cached, Client, Id};
use crate::terminal;

/// Flags of `nextflow models`.
#[derive(Args, Debug)]
pub struct ModelsArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// The built-in model and those in the cache of the Hugging Face hub
    List {
        /// Print JSON in place of text
        #[arg(long)]
        json: bool,
    },
    /// Download a model, or go on with a download
    Pull {
        /// OWNER/NAME, or OWNER/NAME@REVISION; FoundationVision/Infinity:2b for one of several
        id: String,
        #[arg(long, hide = true, env = "HF_HUB_OFFLINE", value_parser = FalseyValueParser::new())]
        offline: bool,
        /// Say nothing but results and errors
        #[arg(short, long)]
        quiet: bool,
    },
    /// Check the files of a model against their SHA-256
    Verify {
        /// OWNER/NAME
        id: Id,
    },
    /// Remove a model from the cache
    Rm {
        /// OWNER/NAME
        id: Id,
    },
}

/// Runs `nextflow models`.
pub(super) fn run(args: &ModelsArgs) -> Result<()> {
    let cache = Cache::from_env()?;
    match &args.action {
        Action::List { json } => list(&cache, *json),
        Action::Pull { id, offline: true, .. } => {
            Err(Error::usage(format!("{id} is to be downloaded, but HF_HUB_OFFLINE or --offline forbids it"))
                .hint(format!("HF_HUB_OFFLINE=0 nextflow models pull {id}")))
        }
        Action::Pull { id, .. } if infinity_id(id)?.is_some() => {
            let (id, choice) = infinity::split(id);
            super::infinity_hub::fetch(&id.parse()?, choice, false).map(drop)
        }
        Action::Pull { id, quiet, .. } => {
            let id: &Id = &id.parse()?;
            let folder = Client::from_env().pull(id, None, &cache, &mut progress(*quiet)?)?;
            terminal::emit_path(&folder).map(drop)
        }
        Action::Verify { id } => verify(&cache, id),
        Action::Rm { id } => {
            let bytes = cache.remove(id)?;
            terminal::emit(format!("removed {id}, {} freed\n", size(bytes)).as_bytes()).map(drop)
        }
    }
}

/// Infinity's id, if that is what is named: it holds several models, of which nobody wants all.
fn infinity_id(name: &str) -> Result<Option<Id>> {
    let id: Id = infinity::split(name).0.parse()?;
    Ok(Some(id).filter(|id| id.is(infinity::HUB)))
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
    let verdict = cache.verify(id)?;
    let bad: Vec<String> = verdict.corrupt.iter().chain(&verdict.missing).map(|p| p.display().to_string()).collect();
    if !bad.is_empty() {
        return Err(Error::model(format!("{id} is damaged: {}", bad.join(", ")))
            .hint(format!("nextflow models rm {id} && nextflow models pull {id}")));
    }
    let text = format!("{id}: {} files sound, {} without a hash\n", verdict.sound, verdict.unhashed);
    terminal::emit(text.as_bytes()).map(drop)
}

/// Tells on stderr how a download goes, a line for every tenth of a file; Ctrl-C breaks it off.
pub(super) fn progress(quiet: bool) -> Result<impl FnMut(&str, u64, u64) -> Result<()>> {
    let stop = terminal::interrupts()?;
    let mut last = (String::new(), 0);
    Ok(move |name: &str, done: u64, all: u64| {
        if stop.check().is_break() {
            return Err(terminal::interrupted());
        }
        let tenth = done * 10 / all.max(1);
        if !quiet && (last.0 != name || last.1 != tenth) {
            last = (name.into(), tenth);
            let _ = writeln!(std::io::stderr(), "{}: {} of {}", terminal::clean(name), size(done), size(all));
        }
        Ok(())
    })
}

fn size(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}
