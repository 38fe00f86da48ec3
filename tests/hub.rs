//! Models from a hub that is a few lines of [`fake`], and does everything that a hub should not do.
#![cfg(feature = "hub")]

#[path = "hub/choice.rs"]
mod choice;
#[path = "hub/disk.rs"]
mod disk;
#[path = "hub/fake.rs"]
mod fake;
#[path = "hub/network.rs"]
mod network;
#[path = "hub/server.rs"]
mod server;

use std::path::Path;
use std::process::Output;

use fake::*;

#[test]
fn a_cut_download_goes_on_and_the_cache_can_be_checked_and_emptied() {
    let (home, bytes) = (tempfile::tempdir().unwrap(), weights());
    let hash = sha256(&bytes);
    let files = [usual().as_slice(), &[("README.md", b"x".to_vec()), (".gitattributes", b"y".to_vec())]].concat();
    let mut answers = model("o/m", &files);
    let path = file_path("o/m", "model.safetensors");
    answers.get_mut(&path).unwrap().push_front(Answer { cut: Some(700_001), ..ok(bytes.clone()) });
    let hub = Hub::serve(answers);
    let (code, stdout, stderr) = pull(home.path(), &hub);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("o/m: 2 files, 1.2 MB"), "{stderr}");
    let snapshot = Path::new(stdout.trim_end());
    assert!(snapshot.ends_with(format!("hub/models--o--m/snapshots/{COMMIT}")), "{stdout}");
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), bytes);
    assert_eq!(std::fs::read(snapshot.join("config.json")).unwrap(), b"{}");
    assert!(!snapshot.join("README.md").exists() && !snapshot.join(".gitattributes").exists());
    let ranges = hub.ranges("model.safetensors");
    assert!(ranges.len() == 2 && ranges[0].is_empty() && ranges[1].starts_with("bytes="), "{ranges:?}");
    // What is there is not downloaded again.
    assert_eq!(pull(home.path(), &hub).0, 0);
    assert_eq!(hub.ranges("model.safetensors").len(), 2);

    let (code, stdout, _) = nextflow(home.path(), &hub, &["models", "list"]);
    assert!(code == 0 && stdout.contains("o/m · 1.2 MB · 0123456"), "{stdout}");
    let (code, stdout, _) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
    assert!(code == 0 && stdout.contains("2 files sound"), "{stdout}");
    let blob = home.path().join("hub/models--o--m/blobs").join(&hash);
    let mut changed = bytes.clone();
    changed[5000] ^= 1;
    std::fs::write(&blob, changed).unwrap();
    let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
    assert!(code == 3 && stderr.contains(&hash) && stderr.contains("hint: nextflow models rm o/m"), "{stderr}");
    let (code, stdout, _) = nextflow(home.path(), &hub, &["models", "rm", "o/m"]);
    assert!(code == 0 && stdout.contains("removed o/m, 1.2 MB freed"), "{stdout}");
    assert!(!home.path().join("hub/.locks/models--o--m").exists());
    assert_eq!(nextflow(home.path(), &hub, &["models", "rm", "o/m"]).0, 3);
    assert_eq!(nextflow(home.path(), &hub, &["models", "verify", "o/m"]).0, 3);
}

#[test]
fn wrong_bytes_are_deleted() {
    let (home, bytes) = (tempfile::tempdir().unwrap(), weights());
    let mut wrong = bytes.clone();
    wrong[77] ^= 1;
    for (sent, part) in [(wrong, "SHA-256"), ([&bytes[..], b"x"].concat(), "bytes, not")] {
        let mut answers = model("o/m", &usual());
        answers.insert(file_path("o/m", "model.safetensors"), [ok(sent)].into());
        let hub = Hub::serve(answers);
        let (code, stdout, stderr) = nextflow(home.path(), &hub, &["models", "pull", "-q", "o/m"]);
        assert!(code == 3 && stdout.is_empty() && stderr.contains(part) && stderr.contains("hint: "), "{stderr}");
        let blobs = std::fs::read_dir(home.path().join("hub/models--o--m/blobs")).unwrap();
        let names: Vec<String> = blobs.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(names, [git_hash(b"{}")]);
    }
}

#[cfg(feature = "nano")]
#[test]
fn gen_draws_with_a_model_of_the_hub_and_offline_with_the_cache_alone() {
    let home = tempfile::tempdir().unwrap();
    let read = |name| (name, std::fs::read(Path::new("assets/nano").join(name)).unwrap());
    let names = ["config.json", "tokenizer.json", "model.safetensors", "image_tokenizer.safetensors"];
    let hub = Hub::serve(model("o/m", &names.map(read)));
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
    assert!(draw(&["--model", "https://huggingface.co/o/m", "--offline"]).1 == built_in);
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
    let hub = Hub::serve(model("o/t2i", &[("config.json", config), ("model.safetensors", b"weights".to_vec())]));
    hub.add(model("ByteVisionLab/TokenFlow", &[(file, b"tokenizer".to_vec()), ("tokenflow_siglip_32k.pt", other)]));
    let (code, _, stderr) = nextflow(home.path(), &hub, &["gen", "-p", "x", "--model", "o/t2i", "-o", "x.png"]);
    assert!(matches!(code, 3 | 4), "those are no weights, or the machine is small: {stderr}");
    let snapshot = home.path().join(format!("hub/models--o--t2i/snapshots/{COMMIT}"));
    assert_eq!(std::fs::read(snapshot.join(file)).unwrap(), b"tokenizer");
    assert!(hub.requests("siglip").is_empty());
}
