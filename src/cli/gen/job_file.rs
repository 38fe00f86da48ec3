//! A file of images to draw: one JSON object a line, each with its own settings.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, Cursor, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::job_line::{EXAMPLE, Line};
use super::job_path;
use crate::cli::SamplingArgs;
use crate::cli::request::{self, Request};
use crate::error::{Error, Result};
use crate::generate::{Job, png_info};
use crate::io::input;
use crate::io::output::{self, Destination};
use crate::text;

/// The longest line, in bytes: a prompt, escaped, and its settings.
const MAX_LINE: u64 = 1 << 20;
/// The longest file of UTF-16, in bytes, which is converted as a whole.
const MAX_UTF16: u64 = 256 << 20;

/// The hint for a file that exists.
pub const NO_OVERWRITING: &str =
    "--resume skips existing images, --force replaces them, --out-dir ANOTHER_FOLDER keeps them";

/// An image to draw, or one that exists.
#[derive(Debug)]
pub struct Task {
    /// Number of its line, from 1 on.
    pub line: usize,
    /// Its ID in the file.
    pub id: Option<String>,
    /// Its path below the folder of all images, if the line has one.
    pub out: Option<PathBuf>,
    /// How it is drawn.
    pub job: Job,
    /// Tokens of its prompt, or of a longer negative prompt.
    pub tokens: usize,
    /// Its image exists, and [`Reading::resume`] skips it.
    pub there: bool,
    /// An existing file is replaced.
    pub replaces: bool,
}

impl Task {
    /// Whether both can be drawn in one pass over every scale.
    pub fn goes_with(&self, other: &Self) -> bool {
        let (own, other) = (&self.job, &other.job);
        let same = own.scales == other.scales && own.sampling == other.sampling && own.negative == other.negative;
        same && !self.there
    }
}

/// What is at the path of an image.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Free,
    /// A whole PNG.
    Image,
    /// Another file, or an incomplete PNG.
    Other,
}

/// A line of which nothing can be drawn.
#[derive(Debug)]
pub struct Fault {
    /// Its number, from 1 on.
    pub line: usize,
    /// Its ID in the file, if it can be read.
    pub id: Option<String>,
    /// The error; it names the line.
    pub error: Error,
}

/// The K-th of N parts of a file: every N-th line from the K-th on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    part: usize,
    parts: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((part, parts)) if (1..=parts).contains(&part) => Ok(Self { part, parts }),
            _ => Err("a part is K/N, as 1/4 to 4/4".into()),
        }
    }
}

/// How a file of jobs is read.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    /// How messages call the file.
    pub name: &'a str,
    /// The model, and where images go.
    pub request: &'a Request,
    /// Settings that lines do not have.
    pub flags: &'a SamplingArgs,
    /// Scales that lines without `draft` skip, in place of the model's.
    pub draft: Option<usize>,
    /// Images go below this folder.
    pub folder: &'a Path,
    /// Existing images are skipped, not errors.
    pub resume: bool,
    /// Existing images are replaced.
    pub force: bool,
    /// The part of the file that is drawn.
    pub shard: Option<Shard>,
}

/// The lines of a file, as they come.
pub struct Jobs<'a> {
    reading: Reading<'a>,
    lines: Box<dyn BufRead + 'a>,
    /// Lines so far.
    read: usize,
    /// Those of them that are not empty.
    seen: usize,
    ended: bool,
    ids: HashSet<String>,
    /// Places of images, with the lines that named them.
    outs: HashMap<PathBuf, usize>,
    /// The folders that they are in, with the first lines that did.
    folders: HashMap<PathBuf, usize>,
    /// Folders that can be written.
    writable: HashSet<PathBuf>,
    /// Folders with existing images, whose leftover temporary files were removed.
    swept: HashSet<PathBuf>,
}

impl<'a> Jobs<'a> {
    /// The jobs of some lines.
    pub fn new(reading: Reading<'a>, lines: impl BufRead + 'a) -> Self {
        Self {
            reading,
            lines: Box::new(lines),
            read: 0,
            seen: 0,
            ended: false,
            ids: HashSet::new(),
            outs: HashMap::new(),
            folders: HashMap::new(),
            writable: HashSet::new(),
            swept: HashSet::new(),
        }
    }

    /// Lines with a job so far, of all parts of the file.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Makes UTF-8 of a file of UTF-16 before its first line.
    fn convert(&mut self) -> std::io::Result<()> {
        if input::is_utf16(self.lines.fill_buf()?) {
            let mut all = Vec::new();
            (&mut self.lines).take(MAX_UTF16).read_to_end(&mut all)?;
            self.lines = Box::new(Cursor::new(input::utf8(all)));
        }
        Ok(())
    }

    /// The next line that is not empty, of any part.
    fn line(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let mut line = Vec::new();
            let first = if self.read == 0 { self.convert() } else { Ok(()) };
            let read = first.and_then(|()| (&mut self.lines).take(MAX_LINE + 1).read_until(b'\n', &mut line));
            self.read += 1;
            read.map_err(|e| {
                self.ended = true;
                Error::usage(format!("it cannot be read: {e}")).hint("--jsonl FILE, or - for standard input")
            })?;
            if line.len() as u64 > MAX_LINE && !line.ends_with(b"\n") {
                let _ = self.lines.skip_until(b'\n');
                let what = format!("it is longer than {} MB", MAX_LINE >> 20);
                return Err(Error::usage(what).hint(format!("one job a line: {EXAMPLE}")));
            }
            if line.is_empty() {
                return Ok(None);
            }
            let text = if self.read == 1 { input::without_bom(&line) } else { &line }.trim_ascii();
            if !text.is_empty() {
                return Ok(Some(text.into()));
            }
        }
    }

    /// The task of a line.
    fn task(&mut self, line: Line) -> Result<Task> {
        let Reading { request, flags, draft, folder, resume, force, .. } = self.reading;
        let out = job_path::of(line.out.as_deref(), line.id.as_deref())?;
        if let Some(id) = line.id.as_ref().filter(|id| !self.ids.insert((*id).clone())) {
            return Err(Error::usage(format!("the id {id:?} is there twice")).hint("give every line an id of its own"));
        }
        if out.is_none() && resume {
            return Err(Error::usage("without id or out its image cannot be found again")
                .hint(format!("name it, or leave out --resume: {EXAMPLE}")));
        }
        let place = out.as_ref().map_or(Ok(Place::Free), |out| self.place(out))?;
        let mut flags = flags.clone();
        flags.size = line.size.unwrap_or(flags.size);
        flags.cfg = line.cfg.or(flags.cfg);
        flags.cfg_until = line.cfg_until.or(flags.cfg_until);
        flags.temperature = line.temperature.or(flags.temperature);
        flags.top_k = line.top_k.or(flags.top_k);
        flags.top_p = line.top_p.or(flags.top_p);
        request::check_sampler(&flags)?;
        let scales = request.config.grids(flags.size.parse()?)?;
        let usual = request.config.sampling();
        let mut sampling = request::sampling(&flags, usual.clone());
        sampling.cfg_layers.clone_from(&request.sampling.cfg_layers);
        if let Some(key) = request::without_effect(line.top_k, line.top_p, &sampling) {
            let key = key.replace('-', "_");
            return Err(
                Error::usage(format!("{key} has no effect with temperature 0")).hint(format!("leave out {key}"))
            );
        }
        sampling.draft = line.draft.or(draft).unwrap_or(usual.draft);
        sampling.check(scales.len())?;
        flags.check_scales(&sampling, scales.len())?;
        let prompt = text::check_prompt(line.prompt.as_bytes())?;
        let mut tokens = request.counter.count(&prompt)?;
        let negative = match &line.negative {
            Some(text) => {
                let negative = request::negative(Some(text.as_bytes()), &request.counter, &sampling, scales.len())?;
                negative.map(|(negative, count)| {
                    tokens = tokens.max(count);
                    negative
                })
            }
            None => request.negative.clone().filter(|_| sampling.guided_scales(scales.len()) > 0),
        };
        if place != Place::Free && !resume && !force {
            let path = folder.join(out.unwrap_or_default());
            return Err(Error::usage(format!("{} already exists", path.display())).hint(NO_OVERWRITING));
        }
        let seed = line.seed.or(flags.seed.first().copied()).unwrap_or_else(request::any_seed);
        let job = Job { prompt, negative, scales, sampling, seed };
        let there = place == Place::Image && resume;
        Ok(Task { line: self.read, id: line.id, out, job, tokens, there, replaces: place != Place::Free && !there })
    }

    /// Reserves a path below the folder of all images; returns what is there.
    ///
    /// Errors: usage, for a path that is taken, leads elsewhere or cannot be written.
    fn place(&mut self, out: &Path) -> Result<Place> {
        let (line, path) = (self.read, self.reading.folder.join(out));
        let taken = |what: &str, by: usize| {
            let message = format!("its place, {}, is {what} line {by}", out.display());
            Err(Error::usage(message).hint("give every line an out, or an id, of its own"))
        };
        let folders = || out.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty());
        if let Some(&by) = self.outs.get(out) {
            return taken("that of", by);
        }
        if let Some(&by) = self.folders.get(out) {
            return taken("a folder of", by);
        }
        if let Some(&by) = folders().find_map(|folder| self.outs.get(folder)) {
            return taken("below that of", by);
        }
        self.outs.insert(out.into(), line);
        for folder in folders() {
            self.folders.entry(folder.into()).or_insert(line);
        }
        output::check_inside(self.reading.folder, &path)?;
        let place = match path.symlink_metadata() {
            Err(_) => Place::Free,
            // Only --resume reads the file.
            Ok(_) if path.is_file() && self.reading.resume && png_info::is_whole_png(&path) => Place::Image,
            Ok(_) if path.is_file() => Place::Other,
            Ok(_) => {
                let message = format!("{} exists and is not an image", path.display());
                return Err(Error::usage(message).hint("give the line another out, or choose another --out-dir"));
            }
        };
        let folder = output::parent(&path);
        if place == Place::Image {
            if self.swept.insert(folder.into()) {
                output::sweep(folder);
            }
        } else if !self.writable.contains(folder) {
            Destination::Folder { path: folder.into(), force: false }.check()?;
            self.writable.insert(folder.into());
        }
        Ok(place)
    }

    /// A fault of the line that was just read.
    fn fault(&self, id: Option<String>, error: Error) -> Fault {
        let line = self.read;
        let message = format!("line {line} of {}: {}", self.reading.name, error.message);
        Fault { line, id, error: Error { message, hint: error.hint.map(|hint| in_a_line(&hint)), ..error } }
    }
}

impl Iterator for Jobs<'_> {
    type Item = Result<Task, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let Some(line) = self.line().transpose() else { break };
            self.seen += 1;
            let mine = self.reading.shard.is_none_or(|Shard { part, parts }| self.seen % parts == part % parts);
            let parsed = line.and_then(|line| Line::parse(&line));
            let id = parsed.as_ref().ok().and_then(|line| line.id.clone());
            let task = parsed.and_then(|line| self.task(line));
            match task {
                // Lines of other shards are read for names that occur twice.
                _ if !mine => {}
                Ok(task) => return Some(Ok(task)),
                Err(error) => return Some(Err(self.fault(id, error))),
            }
        }
        self.ended = true;
        None
    }
}

/// The hint for a flag as a line would have it: `"cfg": 3` for `--cfg 3`.
fn in_a_line(hint: &str) -> String {
    let Some((flag, value)) = hint.strip_prefix("--").and_then(|hint| hint.split_once(' ')) else {
        // A hint for `gen -p`.
        return if hint.starts_with("-p ") { format!("one job a line: {EXAMPLE}") } else { hint.into() };
    };
    match flag {
        "size" => format!("\"size\": {:?}", value.split([' ', ',']).next().unwrap_or(value)),
        "cfg" | "cfg-until" | "temperature" | "top-k" | "top-p" | "draft" => {
            format!("\"{}\": {value}", flag.replace('-', "_"))
        }
        _ => hint.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_parts() {
        assert_eq!("2/3".parse::<Shard>().unwrap(), Shard { part: 2, parts: 3 });
        for bad in ["", "1", "0/3", "4/3", "1/0", "-1/3", "a/b", "1/2/3"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }
}
