//! The cache on disk, in the layout of the hub's own tools.

use std::fs;
use std::path::{Path, PathBuf};

use super::listing::Hash;
use super::{Id, Observer, cannot, hash, is_hex, settings};
use crate::error::{Error, Result};

/// A folder of models.
#[derive(Clone, Debug)]
pub struct Cache {
    layout: hf_hub::Cache,
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

/// The result of checking a model's files.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Verdict {
    /// Files whose content agrees with the hash that they are named by.
    pub sound: usize,
    /// Files without a known hash: the cache has none for files that are in a snapshot itself.
    pub unhashed: usize,
    /// Files whose content does not match their hash.
    pub corrupt: Vec<PathBuf>,
    /// Names in a snapshot that lead to no file.
    pub missing: Vec<PathBuf>,
}

impl Cache {
    /// `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME/hub`, or `~/.cache/huggingface/hub`.
    ///
    /// Errors: usage, if there is no home folder.
    pub fn from_env() -> Result<Self> {
        settings::cache_folder().map(Self::at)
    }

    /// A cache in a folder.
    pub fn at(root: PathBuf) -> Self {
        Self { layout: hf_hub::Cache::new(root) }
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        self.layout.path()
    }

    /// The same as hf-hub knows it.
    pub(super) fn layout(&self) -> &hf_hub::Cache {
        &self.layout
    }

    pub(super) fn folder(&self, id: &Id) -> PathBuf {
        self.root().join(id.repo().folder_name())
    }

    /// Where the hub's own tools lock a model's files.
    pub(super) fn locks(&self, id: &Id) -> PathBuf {
        self.root().join(".locks").join(id.repo().folder_name())
    }

    /// The folder of the snapshot of `id`'s revision, if it exists.
    pub fn snapshot(&self, id: &Id) -> Option<PathBuf> {
        let commit = match fs::read_to_string(self.folder(id).join("refs").join(&id.revision)) {
            Ok(commit) => commit.trim().to_string(),
            Err(_) => id.revision.clone(),
        };
        is_hex(&commit, 40).then(|| self.layout.repo(id.repo()).pointer_path(&commit)).filter(|f| f.is_dir())
    }

    /// Every model, by id.
    pub fn list(&self) -> Result<Vec<Cached>> {
        let mut models = Vec::new();
        for name in names(self.root()) {
            let Some(id) = name.strip_prefix("models--").map(|n| n.replacen("--", "/", 1)) else { continue };
            let folder = self.root().join(&name);
            models.push(Cached { id, commits: names(&folder.join("snapshots")), bytes: bytes(&folder) });
        }
        Ok(models)
    }

    /// Checks every file of a model; `observer` can break it off.
    ///
    /// Errors: `Kind::Model` if it is not in the cache.
    pub fn verify(&self, id: &Id, observer: Observer) -> Result<Verdict> {
        let folder = self.known(id)?;
        let mut verdict = Verdict::default();
        let mut files: Vec<PathBuf> = Vec::new();
        walk(&folder.join("blobs"), &mut |path, _| files.push(path.into()));
        walk(&folder.join("snapshots"), &mut |path, kind| {
            // A link to a blob of this model has been seen already; one to another model's is a
            // file of this one too.
            match path.canonicalize() {
                Err(_) => verdict.missing.push(path.into()),
                Ok(target) if kind.is_symlink() => files.push(target),
                Ok(_) => verdict.unhashed += 1,
            }
        });
        let mut files: Vec<PathBuf> = files.iter().filter_map(|f| f.canonicalize().ok()).collect();
        files.sort();
        files.dedup();
        for path in files.into_iter().filter(|p| p.extension().is_none_or(|e| e != "incomplete" && e != "lock")) {
            match path.file_name().and_then(|n| Hash::from_hex(n.to_str()?)) {
                None => verdict.unhashed += 1,
                Some(name) if hash::agrees(&path, &name, observer)? => verdict.sound += 1,
                Some(_) => verdict.corrupt.push(path),
            }
        }
        Ok(verdict)
    }

    /// Removes a model with all its snapshots; the bytes that became free.
    ///
    /// Errors: `Kind::Model` if it is not in the cache.
    pub fn remove(&self, id: &Id) -> Result<u64> {
        let folder = self.known(id)?;
        let bytes = bytes(&folder);
        fs::remove_dir_all(&folder).map_err(|e| cannot(&folder, e))?;
        let _ = fs::remove_dir_all(self.locks(id));
        Ok(bytes)
    }

    fn known(&self, id: &Id) -> Result<PathBuf> {
        let folder = self.folder(id);
        if folder.is_dir() {
            return Ok(folder);
        }
        Err(Error::model(format!("{id} is not in the cache {}", self.root().display())).hint("nextflow models list"))
    }
}

/// Names in a folder, sorted; none if there is no folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Every file and link below a folder; links are not followed.
fn walk(folder: &Path, seen: &mut dyn FnMut(&Path, fs::FileType)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path(), seen),
            Ok(kind) => seen(&entry.path(), kind),
            Err(_) => {}
        }
    }
}

/// Bytes of a model's files; links take none.
fn bytes(folder: &Path) -> u64 {
    let mut bytes = 0;
    for part in ["blobs", "snapshots"] {
        walk(&folder.join(part), &mut |path, _| {
            bytes += fs::symlink_metadata(path).map_or(0, |m| if m.is_file() { m.len() } else { 0 })
        });
    }
    bytes
}
