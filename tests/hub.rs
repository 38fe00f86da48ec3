//! Models from a hub that is a few lines of this file, and does everything that a hub should not do.
#![cfg(feature = "hub")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server answers to a path.
#[derive(Clone)]
struct Answer {
    status: u16,
    /// Of a redirect, where it leads.
    body: Vec<u8>,
    /// Bytes after which the first connection for it is cut.
    cut: Option<usize>,
}

fn ok(body: impl Into<Vec<u8>>) -> Answer {
    Answer { status: 200, body: body.into(), cut: None }
}

struct Hub {
    endpoint: String,
    log: Arc<Mutex<Vec<Request>>>,
}

/// Path, range, and whether it told who asks.
type Request = (String, String, bool);

impl Hub {
    fn serve(answers: HashMap<String, Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let answers = Arc::new(Mutex::new(answers));
        let requests = log.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answers, requests) = (answers.clone(), requests.clone());
                std::thread::spawn(move || answer(stream, &answers, &requests));
            }
        });
        Self { endpoint, log }
    }

    fn requests(&self, part: &str) -> Vec<String> {
        self.log
            .lock()
            .unwrap()
            .iter()
            .filter(|(path, ..)| path.contains(part))
            .map(|(_, range, _)| range.clone())
            .collect()
    }
}

fn answer(mut stream: TcpStream, answers: &Mutex<HashMap<String, Answer>>, log: &Mutex<Vec<Request>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let headers: Vec<String> = lines.take_while(|l| !l.is_empty()).map(|l| l.to_lowercase()).collect();
    let range = headers.iter().find_map(|h| h.strip_prefix("range: ")).unwrap_or_default().to_string();
    let known = headers.iter().any(|h| h.starts_with("authorization: bearer hf_secret"));
    log.lock().unwrap().push((path.clone(), range.clone(), known));
    let found = {
        let mut answers = answers.lock().unwrap();
        let found = answers.get(&path).cloned();
        // Only the first connection is cut.
        answers.entry(path).and_modify(|a| a.cut = None);
        found
    };
    let Answer { mut status, mut body, cut } = found.unwrap_or(Answer { status: 404, body: Vec::new(), cut: None });
    if let Some(from) = range.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')?.parse::<usize>().ok()) {
        (status, body) = (206, body.split_off(from));
    }
    let location = match status {
        300..400 => format!("Location: {}\r\n", String::from_utf8_lossy(&body)),
        _ => String::new(),
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\n{location}Content-Length: {length}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body[..cut.unwrap_or(body.len())]);
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn weights() -> Vec<u8> {
    (0..300_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes()).collect()
}

/// The listing of a model with a config and one large file of this name and hash.
fn listing(commit: &str, name: &str, hash: &str, size: usize) -> String {
    let blob = "a".repeat(40);
    serde_json::json!({ "sha": commit, "siblings": [
        { "rfilename": ".gitattributes", "size": 3, "blobId": blob },
        { "rfilename": "onnx/.gitkeep", "size": 3, "blobId": blob },
        { "rfilename": "README.md", "size": 3, "blobId": blob },
        { "rfilename": "config.json", "size": 2, "blobId": blob },
        { "rfilename": name, "size": size, "blobId": blob, "lfs": { "sha256": hash, "size": size } },
    ]})
    .to_string()
}

fn model(list: String, name: &str, file: Answer) -> Hub {
    Hub::serve(HashMap::from([
        ("/api/models/o/m/revision/main?blobs=true".to_string(), ok(list)),
        (format!("/o/m/resolve/{COMMIT}/config.json"), ok("{}")),
        (format!("/o/m/resolve/{COMMIT}/{name}"), file),
    ]))
}

fn command(home: &Path, hub: &Hub, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    command.args(args).env("HF_HOME", home).env("HF_ENDPOINT", &hub.endpoint).env("HF_TOKEN", "hf_secret");
    command.env_remove("HF_HUB_CACHE").env_remove("HF_HUB_OFFLINE").env_remove("NEXTFLOW_MODEL");
    command
}

fn nextflow(home: &Path, hub: &Hub, args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command(home, hub, args).output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(!stdout.contains("hf_secret") && !stderr.contains("hf_secret"), "the token is told: {stdout}{stderr}");
    (status.code().unwrap(), stdout, stderr)
}

#[test]
fn a_cut_download_goes_on_and_the_cache_can_be_checked_and_emptied() {
    let (home, bytes) = (tempfile::tempdir().unwrap(), weights());
    let hash = hex(&bytes);
    let file = Answer { cut: Some(700_001), ..ok(bytes.clone()) };
    let hub = model(listing(COMMIT, "sub/w.safetensors", &hash, bytes.len()), "sub/w.safetensors", file);
    let (code, stdout, stderr) = nextflow(home.path(), &hub, &["models", "pull", "o/m"]);
    assert_eq!(code, 0, "{stderr}");
    let snapshot = Path::new(stdout.trim_end());
    assert!(snapshot.ends_with(format!("hub/models--o--m/snapshots/{COMMIT}")), "{stdout}");
    assert_eq!(std::fs::read(snapshot.join("sub/w.safetensors")).unwrap(), bytes);
    assert_eq!(std::fs::read(snapshot.join("config.json")).unwrap(), b"{}");
    assert!(!snapshot.join("README.md").exists() && !snapshot.join(".gitattributes").exists());
    let ranges = hub.requests("w.safetensors");
    assert!(ranges.len() == 2 && ranges[0].is_empty() && ranges[1].starts_with("bytes="), "{ranges:?}");
    // What is there is not downloaded again.
    assert_eq!(nextflow(home.path(), &hub, &["models", "pull", "o/m"]).0, 0);
    assert_eq!(hub.requests("w.safetensors").len(), 2);

    let (code, stdout, _) = nextflow(home.path(), &hub, &["models", "list"]);
    assert!(code == 0 && stdout.contains("o/m · 1.2 MB · 0123456"), "{stdout}");
    let (code, stdout, _) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
    assert!(code == 0 && stdout.contains("1 files sound, 1 without a hash"), "{stdout}");
    let blob = home.path().join("hub/models--o--m/blobs").join(&hash);
    let mut changed = bytes.clone();
    changed[5000] ^= 1;
    std::fs::write(&blob, changed).unwrap();
    let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
    assert!(code == 3 && stderr.contains(&hash) && stderr.contains("hint: nextflow models rm o/m"), "{stderr}");
    let (code, stdout, _) = nextflow(home.path(), &hub, &["models", "rm", "o/m"]);
    assert!(code == 0 && stdout.contains("removed o/m, 1.2 MB freed"), "{stdout}");
    assert_eq!(nextflow(home.path(), &hub, &["models", "rm", "o/m"]).0, 3);
    assert_eq!(nextflow(home.path(), &hub, &["models", "verify", "o/m"]).0, 3);
}

/// A limit on the size of files stands for a disk that is full.
#[cfg(unix)]
/// The hub sends on within its host, and to another for large files, which is not told who asks.
#[test]
fn the_token_stays_with_its_host() {
    let home = tempfile::tempdir().unwrap();
    let bytes = weights();
    let other = Hub::serve(HashMap::from([("/blob".to_string(), ok(bytes.clone()))]));
    let to = |status, place: &str| Answer { status, ..ok(place) };
    let name = "model.safetensors";
    let hub = Hub::serve(HashMap::from([
        ("/api/models/o/m/revision/main?blobs=true".into(), ok(listing(COMMIT, name, &hex(&bytes), bytes.len()))),
        (format!("/o/m/resolve/{COMMIT}/config.json"), to(307, "/cached/config.json")),
        ("/cached/config.json".into(), ok("{}")),
        (
            format!("/o/m/resolve/{COMMIT}/{name}"),
            to(302, &format!("{}/blob", other.endpoint.replace("127.0.0.1", "localhost"))),
        ),
    ]));
    let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "pull", "o/m"]);
    assert_eq!(code, 0, "{stderr}");
    let known = |hub: &Hub, path: &str| hub.log.lock().unwrap().iter().find(|r| r.0 == path).map(|r| r.2);
    assert_eq!((known(&hub, "/cached/config.json"), known(&other, "/blob")), (Some(true), Some(false)));
}

#[test]
fn a_full_disk_keeps_what_is_there() {
    let (home, bytes) = (tempfile::tempdir().unwrap(), weights());
    let list = listing(COMMIT, "w.safetensors", &hex(&bytes), bytes.len());
    let hub = model(list, "w.safetensors", ok(bytes.clone()));
    let pull = command(home.path(), &hub, &["models", "pull", "o/m"]);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$0\" \"$@\""])
        .arg(pull.get_program())
        .args(pull.get_args());
    for (key, value) in pull.get_envs() {
        match value {
            Some(value) => limited.env(key, value),
            None => limited.env_remove(key),
        };
    }
    let output = limited.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(".incomplete: ") && stderr.contains("hint: nextflow models rm"), "{stderr}");
    // With room again it goes on from there.
    let (code, stdout, stderr) = nextflow(home.path(), &hub, &["models", "pull", "o/m"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(std::fs::read(Path::new(stdout.trim_end()).join("w.safetensors")).unwrap(), bytes);
    assert!(hub.requests("w.safetensors")[1].starts_with("bytes="), "{:?}", hub.requests("w.safetensors"));
}

#[test]
fn wrong_bytes_are_deleted() {
    let (home, bytes) = (tempfile::tempdir().unwrap(), weights());
    let mut wrong = bytes.clone();
    wrong[77] ^= 1;
    for (sent, part) in [(wrong, "SHA-256"), ([&bytes[..], b"x"].concat(), "bytes, not")] {
        let list = listing(COMMIT, "w.pt", &hex(&bytes), bytes.len());
        let hub = model(list, "w.pt", ok(sent));
        let (code, stdout, stderr) = nextflow(home.path(), &hub, &["models", "pull", "-q", "o/m"]);
        assert!(code == 3 && stdout.is_empty() && stderr.contains(part) && stderr.contains("hint: "), "{stderr}");
        let blobs = std::fs::read_dir(home.path().join("hub/models--o--m/blobs")).unwrap();
        let names: Vec<String> = blobs.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert!(names.iter().all(|n| n.ends_with(".lock") || n.len() == 40), "{names:?}");
    }
}

#[test]
fn hostile_answers_touch_nothing() {
    let bytes = b"evil".to_vec();
    let hash = hex(&bytes);
    let up = "../".repeat(12);
    let cases = [
        (listing(&format!("{up}tmp/x"), "w.pt", &hash, 4), "is not hexadecimal"),
        (listing(&COMMIT.to_uppercase(), "w.pt", &hash, 4), "is not hexadecimal"),
        (listing(COMMIT, "w.pt", &format!("{up}tmp/x"), 4), "is not hexadecimal"),
        (listing(COMMIT, "../w.pt", &hash, 4), "is not plain"),
        (listing(COMMIT, "a/../../w.pt", &hash, 4), "is not plain"),
        (listing(COMMIT, "/tmp/w.pt", &hash, 4), "is not plain"),
        (listing(COMMIT, r"..\w.pt", &hash, 4), "is not plain"),
        ("{".to_string(), "a wrong answer"),
        ("[]".to_string(), "a wrong answer"),
    ];
    for (list, part) in cases {
        let home = tempfile::tempdir().unwrap();
        let hub = model(list.clone(), "w.pt", ok(bytes.clone()));
        let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "pull", "o/m"]);
        assert!(code == 3 && stderr.contains(part), "{list}: {stderr}");
        assert!(!stderr.contains('\x1b'));
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "{list} left something");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let path = "/api/models/o/m/revision/main?blobs=true".to_string();
    for (status, part, hint) in [
        (401, "who asks", "HF_TOKEN"),
        (403, "who asks", "HF_TOKEN"),
        (404, "no such model", "/o"),
        (500, "answered 500", "again"),
    ] {
        let hub = Hub::serve(HashMap::from([(path.clone(), Answer { status, ..ok("") })]));
        let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "pull", "o/m"]);
        let lines: Vec<&str> = stderr.lines().collect();
        assert!(code == 3 && lines.len() == 2 && lines[0].contains(part) && lines[1].contains(hint), "{stderr}");
    }
    let nobody = Hub { endpoint: "http://127.0.0.1:9".into(), log: Arc::default() };
    let (code, _, stderr) = nextflow(home.path(), &nobody, &["models", "pull", "o/m"]);
    assert!(code == 1 && stderr.contains("cannot be reached") && stderr.contains("hint: "), "{stderr}");
    assert_eq!(nextflow(home.path(), &nobody, &["models", "pull", "../m"]).0, 2);
}

#[test]
fn processes_share_one_download() {
    let (home, bytes) = (tempfile::tempdir().unwrap(), weights());
    let hub = model(listing(COMMIT, "w.pt", &hex(&bytes), bytes.len()), "w.pt", ok(bytes));
    let pull = || command(home.path(), &hub, &["models", "pull", "-q", "o/m"]).spawn().unwrap();
    for mut child in std::array::from_fn::<_, 8, _>(|_| pull()) {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(hub.requests("w.pt").len(), 1);
}

/// A model whose files are `files`, all without a stated SHA-256.
fn small(id: &str, files: &[(&str, Vec<u8>)]) -> HashMap<String, Answer> {
    let sibling = |(i, (name, body)): (usize, &(&str, Vec<u8>))| serde_json::json!({ "rfilename": name, "size": body.len(), "blobId": format!("{i:040x}") });
    let siblings: Vec<_> = files.iter().enumerate().map(sibling).collect();
    let list = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
    let mut answers = HashMap::from([(format!("/api/models/{id}/revision/main?blobs=true"), ok(list))]);
    answers.extend(files.iter().map(|(name, body)| (format!("/{id}/resolve/{COMMIT}/{name}"), ok(body.clone()))));
    answers
}

#[cfg(feature = "nano")]
#[test]
fn gen_draws_with_a_model_of_the_hub_and_offline_with_the_cache_alone() {
    let home = tempfile::tempdir().unwrap();
    let read = |name| (name, std::fs::read(Path::new("assets/nano").join(name)).unwrap());
    let names = ["config.json", "tokenizer.json", "model.safetensors", "image_tokenizer.safetensors"];
    let hub = Hub::serve(small("o/m", &names.map(read)));
    let draw = |more: &[&str]| {
        let args = [&["gen", "-p", "a red apple", "--seed", "3", "-q", "-o", "-"], more].concat();
        let Output { status, stdout, stderr } = command(home.path(), &hub, &args).output().unwrap();
        (status.code().unwrap(), stdout, String::from_utf8(stderr).unwrap())
    };
    let (code, _, stderr) = draw(&["--model", "o/m", "--offline"]);
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("o/m is not in the cache") && stderr.contains("models pull o/m"), "{stderr}");
    assert!(hub.requests("").is_empty());

    let (code, built_in, _) = draw(&[]);
    assert_eq!(code, 0);
    let (code, drawn, stderr) = draw(&["--model", "o/m"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(drawn == built_in);
    let requests = hub.requests("").len();
    assert!(draw(&["--model", "o/m", "--offline"]).1 == built_in);
    assert_eq!(hub.requests("").len(), requests);
    // Flags that are wrong cost no download.
    assert_eq!(draw(&["--model", "o/other", "--top-k", "0"]).0, 2);
    assert_eq!(hub.requests("").len(), requests);
}

#[test]
fn tokenflow_t2i_brings_the_image_tokenizer_that_is_published_apart() {
    let home = tempfile::tempdir().unwrap();
    let config = br#"{"architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 64769}"#.to_vec();
    let (file, other) = ("tokenflow_clipb_32k_enhanced.pt", b"not needed".to_vec());
    let mut answers = small("o/t2i", &[("config.json", config)]);
    answers
        .extend(small("ByteVisionLab/TokenFlow", &[(file, b"weights".to_vec()), ("tokenflow_siglip_32k.pt", other)]));
    let hub = Hub::serve(answers);
    let (code, _, stderr) = nextflow(home.path(), &hub, &["gen", "-p", "x", "--model", "o/t2i", "-o", "x.png"]);
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("model.safetensors is missing"), "{stderr}");
    let snapshot = home.path().join(format!("hub/models--o--t2i/snapshots/{COMMIT}"));
    assert_eq!(std::fs::read(snapshot.join(file)).unwrap(), b"weights");
    assert!(hub.requests("siglip").is_empty());
}
