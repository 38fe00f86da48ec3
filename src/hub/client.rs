//! A download from beginning to end.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::cache::Cache;
use super::http::{Answer, Fault, Head, Http, Piece};
use super::listing::{self, Hash, Remote};
use super::settings::{self, Endpoint};
use super::store::{Part, Store};
use super::{Event, Id, Observer, cannot, hash, retry, select, size};
use crate::error::{Error, Kind, Result};

/// An attempt that brought this many bytes resets the count of attempts.
const WORTH: u64 = 1 << 20;
/// The longest index that is read, in bytes.
const MAX_INDEX: u64 = 100_000_000;
/// Fewer bytes a second are no download.
const MIN_RATE: f64 = 1000.0;

/// A connection to a hub.
pub struct Client {
    http: Arc<Http>,
    endpoint: String,
    /// Whether requests carry a token or a password.
    known: bool,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: std::collections::BTreeMap<String, String>,
}

/// What came of an attempt.
enum Attempt {
    /// All that there is to have.
    Whole,
    /// The partial file does not match the server's: start again.
    Anew,
    /// The connection broke, for this reason; the server may have said when to retry.
    Cut(String, Option<Duration>),
}

impl Client {
    /// For the hub at `HF_ENDPOINT`, with the token of `HF_TOKEN` or of `hf auth login` if there is
    /// one.
    ///
    /// Errors: usage, for variables that cannot be understood.
    pub fn from_env() -> Result<Self> {
        let endpoint = Endpoint::from_env()?;
        let token = settings::token()?;
        let http = Http::new(&endpoint, token.as_deref())?;
        Ok(Self { http, known: token.is_some() || endpoint.login.is_some(), endpoint: endpoint.url })
    }

    /// Downloads the files that the program opens of a model, or the named `files` and the small
    /// ones beside them, unless they are in the cache. Returns the snapshot's folder.
    ///
    /// Errors: [`Kind::Model`] for refusals and wrong answers of the hub, [`Kind::Failure`] for
    /// network and disk.
    pub fn pull(&self, id: &Id, files: &[String], cache: &Cache, observer: Observer) -> Result<PathBuf> {
        let (commit, all) = self.list(id, observer)?;
        let store = Store::new(cache, id, &commit);
        let mut wanted = select::settings(&all);
        match files {
            [] => {
                let weights = select::weights(id, &all)?;
                wanted.extend(weights.files);
                for index in weights.indexes {
                    self.fetch(id, &commit, index, &store, observer)?;
                    wanted.extend(self.shards(id, index, &store, &all)?);
                }
            }
            names => wanted.extend(select::named(id, &all, names)?),
        }
        wanted.sort_by(|a, b| a.name.cmp(&b.name));
        wanted.dedup_by(|a, b| a.name == b.name);
        let bytes = wanted.iter().filter_map(|f| f.size).fold(0, u64::saturating_add);
        // A mirror may state sizes only in its answers for the files.
        let total = if bytes > 0 { format!(", {}", size(bytes)) } else { String::new() };
        observer(Event::Status(&format!("{id}: {} files{total}", wanted.len())))?;
        for file in wanted {
            self.fetch(id, &commit, file, &store, observer)?;
        }
        store.refer(&commit)?;
        Ok(store.snapshot)
    }

    /// Names and lengths of the files that [`Self::pull`] would download of a whole model.
    ///
    /// Errors: as [`Self::pull`].
    pub fn files(&self, id: &Id, observer: Observer) -> Result<Vec<(String, Option<u64>)>> {
        let (_, all) = self.list(id, observer)?;
        let weights = select::weights(id, &all)?;
        let shards = weights.indexes.iter().flat_map(|index| select::shards_beside(index, &all));
        let mut files: Vec<&Remote> = select::settings(&all).into_iter().chain(weights.files).chain(shards).collect();
        files.extend(&weights.indexes);
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files.dedup_by(|a, b| a.name == b.name);
        Ok(files.iter().map(|file| (file.name.clone(), file.size)).collect())
    }

    /// The files that an index names: they are beside it.
    fn shards<'a>(&self, id: &Id, index: &Remote, store: &Store, all: &'a [Remote]) -> Result<Vec<&'a Remote>> {
        let wrong = |what: String| {
            Error::model(format!("{} of {id} {what}", index.name)).hint("nextflow models pull another OWNER/NAME")
        };
        if index.size.is_some_and(|size| size > MAX_INDEX) {
            return Err(wrong(format!("has more than {} MB", MAX_INDEX / 1_000_000)));
        }
        let path = store.snapshot.join(&index.path);
        let text = fs::read(&path).map_err(|e| cannot(&path, e))?;
        let Index { weight_map } = serde_json::from_slice(&text).map_err(|e| wrong(format!("is no index: {e}")))?;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort();
        names.dedup();
        let folder = index.name.rfind('/').map_or("", |end| &index.name[..=end]);
        let find = |name: &String| all.iter().find(|f| f.name.strip_prefix(folder) == Some(name));
        if let Some(name) = names.iter().find(|name| find(name).is_none()) {
            return Err(wrong(format!("names {name:?}, which is not there")));
        }
        match names.is_empty() {
            true => Err(wrong("names no files".into())),
            false => Ok(names.into_iter().filter_map(find).collect()),
        }
    }

    /// The commit of a revision, and all files.
    fn list(&self, id: &Id, observer: Observer) -> Result<(String, Vec<Remote>)> {
        let revision = encode(&id.revision).replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.endpoint, id.repo_id());
        let what = format!("the list of files of {id} from {}", self.endpoint);
        let patience = settings::list_timeout();
        observer(Event::Status(&format!("asking {} for the files of {id}", self.endpoint)))?;
        for attempt in 1.. {
            let deadline = Instant::now() + patience;
            let cut = match self.read_list(&url, deadline, &what, observer) {
                Ok((head, body)) if head.status == 200 => return listing::parse(id, &head.server, &body),
                Ok((head, _)) => match retry::wait_for(&head) {
                    Some(wait) => (format!("it answered {}", head.status), wait),
                    None => return Err(listing::refused(id, &self.endpoint, &head, None, self.known)),
                },
                Err(Fault::Stopped(e) | Fault::Unreachable(e)) => return Err(e),
                Err(Fault::Cut(_)) if Instant::now() >= deadline => {
                    let seconds = patience.as_secs_f64();
                    return Err(Error::new(Kind::Failure, format!("{what} took longer than {seconds:.0} s"))
                        .hint("HF_HUB_ETAG_TIMEOUT=300 nextflow ... waits longer"));
                }
                Err(Fault::Cut(text)) => (text, None),
            };
            retry::pause(id, attempt, &what, cut, observer)?;
        }
        unreachable!("pause gives up")
    }

    fn read_list(
        &self,
        url: &str,
        deadline: Instant,
        what: &str,
        observer: Observer,
    ) -> Result<(Head, Vec<u8>), Fault> {
        let answer = self.http.get(url.into(), 0)?;
        let head = answer.head(deadline, what, observer)?;
        let mut body = Vec::new();
        if head.status != 200 {
            return Ok((head, body));
        }
        while let Piece::Bytes(bytes) = answer.next(deadline, what, observer)? {
            body.extend(bytes);
            if body.len() > listing::MAX_LIST {
                let message = format!("{what} has more than {} MB", listing::MAX_LIST >> 20);
                return Err(Fault::Stopped(Error::model(message).hint("HF_ENDPOINT=URL names another hub")));
            }
        }
        Ok((head, body))
    }

    /// Makes sure that a file is in the snapshot.
    fn fetch(&self, id: &Id, commit: &str, file: &Remote, store: &Store, observer: Observer) -> Result<()> {
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, id.repo_id(), encode(&file.name));
        let stated = match file {
            Remote { size: Some(_), hash: Some(_), .. } => file.clone(),
            _ => self.ask_for(id, &url, file, observer)?,
        };
        let file = &stated;
        if store.has(file)? {
            return Ok(());
        }
        let place = || hex(&Sha256::digest(format!("{commit}/{}", file.name)));
        let key = file.hash.as_ref().map_or_else(place, |hash| hash.digits().to_string());
        let lock = store.lock(&key, &file.name, observer)?;
        if store.has(file)? {
            return Ok(());
        }
        let mut part = store.part(&key, &lock)?;
        let resumed = part.len()? > 0;
        let mut outcome = self.download(id, &url, file, &mut part, observer);
        // A beginning from another run or another answer may have been wrong, and some file systems
        // only pretend to lock.
        if let Ok(Some(wrong)) = &outcome
            && (resumed || part.mixed)
        {
            observer(Event::Status(&format!("{} came with {wrong}: downloading it anew", file.name)))?;
            part.delete()?;
            part = store.fresh_part(&key)?;
            outcome = self.download(id, &url, file, &mut part, observer);
        }
        match outcome {
            Err(e) => {
                part.leave();
                Err(e)
            }
            Ok(Some(wrong)) => {
                part.delete()?;
                Err(Error::model(format!("{} of {id} came with {wrong}; it was deleted", file.name))
                    .hint(format!("nextflow models pull {id} tries again")))
            }
            Ok(None) => {
                let digits = match &file.hash {
                    Some(hash) => hash.digits().to_string(),
                    None => {
                        let text = format!("{}: the mirror states no hash, so only its size was checked", file.name);
                        observer(Event::Status(&text))?;
                        hash::sha256(&part.path, observer)?
                    }
                };
                store.keep(part, &digits, file)
            }
        }
    }

    /// Size and hash from the answer to a request for the file, for hubs that do not list them.
    fn ask_for(&self, id: &Id, url: &str, file: &Remote, observer: Observer) -> Result<Remote> {
        let what = format!("{} from {}", file.name, self.endpoint);
        for attempt in 1.. {
            let answer = self.http.get(url.into(), 0)?;
            let cut = match answer.head(Instant::now() + settings::stall_timeout(), &what, observer) {
                Ok(head) if head.status == 200 => return listing::complete(file, &head),
                Ok(head) => match retry::wait_for(&head) {
                    Some(wait) => (format!("the server answered {}", head.status), wait),
                    None => return Err(listing::refused(id, &self.endpoint, &head, Some(&file.name), self.known)),
                },
                Err(Fault::Stopped(e) | Fault::Unreachable(e)) => return Err(e),
                Err(Fault::Cut(text)) => (text, None),
            };
            retry::pause(id, attempt, &what, cut, observer)?;
        }
        unreachable!("pause gives up")
    }

    /// Downloads the rest of `part`; returns what is wrong with the complete file, if anything.
    fn download(
        &self,
        id: &Id,
        url: &str,
        file: &Remote,
        part: &mut Part,
        observer: Observer,
    ) -> Result<Option<String>> {
        let size = file.size.unwrap_or_default();
        let what = format!("{} from {}", file.name, self.endpoint);
        let (mut attempt, mut best) = (0, part.len()?);
        loop {
            let cut = match self.resume(id, url, file, part, observer)? {
                Attempt::Whole => break,
                Attempt::Anew => {
                    part.file.set_len(0).map_err(|e| cannot(&part.path, e))?;
                    ("the server has another length of it".into(), Some(Duration::ZERO))
                }
                Attempt::Cut(why, wait) => (why, wait),
            };
            let found = part.len()?;
            attempt = if found >= best.saturating_add(WORTH) { 1 } else { attempt + 1 };
            best = best.max(found);
            retry::pause(id, attempt, &what, cut, observer)?;
        }
        let found = part.len()?;
        if found != size {
            return Ok(Some(format!("{found} bytes, not {size}")));
        }
        let Some(expected) = &file.hash else { return Ok(None) };
        let sound = hash::agrees(&part.path, expected, observer)?;
        let kind = if matches!(expected, Hash::Git(_)) { "git hash" } else { "SHA-256" };
        Ok((!sound).then(|| format!("bytes that are not those of its {kind}")))
    }

    /// One attempt to download what `part` lacks.
    fn resume(&self, id: &Id, url: &str, file: &Remote, part: &mut Part, observer: Observer) -> Result<Attempt> {
        let total = file.size.unwrap_or_default();
        let mut done = part.len()?;
        if done == total {
            return Ok(Attempt::Whole);
        }
        if done > total {
            return Ok(Attempt::Anew);
        }
        let stall = settings::stall_timeout();
        let what = format!("{} from {}", file.name, self.endpoint);
        let answer = self.http.get(url.into(), done)?;
        let head = match answer.head(Instant::now() + stall, &what, observer) {
            Ok(head) => head,
            Err(Fault::Cut(why)) => return Ok(Attempt::Cut(why, None)),
            Err(Fault::Stopped(e) | Fault::Unreachable(e)) => return Err(e),
        };
        match head.status {
            206 if done > 0 && starts_at(&head, done) => part.mixed = true,
            206 | 416 if done > 0 => return Ok(Attempt::Anew),
            // A server without ranges starts again.
            200 => {
                part.file.set_len(0).map_err(|e| cannot(&part.path, e))?;
                done = 0;
            }
            _ => {
                return match retry::wait_for(&head) {
                    Some(wait) => Ok(Attempt::Cut(format!("{} answered {}", head.server, head.status), wait)),
                    None => Err(listing::refused(id, &self.endpoint, &head, Some(&file.name), self.known)),
                };
            }
        }
        self.receive(&answer, &head, file, part, done, observer)
    }

    /// Appends the content of an answer to `part`, which has `done` bytes.
    fn receive(
        &self,
        answer: &Answer,
        head: &Head,
        file: &Remote,
        part: &mut Part,
        mut done: u64,
        observer: Observer,
    ) -> Result<Attempt> {
        let (total, stall) = (file.size.unwrap_or_default(), settings::stall_timeout());
        let what = format!("more of {} from {}", file.name, head.server);
        // Bytes and time since which the rate is measured.
        let mut measured = (done, Instant::now());
        loop {
            let bytes = match answer.next(Instant::now() + stall, &what, observer) {
                Ok(Piece::Bytes(bytes)) => bytes,
                Ok(Piece::End) if done < total => return Ok(Attempt::Cut("the other side closed it".into(), None)),
                Ok(_) => return Ok(Attempt::Whole),
                Err(Fault::Cut(why)) => return Ok(Attempt::Cut(why, None)),
                Err(Fault::Stopped(e) | Fault::Unreachable(e)) => return Err(e),
            };
            if done == 0 && listing::is_page(&bytes) && !file.name.ends_with(".html") {
                return Err(listing::web_page(&head.server, &file.name));
            }
            // One byte too many shows that the file is too long.
            let room = usize::try_from(total - done).unwrap_or(usize::MAX).saturating_add(1);
            let bytes = &bytes[..bytes.len().min(room)];
            part.file.write_all(bytes).map_err(|e| cannot(&part.path, e))?;
            done += bytes.len() as u64;
            part.mixed |= part.len()? != done;
            observer(Event::Progress { name: &file.name, done: done.min(total), total })?;
            if done > total {
                return Ok(Attempt::Whole);
            }
            if measured.1.elapsed() >= stall {
                let (new, seconds) = (done - measured.0, measured.1.elapsed().as_secs_f64());
                if (new as f64) < MIN_RATE * seconds {
                    return Ok(Attempt::Cut(format!("only {new} bytes came in {seconds:.0} s"), None));
                }
                measured = (done, Instant::now());
            }
        }
    }
}

/// Whether a partial answer begins where the file ends; assumed if the server does not say.
fn starts_at(head: &Head, done: u64) -> bool {
    let range = head.headers.get("content-range").and_then(|v| v.to_str().ok());
    range.is_none_or(|r| {
        r.trim_start_matches("bytes").trim_start().split('-').next().is_some_and(|start| start.parse() == Ok(done))
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
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
