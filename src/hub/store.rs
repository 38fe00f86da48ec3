//! Storing files in the cache: under a lock and by links where the file system has them, and never
//! through a link that another user has planted.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::cache::Cache;
use super::http::TICK;
use super::listing::Remote;
use super::{Event, Id, Observer, cannot};
use crate::error::Result;
use crate::io::output;

/// A model's part of the cache, at one commit.
pub(super) struct Store {
    blobs: PathBuf,
    locks: PathBuf,
    /// The folder of the commit.
    pub snapshot: PathBuf,
    reference: PathBuf,
}

/// The right to download a file, until it is dropped. Without a file the file system has no locks,
/// and every process downloads for itself.
pub(super) struct Lock(Option<File>);

impl Store {
    pub fn new(cache: &Cache, id: &Id, commit: &str) -> Self {
        let repo = id.repo();
        let folder = cache.folder(id);
        Self {
            blobs: folder.join("blobs"),
            locks: cache.locks(id),
            snapshot: cache.layout().repo(repo.clone()).pointer_path(commit),
            reference: folder.join("refs").join(repo.revision()),
        }
    }

    /// Whether a file is in the snapshot; one that is only among the blobs is put there.
    pub fn has(&self, file: &Remote) -> Result<bool> {
        let sized = |path: &Path| fs::metadata(path).is_ok_and(|m| m.is_file() && Some(m.len()) == file.size);
        let place = self.snapshot.join(&file.path);
        let blob = file.hash.as_ref().map(|hash| self.blobs.join(hash.digits()));
        match blob.filter(|blob| sized(blob)) {
            Some(blob) if !leads(&place, &blob) => self.put(&blob, &place, false).map(|()| true),
            Some(_) => Ok(true),
            // A cache without links, or a mirror without hashes.
            None => Ok(sized(&place) && (file.hash.is_none() || !place.is_symlink())),
        }
    }

    /// Waits until no other process downloads `key`.
    pub fn lock(&self, key: &str, name: &str, observer: Observer) -> Result<Lock> {
        let path = self.locks.join(format!("{key}.lock"));
        if fs::create_dir_all(&self.locks).is_err() {
            return Ok(Lock(None));
        }
        loop {
            let Ok(file) = open_own(&path) else { return Ok(Lock(None)) };
            loop {
                match file.try_lock() {
                    Ok(()) => break,
                    Err(TryLockError::WouldBlock) => {
                        let what = format!("waiting for another process that downloads {name} ({})", path.display());
                        observer(Event::Status(&what))?;
                        std::thread::sleep(TICK);
                    }
                    Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                    // Lustre without flock, SMB, some containers.
                    Err(TryLockError::Error(_)) => return Ok(Lock(None)),
                }
            }
            // The hub's own tools remove the file when they are done: then this lock is on nothing.
            if same_file(&file, &path) {
                return Ok(Lock(Some(file)));
            }
        }
    }

    /// The unfinished file called `key` and how long it is; with a lock the one that was left last
    /// time, else one of this process alone.
    pub fn part(&self, key: &str, lock: &Lock) -> Result<Part> {
        fs::create_dir_all(&self.blobs).map_err(|e| cannot(&self.blobs, e))?;
        let shared = self.blobs.join(format!("{key}.incomplete"));
        if lock.0.is_some() {
            return Part::open(shared, None);
        }
        let own = self.blobs.join(format!("{key}.{}.incomplete", std::process::id()));
        // Only one process succeeds, so one process takes over a partial file.
        let _ = fs::rename(&shared, &own);
        Part::open(own, Some(shared))
    }

    /// A file of this process alone, empty.
    pub fn fresh_part(&self, key: &str) -> Result<Part> {
        let own = self.blobs.join(format!("{key}.{}.incomplete", std::process::id()));
        let _ = fs::remove_file(&own);
        Part::open(own, None)
    }

    /// Moves a file that was checked to its place among the blobs and into the snapshot.
    pub fn keep(&self, part: Part, digits: &str, file: &Remote) -> Result<()> {
        let blob = self.blobs.join(digits);
        part.file.sync_all().map_err(|e| cannot(&part.path, e))?;
        fs::rename(&part.path, &blob).map_err(|e| cannot(&blob, e))?;
        self.put(&blob, &self.snapshot.join(&file.path), true)
    }

    /// Puts a blob into the snapshot: by a relative link or, where there are no links, itself if it
    /// is `new`, else as a copy.
    fn put(&self, blob: &Path, place: &Path, new: bool) -> Result<()> {
        let below = place.strip_prefix(&self.snapshot).unwrap_or(place);
        // A planted link in place of a folder would lead out of the cache.
        let mut folder = self.snapshot.clone();
        for part in below.parent().into_iter().flat_map(Path::components) {
            folder.push(part);
            if folder.is_symlink() {
                fs::remove_file(&folder).map_err(|e| cannot(&folder, e))?;
            }
        }
        let up: PathBuf = std::iter::repeat_n("..", 1 + below.components().count()).collect();
        let target = up.join("blobs").join(blob.file_name().unwrap_or_default());
        put(place, &target, blob, new)
    }

    /// Writes which commit the revision is.
    pub fn refer(&self, commit: &str) -> Result<()> {
        if self.reference.file_name().is_some_and(|name| name == commit) {
            return Ok(());
        }
        make_parent(&self.reference)?;
        output::write(&self.reference, commit.as_bytes())
    }
}

/// A file that is being downloaded.
pub(super) struct Part {
    pub path: PathBuf,
    pub file: File,
    /// Whether its bytes come from more than one answer, or from another process.
    pub mixed: bool,
    /// Where it goes if it stays unfinished.
    shared: Option<PathBuf>,
}

impl Part {
    fn open(path: PathBuf, shared: Option<PathBuf>) -> Result<Self> {
        let file = open_own(&path).map_err(|e| cannot(&path, e))?;
        Ok(Self { path, file, mixed: false, shared })
    }

    /// Its bytes so far.
    pub fn len(&self) -> Result<u64> {
        self.file.metadata().map(|m| m.len()).map_err(|e| cannot(&self.path, e))
    }

    /// Removes it.
    pub fn delete(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(|e| cannot(&self.path, e))
    }

    /// Leaves it for the next time.
    pub fn leave(self) {
        if let Some(shared) = self.shared {
            let _ = fs::rename(&self.path, &shared);
        }
    }
}

/// Opens a file for appending, or creates it. Anything but a plain file with one name is removed:
/// through a link another file would be written, and a pipe would block.
fn open_own(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    }
    for _ in 0..3 {
        match fs::symlink_metadata(path) {
            Ok(found) if is_own(&found) => match options.open(path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                opened => return opened,
            },
            Ok(_) => fs::remove_file(path)?,
            Err(_) => {}
        }
        match options.clone().create_new(true).open(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            opened => return opened,
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn is_own(found: &fs::Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        found.is_file() && found.nlink() <= 1
    }
    #[cfg(not(unix))]
    found.is_file()
}

/// Whether `path` is still the file that was opened.
fn same_file(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let key = |m: fs::Metadata| (m.dev(), m.ino());
        matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if key(a.clone()) == key(b.clone()))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

/// Whether a link leads to a blob.
fn leads(place: &Path, blob: &Path) -> bool {
    matches!((place.canonicalize(), blob.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn make_parent(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(|e| cannot(folder, e))
}

/// Makes `place` a link to the file `source`, which is at `target` from there. File systems without
/// links (exFAT, SMB) get the file itself if it may `move` there, else a copy, as the hub's own
/// tools do it on Windows.
pub(super) fn put(place: &Path, target: &Path, source: &Path, may_move: bool) -> Result<()> {
    make_parent(place)?;
    // Created beside it and renamed: another process may do the same, or read the old one.
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let new = place.with_file_name(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&new);
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(target, &new);
    #[cfg(not(unix))]
    let linked: io::Result<()> = {
        let _ = target;
        Err(io::ErrorKind::Unsupported.into())
    };
    let made = match linked {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => Err(e),
        Err(_) if may_move => return fs::rename(source, place).map_err(|e| cannot(place, e)),
        Err(_) => fs::copy(source, &new).map(drop),
    };
    made.and_then(|()| fs::rename(&new, place)).map_err(|e| {
        let _ = fs::remove_file(&new);
        cannot(place, e)
    })
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn traps_are_removed_and_not_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let victim = folder.path().join("victim");
        fs::write(&victim, "mine").unwrap();
        let path = folder.path().join("x.lock");
        let traps: [fn(&Path, &Path) -> io::Result<()>; 3] = [
            |victim, path| std::os::unix::fs::symlink(victim, path),
            |_, path| std::os::unix::fs::symlink("nowhere", path),
            |victim, path| fs::hard_link(victim, path),
        ];
        for trap in traps {
            trap(&victim, &path).unwrap();
            io::Write::write_all(&mut open_own(&path).unwrap(), b"x").unwrap();
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
            assert_eq!((fs::read(&victim).unwrap(), fs::read(&path).unwrap()), (b"mine".to_vec(), b"x".to_vec()));
            assert!(!folder.path().join("nowhere").exists());
            fs::remove_file(&path).unwrap();
        }
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(open_own(&path).unwrap().metadata().unwrap().is_file());
    }
}
