//! Files that appear whole or not at all: written under a temporary name beside their final place,
//! locked while their process lives, and renamed when they are complete. Leftovers of a killed
//! process are removed by the next one.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::{NamedTempFile, TempDir};

use super::parent;

const PREFIX: &str = ".nextflow-";
const SUFFIX: &str = ".tmp";
/// Locks may not reach across hosts: what another host left is removed when nothing was written to
/// it for this long.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// A file with a temporary name, removed on drop unless it gets its final one.
pub(crate) struct Temp(NamedTempFile);

impl Temp {
    /// `bytes` in the folder of their final place, because only a rename within one file system is
    /// atomic.
    pub fn in_folder(folder: &Path, bytes: &[u8]) -> io::Result<Self> {
        Self::with_mode(folder, None)?.filled(bytes)
    }

    /// `bytes` beside `path`, with the permissions of the file that they are to replace, if there
    /// is one.
    pub fn beside(path: &Path, bytes: &[u8]) -> io::Result<Self> {
        let old = fs::metadata(path).ok().map(|old| old.permissions());
        let temp = Self::with_mode(parent(path), old.clone())?;
        if let Some(old) = old.filter(|old| temp.0.as_file().metadata().is_ok_and(|new| new.permissions() != *old)) {
            // The umask cleared some. A file system without permissions has none to preserve.
            let _ = temp.0.as_file().set_permissions(old);
        }
        temp.filled(bytes)
    }

    /// An empty file with these permissions or, as any new file, with all that the umask leaves.
    fn with_mode(folder: &Path, mode: Option<fs::Permissions>) -> io::Result<Self> {
        let (prefix, mut builder) = (prefix(), tempfile::Builder::new());
        builder.prefix(&prefix).suffix(SUFFIX);
        #[cfg(unix)]
        builder.permissions(mode.unwrap_or(std::os::unix::fs::PermissionsExt::from_mode(0o666)));
        #[cfg(not(unix))]
        let _ = mode;
        let mut tries = 3;
        loop {
            let temp = builder.tempfile_in(folder)?;
            tries -= 1;
            if is_held(temp.as_file(), temp.path()) || tries == 0 {
                return Ok(Self(temp));
            }
        }
    }

    fn filled(mut self, bytes: &[u8]) -> io::Result<Self> {
        self.0.write_all(bytes)?;
        Ok(self)
    }

    /// Renames the file to its final name, replacing an existing one.
    pub fn replace(self, path: &Path) -> io::Result<()> {
        sync(self.0.as_file())?;
        self.0.persist(path).map_err(|e| e.error)?;
        sync_folder(path);
        Ok(())
    }

    /// Renames the file to its final name if that is free; else returns the error and the file.
    pub fn persist_new(self, path: &Path) -> Result<(), (io::Error, Self)> {
        if let Err(e) = sync(self.0.as_file()) {
            return Err((e, self));
        }
        match self.0.persist_noclobber(path) {
            Ok(_) => {}
            Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => return Err((e.error, Self(e.file))),
            // Some file systems (network, FUSE, exFAT) know neither a rename that replaces nothing
            // nor hard links.
            Err(e) => claim(e.file, path)?,
        }
        sync_folder(path);
        Ok(())
    }
}

/// Takes the free name `path` by an empty file of that name, and then replaces that.
fn claim(temp: NamedTempFile, path: &Path) -> Result<(), (io::Error, Temp)> {
    if let Err(e) = OpenOptions::new().write(true).create_new(true).open(path) {
        return Err((e, Temp(temp)));
    }
    temp.persist(path).map(drop).map_err(|e| {
        let _ = fs::remove_file(path);
        (e.error, Temp(e.file))
    })
}

/// A folder with a temporary name, removed on drop unless it gets its final one.
pub(crate) struct TempFolder {
    folder: TempDir,
    /// Holds the lock.
    _lock: Option<File>,
}

impl TempFolder {
    /// An empty one in `parent`.
    pub fn new(parent: &Path) -> io::Result<Self> {
        let (prefix, mut builder) = (prefix(), tempfile::Builder::new());
        builder.prefix(&prefix).suffix(SUFFIX);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let folder = builder.tempdir_in(parent)?;
        let lock = File::open(folder.path()).ok();
        if lock.as_ref().is_some_and(|lock| !is_held(lock, folder.path())) {
            return Err(io::Error::other("another process removed a new folder"));
        }
        Ok(Self { folder, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Renames it to its final name.
    pub fn rename(self, to: &Path) -> io::Result<()> {
        fs::rename(self.folder.path(), to)?;
        let _ = self.folder.keep();
        sync_folder(to);
        Ok(())
    }
}

/// Locks a new file or folder for as long as it is open; `false` if another process took it for a
/// dead one's meanwhile.
fn is_held(file: &File, path: &Path) -> bool {
    match file.try_lock() {
        Ok(()) => fs::symlink_metadata(path).is_ok(),
        Err(TryLockError::WouldBlock) => false,
        // There are no locks here: see `LONG`.
        Err(TryLockError::Error(_)) => true,
    }
}

/// Removes the temporary files and folders in `folder` of processes that are no more.
pub(crate) fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_temporary(&entry.file_name())) {
        let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
        if kind.is_dir() && is_abandoned(&path, File::open(&path)) {
            let _ = fs::remove_dir_all(&path);
        } else if kind.is_file() && is_abandoned(&path, OpenOptions::new().read(true).write(true).open(&path)) {
            let _ = fs::remove_file(&path);
        }
    }
}

fn is_temporary(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PREFIX.as_bytes()) && name.as_encoded_bytes().ends_with(SUFFIX.as_bytes())
}

/// Whether no process works at a temporary file.
fn is_abandoned(path: &Path, file: io::Result<File>) -> bool {
    let Ok(file) = file else { return false };
    let ours = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix().as_encoded_bytes()));
    let old = || file.metadata().and_then(|m| m.modified()).is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LONG));
    match file.try_lock() {
        Ok(()) => ours || old(),
        Err(TryLockError::WouldBlock) => false,
        Err(TryLockError::Error(_)) => old(),
    }
}

/// The prefix of temporary names on this host.
fn prefix() -> OsString {
    static HOST: OnceLock<String> = OnceLock::new();
    let host = HOST.get_or_init(|| {
        let name = fs::read_to_string(PathBuf::from("/proc/sys/kernel/hostname")).unwrap_or_default();
        let plain = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
        format!("{PREFIX}{}-", plain.take(32).collect::<String>().trim_end_matches('_'))
    });
    host.into()
}

/// Puts a file on the disk, where the file system can: after a power cut a name must not lead to an
/// empty file.
fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

/// Puts the name of a file on the disk, where that is possible.
fn sync_folder(path: &Path) {
    #[cfg(unix)]
    let _ = File::open(parent(path)).and_then(|folder| folder.sync_all());
    #[cfg(not(unix))]
    let _ = path;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn what_dead_processes_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        let (alive, alive_folder) = (Temp::in_folder(here, b"x").unwrap(), TempFolder::new(here).unwrap());
        let mut dead = prefix();
        dead.push("dEAd12.tmp");
        fs::write(here.join(&dead), "x").unwrap();
        let mut dead_folder = prefix();
        dead_folder.push("dEAd34.tmp");
        fs::create_dir(here.join(&dead_folder)).unwrap();
        fs::write(here.join(&dead_folder).join("model.gguf"), "x").unwrap();
        // A lock of another host may not be seen here.
        fs::write(here.join(".nextflow-other_host-abc123.tmp"), "x").unwrap();
        let old = File::create(here.join(".nextflow-other_host-def456.tmp")).unwrap();
        old.set_modified(std::time::SystemTime::now() - 2 * LONG).unwrap();
        drop(old);
        for name in [".nextflow-notes.txt", "a.tmp", "mine.png"] {
            fs::write(here.join(name), "x").unwrap();
        }
        #[cfg(unix)]
        {
            let mut link = prefix();
            link.push("aLink1.tmp");
            std::os::unix::fs::symlink(here.join("mine.png"), here.join(link)).unwrap();
        }
        sweep(here);
        let left = names(here);
        assert!(!left.iter().any(|name| name.contains("dEAd") || name.contains("def456")), "{left:?}");
        assert_eq!(left.len(), if cfg!(unix) { 7 } else { 6 }, "{left:?}");
        assert!(alive_folder.path().is_dir());
        alive.replace(&here.join("alive.png")).unwrap();
        assert_eq!(fs::read(here.join("alive.png")).unwrap(), b"x");
        alive_folder.rename(&here.join("model")).unwrap();
        assert!(here.join("model").is_dir());
    }

    #[test]
    fn a_free_name_is_claimed_where_nothing_better_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let temp = |bytes: &[u8]| Temp::in_folder(folder.path(), bytes).unwrap().0;
        assert!(claim(temp(b"one"), &path).is_ok());
        let (error, _) = claim(temp(b"two"), &path).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(names(folder.path()), ["a.png"]);
    }
}
