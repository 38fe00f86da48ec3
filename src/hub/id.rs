//! Names of models on the hub, as people type and paste them.

use std::fmt;
use std::str::FromStr;

use hf_hub::{Repo, RepoType};

use super::settings::{self, percent_decoded};
use crate::error::{Error, Result};

/// A model on the hub: `OWNER/NAME`, or `OWNER/NAME@REVISION`.
///
/// Parses a pasted address too:
/// `https://huggingface.co/OWNER/NAME/tree/REVISION`, `hf://OWNER/NAME@REVISION`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    pub(super) owner: String,
    pub(super) name: String,
    pub(super) revision: String,
}

/// Hosts that are the public hub.
const PUBLIC: [&str; 3] = ["huggingface.co", "www.huggingface.co", "hf.co"];

impl FromStr for Id {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::with_file(text).map(|(id, _)| id)
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.repo_id())?;
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

impl Id {
    /// Whether it names a model, OWNER/NAME, in any revision.
    pub fn is(&self, model: &str) -> bool {
        self.repo_id() == model
    }

    /// The model that `text` names and, for the address of one file (`.../blob/main/model.gguf`),
    /// the file.
    ///
    /// Errors: usage, for text that names no model, and for addresses of another host than the
    /// hub's.
    pub fn with_file(text: &str) -> Result<(Self, Option<String>)> {
        let trimmed = text.trim();
        let hub = settings::endpoint_address();
        match path_of_address(trimmed, hub.as_deref())? {
            Some(path) => Self::from_address(trimmed, &path),
            None => Self::from_name(trimmed).map(|id| (id, None)),
        }
        .map_err(|e| e.unwrap_or_else(|| not_an_id(text)))
    }

    /// `OWNER/NAME`.
    pub fn repo_id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The model's place in a cache of the hub's own tools.
    pub(super) fn repo(&self) -> Repo {
        Repo::with_revision(self.repo_id(), RepoType::Model, self.revision.clone())
    }

    fn from_name(text: &str) -> Result<Self, Option<Error>> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = path.trim_end_matches('/').split_once('/').ok_or(None)?;
        Self::new(owner, name, revision).ok_or(None)
    }

    fn new(owner: &str, name: &str, revision: &str) -> Option<Self> {
        let id = Self { owner: owner.into(), name: name.into(), revision: revision.into() };
        ([owner, name].into_iter().all(is_plain) && is_revision(revision)).then_some(id)
    }

    /// From what follows the host in an address.
    fn from_address(text: &str, path: &str) -> Result<(Self, Option<String>), Option<Error>> {
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let mut parts: Vec<String> = path.split('/').filter(|p| !p.is_empty()).map(percent_decoded).collect();
        if parts.first().is_some_and(|p| p == "models") {
            parts.remove(0);
        }
        if let Some(kind @ ("datasets" | "spaces")) = parts.first().map(String::as_str) {
            let what = kind.trim_end_matches('s');
            return Err(Some(Error::usage(format!("{text} is a {what}, not a model")).hint(HINT)));
        }
        let [owner, name, rest @ ..] = &parts[..] else { return Err(None) };
        let (name, at) = name.split_once('@').unwrap_or((name, "main"));
        let name = name.strip_suffix(".git").unwrap_or(name);
        let (revision, file) = match rest {
            [kind, rest @ ..] if ["tree", "blob", "resolve", "raw", "commit", "commits"].contains(&kind.as_str()) => {
                // Revisions of the hub itself have slashes: refs/pr/1, refs/convert/parquet.
                let length = if rest.first().is_some_and(|p| p == "refs") { 3 } else { 1 };
                let (revision, file) = rest.split_at(length.min(rest.len()));
                let file = ["blob", "resolve", "raw"].contains(&kind.as_str()).then(|| file.join("/"));
                (if revision.is_empty() { "main".into() } else { revision.join("/") }, file)
            }
            [first, second, ..] if at == "refs" => (format!("{at}/{first}/{second}"), None),
            _ => (at.into(), None),
        };
        let id = Self::new(owner, name, &revision).ok_or(None)?;
        Ok((id, file.filter(|f| !f.is_empty())))
    }
}

const HINT: &str = "a model of the hub is OWNER/NAME, as in nextflow models pull ByteVisionLab/TokenFlow-t2i";

fn not_an_id(text: &str) -> Error {
    Error::usage(format!("{text} is not the name of a model on the hub")).hint(HINT)
}

/// What follows the host if `text` is an address of the hub; none if it is no address.
fn path_of_address(text: &str, endpoint: Option<&str>) -> Result<Option<String>, Error> {
    if let Some(path) = text.strip_prefix("hf://") {
        return Ok(Some(path.into()));
    }
    let bare = |address: &str| {
        let (_, rest) = address.split_once("://").unwrap_or(("", address));
        rest.trim_end_matches('/').to_string()
    };
    let address = bare(text);
    let hosts = endpoint.into_iter().map(bare).chain(PUBLIC.map(String::from));
    for host in hosts {
        match address.get(..host.len()) {
            Some(start) if start.eq_ignore_ascii_case(&host) => {}
            _ => continue,
        }
        let rest = &address[host.len()..];
        // huggingface.co/NAME without a scheme is an address as well: no owner's name has a dot and
        // two parts after it.
        if rest.is_empty() || rest.starts_with('/') {
            return Ok(Some(rest.into()));
        }
    }
    let Some((scheme, rest)) = text.split_once("://") else { return Ok(None) };
    let host = rest.split('/').next().unwrap_or_default().rsplit('@').next().unwrap_or_default();
    Err(Error::usage(format!("{host} is not the hub that models come from"))
        .hint(format!("HF_ENDPOINT={scheme}://{host} nextflow models pull OWNER/NAME takes them from there")))
}

/// Letters, digits, `.`, `_` and `-`, without a leading dot, and without `--`, which means `/` in
/// the cache.
fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !part.is_empty() && part.len() <= 96 && part.chars().all(allowed) && !part.starts_with('.') && !part.contains("--")
}

/// A branch, a tag, a commit or a reference such as `refs/pr/1`: a plain path, because it names a
/// file of the cache.
fn is_revision(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+=".contains(c);
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed);
    text.len() <= 200 && text.split('/').all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        let id: Id = "ByteVisionLab/TokenFlow-t2i".parse().unwrap();
        assert_eq!(
            (id.to_string().as_str(), id.repo().folder_name().as_str()),
            ("ByteVisionLab/TokenFlow-t2i", "models--ByteVisionLab--TokenFlow-t2i")
        );
        for same in ["a/b@v1.0", "a/b@refs/pr/1", "a/b@feature/x-1"] {
            assert_eq!(same.parse::<Id>().unwrap().to_string(), same);
        }
        assert_eq!("a/b/".parse::<Id>().unwrap().to_string(), "a/b");
        for bad in [
            "",
            "a",
            "a/",
            "/b",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../x",
            "a/b@x/../y",
            "a/b@x//y",
            "a/b@/x",
            "a/b@x/",
            "a--b/c",
            "a/b c",
            "a/b\nc",
            "é/b",
            "a/b@x/.y",
            "hf://a",
            "https://huggingface.co/a",
            "https://huggingface.co/",
            "https://huggingface.co/datasets/a/b",
            "https://huggingface.co/..%2Fa/b",
            "https://huggingface.co/a/b/tree/..%2F..%2Fx",
            "https://huggingface.co.evil.org/a/b",
        ] {
            assert_eq!(bad.parse::<Id>().unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }

    #[test]
    fn a_pasted_address_is_a_name() {
        for (text, id, file) in [
            ("https://huggingface.co/o/m", "o/m", None),
            ("http://www.huggingface.co/o/m/", "o/m", None),
            ("HTTPS://HuggingFace.co/o/m", "o/m", None),
            ("huggingface.co/o/m", "o/m", None),
            ("https://hf.co/o/m?library=candle#files", "o/m", None),
            ("https://huggingface.co/o/m/tree/main", "o/m", None),
            ("https://huggingface.co/o/m/tree/v2/sub", "o/m@v2", None),
            ("https://huggingface.co/o/m/tree/refs%2Fpr%2F1", "o/m@refs/pr/1", None),
            ("https://huggingface.co/o/m/tree/refs/pr/1", "o/m@refs/pr/1", None),
            ("https://huggingface.co/o/m/blob/main/a/w.gguf", "o/m", Some("a/w.gguf")),
            ("https://huggingface.co/o/m/resolve/v1/w.gguf?download=true", "o/m@v1", Some("w.gguf")),
            ("https://huggingface.co/o/m/discussions/3", "o/m", None),
            ("https://huggingface.co/o/m.git", "o/m", None),
            ("hf://o/m", "o/m", None),
            ("hf://o/m@refs/pr/1", "o/m@refs/pr/1", None),
            ("hf://models/o/m@refs%2Fpr%2F1/config.json", "o/m@refs/pr/1", None),
            (" o/m\n", "o/m", None),
        ] {
            let (found, name) = Id::with_file(text).unwrap();
            assert_eq!((found.to_string().as_str(), name.as_deref()), (id, file), "{text}");
        }
        let other = "https://mirror.corp/o/m".parse::<Id>().unwrap_err();
        assert!(other.hint.unwrap().starts_with("HF_ENDPOINT=https://mirror.corp nextflow"));
        assert_eq!(
            path_of_address("https://mirror.corp/hub/o/m", Some("https://mirror.corp/hub/")).unwrap().as_deref(),
            Some("/o/m")
        );
    }
}
