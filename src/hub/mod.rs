//! Models of the Hugging Face hub, in the cache that its own tools use. The crate hf-hub knows its
//! layout; downloads are checked here, because neither its 0.5 nor its 1.0 checks length, SHA-256
//! or names.
//!
//! A server's answers are checked before they become part of a path: commits and hashes are
//! hexadecimal, file names are plain paths below the snapshot. Files are downloaded under the name
//! of their hash, resumed where a download was cut, and take their place only when size and hash
//! agree. Every wait is bounded and announced.
//!
//! | file | what |
//! |---|---|
//! | `id` | names of models, and the addresses that people paste |
//! | `settings` | the environment: endpoint, token, cache |
//! || `proxy`, `tls`, `http`, `retry` | requests, redirects, timeouts, retries | |
//! || `listing`, `select` | the hub's list of files, and the choice of those that are needed | |
//! || `cache`, `store`, `hash` | the folder of models; storing files in it; checking their hashes | |
//! || `client` | a whole download | |

mod cache;
mod client;
mod hash;
mod http;
mod id;
mod listing;
mod proxy;
mod retry;
mod select;
mod settings;
mod store;
mod tls;

use std::io;
use std::path::{Path, PathBuf};

pub use cache::{Cache, Cached, Verdict};
pub use client::Client;
pub use id::Id;

use crate::error::{Error, Kind, Result};

/// What happens while a model is downloaded or checked.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Nothing new, a few times a second.
    Tick,
    /// The current step or wait; the same text repeats while it lasts.
    Status(&'a str),
    /// A file has grown.
    Progress {
        /// Its name in the repository.
        name: &'a str,
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
}

/// Receives events. An error that it returns stops the download or check.
pub type Observer<'a> = &'a mut dyn FnMut(Event) -> Result<()>;

/// A number of bytes with its unit, to one digit.
pub fn size(bytes: u64) -> String {
    match bytes as f64 {
        b if b < 1e3 => format!("{bytes} B"),
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}

/// Whether `text` is lower-case hexadecimal of `length` digits.
fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The error of a file of the cache that cannot be read or written.
fn cannot(path: &Path, e: io::Error) -> Error {
    let error = Error::new(Kind::Failure, format!("{}: {e}", path.display()));
    let kind = e.kind();
    let error = error.because(e);
    match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            error.hint("nextflow models rm OWNER/NAME frees space, HF_HOME=FOLDER puts the cache elsewhere")
        }
        _ => error.hint("HF_HOME=FOLDER puts the cache elsewhere"),
    }
}

/// The snapshot folder of a model, with at least the file `only` of it: from the cache, if its
/// content is `whole`, or downloaded into it unless `offline`.
pub fn fetch(
    id: &Id,
    only: Option<&str>,
    whole: impl Fn(&Path) -> bool,
    offline: bool,
    observer: Observer,
) -> Result<PathBuf> {
    let cache = Cache::from_env()?;
    let there = cache.snapshot(id);
    if let Some(folder) = there.filter(|folder| whole(folder) || offline && only.is_none()) {
        return Ok(folder);
    }
    if offline {
        return Err(Error::model(format!("{id} is not in the cache {}", cache.root().display()))
            .hint(format!("without --offline and HF_HUB_OFFLINE: nextflow models pull {id}")));
    }
    let files: Vec<String> = only.into_iter().map(String::from).collect();
    Client::from_env()?.pull(id, &files, &cache, observer)
}

/// Puts `file` of another model into a snapshot's folder.
pub fn borrow(folder: &Path, id: &Id, file: &str, offline: bool, observer: Observer) -> Result<()> {
    let source = fetch(id, Some(file), |folder| folder.join(file).exists(), offline, observer)?.join(file);
    let source = source.canonicalize()?;
    store::put(&folder.join(file), &source, &source, false)
}
