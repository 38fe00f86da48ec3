//! The cache on disk.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};

use super::Id;
use crate::error::{Error, Kind, Result};

/// A folder of models.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// A model in the cache.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Cached {
    /// `OWNER/NAME`.
    pub id: String,
    /// Commits that there are snapshots of.
    pub commits: Vec<String>,
    /// Bytes of all its files, those of broken-off downloads included.
    pub bytes: u64,
}

/// What a check of a model's files found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Verdict {
    /// Files whose SHA-256 agrees with their name.
    pub sound: usize,
    /// Files that the hub states no SHA-256 of.
    pub unhashed: usize,
    /// Files whose content is not what their name says.
    pub corrupt: Vec<PathBuf>,
    /// Names in a snapshot that lead to no file.
    pub missing: Vec<PathBuf>,
}

/// Whether `text` is lower-case hexadecimal of `length` digits.
pub(super) fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// `name` as a path below a snapshot, if it is plain: no root, no `..`, nothing hidden.
pub(super) fn below(name: &str) -> Option<PathBuf> {
    let path = Path::new(name);
    let plain = |c: Component| matches!(c, Component::Normal(part) if !part.as_encoded_bytes().starts_with(b"."));
    let safe = !name.is_empty() && !name.contains(['\\', '\0']) && path.components().all(plain);
    safe.then(|| path.to_path_buf())
}

/// Whether a path is below a folder, but hidden there.
pub(super) fn hidden(name: &str) -> bool {
    let mut parts = name.split('/');
    !name.contains(['\\', '\0'])
        && parts.clone().all(|part| !matches!(part, "" | "." | ".."))
        && parts.any(|part| part.starts_with('.'))
}

impl Cache {
    /// `HF_HUB_CACHE`, `HF_HOME/hub`, or `~/.cache/huggingface/hub`.
    pub fn from_env() -> Result<Self> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let cache =
            || var("XDG_CACHE_HOME").or_else(|| Some(var("HOME").or_else(|| var("USERPROFILE"))?.join(".cache")));
        let home = || var("HF_HOME").or_else(|| Some(cache()?.join("huggingface")));
        let root = var("HF_HUB_CACHE").or_else(|| Some(home()?.join("hub")));
        root.map(|root| Self { root })
            .ok_or_else(|| Error::usage("there is no home folder").hint("HF_HOME=FOLDER nextflow ..."))
    }

    /// A cache in a folder.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn folder(&self, id: &Id) -> PathBuf {
        self.root.join(id.folder())
    }

    /// The folder of the snapshot that `id`'s revision stands for, if it is there.
    pub fn snapshot(&self, id: &Id) -> Option<PathBuf> {
        let folder = self.folder(id);
        let commit = match fs::read_to_string(folder.join("refs").join(&id.revision)) {
            Ok(commit) => commit.trim().to_string(),
            Err(_) => id.revision.clone(),
        };
        is_hex(&commit, 40).then(|| folder.join("snapshots").join(commit)).filter(|f| f.is_dir())
    }

    /// Every model, by id.
    pub fn list(&self) -> Result<Vec<Cached>> {
        let mut models = Vec::new();
        for name in names(&self.root) {
            let Some((owner, model)) = name.strip_prefix("models--").and_then(|n| n.split_once("--")) else { continue };
            let folder = self.root.join(&name);
            let commits = names(&folder.join("snapshots"));
            let blobs = names(&folder.join("blobs"));
            let size = |blob: &String| fs::metadata(folder.join("blobs").join(blob)).map_or(0, |m| m.len());
            models.push(Cached { id: format!("{owner}/{model}"), commits, bytes: blobs.iter().map(size).sum() });
        }
        Ok(models)
    }

    /// Checks every file of a model.
    ///
    /// Errors: [`Kind::Model`] if it is not in the cache.
    pub fn verify(&self, id: &Id) -> Result<Verdict> {
        let folder = self.known(id)?;
        let mut verdict = Verdict::default();
        for name in names(&folder.join("blobs")) {
            let path = folder.join("blobs").join(&name);
            if is_hex(&name, 64) {
                match sha256(&path)? == name {
                    true => verdict.sound += 1,
                    false => verdict.corrupt.push(path),
                }
            } else if is_hex(&name, 40) {
                verdict.unhashed += 1;
            }
        }
        for commit in names(&folder.join("snapshots")) {
            let mut rest = vec![folder.join("snapshots").join(commit)];
            while let Some(path) = rest.pop() {
                if path.is_dir() {
                    rest.extend(names(&path).iter().map(|n| path.join(n)));
                } else if !path.exists() {
                    verdict.missing.push(path);
                }
            }
        }
        Ok(verdict)
    }

    /// Removes a model with all its snapshots; the bytes that became free.
    ///
    /// Errors: [`Kind::Model`] if it is not in the cache.
    pub fn remove(&self, id: &Id) -> Result<u64> {
        let folder = self.known(id)?;
        let bytes = self.list()?.iter().find(|m| m.id == format!("{}/{}", id.owner, id.name)).map_or(0, |m| m.bytes);
        fs::remove_dir_all(&folder).map_err(|e| cannot(&folder, &e))?;
        Ok(bytes)
    }

    fn known(&self, id: &Id) -> Result<PathBuf> {
        let folder = self.folder(id);
        if folder.is_dir() {
            return Ok(folder);
        }
        Err(Error::model(format!("{id} is not in the cache {}", self.root.display())).hint("nextflow models list"))
    }
}

/// Names in a folder, sorted; none if there is no folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The SHA-256 of a file, in lower-case hexadecimal.
pub(super) fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| cannot(path, &e))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer).map_err(|e| cannot(path, &e))? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

pub(super) fn cannot(path: &Path, e: &io::Error) -> Error {
    let error = Error::new(Kind::Failure, format!("{}: {e}", path.display()));
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            error.hint("nextflow models rm OWNER/NAME frees space, HF_HOME=FOLDER puts the cache elsewhere")
        }
        _ => error.hint("HF_HOME=FOLDER puts the cache elsewhere"),
    }
}
