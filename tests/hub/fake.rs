//! A hub that is a few lines of this file, and does everything that a hub should not do.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const TOKEN: &str = "hf_secret";

/// What the server answers to a path.
#[derive(Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Bytes after which the connection is closed.
    pub cut: Option<usize>,
    /// Bytes after which nothing more comes, while the connection stays open.
    pub stall: Option<usize>,
    /// The time between single bytes.
    pub trickle: Option<Duration>,
    /// `Range` is answered as if it were not there.
    pub no_ranges: bool,
    /// In chunks, without a length.
    pub chunked: bool,
}

pub fn ok(body: impl Into<Vec<u8>>) -> Answer {
    Answer { status: 200, body: body.into(), ..Answer::default() }
}

pub fn status(status: u16, headers: &[(&'static str, &str)]) -> Answer {
    Answer { status, headers: headers.iter().map(|(k, v)| (*k, v.to_string())).collect(), ..Answer::default() }
}

pub fn to(status_code: u16, place: &str) -> Answer {
    status(status_code, &[("location", place)])
}

impl Answer {
    pub fn with(mut self, key: &'static str, value: impl ToString) -> Self {
        self.headers.push((key, value.to_string()));
        self
    }
}

/// A request: its path, and its headers in lower case with their values.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    pub headers: HashMap<String, String>,
}

impl Request {
    pub fn authorization(&self) -> &str {
        self.headers.get("authorization").map_or("", String::as_str)
    }
}

/// Answers by path, the last of which is given again and again.
pub type Answers = HashMap<String, VecDeque<Answer>>;

pub struct Hub {
    pub endpoint: String,
    pub log: Arc<Mutex<Vec<Request>>>,
    answers: Arc<Mutex<Answers>>,
}

impl Hub {
    pub fn serve(answers: Answers) -> Self {
        Self::listen(answers, "http", |stream| Some(Box::new(stream)))
    }

    /// The same behind TLS.
    pub fn serve_tls(answers: Answers, config: Arc<rustls::ServerConfig>) -> Self {
        Self::listen(answers, "https", move |stream| {
            let connection = rustls::ServerConnection::new(config.clone()).ok()?;
            Some(Box::new(rustls::StreamOwned::new(connection, stream)))
        })
    }

    fn listen(
        answers: Answers,
        scheme: &str,
        wrap: impl Fn(TcpStream) -> Option<Box<dyn Stream>> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("{scheme}://{}", listener.local_addr().unwrap());
        let hub = Self { endpoint, log: Arc::default(), answers: Arc::new(Mutex::new(answers)) };
        let (answers, log, wrap) = (hub.answers.clone(), hub.log.clone(), Arc::new(wrap));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answers, log, wrap) = (answers.clone(), log.clone(), wrap.clone());
                std::thread::spawn(move || {
                    if let Some(stream) = wrap(stream) {
                        answer(stream, &answers, &log);
                    }
                });
            }
        });
        hub
    }

    /// Answers to paths that come in beside the others.
    pub fn add(&self, answers: Answers) {
        self.answers.lock().unwrap().extend(answers);
    }

    pub fn requests(&self, part: &str) -> Vec<Request> {
        self.log.lock().unwrap().iter().filter(|r| r.path.contains(part)).cloned().collect()
    }

    /// What was asked for of files with such a path.
    pub fn ranges(&self, part: &str) -> Vec<String> {
        let range = |r: Request| r.headers.get("range").cloned().unwrap_or_default();
        self.requests(part).into_iter().map(range).collect()
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

fn answer(stream: Box<dyn Stream>, answers: &Mutex<Answers>, log: &Mutex<Vec<Request>>) {
    let mut stream = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        stream.read_line(&mut line).ok().filter(|n| *n > 0).map(|_| line.trim_end().to_string())
    };
    let Some(first) = line() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let mut headers = HashMap::new();
    while let Some((key, value)) = line().as_deref().and_then(|l| l.split_once(": ")) {
        headers.insert(key.to_lowercase(), value.to_string());
    }
    let range = headers.get("range").cloned();
    log.lock().unwrap().push(Request { path: path.clone(), headers });
    let found = {
        let mut answers = answers.lock().unwrap();
        answers.get_mut(&path).and_then(|a| if a.len() > 1 { a.pop_front() } else { a.front().cloned() })
    };
    let mut answer = found.unwrap_or(Answer { status: 404, ..Answer::default() });
    let from = range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    if let Some(from) = from.filter(|_| answer.status == 200 && !answer.no_ranges) {
        if from >= answer.body.len() {
            answer = status(416, &[]);
        } else {
            let all = answer.body.len();
            answer.status = 206;
            answer.body.drain(..from);
            answer.headers.push(("content-range", format!("bytes {from}-{}/{all}", all - 1)));
        }
    }
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", answer.status);
    head.extend(answer.headers.iter().map(|(key, value)| format!("{key}: {value}\r\n")));
    head += &match answer.chunked {
        true => "transfer-encoding: chunked\r\n\r\n".to_string(),
        false => format!("content-length: {}\r\n\r\n", answer.body.len()),
    };
    let stream = stream.get_mut();
    let _ = stream.write_all(head.as_bytes());
    if answer.chunked {
        let _ = stream.write_all(format!("{:x}\r\n", answer.body.len()).as_bytes());
    }
    let end = answer.cut.or(answer.stall).unwrap_or(answer.body.len());
    match answer.trickle {
        None => drop(stream.write_all(&answer.body[..end])),
        Some(pause) => {
            for byte in &answer.body[..end] {
                if stream.write_all(&[*byte]).and_then(|()| stream.flush()).is_err() {
                    return;
                }
                std::thread::sleep(pause);
            }
        }
    }
    if answer.chunked {
        let _ = stream.write_all(b"\r\n0\r\n\r\n");
    }
    let _ = stream.flush();
    if answer.stall.is_some() {
        std::thread::sleep(Duration::from_secs(20));
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// What git calls a file.
pub fn git_hash(bytes: &[u8]) -> String {
    hex(&sha1::Sha1::digest([format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat()))
}

pub fn weights() -> Vec<u8> {
    (0..300_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes()).collect()
}

/// The hub's entry for a file: weights with their SHA-256.
pub fn sibling(name: &str, bytes: &[u8]) -> serde_json::Value {
    let mut entry = serde_json::json!({ "rfilename": name, "size": bytes.len(), "blobId": git_hash(bytes) });
    if [".safetensors", ".gguf", ".pt", ".pth", ".bin", ".onnx"].iter().any(|e| name.ends_with(e)) {
        entry["lfs"] = serde_json::json!({ "sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 130 });
    }
    entry
}

pub fn list_path(id: &str) -> String {
    format!("/api/models/{id}/revision/main?blobs=true")
}

pub fn file_path(id: &str, name: &str) -> String {
    format!("/{id}/resolve/{COMMIT}/{name}")
}

pub fn listing(siblings: &[serde_json::Value]) -> Answer {
    ok(serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string())
}

pub fn answers(pairs: impl IntoIterator<Item = (String, Answer)>) -> Answers {
    pairs.into_iter().map(|(path, answer)| (path, VecDeque::from([answer]))).collect()
}

/// The answers of a proper hub with a model of these files.
pub fn model(id: &str, files: &[(&str, Vec<u8>)]) -> Answers {
    let list: Vec<_> = files.iter().map(|(name, bytes)| sibling(name, bytes)).collect();
    let files = files.iter().map(|(name, bytes)| (file_path(id, name), ok(bytes.clone())));
    answers(files.chain([(list_path(id), listing(&list))]))
}

/// A small model that is all right: a config and weights.
pub fn usual() -> [(&'static str, Vec<u8>); 2] {
    [("config.json", b"{}".to_vec()), ("model.safetensors", weights())]
}

/// What the environment of whoever runs the tests could change.
const CLEARED: [&str; 28] = [
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "NEXTFLOW_MODEL",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "XDG_CACHE_HOME",
    "HF_HUB_ETAG_TIMEOUT",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "ALL_PROXY",
    "all_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "NO_PROXY",
    "no_proxy",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_TOKEN",
    "HF_HOME",
    "HF_ENDPOINT",
    "TRANSFORMERS_OFFLINE",
    "RUST_BACKTRACE",
    "RUST_LOG",
];

pub fn command(home: &Path, hub: &Hub, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    for name in CLEARED {
        command.env_remove(name);
    }
    command.args(args).env("HF_HOME", home).env("HF_ENDPOINT", &hub.endpoint).env("HF_TOKEN", TOKEN);
    command
}

/// Exit code, stdout and stderr.
pub fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(!stdout.contains(TOKEN) && !stderr.contains(TOKEN), "the token is printed: {stdout}{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains('\x1b'), "{stderr}");
    (status.code().unwrap(), stdout, stderr)
}

pub fn nextflow(home: &Path, hub: &Hub, args: &[&str]) -> (i32, String, String) {
    run(&mut command(home, hub, args))
}

pub fn pull(home: &Path, hub: &Hub) -> (i32, String, String) {
    nextflow(home, hub, &["models", "pull", "o/m"])
}

/// A pull that has to succeed: what it printed on stderr.
pub fn pulled(command: &mut Command) -> String {
    let (code, stdout, stderr) = run(command);
    assert_eq!(code, 0, "{stderr}");
    let folder = Path::new(stdout.trim_end());
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights(), "{stderr}");
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{}", "{stderr}");
    stderr
}
