//! Models of the Hugging Face hub, in the cache that its own tools use: `models--OWNER--NAME/{blobs,snapshots,refs}`. The crate
//! hf-hub keeps what arrives without comparing its hash.
//!
//! What a server says is checked before it becomes part of a path: commits and hashes are hexadecimal, file names are
//! plain paths below the snapshot. Files are downloaded under the name of their hash, resumed where a download was cut,
//! and take their place only when size and, where the hub states one, SHA-256 agree.

mod cache;
mod client;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use cache::{Cache, Cached, Verdict};
pub use client::{Client, Progress};

use crate::error::{Error, Result};

/// A model on the hub: `OWNER/NAME`, or `OWNER/NAME@REVISION`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    owner: String,
    name: String,
    revision: String,
}

impl FromStr for Id {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let bad = || {
            Error::usage(format!("{text} is not a model id"))
                .hint("an id is OWNER/NAME, as in nextflow models pull ByteVisionLab/TokenFlow-t2i")
        };
        let (owner, name) = path.split_once('/').ok_or_else(bad)?;
        if [owner, name, revision].into_iter().all(plain) {
            return Ok(Self { owner: owner.into(), name: name.into(), revision: revision.into() });
        }
        Err(bad())
    }
}

/// Letters, digits, `.`, `_` and `-`, not led by a dot, and without `--`, which stands for `/` in the cache.
fn plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !part.is_empty() && part.len() <= 96 && part.chars().all(allowed) && !part.starts_with('.') && !part.contains("--")
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

impl Id {
    /// Whether it names a model, OWNER/NAME, in any revision.
    pub fn is(&self, model: &str) -> bool {
        model.split_once('/') == Some((&self.owner, &self.name))
    }

    /// The model's folder in the cache.
    fn folder(&self) -> String {
        format!("models--{}--{}", self.owner, self.name)
    }
}

/// The snapshot's folder of a model, or one with at least the file `only` of it: from the cache, if what is there is `whole`,
/// or downloaded into it unless `offline`.
pub fn fetch(
    id: &Id,
    only: Option<&str>,
    whole: impl Fn(&Path) -> bool,
    offline: bool,
    progress: Progress,
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
    Client::from_env().pull(id, only, &cache, progress)
}

/// Puts `file` of another model into a snapshot's folder.
pub fn borrow(folder: &Path, id: &Id, file: &str, offline: bool, progress: Progress) -> Result<()> {
    let target = fetch(id, Some(file), |folder| folder.join(file).exists(), offline, progress)?.join(file);
    client::put(&folder.join(file), &target.canonicalize()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain() {
        let id: Id = "ByteVisionLab/TokenFlow-t2i".parse().unwrap();
        assert_eq!(
            (id.to_string().as_str(), id.folder().as_str()),
            ("ByteVisionLab/TokenFlow-t2i", "models--ByteVisionLab--TokenFlow-t2i")
        );
        assert_eq!("a/b@v1.0".parse::<Id>().unwrap().to_string(), "a/b@v1.0");
        for bad in ["", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/b@", "a/b@../x", "a--b/c", "a/b c", "a/b\n", "é/b"]
        {
            assert_eq!(bad.parse::<Id>().unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
