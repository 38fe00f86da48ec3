//! Where images go: names, PNG with its settings as text, atomic writes that never replace a file unasked.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use image::RgbImage;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::error::{Error, Kind, Result};
use crate::generate::Job;

/// Everything that decided an image; the `nextflow` text chunk of its PNG, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// What was asked for.
    pub prompt: String,
    /// Decides all randomness.
    pub seed: u64,
    /// WIDTHxHEIGHT in pixels.
    pub size: String,
    /// Grids (height, width) coarse to fine.
    pub scales: Vec<(usize, usize)>,
    /// Guidance.
    pub cfg: f64,
    /// 0 means argmax.
    pub temperature: f64,
    /// `None` keeps all codes.
    pub top_k: Option<usize>,
    /// 1 keeps all codes.
    pub top_p: f64,
    /// How many of the first scales were guided, if not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cfg_until: Option<usize>,
    /// How many scales were left out at the end, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<usize>,
    /// What the model said first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thought: Option<String>,
    /// The files of the images that it changes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    /// Guidance led away from any image, not from one with the same sources.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub free: bool,
    /// The model's name.
    pub model: String,
    /// Of this program.
    pub version: String,
}

impl Settings {
    /// The settings of `job` as drawn by `model` at (width, height) pixels.
    pub fn new(job: &Job, model: &str, (width, height): (u32, u32)) -> Self {
        Self {
            prompt: job.prompt.clone(),
            seed: job.seed,
            size: format!("{width}x{height}"),
            scales: job.scales.clone(),
            cfg: job.sampling.cfg,
            temperature: job.sampling.temperature,
            top_k: job.sampling.top_k,
            top_p: job.sampling.top_p,
            cfg_until: job.sampling.cfg_until,
            draft: Some(job.sampling.draft).filter(|&n| n > 0),
            thought: None,
            sources: Vec::new(),
            free: false,
            model: model.into(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// The same in the form that other tools read: the prompt, then one line of `Key: value` pairs (A1111).
    fn parameters(&self) -> String {
        let some = |key: &str, n: Option<usize>| n.map(|n| format!(", {key}: {n}")).unwrap_or_default();
        let top_k = some("Top-k", self.top_k);
        let passes = some("CFG until scale", self.cfg_until) + &some("Scales left out", self.draft);
        // A name with a separator in it is quoted, as A1111 does.
        let model = match self.model.contains([',', ':', '\n', '"']) {
            true => serde_json::Value::from(self.model.as_str()).to_string(),
            false => self.model.clone(),
        };
        format!(
            "{}\nSteps: {}, Sampler: NextFlow, CFG scale: {}, Seed: {}, Size: {}, Model: {model}, Temperature: {}{top_k}, \
             Top-p: {}{passes}, Version: nextflow {}",
            self.prompt,
            self.scales.len(),
            self.cfg,
            self.seed,
            self.size,
            self.temperature,
            self.top_p,
            self.version
        )
    }
}

/// The PNG of `image`, with `settings` in the text chunks `parameters` and `nextflow`. Same input, same bytes.
pub fn encode(image: &RgbImage, settings: &Settings) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::new(Kind::Failure, format!("cannot encode the PNG: {e}"));
    let json = serde_json::to_string(settings).map_err(|e| failed(&e))?;
    let write = || -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        // The usual level takes 94 ms in place of 3 for 768x512 pixels, and makes no smaller files of what we draw.
        encoder.set_compression(png::Compression::Fast);
        for (key, text) in [("parameters", settings.parameters()), ("nextflow", json.clone())] {
            match is_latin1(&text) {
                true => encoder.add_text_chunk(key.into(), text)?,
                false => encoder.add_itxt_chunk(key.into(), text)?,
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(image.as_raw())?;
        writer.finish()?;
        Ok(bytes)
    };
    write().map_err(|e| failed(&e))
}

/// Whether a tEXt chunk may hold `text`: Latin-1 without controls but newlines.
fn is_latin1(text: &str) -> bool {
    text.chars().all(|c| matches!(c, '\n' | ' '..='~' | '\u{a0}'..='\u{ff}'))
}

/// Where the images of a run go.
#[derive(Clone, Debug, PartialEq)]
pub enum Destination {
    /// PNG bytes on stdout.
    Stdout,
    /// One file.
    File {
        /// Its path.
        path: PathBuf,
        /// Replace what is there.
        force: bool,
    },
    /// Free names in a folder, which is made when the first image is there; empty is the current one.
    Folder(PathBuf),
}

impl Destination {
    /// Whether writing can succeed, as far as that can be told before there is something to write.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Stdout => Ok(()),
            Self::File { path, force } => check_file(path, *force),
            Self::Folder(folder) => check_folder(folder),
        }
    }

    /// Writes `png` whole or not at all and returns its path; `None` for stdout, which is the terminal's to write.
    pub fn save(&self, png: &[u8], prompt: &str, seed: u64) -> Result<Option<PathBuf>> {
        match self {
            Self::Stdout => Ok(None),
            Self::File { path, force } => {
                // Behind a link it is the file that is replaced, not the link.
                let target =
                    if *force { fs::canonicalize(path).unwrap_or_else(|_| path.clone()) } else { path.clone() };
                let temp = write_temp(parent(&target), png).map_err(|e| cannot_write(path, &e))?;
                let result = if *force { temp.persist(&target) } else { temp.persist_noclobber(&target) };
                match result {
                    Ok(_) => Ok(Some(path.clone())),
                    Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Err(exists(path)),
                    Err(e) => Err(cannot_write(path, &e.error)),
                }
            }
            Self::Folder(folder) => save_free(folder, png, &format!("{}-{seed}", slug(prompt))).map(Some),
        }
    }
}

/// Writes `{stem}.png`, or the first of `{stem}-2.png`, `{stem}-3.png`, ... that is free.
fn save_free(folder: &Path, png: &[u8], stem: &str) -> Result<PathBuf> {
    if !folder.as_os_str().is_empty() {
        fs::create_dir_all(folder).map_err(|e| cannot_write(folder, &e))?;
    }
    let mut temp = write_temp(here(folder), png).map_err(|e| cannot_write(folder, &e))?;
    for n in 1u64.. {
        let name = if n == 1 { format!("{stem}.png") } else { format!("{stem}-{n}.png") };
        let path = folder.join(name);
        match temp.persist_noclobber(&path) {
            Ok(_) => return Ok(path),
            Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => temp = e.file,
            Err(e) => return Err(cannot_write(&path, &e.error)),
        }
    }
    Err(exists(folder))
}

/// A file beside its final place: only a rename within one file system is atomic.
fn write_temp(folder: &Path, bytes: &[u8]) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".nextflow-").suffix(".tmp");
    #[cfg(unix)]
    {
        // As any new file, less the umask; a private 0600 would surprise.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder)?;
    file.write_all(bytes)?;
    Ok(file)
}

fn check_file(path: &Path, force: bool) -> Result<()> {
    let shown = path.display();
    if path.as_os_str().is_empty() {
        return Err(Error::usage("the output path is empty").hint("-o apple.png"));
    }
    if path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(Error::usage(format!("{shown} is a folder")).hint(format!("--out-dir {shown}")));
    }
    if path.extension().and_then(image::ImageFormat::from_extension).is_some_and(|f| f != image::ImageFormat::Png) {
        let png = path.with_extension("png");
        return Err(Error::usage(format!("{shown} is not a PNG name, and images are written as PNG"))
            .hint(format!("-o {}", png.display())));
    }
    match fs::symlink_metadata(path) {
        Ok(_) if !force => return Err(exists(path)),
        Ok(_) if fs::metadata(path).is_ok_and(|m| !m.is_file()) => {
            return Err(Error::usage(format!("{shown} is not a regular file")).hint(format!("-o - > {shown}")));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(unusable(path, &e, "-o FILE")),
    }
    let folder = parent(path);
    match folder.is_dir() {
        true => write_temp(folder, b"").map(drop).map_err(|e| unusable(path, &e, "-o FILE")),
        false => Err(Error::usage(format!("cannot write {shown}: there is no folder {}", folder.display()))
            .hint(format!("mkdir -p {}", folder.display()))),
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
    write_temp(there, b"").map(drop).map_err(|e| unusable(folder, &e, "--out-dir FOLDER"))
}

/// The folder of `path`.
fn parent(path: &Path) -> &Path {
    here(path.parent().unwrap_or(path))
}

fn here(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

fn exists(path: &Path) -> Error {
    Error::usage(format!("{} already exists", path.display())).hint("--force replaces it, or -o ANOTHER_FILE")
}

fn unusable(path: &Path, e: &io::Error, flag: &str) -> Error {
    Error::usage(format!("cannot write {}: {}", here(path).display(), reason(e)))
        .hint(format!("choose another place with {flag}"))
}

fn cannot_write(path: &Path, e: &io::Error) -> Error {
    Error::new(Kind::Failure, format!("cannot write {}: {}", here(path).display(), reason(e)))
}

/// The error in words; tempfile's would name the temporary file.
fn reason(e: &io::Error) -> String {
    if e.raw_os_error().is_some() { e.to_string() } else { e.kind().to_string() }
}

/// The prompt as a file name: its words, ASCII letters in lower case, joined by `-`; at most [`SLUG`] characters.
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
    use crate::generate::Sampling;

    fn settings(prompt: &str) -> Settings {
        let sampling = Sampling { cfg: 2.5, top_k: Some(100), top_p: 0.95, ..Sampling::default() };
        let job = Job { prompt: prompt.into(), scales: vec![(1, 1), (1, 2)], sampling, seed: 42 };
        Settings::new(&job, "nano", (32, 16))
    }

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
    fn settings_come_back_from_the_png() {
        let image = RgbImage::from_fn(32, 16, |x, y| image::Rgb([x as u8, y as u8, 7]));
        for prompt in ["a red apple", "un café", "红苹果 \u{1b}[1m", "two\nlines, \"quoted\": yes"] {
            let settings = settings(prompt);
            let png = encode(&image, &settings).unwrap();
            assert_eq!(png, encode(&image, &settings).unwrap());
            assert_eq!(image::load_from_memory(&png).unwrap().to_rgb8(), image);
            let reader = png::Decoder::new(io::Cursor::new(&png)).read_info().unwrap();
            let latin = reader.info().uncompressed_latin1_text.iter().map(|t| (t.keyword.clone(), t.text.clone()));
            let utf8 = reader.info().utf8_text.iter().map(|t| (t.keyword.clone(), t.get_text().unwrap()));
            let texts: Vec<(String, String)> = latin.chain(utf8).collect();
            let text = |key: &str| texts.iter().find(|(k, _)| k == key).unwrap().1.clone();
            assert_eq!(serde_json::from_str::<Settings>(&text("nextflow")).unwrap(), settings);
            let rest = "\nSteps: 2, Sampler: NextFlow, CFG scale: 2.5, Seed: 42, Size: 32x16, Model: nano, ";
            assert!(text("parameters").starts_with(&format!("{prompt}{rest}")), "{}", text("parameters"));
        }
    }

    #[test]
    fn free_names_never_replace() {
        let folder = tempfile::tempdir().unwrap();
        let to = Destination::Folder(folder.path().join("new/sub"));
        to.check().unwrap();
        assert!(!folder.path().join("new").exists(), "a check leaves nothing behind");
        let names: Vec<PathBuf> = (0..3u8).map(|i| to.save(&[i], "A cat", 7).unwrap().unwrap()).collect();
        for (i, name) in ["a-cat-7.png", "a-cat-7-2.png", "a-cat-7-3.png"].iter().enumerate() {
            assert!(names[i].ends_with(name));
            assert_eq!(fs::read(&names[i]).unwrap(), [i as u8]);
        }
        assert_eq!(fs::read_dir(folder.path().join("new/sub")).unwrap().count(), 3, "no temporary file stays");
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
        to(true).save(b"two", "", 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
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
        assert_eq!(Destination::Folder(file.join("under")).check().unwrap_err().exit_code(), 2);
        assert_eq!(Destination::Folder(file).check().unwrap_err().exit_code(), 2);
        #[cfg(target_os = "linux")]
        for error in
            [as_file("/dev/null".into()), as_file("/proc/a.png".into()), Destination::Folder("/proc/a".into()).check()]
        {
            assert_eq!(error.unwrap_err().exit_code(), 2);
        }
    }
}
