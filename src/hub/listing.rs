//! A hub's answer about a model: its files, or why it refuses.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use ureq::http::HeaderMap;

use super::http::Head;
use super::{Id, is_hex};
use crate::error::{Error, Result};

/// The longest list of files that is read, in bytes.
pub(super) const MAX_LIST: usize = 32 << 20;
/// The most files that a list may have.
const MAX_FILES: usize = 50_000;
/// The longest file that there can be, in bytes.
const MAX_SIZE: u64 = 1 << 50;

/// Hash of a file's content; its name among the blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    /// SHA-256 of the content: large files.
    Sha256(String),
    /// SHA-1 of `blob SIZE\0` and the content, as git names it: small files.
    Git(String),
}

/// A file of a model.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    /// Its path below a snapshot.
    pub path: PathBuf,
    /// The same as the hub writes it.
    pub name: String,
    /// Bytes; some mirrors name them only when the file is requested.
    pub size: Option<u64>,
    /// As for the size.
    pub hash: Option<Hash>,
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Hash {
    /// From hexadecimal digits; their number decides the algorithm.
    pub fn from_hex(digits: &str) -> Option<Self> {
        match digits.len() {
            64 if is_hex(digits, 64) => Some(Self::Sha256(digits.into())),
            40 if is_hex(digits, 40) => Some(Self::Git(digits.into())),
            _ => None,
        }
    }

    /// Its digits.
    pub fn digits(&self) -> &str {
        let (Self::Sha256(digits) | Self::Git(digits)) = self;
        digits
    }
}

/// The commit of a model's revision and all of its files, from the hub's answer.
///
/// Errors: [`crate::error::Kind::Model`] for an answer that is wrong or hostile.
pub(super) fn parse(id: &Id, server: &str, body: &[u8]) -> Result<(String, Vec<Remote>)> {
    let wrong = |what: String| {
        Error::model(format!("{server}: a wrong answer about {id}: {what}")).hint("HF_ENDPOINT=URL names another hub")
    };
    let listing: Listing = serde_json::from_slice(body).map_err(|e| match is_page(body) {
        true => web_page(server, &format!("the files of {id}")),
        false => wrong(e.to_string()),
    })?;
    if !is_hex(&listing.sha, 40) {
        return Err(wrong(format!("the commit {:?} is not hexadecimal", listing.sha)));
    }
    if listing.siblings.len() > MAX_FILES {
        return Err(wrong(format!("{} files are more than {MAX_FILES}", listing.siblings.len())));
    }
    let mut files = Vec::new();
    let mut seen = HashSet::new();
    for Sibling { rfilename: name, size, blob_id, lfs } in listing.siblings {
        let Some(path) = below(&name) else {
            // Hidden files (.gitattributes) hold no weights; any other name that is not plain is an
            // attack.
            if hidden(&name) {
                continue;
            }
            return Err(wrong(format!("the file name {name:?} is not plain")));
        };
        if !seen.insert(path.clone()) {
            return Err(wrong(format!("the file {name:?} is there twice")));
        }
        let (size, digits) = match lfs {
            Some(lfs) => (lfs.size.or(size), lfs.sha256.map(|h| (h, 64))),
            None => (size, blob_id.map(|h| (h, 40))),
        };
        if let Some(size) = size.filter(|s| *s > MAX_SIZE) {
            return Err(wrong(format!("{name} has {size} bytes, and no file is that long")));
        }
        let hash = match digits {
            Some((digits, length)) if is_hex(&digits, length) => Hash::from_hex(&digits),
            Some((digits, _)) => return Err(wrong(format!("the hash {digits:?} of {name} is not hexadecimal"))),
            None => None,
        };
        files.push(Remote { path, name, size, hash });
    }
    Ok((listing.sha, files))
}

/// `file` with the size and hash that the answer to a request for it states.
///
/// Errors: [`crate::error::Kind::Model`] if that leaves no size, or one that no file has.
pub(super) fn complete(file: &Remote, head: &Head) -> Result<Remote> {
    let number = |headers: &HeaderMap, name: &str| text(headers, name).and_then(|v| v.trim().parse::<u64>().ok());
    let size = file.size.or_else(|| number(&head.first, "x-linked-size"));
    let size = size.or_else(|| number(&head.headers, "content-length"));
    let name = &file.name;
    let wrong = |what: String| {
        Error::model(format!("{}: {what}", head.server)).hint("HF_ENDPOINT=URL names another hub or mirror")
    };
    match size {
        None => Err(wrong(format!("the mirror gives no length of {name}, neither in its list nor in its answer"))),
        Some(size) if size > MAX_SIZE => Err(wrong(format!("{name} has {size} bytes, and no file is that long"))),
        size => {
            let stated = ["x-linked-etag", "etag"].into_iter().find_map(|h| etag(text(&head.first, h)?));
            Ok(Remote { size, hash: file.hash.clone().or(stated), ..file.clone() })
        }
    }
}

/// The hash in an ETag: quotes and the mark of a weak one are not part of it.
fn etag(value: &str) -> Option<Hash> {
    Hash::from_hex(value.trim().trim_start_matches("W/").trim_matches('"'))
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether content is a web page, which is what login pages and proxies send in place of files.
pub(super) fn is_page(body: &[u8]) -> bool {
    let start = String::from_utf8_lossy(&body[..body.len().min(200)]).trim_start().to_lowercase();
    start.starts_with("<!doctype html") || start.starts_with("<html")
}

/// An answer that is a web page.
pub(super) fn web_page(server: &str, what: &str) -> Error {
    Error::model(format!(
        "{server} answered with a web page in place of {what}: a login page, or the notice of a proxy"
    ))
    .hint(format!("open {server} in a browser, or see whether HTTPS_PROXY and HF_ENDPOINT are right"))
}

/// The error of a status other than success; `known` is whether the request carried a token or a
/// password.
pub(super) fn refused(id: &Id, endpoint: &str, head: &Head, file: Option<&str>, known: bool) -> Error {
    let error = |what: &str| Error::model(format!("{id}: {what}"));
    let header = |name: &str| text(&head.first, name).or_else(|| text(&head.headers, name)).unwrap_or_default();
    let (code, message) = (header("x-error-code"), header("x-error-message"));
    let page = format!("{endpoint}/{}", id.repo_id());
    let no_model = || {
        let what = match known {
            true => "the hub has no such model, or the account of this token may not see it",
            false => "the hub has no such model, or it is private",
        };
        error(what).hint(format!(
            "look at the name at {endpoint}/{}; for a private or gated one: HF_TOKEN=... nextflow models pull {id}",
            id.owner
        ))
    };
    let gated = || match known {
        true => error(
            "the account of this token has no access: the model is gated, its authors ask for terms to be accepted",
        )
        .hint(format!("accept the terms at {page}, then nextflow models pull {id}")),
        false => error("the model is gated: its authors ask for terms to be accepted")
            .hint(format!("accept the terms at {page}, then HF_TOKEN=... nextflow models pull {id}")),
    };
    match (head.status, code) {
        (_, "RepoNotFound") => no_model(),
        (_, "GatedRepo") => gated(),
        (_, "RevisionNotFound") => error(&format!("the hub has no revision {}", id.revision))
            .hint(format!("look at {page}/tree/main, or nextflow models pull {}", id.repo_id())),
        (_, "EntryNotFound") => error(&format!("the hub has no file {} in it", file.unwrap_or_default()))
            .hint(format!("look at {page}/tree/{}", id.revision)),
        (_, "DisabledRepo") => error("the hub has closed this model").hint(format!("look at {page}")),
        (401, _) if known && message.to_lowercase().contains("credentials") => {
            error("the hub does not know this token").hint("hf auth login, or HF_TOKEN=hf_... nextflow ...")
        }
        (401, _) => no_model(),
        (403, _) if code.is_empty() && !message.is_empty() => {
            error(&format!("the hub forbids it: {}", short(message))).hint(format!("look at {page}"))
        }
        (403, _) => gated(),
        (404, _) => no_model(),
        (407, _) => error("the proxy wants a name and a password")
            .hint("HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT nextflow ..."),
        (status, _) => {
            let why = if message.is_empty() { String::new() } else { format!(": {}", short(message)) };
            error(&format!("{} answered {status}{why}", head.server)).hint("run the same command again later")
        }
    }
}

fn short(message: &str) -> String {
    message.chars().take(200).collect()
}

/// `name` as a path below a snapshot, if it is plain: no root, no `..`, nothing hidden.
pub(super) fn below(name: &str) -> Option<PathBuf> {
    let path = Path::new(name);
    let plain = |c: Component| matches!(c, Component::Normal(part) if !part.as_encoded_bytes().starts_with(b"."));
    let safe = !name.is_empty() && !name.contains(['\\', '\0']) && path.components().all(plain);
    safe.then(|| path.components().collect())
}

/// Whether a path is below a folder, but hidden there.
fn hidden(name: &str) -> bool {
    let mut parts = name.split('/');
    !name.contains(['\\', '\0'])
        && parts.clone().all(|part| !matches!(part, "" | "." | ".."))
        && parts.any(|part| part.starts_with('.'))
}
