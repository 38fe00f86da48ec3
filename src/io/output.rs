//! Where images go: names, and atomic writes that never replace a file unasked.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::here;
use super::input::quoted;
use crate::error::{Error, Kind, Result};

pub(crate) use super::parent;
pub(crate) use super::temp::{Temp, TempFolder, sweep};

/// Where the images of a run go.
#[derive(Clone, Debug, PartialEq)]
pub enum Destination {
    /// PNG bytes on stdout.
    Stdout,
    /// One file.
    File {
        /// Its path.
        path: PathBuf,
        /// Replace an existing file.
        force: bool,
    },
    /// Names made of prompt and seed, in a folder that is created with the first image.
    Folder {
        /// Its path; empty is the current one.
        path: PathBuf,
        /// Replace a file of the name that was there before the run; otherwise a free name is
        /// found.
        force: bool,
    },
}

impl Destination {
    /// Checks, as far as possible in advance, that writing will succeed.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Stdout => Ok(()),
            Self::File { path, force } => check_file(path, *force),
            Self::Folder { path, .. } => check_folder(path),
        }
    }

    /// Writes `png` whole or not at all and returns its path; `None` for stdout, which is the
    /// terminal's to write.
    pub fn save(&self, png: &[u8], prompt: &str, seed: u64) -> Result<Option<PathBuf>> {
        self.save_beside(png, prompt, seed, &mut HashSet::new())
    }

    /// As [`Destination::save`]. Files in `saved`, which this run wrote into a folder, are not
    /// replaced by force; the new one becomes one of them.
    pub fn save_beside(
        &self,
        png: &[u8],
        prompt: &str,
        seed: u64,
        saved: &mut HashSet<PathBuf>,
    ) -> Result<Option<PathBuf>> {
        match self {
            Self::Stdout => Ok(None),
            Self::File { path, force } => {
                let target = target(path, *force);
                // It was there when the path was checked, unless the path was made up since.
                fs::create_dir_all(parent(&target)).map_err(|e| cannot_write(path, e))?;
                let temp = Temp::beside(&target, png).map_err(|e| cannot_write(path, e))?;
                let result = match force {
                    true => temp.replace(&target),
                    false => temp.persist_new(&target).map_err(|(e, _)| e),
                };
                match result {
                    Ok(()) => Ok(Some(path.clone())),
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(exists(path)),
                    Err(e) => Err(cannot_write(path, e)),
                }
            }
            Self::Folder { path: folder, force } => {
                let stem = format!("{}-{seed}", slug(prompt));
                let path = folder.join(format!("{stem}.png"));
                let path = match *force && !saved.contains(&path) && path.is_file() {
                    true => Self::File { path, force: true }.save(png, prompt, seed)?,
                    false => Some(save_free(folder, png, &stem)?),
                };
                saved.extend(path.clone());
                Ok(path)
            }
        }
    }
}

/// Writes a file whole or not at all; an existing file is replaced.
///
/// Errors: a file that cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    sweep(parent(path));
    Temp::beside(path, bytes)
        .and_then(|file| file.replace(path))
        .map_err(|e| Error::unwritten(path, &reason(&e)).because(e))
}

/// Whether a path names standard output.
pub fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path.as_os_str() == *name)
}

/// Whether `path` stays below `folder` also where links lead.
///
/// Errors: usage, if a link leads elsewhere.
pub fn check_inside(folder: &Path, path: &Path) -> Result<()> {
    // Below a folder that is still to be made there are no links.
    let Ok(root) = here(folder).canonicalize() else { return Ok(()) };
    let mut there = path;
    while fs::symlink_metadata(there).is_err() && there != folder && there.parent().is_some() {
        there = parent(there);
    }
    match there.canonicalize() {
        Ok(real) if real.starts_with(&root) => Ok(()),
        _ => Err(Error::usage(format!("{} leads out of {} by a link", path.display(), here(folder).display()))
            .hint("name a place below the folder of the images, or choose another --out-dir")),
    }
}

/// The file to write: the target of a link that is replaced, not the link.
fn target(path: &Path, force: bool) -> PathBuf {
    Some(path).filter(|_| force).and_then(|path| fs::canonicalize(path).ok()).unwrap_or_else(|| path.into())
}

/// Writes `{stem}.png`, or the first of `{stem}-2.png`, `{stem}-3.png`, ... that is free.
fn save_free(folder: &Path, png: &[u8], stem: &str) -> Result<PathBuf> {
    if !folder.as_os_str().is_empty() {
        fs::create_dir_all(folder).map_err(|e| cannot_write(folder, e))?;
    }
    let mut temp = Temp::in_folder(here(folder), png).map_err(|e| cannot_write(folder, e))?;
    for n in 1u64.. {
        let name = if n == 1 { format!("{stem}.png") } else { format!("{stem}-{n}.png") };
        let path = folder.join(name);
        match temp.persist_new(&path) {
            Ok(()) => return Ok(path),
            Err((e, file)) if e.kind() == io::ErrorKind::AlreadyExists => temp = file,
            Err((e, _)) => return Err(cannot_write(&path, e)),
        }
    }
    Err(exists(folder))
}

fn check_file(path: &Path, force: bool) -> Result<()> {
    let shown = path.display();
    if path.as_os_str().is_empty() {
        return Err(Error::usage("the output path is empty").hint("-o apple.png"));
    }
    if path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(Error::usage(format!("{shown} is a folder")).hint(format!("-o {}", quoted(&path.join("NAME")))));
    }
    if path.extension().and_then(image::ImageFormat::from_extension).is_some_and(|f| f != image::ImageFormat::Png) {
        let png = path.with_extension("png");
        return Err(Error::usage(format!("{shown} is not a PNG name, and images are written as PNG"))
            .hint(format!("-o {}", quoted(&png))));
    }
    match fs::symlink_metadata(path) {
        Ok(_) if fs::metadata(path).is_ok_and(|m| !m.is_file()) => {
            return Err(Error::usage(format!("{shown} is not a regular file")).hint(format!("-o - > {}", quoted(path))));
        }
        Ok(_) if !force => return Err(exists(path)),
        Ok(_) if !path.exists() => {
            return Err(Error::usage(format!("{shown} is a link to nothing")).hint(format!("rm {}", quoted(path))));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(unusable(path, e, "-o FILE")),
    }
    let target = target(path, force);
    let folder = parent(&target);
    match folder.is_dir() {
        true => {
            sweep(folder);
            Temp::beside(&target, b"").map(drop).map_err(|e| unusable(path, e, "-o FILE"))
        }
        false => Err(Error::usage(format!("cannot write {shown}: there is no folder {}", folder.display()))
            .hint(format!("mkdir -p {}", quoted(folder)))),
    }
}

fn check_folder(folder: &Path) -> Result<()> {
    let mut there = here(folder);
    while fs::symlink_metadata(there).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        there = parent(there);
    }
    if fs::metadata(there).is_ok_and(|m| !m.is_dir()) {
        let message = format!("{} is not a folder", there.display());
        return Err(Error::usage(message).hint("choose another --out-dir"));
    }
    sweep(there);
    Temp::in_folder(there, b"").map(drop).map_err(|e| unusable(folder, e, "--out-dir FOLDER"))
}

fn exists(path: &Path) -> Error {
    Error::usage(format!("{} already exists", path.display())).hint("--force replaces it, or -o ANOTHER_FILE")
}

fn unusable(path: &Path, e: io::Error, flag: &str) -> Error {
    Error::usage(format!("cannot write {}: {}", here(path).display(), reason(&e)))
        .hint(format!("choose another place with {flag}"))
        .because(e)
}

fn cannot_write(path: &Path, e: io::Error) -> Error {
    Error::new(Kind::Failure, format!("cannot write {}: {}", here(path).display(), reason(&e)))
        .hint("check the folder's permissions and free space (df -h), or choose another with -o or --out-dir")
        .because(e)
}

/// The error's text; tempfile's would name the temporary file.
pub(crate) fn reason(e: &io::Error) -> String {
    if e.raw_os_error().is_some() { e.to_string() } else { e.kind().to_string() }
}

/// The prompt as a file name: its words, ASCII letters in lower case, joined by `-`; at most 48
/// characters.
pub fn slug(prompt: &str) -> String {
    let mut slug = String::new();
    let mut length = 0;
    for word in prompt.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()) {
        let room = SLUG - length;
        let size = word.chars().count();
        if length > 0 && size + 1 > room {
            break;
        }
        if length > 0 {
            slug.push('-');
            length += 1;
        }
        slug.extend(word.chars().take(room).map(|c| c.to_ascii_lowercase()));
        length += size.min(room);
    }
    if slug.is_empty() { "image".into() } else { slug }
}

/// Characters of a [`slug`]: at four bytes each, well under the 255 bytes of a file name.
const SLUG: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_are_safe_names() {
        for (prompt, name) in [
            ("A red Apple!", "a-red-apple"),
            ("三只蓝色的猫", "三只蓝色的猫"),
            ("a 红 apple", "a-红-apple"),
            ("../../etc/passwd", "etc-passwd"),
            ("  \u{1b}[2J\n", "2j"),
            ("🍎 !?", "image"),
            ("", "image"),
            ("-rf", "rf"),
        ] {
            assert_eq!(slug(prompt), name);
        }
        assert_eq!(slug(&"猫".repeat(100)).chars().count(), SLUG);
        let long = slug(&"apple ".repeat(100));
        assert!(long.len() <= SLUG && long.ends_with("apple"), "{long}");
    }

    #[test]
    fn free_names_never_replace() {
        let folder = tempfile::tempdir().unwrap();
        let to = Destination::Folder { path: folder.path().join("new/sub"), force: false };
        to.check().unwrap();
        assert!(!folder.path().join("new").exists(), "a check leaves nothing behind");
        let names: Vec<PathBuf> = (0..3u8).map(|i| to.save(&[i], "A cat", 7).unwrap().unwrap()).collect();
        for (i, name) in ["a-cat-7.png", "a-cat-7-2.png", "a-cat-7-3.png"].iter().enumerate() {
            assert!(names[i].ends_with(name));
            assert_eq!(fs::read(&names[i]).unwrap(), [i as u8]);
        }
        assert_eq!(fs::read_dir(folder.path().join("new/sub")).unwrap().count(), 3, "no temporary file stays");
        // A file whose name is the beginning of an image's has nothing to do with it.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let private = folder.path().join("new/sub/a-dog-7");
            fs::write(&private, "mine").unwrap();
            fs::set_permissions(&private, fs::Permissions::from_mode(0o600)).unwrap();
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode(&to.save(&[9], "A dog", 7).unwrap().unwrap()), mode(&names[0]));
        }
    }

    #[test]
    fn files_are_replaced_only_by_force() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let to = |force| Destination::File { path: path.clone(), force };
        to(false).check().unwrap();
        to(false).save(b"one", "", 0).unwrap();
        assert_eq!(to(false).check().unwrap_err().exit_code(), 2);
        assert!(to(false).save(b"two", "", 0).unwrap_err().message.contains("already exists"));
        assert_eq!(fs::read(&path).unwrap(), b"one");
        to(true).check().unwrap();
        #[cfg(unix)]
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions();
        to(true).save(b"two", "", 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions(), mode, "a private file stays private");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn force_replaces_what_was_there_before_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("a-cat-7.png");
        fs::write(&old, "old").unwrap();
        let to = Destination::Folder { path: folder.path().into(), force: true };
        let saved = &mut HashSet::new();
        // Two prompts with one name: the second must not replace the first.
        assert_eq!(to.save_beside(b"one", "A cat", 7, saved).unwrap().unwrap(), old);
        assert!(to.save_beside(b"two", "a cat!", 7, saved).unwrap().unwrap().ends_with("a-cat-7-2.png"));
        assert_eq!(fs::read(&old).unwrap(), b"one");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[cfg(unix)]
    #[test]
    fn links_do_not_lead_outside() {
        let folder = tempfile::tempdir().unwrap();
        let (out, other) = (folder.path().join("out"), folder.path().join("other"));
        [&out, &out.join("sub"), &other].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
        let link = |to: &Path, from: &str| std::os::unix::fs::symlink(to, out.join(from)).unwrap();
        link(&other, "away");
        link(&out.join("sub"), "within");
        link(&folder.path().join("nothing"), "lost.png");
        let inside = |path: &str| check_inside(&out, &out.join(path)).is_ok();
        assert!(inside("a.png") && inside("sub/a.png") && inside("new/a.png") && inside("within/a.png"));
        assert!(!inside("away/a.png") && !inside("away/new/a.png") && !inside("lost.png"));
        assert!(check_inside(&folder.path().join("new"), &folder.path().join("new/a.png")).is_ok());
    }

    #[test]
    fn unusable_places_are_refused_up_front() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        let as_file = |path: PathBuf| Destination::File { path, force: true }.check();
        for path in [
            PathBuf::new(),
            folder.path().into(),
            folder.path().join("no/such.png"),
            folder.path().join("new/"),
            file.join("under.png"),
            folder.path().join("a.jpg"),
            folder.path().join("x".repeat(300)),
        ] {
            let error = as_file(path.clone()).unwrap_err();
            assert_eq!((error.exit_code(), error.hint.is_some()), (2, true), "{path:?}");
        }
        let as_folder = |path: PathBuf| Destination::Folder { path, force: false }.check();
        assert_eq!(as_folder(file.join("under")).unwrap_err().exit_code(), 2);
        assert_eq!(as_folder(file).unwrap_err().exit_code(), 2);
        // Behind a link it is the folder of the file that counts.
        #[cfg(unix)]
        {
            let link = folder.path().join("link.png");
            std::os::unix::fs::symlink(folder.path().join("lost.png"), &link).unwrap();
            assert!(as_file(link.clone()).unwrap_err().message.ends_with("is a link to nothing"));
            fs::write(folder.path().join("lost.png"), "x").unwrap();
            as_file(link).unwrap();
        }
        #[cfg(target_os = "linux")]
        assert!(check_file(Path::new("/dev/null"), false).unwrap_err().hint.unwrap().ends_with("-o - > /dev/null"));
        #[cfg(target_os = "linux")]
        for error in [as_file("/dev/null".into()), as_file("/proc/a.png".into()), as_folder("/proc/a".into())] {
            assert_eq!(error.unwrap_err().exit_code(), 2);
        }
    }
}
