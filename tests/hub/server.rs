//! Servers that are busy, slow, wrong or in the way.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::fake::*;

/// A proper model whose list or weights are answered by these first.
fn after(path: String, first: impl IntoIterator<Item = Answer>) -> Hub {
    let mut answers = model("o/m", &usual());
    let last = answers.remove(&path).unwrap();
    answers.insert(path, first.into_iter().chain(last).collect());
    Hub::serve(answers)
}

fn weights_path() -> String {
    file_path("o/m", "model.safetensors")
}

#[test]
fn a_busy_hub_is_asked_again() {
    let past = httpdate::fmt_http_date(std::time::SystemTime::now() - Duration::from_secs(60));
    let soon = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(3));
    for (path, busy, said) in [
        (list_path("o/m"), status(429, &[("retry-after", "1")]), "answered 429; waiting 1.0 s, then attempt 2 of 5"),
        (list_path("o/m"), status(429, &[("ratelimit", "\"api\";r=0;t=1")]), "answered 429; waiting 1.0 s"),
        (list_path("o/m"), status(503, &[("Retry-After", &past)]), "answered 503; waiting 0.0 s"),
        (weights_path(), status(503, &[]), "answered 503; waiting 0.5 s"),
        (weights_path(), status(500, &[("Retry-After", &soon)]), "answered 500; waiting "),
        (weights_path(), status(502, &[("Retry-After", "0")]), "answered 502; waiting 0.0 s"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let hub = after(path.clone(), [busy.clone(), busy]);
        let stderr = pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
        assert!(stderr.contains(said), "{said}: {stderr}");
        assert_eq!(hub.requests(&path).len(), 3);
    }
}

#[test]
fn a_hub_that_stays_busy_is_left_alone() {
    let home = tempfile::tempdir().unwrap();
    for (path, answer, requests, said) in [
        (list_path("o/m"), status(429, &[("Retry-After", "0")]), 5, "it answered 429, 5 times in a row"),
        (weights_path(), status(504, &[("Retry-After", "0")]), 5, "answered 504, 5 times in a row"),
        (list_path("o/m"), status(429, &[("Retry-After", "7200")]), 1, "asks to retry in 7200 s"),
        (list_path("o/m"), status(503, &[("Retry-After", "18446744073709551615")]), 1, "asks to retry"),
    ] {
        let mut answers = model("o/m", &usual());
        answers.insert(path.clone(), VecDeque::from([answer]));
        let hub = Hub::serve(answers);
        let (code, stdout, stderr) = pull(home.path(), &hub);
        assert!(code == 1 && stdout.is_empty() && stderr.contains(said) && stderr.contains("hint: "), "{stderr}");
        assert_eq!(hub.requests(&path).len(), requests, "{stderr}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    for (code, headers, part, hint) in [
        (401, &[("X-Error-Code", "RepoNotFound")][..], "no such model, or the account of this token", "the name at "),
        (404, &[("x-error-code", "RepoNotFound")], "no such model", "the name at "),
        (401, &[], "no such model", "HF_TOKEN"),
        (404, &[], "no such model", "/o"),
        (
            401,
            &[("x-error-message", "Invalid credentials in Authorization header")],
            "does not know this token",
            "hf auth login",
        ),
        (403, &[("X-Error-Code", "GatedRepo")], "has no access", "accept the terms at "),
        (401, &[("X-Error-Code", "GatedRepo")], "terms to be accepted", "accept the terms at "),
        (404, &[("X-Error-Code", "RevisionNotFound")], "no revision main", "nextflow models pull o/m"),
        (403, &[("X-Error-Message", "blocked by policy")], "forbids it: blocked by policy", "look at "),
        (451, &[], "answered 451", "again"),
    ] {
        let hub = Hub::serve(answers([(list_path("o/m"), status(code, headers))]));
        let (code, _, stderr) = pull(home.path(), &hub);
        let lines: Vec<&str> = stderr.lines().collect();
        assert!(code == 3 && lines.len() == 3, "{stderr}");
        assert!(lines[1].contains(part) && lines[2].starts_with("hint: ") && lines[2].contains(hint), "{stderr}");
    }
    // Without a token the hint is another.
    let hub = Hub::serve(answers([(list_path("o/m"), status(401, &[("X-Error-Code", "GatedRepo")]))]));
    let (_, _, stderr) = run(command(home.path(), &hub, &["models", "pull", "o/m"]).env("HF_TOKEN", ""));
    assert!(stderr.contains("the model is gated: ") && stderr.contains("then HF_TOKEN=... nextflow"), "{stderr}");
    let hub = after(weights_path(), [status(404, &[("X-Error-Code", "EntryNotFound")])]);
    let (code, _, stderr) = pull(home.path(), &hub);
    assert!(code == 3 && stderr.contains("no file model.safetensors in it"), "{stderr}");

    let mut nobody = Hub::serve(Answers::new());
    nobody.endpoint = "http://127.0.0.1:9".into();
    let (code, _, stderr) = pull(home.path(), &nobody);
    assert!(code == 1 && stderr.contains("http://127.0.0.1:9 cannot be reached: ") && stderr.contains("hint: "));
    assert_eq!(nextflow(home.path(), &nobody, &["models", "pull", "../m"]).0, 2);
}

#[test]
fn a_list_may_not_take_for_ever() {
    let home = tempfile::tempdir().unwrap();
    let slow = Answer { trickle: Some(Duration::from_millis(50)), ..ok(vec![b' '; 10_000]) };
    let silent = Answer { stall: Some(0), ..ok("{}") };
    for answer in [slow, silent] {
        let hub = Hub::serve(answers([(list_path("o/m"), answer)]));
        let start = Instant::now();
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        let (code, _, stderr) = run(command.env("HF_HUB_ETAG_TIMEOUT", "1"));
        assert!(code == 1 && stderr.contains("took longer than 1 s"), "{stderr}");
        assert!(stderr.contains("asking http://127.0.0.1") && stderr.contains("hint: HF_HUB_ETAG_TIMEOUT"), "{stderr}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn a_list_may_not_be_of_any_length() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(answers([(list_path("o/m"), ok(vec![b' '; 33 << 20]))]));
    let (code, _, stderr) = pull(home.path(), &hub);
    assert!(code == 3 && stderr.contains("has more than 32 MB"), "{stderr}");
    let many: Vec<_> = (0..50_001).map(|i| serde_json::json!({ "rfilename": format!("{i}.json") })).collect();
    let hub = Hub::serve(answers([(list_path("o/m"), listing(&many))]));
    let (code, _, stderr) = pull(home.path(), &hub);
    assert!(code == 3 && stderr.contains("50001 files are more than"), "{stderr}");
}

#[test]
fn a_stalled_file_is_taken_up_again() {
    let bytes = weights();
    let stalled = Answer { stall: Some(500_000), ..ok(bytes.clone()) };
    // Some bytes a second are no download either.
    let trickle = Answer { trickle: Some(Duration::from_millis(20)), ..ok(bytes) };
    for answer in [stalled, trickle] {
        let home = tempfile::tempdir().unwrap();
        let hub = after(weights_path(), [answer]);
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        let stderr = pulled(command.env("HF_HUB_DOWNLOAD_TIMEOUT", "1"));
        assert!(stderr.contains("then attempt 2 of 5"), "{stderr}");
        assert!(hub.ranges("model.safetensors")[1].starts_with("bytes="), "{stderr}");
    }
}

#[test]
fn waits_are_announced() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(answers([(list_path("o/m"), Answer { stall: Some(0), ..ok("{}") })]));
    let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
    let (_, _, stderr) = run(command.env("HF_HUB_ETAG_TIMEOUT", "4"));
    assert!(stderr.contains("waiting for the list of files of o/m from http://127.0.0.1"), "{stderr}");
}

#[test]
fn redirects_end() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(answers([(list_path("o/m"), to(302, &list_path("o/m")))]));
    let (code, _, stderr) = pull(home.path(), &hub);
    assert!(code == 3 && stderr.contains("redirects more than 10 times"), "{stderr}");
    assert_eq!(hub.requests("/api").len(), 11);
    for place in ["file:///etc/passwd", "", "gopher://x"] {
        let hub = Hub::serve(answers([(list_path("o/m"), to(302, place))]));
        let (code, _, stderr) = pull(home.path(), &hub);
        assert!(code == 3 && stderr.contains("error: "), "{stderr}");
    }
}

#[test]
fn a_login_page_is_no_list_and_no_file() {
    let page = "\n<!DOCTYPE html><html><body>Please sign in</body></html>".repeat(30_000);
    for path in [list_path("o/m"), weights_path()] {
        let home = tempfile::tempdir().unwrap();
        let hub = after(path, [ok(page.clone()).with("content-type", "text/html")]);
        let (code, _, stderr) = pull(home.path(), &hub);
        assert!(code == 3 && stderr.contains("answered with a web page in place of"), "{stderr}");
        // It spoils nothing.
        pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
    }
}

#[test]
fn every_way_to_go_on_wrongly_ends_well() {
    let bytes = weights();
    let cut = Answer { cut: Some(700_001), ..ok(bytes.clone()) };
    let wrong_place = status(206, &[("content-range", "bytes 0-1199999/1200000")]);
    let other_bytes = Answer { status: 206, body: vec![7; 1_200_000 - 700_001], ..Answer::default() };
    let cases: [(&str, Vec<Answer>); 6] = [
        ("ranges are ignored", vec![cut.clone(), Answer { no_ranges: true, ..ok(bytes.clone()) }]),
        ("416", vec![cut.clone(), status(416, &[])]),
        ("a range from elsewhere", vec![cut.clone(), Answer { body: bytes.clone(), ..wrong_place }]),
        ("a range of other bytes", vec![cut.clone(), other_bytes]),
        ("cut before the first byte", vec![Answer { cut: Some(0), ..ok(bytes.clone()) }; 3]),
        ("a head without an end", vec![Answer { status: 999, ..Answer::default() }]),
    ];
    for (what, first) in cases {
        let home = tempfile::tempdir().unwrap();
        let hub = after(weights_path(), first);
        let (code, stdout, stderr) = pull(home.path(), &hub);
        if what == "a head without an end" {
            assert_eq!(code, 3, "{stderr}");
            continue;
        }
        assert_eq!(code, 0, "{what}: {stderr}");
        assert_eq!(std::fs::read(std::path::Path::new(stdout.trim_end()).join("model.safetensors")).unwrap(), bytes);
    }
}

#[test]
fn what_was_left_of_another_file_is_no_beginning() {
    let bytes = weights();
    for left in [vec![9; 1000], vec![9; 1_200_000], vec![9; 1_300_000]] {
        let home = tempfile::tempdir().unwrap();
        let blobs = home.path().join("hub/models--o--m/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{}.incomplete", sha256(&bytes))), left).unwrap();
        let hub = Hub::serve(model("o/m", &usual()));
        pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
        assert_eq!(std::fs::read_dir(&blobs).unwrap().count(), 2);
    }
}

/// Company proxies compress what nobody asked them to compress.
#[test]
fn what_comes_compressed_is_read() {
    let gzip = |bytes: &[u8]| {
        use std::process::{Command, Stdio};
        let mut child =
            Command::new("gzip").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("gzip");
        let mut stdin = child.stdin.take().unwrap();
        let bytes = bytes.to_vec();
        std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &bytes));
        child.wait_with_output().unwrap().stdout
    };
    let home = tempfile::tempdir().unwrap();
    let mut answers = model("o/m", &usual());
    for answer in answers.values_mut() {
        let body = gzip(&answer[0].body);
        answer[0] = Answer { no_ranges: true, ..ok(body).with("content-encoding", "gzip") };
    }
    pulled(&mut command(home.path(), &Hub::serve(answers), &["models", "pull", "o/m"]));
}

#[test]
fn mirrors_state_sizes_and_hashes_where_they_like() {
    let bytes = weights();
    let bare: Vec<_> = usual().iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
    let cdn = Hub::serve(answers([("/blob".to_string(), ok(bytes.clone()).with("etag", "\"an-md5-of-a-cdn\""))]));
    let quoted = |hash: String| format!("\"{hash}\"");
    let cases: [(&str, Answer); 5] = [
        ("only a length", ok(bytes.clone())),
        ("a weak ETag", ok(bytes.clone()).with("ETag", format!("W/\"{}\"", sha256(&bytes)))),
        ("an ETag of git", ok(bytes.clone()).with("etag", quoted(git_hash(&bytes)))),
        (
            "a redirect with what the hub says, as of Xet",
            to(302, &format!("{}/blob", cdn.endpoint))
                .with("x-linked-etag", quoted(sha256(&bytes)))
                .with("x-linked-size", bytes.len())
                .with("x-xet-hash", "f".repeat(64))
                .with("etag", quoted("0".repeat(32))),
        ),
        ("an ETag that is no hash", ok(bytes.clone()).with("etag", "\"5f3e-61\"")),
    ];
    for (what, answer) in cases {
        let home = tempfile::tempdir().unwrap();
        let mut answers = model("o/m", &usual());
        answers.insert(list_path("o/m"), VecDeque::from([listing(&bare)]));
        answers.insert(weights_path(), VecDeque::from([answer]));
        let hub = Hub::serve(answers);
        let stderr = pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
        let unchecked = stderr.contains("model.safetensors: the mirror states no hash, so only its size was checked");
        assert_eq!(unchecked, matches!(what, "only a length" | "an ETag that is no hash"), "{what}: {stderr}");
        let before = hub.ranges("model.safetensors").len();
        let (code, stdout, _) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
        assert!(code == 0 && stdout.contains("2 files sound"), "{what}: {stdout}");
        pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
        assert!(hub.ranges("model.safetensors").len() <= before + 1, "{what}: downloaded twice");
    }

    // Wrong bytes are found by a hash from there, too; what states no length cannot be checked at
    // all.
    let wrong = ok(vec![1; bytes.len()]).with("x-linked-etag", sha256(&bytes));
    let endless = Answer { chunked: true, ..ok(bytes.clone()) };
    for (answer, said) in
        [(wrong, "not those of its SHA-256"), (endless, "the mirror gives no length of model.safetensors")]
    {
        let home = tempfile::tempdir().unwrap();
        let mut answers = model("o/m", &usual());
        answers.insert(list_path("o/m"), VecDeque::from([listing(&bare)]));
        answers.insert(weights_path(), VecDeque::from([answer]));
        let (code, _, stderr) = pull(home.path(), &Hub::serve(answers));
        assert!(code == 3 && stderr.contains(said), "{stderr}");
    }
}

#[test]
fn a_length_in_the_list_is_enough_for_chunks() {
    let home = tempfile::tempdir().unwrap();
    let hub = after(weights_path(), [Answer { chunked: true, ..ok(weights()) }]);
    pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
}

#[test]
fn hostile_answers_touch_nothing() {
    let entry = |name: &str| sibling(name, b"evil");
    let with = |key: &str, value: serde_json::Value| {
        let mut entry = entry("model.safetensors");
        entry["lfs"][key] = value;
        listing(&[entry])
    };
    let commit = |sha: &str| ok(serde_json::json!({ "sha": sha, "siblings": [entry("model.pt")] }).to_string());
    let up = "../".repeat(12);
    let cases = [
        (commit(&format!("{up}tmp/x")), "is not hexadecimal"),
        (commit(&COMMIT.to_uppercase()), "is not hexadecimal"),
        (with("sha256", format!("{up}tmp/x").into()), "is not hexadecimal"),
        (with("sha256", "é".repeat(32).into()), "is not hexadecimal"),
        (with("size", u64::MAX.into()), "no file is that long"),
        (with("size", (u64::MAX - 1).into()), "no file is that long"),
        (with("size", (1u64 << 63).into()), "no file is that long"),
        (with("size", (-1).into()), "a wrong answer"),
        (with("size", 1e300.into()), "a wrong answer"),
        (listing(&[entry("../model.pt")]), "is not plain"),
        (listing(&[entry("a/../../model.pt")]), "is not plain"),
        (listing(&[entry("/tmp/model.pt")]), "is not plain"),
        (listing(&[entry(r"..\model.pt")]), "is not plain"),
        (listing(&[entry("model.pt"), entry("model.pt")]), "is there twice"),
        (listing(&[entry("a/model.pt"), entry("a//model.pt")]), "is there twice"),
        (ok("{"), "a wrong answer"),
        (ok("[]"), "a wrong answer"),
        (ok("[".repeat(100_000)), "a wrong answer"),
    ];
    for (list, part) in cases {
        let home = tempfile::tempdir().unwrap();
        let hub = Hub::serve(answers([(list_path("o/m"), list.clone())]));
        let (code, _, stderr) = pull(home.path(), &hub);
        let list = String::from_utf8_lossy(&list.body[..list.body.len().min(300)]).into_owned();
        assert!(code == 3 && stderr.contains(part), "{list}: {stderr}");
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "{list} left something");
    }
}
