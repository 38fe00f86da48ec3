//! The cache: whose layout it has, what may be planted in it, and file systems without locks or
//! links.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::fake::*;

fn blobs(home: &Path) -> PathBuf {
    home.join("hub/models--o--m/blobs")
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The official crate finds what `models pull` wrote, and `--offline` what it would have written.
#[test]
fn the_official_crate_and_this_program_find_each_others_files() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(model("o/m", &usual()));
    for model in ["o/m", "o/m@refs/pr/1"] {
        hub.add(
            [(
                "/api/models/o/m/revision/refs%2Fpr%2F1?blobs=true".into(),
                [listing(&[sibling("model.safetensors", &weights()), sibling("config.json", b"{}")])].into(),
            )]
            .into(),
        );
        pulled(&mut command(home.path(), &hub, &["models", "pull", model]));
    }
    let cache = hf_hub::Cache::new(home.path().join("hub"));
    let found = cache.model("o/m".into()).get("model.safetensors").expect("the official crate finds it");
    assert_eq!(fs::read(found).unwrap(), weights());
    let pr = hf_hub::Repo::with_revision("o/m".into(), hf_hub::RepoType::Model, "refs/pr/1".into());
    assert!(cache.repo(pr).get("config.json").is_some());
    assert_eq!(
        fs::read_link(home.path().join(format!("hub/models--o--m/snapshots/{COMMIT}/config.json"))).unwrap(),
        Path::new("../../blobs").join(git_hash(b"{}"))
    );

    let other = hf_hub::Cache::new(home.path().join("other/hub")).model("p/q".into());
    let snapshot = other.pointer_path(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    fs::write(snapshot.join("model.safetensors"), [0; 100]).unwrap();
    other.create_ref(COMMIT).unwrap();
    let args = ["gen", "-p", "x", "--offline", "--model", "p/q", "-o", "x.png"];
    let (code, _, stderr) = nextflow(&home.path().join("other"), &hub, &args);
    assert!(code == 3 && stderr.contains(COMMIT) && !stderr.contains("is not in the cache"), "{stderr}");
    let (code, stdout, _) = nextflow(&home.path().join("other"), &hub, &["models", "list"]);
    assert!(code == 0 && stdout.contains("p/q · 102 B · 0123456"), "{stdout}");
}

#[test]
fn folders_are_named_as_the_hubs_own_tools_name_them() {
    let hub = Hub::serve(model("o/m", &usual()));
    for (variables, place) in [
        (&[("HF_HOME", "~/h")][..], "h/hub"),
        (&[("HF_HOME", "$WHERE/h")], "deep/h/hub"),
        (&[("HF_HUB_CACHE", "~/c"), ("HF_HOME", "/nowhere")], "c"),
        (&[("HUGGINGFACE_HUB_CACHE", "${WHERE}/c"), ("HF_HOME", "/nowhere")], "deep/c"),
        (&[("HF_HOME", ""), ("XDG_CACHE_HOME", "~/x")], "x/huggingface/hub"),
        (&[("HF_HOME", "")], ".cache/huggingface/hub"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        command.env("HOME", home.path()).env("WHERE", home.path().join("deep")).current_dir(home.path());
        pulled(command.envs(variables.iter().copied()));
        assert!(home.path().join(place).join("models--o--m/refs/main").is_file(), "{place}");
        assert!(!home.path().join("~").exists());
    }
    let home = tempfile::tempdir().unwrap();
    let (code, _, stderr) = run(command(home.path(), &hub, &["models", "list"]).env("HF_HOME", "~nobody/x"));
    assert!(code == 2 && stderr.contains("HF_HOME=~nobody/x"), "{stderr}");
}

/// Another process holds the lock that the hub's own tools would hold.
#[cfg(unix)]
#[test]
fn a_lock_of_the_hubs_own_tools_is_waited_for() {
    use std::io::{BufRead, BufReader};
    let (home, hub) = (tempfile::tempdir().unwrap(), Hub::serve(model("o/m", &usual())));
    let locks = home.path().join("hub/.locks/models--o--m");
    fs::create_dir_all(&locks).unwrap();
    let path = locks.join(format!("{}.lock", sha256(&weights())));
    let lock = fs::File::create(&path).unwrap();
    lock.lock().unwrap();
    let mut child = command(home.path(), &hub, &["models", "pull", "o/m"])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.find(|l| l.contains("waiting for another process")).expect("the wait is announced");
    assert!(line.contains("model.safetensors") && line.contains(".lock"), "{line}");
    // The tools remove the file: then a lock on it is worth nothing, and the next one is.
    fs::remove_file(&path).unwrap();
    drop(lock);
    assert!(child.wait().unwrap().success());
    assert!(names(&blobs(home.path())).iter().all(|n| !n.ends_with(".lock")));

    // Ctrl-C ends a wait.
    fs::remove_dir_all(home.path().join("hub/models--o--m")).unwrap();
    let lock = fs::File::create(&path).unwrap();
    lock.lock().unwrap();
    let mut child = command(home.path(), &hub, &["models", "pull", "o/m"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    lines.find(|l| l.contains("waiting for another process")).expect("the wait is announced");
    let start = Instant::now();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn processes_share_one_download() {
    let (home, hub) = (tempfile::tempdir().unwrap(), Hub::serve(model("o/m", &usual())));
    let pull = || {
        let mut command = command(home.path(), &hub, &["models", "pull", "-q", "o/m"]);
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    for mut child in std::array::from_fn::<_, 8, _>(|_| pull()) {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(hub.requests("model.safetensors").len(), 1);
}

#[cfg(unix)]
#[test]
fn planted_links_are_not_followed() {
    use std::os::unix::fs::symlink;
    let (home, hub) = (tempfile::tempdir().unwrap(), Hub::serve(model("o/m", &usual())));
    let outside = home.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let victim = outside.join("victim");
    fs::write(&victim, "mine").unwrap();
    let locks = home.path().join("hub/.locks/models--o--m");
    let snapshot = home.path().join(format!("hub/models--o--m/snapshots/{COMMIT}"));
    for folder in [&locks, &blobs(home.path()), &snapshot] {
        fs::create_dir_all(folder).unwrap();
    }
    for (hash, target) in [(sha256(&weights()), &victim), (git_hash(b"{}"), &outside.join("new"))] {
        symlink(target, locks.join(format!("{hash}.lock"))).unwrap();
        symlink(target, blobs(home.path()).join(format!("{hash}.incomplete"))).unwrap();
    }
    symlink(&victim, snapshot.join("config.json")).unwrap();
    pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
    assert_eq!((fs::read(&victim).unwrap(), names(&outside)), (b"mine".to_vec(), vec!["victim".to_string()]));

    // A folder of the repository that was made a way out.
    symlink(&outside, snapshot.join("sub")).unwrap();
    let hub = Hub::serve(model("o/m", &[("sub/w.safetensors", weights())]));
    let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "pull", "o/m", "sub/w.safetensors"]);
    assert_eq!((code, names(&outside)), (0, vec!["victim".to_string()]), "{stderr}");
}

/// Lets system calls fail in a child, as file systems do that lack them.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn without<'a>(calls: &[libc::c_long], errno: i32, command: &'a mut Command) -> &'a mut Command {
    use std::os::unix::process::CommandExt;
    let statement = |code: u32, k: u32, jt: usize| libc::sock_filter { code: code as u16, jt: jt as u8, jf: 0, k };
    // Loads the number of the call; each that is named leads to the error at the end.
    let mut filter = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    let named = calls.iter().enumerate();
    filter
        .extend(named.map(|(i, &c)| statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, c as u32, calls.len() - i)));
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0));
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0));
    let install = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: plain system calls on memory that lives until they return.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
        };
        if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec it makes system calls and nothing else.
    unsafe { command.pre_exec(install) }
}

#[cfg(target_os = "linux")]
#[test]
fn file_systems_without_locks_are_used_without() {
    for errno in [libc::ENOSYS, libc::EPERM, libc::EOPNOTSUPP, libc::ENOLCK] {
        let (home, bytes) = (tempfile::tempdir().unwrap(), weights());
        let mut answers = model("o/m", &usual());
        let path = file_path("o/m", "model.safetensors");
        let cut = Answer { cut: Some(700_001), ..ok(bytes) };
        let refused = status(403, &[]);
        answers.insert(path, [cut, refused, answers[&file_path("o/m", "model.safetensors")][0].clone()].into());
        let hub = Hub::serve(answers);
        let pull = || command(home.path(), &hub, &["models", "pull", "o/m"]);
        let mut first = pull();
        let (code, _, stderr) = run(without(&[libc::SYS_flock], errno, &mut first));
        assert_eq!(code, 3, "{stderr}");
        // The next run goes on with what was left.
        let mut second = pull();
        pulled(without(&[libc::SYS_flock], errno, &mut second));
        assert!(hub.ranges("model.safetensors")[2].starts_with("bytes="), "{:?}", hub.ranges("model.safetensors"));
        assert_eq!(names(&blobs(home.path())).len(), 2);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn file_systems_without_links_get_the_files_themselves() {
    #[cfg(target_arch = "x86_64")]
    const LINKS: &[libc::c_long] = &[libc::SYS_symlink, libc::SYS_symlinkat];
    #[cfg(not(target_arch = "x86_64"))]
    const LINKS: &[libc::c_long] = &[libc::SYS_symlinkat];
    for errno in [libc::EPERM, libc::ENOSYS, libc::EOPNOTSUPP] {
        let (home, hub) = (tempfile::tempdir().unwrap(), Hub::serve(model("o/m", &usual())));
        let pull = || command(home.path(), &hub, &["models", "pull", "o/m"]);
        pulled(without(LINKS, errno, &mut pull()));
        let snapshot = home.path().join(format!("hub/models--o--m/snapshots/{COMMIT}"));
        assert!(fs::symlink_metadata(snapshot.join("model.safetensors")).unwrap().is_file());
        assert!(names(&blobs(home.path())).is_empty() && names(&snapshot).len() == 2);
        // Nothing is downloaded again.
        pulled(without(LINKS, errno, &mut pull()));
        assert_eq!(hub.requests("model.safetensors").len(), 1);
        let (_, stdout, _) = nextflow(home.path(), &hub, &["models", "list"]);
        assert!(stdout.contains("o/m · 1.2 MB"), "{stdout}");
        let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
        assert!(code == 1 && stderr.contains("nothing of o/m could be checked: 2 files"), "{stderr}");
    }
    // A blob that was there stays, and is copied.
    let (home, hub) = (tempfile::tempdir().unwrap(), Hub::serve(model("o/m", &usual())));
    fs::create_dir_all(blobs(home.path())).unwrap();
    let blob = blobs(home.path()).join(sha256(&weights()));
    fs::write(&blob, weights()).unwrap();
    pulled(without(LINKS, libc::EPERM, &mut command(home.path(), &hub, &["models", "pull", "o/m"])));
    assert!(blob.is_file() && hub.requests("model.safetensors").is_empty());
}

#[test]
fn small_files_are_checked() {
    let home = tempfile::tempdir().unwrap();
    let mut wrong = model("o/m", &usual());
    wrong.insert(file_path("o/m", "config.json"), [ok("[]")].into());
    let hub = Hub::serve(wrong);
    let (code, _, stderr) = pull(home.path(), &hub);
    assert!(code == 3 && stderr.contains("config.json of o/m came with bytes that are not those of its git hash"));
    assert!(names(&blobs(home.path())).is_empty(), "{stderr}");

    let hub = Hub::serve(model("o/m", &usual()));
    pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
    let (code, stdout, _) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
    assert!(code == 0 && stdout == "o/m: 2 files sound\n", "{stdout}");
    let config = blobs(home.path()).join(git_hash(b"{}"));
    fs::write(&config, "[]").unwrap();
    let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
    assert!(code == 3 && stderr.contains(&git_hash(b"{}")), "{stderr}");
    fs::remove_file(&config).unwrap();
    let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "verify", "o/m"]);
    assert!(code == 3 && stderr.contains("config.json"), "{stderr}");
    // An empty model is no sound one.
    fs::create_dir_all(home.path().join("hub/models--o--empty/snapshots")).unwrap();
    assert_eq!(nextflow(home.path(), &hub, &["models", "verify", "o/empty"]).0, 1);
}

/// A limit on the size of files stands for a disk that is full.
#[cfg(unix)]
#[test]
fn a_full_disk_keeps_what_is_there() {
    let (home, hub) = (tempfile::tempdir().unwrap(), Hub::serve(model("o/m", &usual())));
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
    let (code, _, stderr) = run(&mut limited);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains(".incomplete: ") && stderr.contains("hint: nextflow models rm"), "{stderr}");
    // With room again it goes on from there.
    pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
    assert!(hub.ranges("model.safetensors")[1].starts_with("bytes="), "{:?}", hub.ranges("model.safetensors"));
}
