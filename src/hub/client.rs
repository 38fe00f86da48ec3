//! The network side: what a model has, and its files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::StatusCode;
use ureq::{Agent, Body};

use super::Id;
use super::cache::{Cache, below, cannot, hidden, is_hex, sha256};
use crate::error::{Error, Kind, Result};

/// The longest list of files that is read, in bytes.
const MAX_LIST: u64 = 32 << 20;
/// A connection is taken up again so many times.
const ATTEMPTS: usize = 5;
/// Files that a model may need.
const WANTED: [&str; 6] = ["json", "safetensors", "pt", "pth", "gguf", "model"];

/// Told of every file as it grows: name, bytes so far, bytes in all. Breaking off is an error of its own.
pub type Progress<'a> = &'a mut dyn FnMut(&str, u64, u64) -> Result<()>;

/// A connection to a hub.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// What the hub says about a model.
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
    sha256: String,
    size: u64,
}

/// A file to have.
struct Remote {
    path: PathBuf,
    name: String,
    size: u64,
    /// Its name among the blobs: a SHA-256 of the content, or what the hub calls a small file.
    hash: String,
}

impl Client {
    /// For the hub at `HF_ENDPOINT`, with the token in `HF_TOKEN` if there is one.
    pub fn from_env() -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Self::new(&endpoint, var("HF_TOKEN"))
    }

    /// For the hub at `endpoint`.
    pub fn new(endpoint: &str, token: Option<String>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            // A file is often elsewhere on the same host; others are not told who asks.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("nextflow/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: Agent::new_with_config(config), endpoint: endpoint.trim_end_matches('/').into(), token }
    }

    /// Downloads what a model needs, or one file of it, and is not there yet; the snapshot's folder.
    ///
    /// Errors: [`Kind::Model`] for what the hub refuses or gets wrong, [`Kind::Failure`] for network and disk.
    pub fn pull(&self, id: &Id, only: Option<&str>, cache: &Cache, progress: Progress) -> Result<PathBuf> {
        let (commit, mut files) = self.list(id)?;
        if let Some(name) = only {
            files.retain(|file| file.name == name);
            if files.is_empty() {
                return Err(Error::model(format!("{id} has no file {name}")).hint(format!("nextflow models pull {id}")));
            }
        }
        let folder = cache.folder(id);
        let snapshot = folder.join("snapshots").join(&commit);
        for file in &files {
            self.fetch(id, &commit, file, &folder, progress)?;
            link(&snapshot, file)?;
        }
        let reference = folder.join("refs").join(&id.revision);
        make_parent(&reference)?;
        crate::checkpoint::write(&reference, commit.as_bytes())?;
        Ok(snapshot)
    }

    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<Body>, ureq::Error> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        request.call()
    }

    fn unreachable(&self, e: &ureq::Error) -> Error {
        Error::new(Kind::Failure, format!("{} cannot be reached: {e}", self.endpoint))
            .hint("HF_ENDPOINT=URL names another hub; commands that use a model do without one if --offline is given")
    }

    /// What a status other than success means.
    fn refused(&self, id: &Id, status: StatusCode) -> Error {
        let error = |what: &str| Error::model(format!("{id}: {what}"));
        match status.as_u16() {
            401 | 403 => error("the hub wants to know who asks, or its terms accepted first").hint(format!(
                "accept the terms at {}/{}/{}, then HF_TOKEN=... nextflow models pull {id}",
                self.endpoint, id.owner, id.name
            )),
            404 => {
                error("the hub has no such model or revision").hint(format!("look at {}/{}", self.endpoint, id.owner))
            }
            code => error(&format!("the hub answered {code}")).hint("run the same command again later"),
        }
    }

    /// The commit that a revision stands for, and the files that a model may need.
    fn list(&self, id: &Id) -> Result<(String, Vec<Remote>)> {
        let url = format!("{}/api/models/{}/{}/revision/{}?blobs=true", self.endpoint, id.owner, id.name, id.revision);
        let mut response = self.get(&url, 0).map_err(|e| self.unreachable(&e))?;
        if !response.status().is_success() {
            return Err(self.refused(id, response.status()));
        }
        let wrong = |what: String| {
            Error::model(format!("{}: a wrong answer about {id}: {what}", self.endpoint))
                .hint("HF_ENDPOINT=URL names another hub")
        };
        let body = response.body_mut().with_config().limit(MAX_LIST).read_to_vec();
        let body = body.map_err(|e| wrong(e.to_string()))?;
        let listing: Listing = serde_json::from_slice(&body).map_err(|e| wrong(e.to_string()))?;
        if !is_hex(&listing.sha, 40) {
            return Err(wrong(format!("the commit {:?} is not hexadecimal", listing.sha)));
        }
        let mut files = Vec::new();
        for sibling in listing.siblings {
            let path = below(&sibling.rfilename);
            let path = match path {
                Some(path) => path,
                // Hidden files (.gitattributes) are nobody's weights; anything else that is not plain is an attack.
                None if hidden(&sibling.rfilename) => continue,
                None => return Err(wrong(format!("the file name {:?} is not plain", sibling.rfilename))),
            };
            if !path.extension().and_then(|e| e.to_str()).is_some_and(|e| WANTED.contains(&e)) {
                continue;
            }
            let (size, hash, digits) = match (sibling.lfs, sibling.size, sibling.blob_id) {
                (Some(lfs), _, _) => (lfs.size, lfs.sha256, 64),
                (None, Some(size), Some(blob)) => (size, blob, 40),
                _ => return Err(wrong(format!("{} has neither size nor hash", sibling.rfilename))),
            };
            if !is_hex(&hash, digits) {
                return Err(wrong(format!("the hash {hash:?} of {} is not hexadecimal", sibling.rfilename)));
            }
            files.push(Remote { path, name: sibling.rfilename, size, hash });
        }
        match files.is_empty() {
            true => Err(Error::model(format!("{id} has no weights")).hint("nextflow models pull another OWNER/NAME")),
            false => Ok((listing.sha, files)),
        }
    }

    /// Makes sure that a file is among the blobs.
    fn fetch(&self, id: &Id, commit: &str, file: &Remote, folder: &Path, progress: Progress) -> Result<()> {
        let blob = folder.join("blobs").join(&file.hash);
        make_parent(&blob)?;
        // Whoever comes second waits here and then finds the file.
        let lock_path = folder.join("blobs").join(format!("{}.lock", file.hash));
        let lock = File::create(&lock_path).map_err(|e| cannot(&lock_path, &e))?;
        lock.lock().map_err(|e| cannot(&lock_path, &e))?;
        if fs::metadata(&blob).is_ok_and(|m| m.len() == file.size) {
            return Ok(());
        }
        let part = folder.join("blobs").join(format!("{}.incomplete", file.hash));
        let url = format!("{}/{}/{}/resolve/{commit}/{}", self.endpoint, id.owner, id.name, encode(&file.name));
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.resume(id, &url, file, &part, progress) {
                Ok(None) => {
                    last = None;
                    break;
                }
                Ok(Some(cut)) => last = Some(cut),
                Err(e) => return Err(e),
            }
        }
        if let Some(cut) = last {
            return Err(Error::new(Kind::Failure, format!("the connection was cut at {}: {cut}", file.name))
                .hint(format!("nextflow models pull {id} goes on from there")));
        }
        let found = fs::metadata(&part).map_err(|e| cannot(&part, &e))?.len();
        let wrong = if found != file.size {
            Some(format!("{found} bytes, not {}", file.size))
        } else if is_hex(&file.hash, 64) && sha256(&part)? != file.hash {
            Some("bytes that are not those of its SHA-256".into())
        } else {
            None
        };
        if let Some(wrong) = wrong {
            fs::remove_file(&part).map_err(|e| cannot(&part, &e))?;
            return Err(Error::model(format!("{} of {id} came with {wrong}; it was deleted", file.name))
                .hint(format!("nextflow models pull {id} tries again")));
        }
        fs::rename(&part, &blob).map_err(|e| cannot(&blob, &e))
    }

    /// Goes on with a download; what cut it, if something did.
    fn resume(&self, id: &Id, url: &str, file: &Remote, part: &Path, progress: Progress) -> Result<Option<String>> {
        let mut done = fs::metadata(part).map_or(0, |m| m.len());
        if done > file.size {
            done = 0;
        }
        if done == file.size && file.size > 0 {
            return Ok(None);
        }
        let response = match self.get(url, done) {
            Ok(response) => response,
            Err(ureq::Error::HostNotFound | ureq::Error::ConnectionFailed) if done == 0 => {
                return Err(self.unreachable(&ureq::Error::ConnectionFailed));
            }
            Err(e) => return Ok(Some(e.to_string())),
        };
        match response.status().as_u16() {
            206 if done > 0 => {}
            // A server that knows no ranges begins anew.
            200 => done = 0,
            _ => return Err(self.refused(id, response.status())),
        }
        let mut out = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(done == 0)
            .append(done > 0)
            .open(part)
            .map_err(|e| cannot(part, &e))?;
        // One byte more than it should have tells a file that is too long.
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader().take(file.size - done + 1);
        let mut buffer = vec![0; 1 << 18];
        loop {
            match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    out.write_all(&buffer[..n]).map_err(|e| cannot(part, &e))?;
                    done += n as u64;
                    progress(&file.name, done, file.size)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Ok(Some(e.to_string())),
            }
        }
        Ok((done < file.size).then(|| "the other side closed it".into()))
    }
}

fn make_parent(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(|e| cannot(folder, &e))
}

/// Puts a blob into a snapshot: by a relative link, or as a copy where there are none.
fn link(snapshot: &Path, file: &Remote) -> Result<()> {
    // Up from snapshots/COMMIT and from the file's own folders.
    let up: PathBuf = std::iter::repeat_n("..", 1 + file.path.components().count()).collect();
    put(&snapshot.join(&file.path), &up.join("blobs").join(&file.hash))
}

/// Makes `place` stand for `target`, which is a path from there or an absolute one.
pub(super) fn put(place: &Path, target: &Path) -> Result<()> {
    make_parent(place)?;
    // Made beside it and moved there: another process may be doing the same, or reading what is there.
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let new = place.with_file_name(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&new);
    #[cfg(unix)]
    let made = std::os::unix::fs::symlink(target, &new);
    #[cfg(not(unix))]
    let made = fs::copy(place.with_file_name("").join(target), &new).map(drop);
    made.and_then(|()| fs::rename(&new, place)).map_err(|e| cannot(place, &e))
}

/// A path as part of a URL.
fn encode(path: &str) -> String {
    path.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        })
        .collect()
}
