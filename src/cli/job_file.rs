//! A file of images to draw: one JSON object a line, each with its own settings.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, Read};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use super::DrawArgs;
use super::per_scale::PerScale;
use super::request::{self, Request};
use crate::error::{Error, Kind, Result};
use crate::generate::Job;
use crate::output::{self, Destination, slug};
use crate::{input, terminal, text};

/// The longest line, in bytes: a prompt, escaped, and its settings.
const MAX_LINE: u64 = 1 << 20;
/// What a line looks like.
const EXAMPLE: &str = r#"{"prompt": "a red apple", "out": "apple.png", "seed": 7}"#;

/// What is there stays.
pub const NO_OVERWRITING: &str = "--resume leaves out what is there, or --out-dir ANOTHER_FOLDER";

/// What a line may say. What it does not is as the flags have it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: String,
    negative: Option<String>,
    id: Option<String>,
    out: Option<String>,
    seed: Option<u64>,
    size: Option<String>,
    cfg: Option<PerScale>,
    cfg_until: Option<usize>,
    temperature: Option<PerScale>,
    top_k: Option<usize>,
    top_p: Option<f64>,
    draft: Option<usize>,
}

/// An image to draw, or one that is there.
#[derive(Debug)]
pub struct Task {
    /// Number of its line, from 1 on.
    pub line: usize,
    /// What the file calls it.
    pub id: Option<String>,
    /// Its place below the folder of all images, if the file tells.
    pub out: Option<PathBuf>,
    /// How it is drawn.
    pub job: Job,
    /// Tokens of its prompt, or of what guidance leads away from.
    pub tokens: usize,
    /// Its image is there already, and [`Reading::resume`] leaves it out.
    pub there: bool,
}

impl Task {
    /// Whether both can be drawn in one pass over every scale.
    pub fn goes_with(&self, other: &Self) -> bool {
        let (own, other) = (&self.job, &other.job);
        let same = own.scales == other.scales && own.sampling == other.sampling && own.negative == other.negative;
        same && !self.there
    }
}

/// A line of which nothing can be drawn.
#[derive(Debug)]
pub struct Fault {
    /// Its number, from 1 on.
    pub line: usize,
    /// What the file calls it, if that much can be read.
    pub id: Option<String>,
    /// What is wrong; it names the line.
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
    /// What the model is, and where images go.
    pub request: &'a Request,
    /// Settings of lines that tell none.
    pub flags: &'a DrawArgs,
    /// Scales that lines that do not tell leave out, in place of the model's.
    pub draft: Option<usize>,
    /// Images go below this folder.
    pub folder: &'a Path,
    /// Images that are there already are left out, not faults.
    pub resume: bool,
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
        }
    }

    /// Lines with a job so far, of all parts of the file.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// The next line that is not empty, of any part.
    fn line(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let mut line = Vec::new();
            let read = (&mut self.lines).take(MAX_LINE + 1).read_until(b'\n', &mut line);
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

    /// What a line asks for.
    fn task(&mut self, line: Line) -> Result<Task> {
        let Reading { request, flags, draft, folder, resume, .. } = self.reading;
        let out = target(line.out.as_deref(), line.id.as_deref())?;
        if let Some(id) = line.id.as_ref().filter(|id| !self.ids.insert((*id).clone())) {
            return Err(Error::usage(format!("the id {id:?} is there twice")).hint("give every line an id of its own"));
        }
        if out.is_none() && resume {
            return Err(Error::usage("neither id nor out tells whether its image is there already")
                .hint(format!("name it, or leave out --resume: {EXAMPLE}")));
        }
        let there = out.as_ref().map_or(Ok(false), |out| self.place(out))?;
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
        if there && !resume {
            let path = folder.join(out.unwrap_or_default());
            return Err(Error::usage(format!("{} already exists", path.display())).hint(NO_OVERWRITING));
        }
        let seed = line.seed.or(flags.seed.first().copied()).unwrap_or_else(request::any_seed);
        let job = Job { prompt, negative, scales, sampling, seed };
        Ok(Task { line: self.read, id: line.id, out, job, tokens, there })
    }

    /// Takes a place below the folder of all images; whether there is an image already.
    ///
    /// Errors: usage, for one that is taken or cannot be written.
    fn place(&mut self, out: &Path) -> Result<bool> {
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
        match path.symlink_metadata() {
            Err(_) => {}
            Ok(_) if path.is_file() => return Ok(true),
            Ok(_) => {
                let message = format!("{} exists and is not an image", path.display());
                return Err(Error::usage(message).hint(NO_OVERWRITING));
            }
        }
        let folder = output::parent(&path);
        if !self.writable.contains(folder) {
            Destination::Folder(folder.into()).check()?;
            self.writable.insert(folder.into());
        }
        Ok(false)
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
            let parsed = line.and_then(|line| match line.starts_with(b"{") {
                true => serde_json::from_slice::<Line>(&line).map_err(|e| unreadable(&e)),
                false => Err(Error::usage("it is not a JSON object").hint(format!("one job a line: {EXAMPLE}"))),
            });
            let id = parsed.as_ref().ok().and_then(|line| line.id.clone());
            let task = parsed.and_then(|line| self.task(line));
            match task {
                // Those of the other parts are read to know what is named twice.
                _ if !mine => {}
                Ok(task) => return Some(Ok(task)),
                Err(error) => return Some(Err(self.fault(id, error))),
            }
        }
        self.ended = true;
        None
    }
}

/// The error of a line that is no job.
fn unreadable(e: &serde_json::Error) -> Error {
    let text = e.to_string();
    let what = text.rsplit_once(" at line ").map_or(&*text, |(what, _)| what);
    let place = if e.column() > 0 { format!(" (column {})", e.column()) } else { String::new() };
    Error::new(Kind::Usage, format!("{what}{place}")).hint(format!("one job a line: {EXAMPLE}"))
}

/// A hint about a flag, for what a line says in its place: `"cfg": 3` for `--cfg 3`.
fn in_a_line(hint: &str) -> String {
    let Some((flag, value)) = hint.strip_prefix("--").and_then(|hint| hint.split_once(' ')) else {
        // What `gen -p` is told of.
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

/// The longest name of a file, in bytes.
const MAX_NAME: usize = 255;

/// Where an image goes below the folder of all: to `out`, or to a name made of `id`.
fn target(out: Option<&str>, id: Option<&str>) -> Result<Option<PathBuf>> {
    let Some(out) = out else { return Ok(id.map(|id| format!("{}.png", slug(id)).into())) };
    let path = Path::new(out);
    let bad = |what: &str| Err(Error::usage(format!("out {out:?} {what}")).hint(r#""out": "fruit/apple.png""#));
    let inside = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
    if out.is_empty() || out.contains('\\') || terminal::clean(out) != out || !path.components().all(inside) {
        return bad("is not a place below the folder of the images");
    }
    if out.ends_with('/') || path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("png")) {
        return bad("is not the name of a PNG");
    }
    let parts = path.components().filter(|part| matches!(part, Component::Normal(_)));
    if parts.clone().any(|part| part.as_os_str().len() > MAX_NAME) {
        return bad("has a name of more than 255 bytes");
    }
    Ok(Some(parts.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_stay_below_the_folder() {
        let place = |out: &str| target(Some(out), Some("x")).map(|path| path.unwrap());
        assert_eq!(place("a/b/c.png").unwrap(), Path::new("a/b/c.png"));
        assert_eq!(place("./a//b/./c.png").unwrap(), Path::new("a/b/c.png"));
        assert!(place(&format!("{}.png", "x".repeat(252))).is_err());
        assert_eq!(target(None, Some("The 1st/../x")).unwrap().unwrap(), Path::new("the-1st-x.png"));
        assert_eq!(target(None, None).unwrap(), None);
        for out in [
            "",
            "../x.png",
            "/etc/x.png",
            "a/../../x.png",
            "a\\b.png",
            "a\0.png",
            "a\u{1b}[2J.png",
            "a.jpg",
            "a",
            "a.png/",
        ] {
            let error = place(out).unwrap_err();
            assert_eq!((error.exit_code(), error.hint.is_some()), (2, true), "{out:?}");
        }
    }

    #[test]
    fn shards_are_parts() {
        assert_eq!("2/3".parse::<Shard>().unwrap(), Shard { part: 2, parts: 3 });
        for bad in ["", "1", "0/3", "4/3", "1/0", "-1/3", "a/b", "1/2/3"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }
}
