//! What shows on a terminal: a pseudo-terminal, with a person's keys.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Long enough for a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);
const PROMPT: &str = "> ";

/// A conversation, and all that its terminal showed.
struct Terminal {
    keys: File,
    screen: Receiver<Vec<u8>>,
    shown: String,
    child: Child,
    _state: tempfile::TempDir,
}

impl Terminal {
    /// With the tiny model.
    fn open(args: &[&str]) -> Self {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/qwen/tiny");
        let args = [&["--temperature", "0", "--repetition-penalty", "1"], args].concat();
        Self::with(&args, &[("NEXTFLOW_MODEL", model.to_str().unwrap()), ("NO_COLOR", "1")])
    }

    fn with(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut terminal = Self::run(&[&["chat"], args].concat(), variables);
        terminal.see(PROMPT);
        terminal
    }

    /// With any command.
    fn run(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let state = tempfile::tempdir().unwrap();
        let (mut master, mut slave) = (0, 0);
        let size = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the pointers are to variables of the types that are asked for, or null where that
        // is allowed.
        #[allow(unsafe_code)]
        let opened =
            unsafe { libc::openpty(&mut master, &mut slave, std::ptr::null_mut(), std::ptr::null(), &raw const size) };
        assert_eq!(opened, 0, "no pseudo-terminal");
        // SAFETY: both were just opened, and belong to nobody else.
        #[allow(unsafe_code)]
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
        command.args(args).current_dir(state.path());
        // Nothing of the terminal in which the tests run.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("TERM", "xterm").env("XDG_STATE_HOME", state.path()).envs(variables.iter().copied());
        let end = || slave.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end());
        let terminal = slave.as_raw_fd();
        // SAFETY: all of these calls may be made between fork and exec.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(move || {
                // Under nohup it would be ignored.
                libc::signal(libc::SIGHUP, libc::SIG_DFL);
                libc::setsid();
                libc::ioctl(terminal, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let (mut reader, (send, screen)) = (master.try_clone().unwrap(), channel());
        std::thread::spawn(move || {
            let mut bytes = [0; 1 << 16];
            // A terminal that nobody is at any more is an error to read.
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                if send.send(bytes[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { keys: master, screen, shown: String::new(), child, _state: state }
    }

    /// Types something, and waits until something is shown after all that was shown before.
    fn type_and_see(&mut self, keys: &str, part: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.see(part);
    }

    /// Waits for `part`; what comes before it is taken as seen, and given.
    fn see(&mut self, part: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.shown.find(part) {
                return self.shown.drain(..at + part.len()).collect();
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.shown += &String::from_utf8_lossy(&bytes),
                Err(e) => panic!("{part:?} did not come ({e}), but {:?}", self.shown),
            }
        }
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the call reads a window size, which this is.
        #[allow(unsafe_code)]
        let set = unsafe { libc::ioctl(self.keys.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(set, 0);
    }

    fn leave(mut self) {
        self.keys.write_all(b"/exit\r").unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn lines_typed_ahead_are_said_one_by_one_and_pasted_ones_together() {
    let mut terminal = Terminal::open(&["--max-tokens", "3"]);
    terminal.type_and_see("one\rtwo \\\rand more\rthree\r", "three");
    terminal.see(PROMPT);
    terminal.type_and_see("\x1b[200~four\nfive\x1b[201~\r", "five");
    terminal.see(PROMPT);
    terminal.keys.write_all(b"/show\r").unwrap();
    for line in ["you: one", "model: ", "you: two", "you: and more", "model: ", "you: three", "you: four", "you: five"]
    {
        terminal.see(&format!("\n{line}"));
    }
    terminal.see(PROMPT);
    // The last message again, from the history.
    terminal.type_and_see("\x1b[A\x1b[A\r", "(cut at --max-tokens)");
    terminal.see(PROMPT);
    terminal.leave();
}

#[test]
fn an_interrupt_and_another_size_of_the_terminal_leave_the_conversation_as_it_is() {
    // This question has an answer of 3,772 words.
    let mut terminal = Terminal::open(&["--max-tokens", "4000"]);
    terminal.type_and_see("b\r", "\n");
    terminal.see("\u{fffd}");
    terminal.resize(5, 20);
    terminal.type_and_see("\x03", "(stopped)");
    terminal.see(PROMPT);
    // While typing it drops the line.
    terminal.resize(50, 150);
    terminal.type_and_see("never said\x03", PROMPT);
    terminal.type_and_see("a\r", PROMPT);
    terminal.type_and_see("/show\r", "you: b");
    let between = terminal.see("you: a");
    assert!(between.contains("model: ") && !between.contains("never said"), "{between}");
    terminal.see(PROMPT);
    terminal.leave();
}

#[test]
fn a_paste_of_a_megabyte_is_refused_in_a_sentence() {
    let mut terminal = Terminal::open(&["--max-tokens", "3"]);
    let paste = format!("\x1b[200~{}\x1b[201~\r", "x".repeat(1 << 20));
    terminal.type_and_see(&paste, "error: the message has 1048577 bytes, the limit is 65536");
    terminal.see("hint: ");
    terminal.see(PROMPT);
    terminal.type_and_see("Hello\r", "(cut at --max-tokens)");
    terminal.see(PROMPT);
    terminal.leave();
}

/// Nobody answers this terminal's questions: it is asked none.
#[cfg(feature = "nano")]
#[test]
fn an_image_shows_in_half_blocks_on_any_terminal() {
    let mut terminal = Terminal::with(&["--seed", "1"], &[]);
    terminal.type_and_see("/gen a red circle\r", "\u{2584}");
    terminal.see(PROMPT);
    terminal.leave();
}

/// A terminal that may know sixels is asked, and says so.
#[cfg(feature = "nano")]
#[test]
fn an_image_shows_in_sixels_where_they_are_known() {
    let mut terminal = Terminal::with(&["--seed", "1"], &[("XTERM_VERSION", "XTerm(390)")]);
    terminal.type_and_see("/gen a red circle\r", "\u{1b}[c");
    terminal.type_and_see("\u{1b}[?63;1;4c", "\u{1b}P");
    terminal.see(PROMPT);
    terminal.leave();
}

/// Every scale in the place of the one before it, and the whole image in the place of all.
#[cfg(feature = "nano")]
#[test]
fn an_image_grows_on_a_terminal() {
    for args in [&["gen", "a red circle"][..], &["gen", "a red circle", "--think"]] {
        let mut terminal = Terminal::run(&[args, &["--seed", "1", "--preview"]].concat(), &[]);
        let shown = terminal.see("a-red-circle-1.png");
        assert_eq!(shown.matches("\u{1b}[16A\u{1b}[J").count(), 7, "{shown:?}");
        assert!(shown.contains("\u{2584}") && shown.contains("seed 1 · 128x128"), "{shown:?}");
        assert!(terminal.child.wait().unwrap().success());
    }
    // Verbose lines stay where they are, and so does every picture.
    let mut terminal = Terminal::run(&["gen", "a red circle", "--seed", "1", "--preview", "-v"], &[]);
    let shown = terminal.see("a-red-circle-1.png");
    assert!(!shown.contains("A\u{1b}[J") && shown.contains("scale 3/8"), "{shown:?}");
    for (variable, why) in [(("NO_COLOR", "1"), "NO_COLOR is set"), (("TERM", "dumb"), "TERM is dumb")] {
        let mut terminal = Terminal::run(&["gen", "a cat", "--preview"], &[variable]);
        terminal.see(&format!("error: --preview cannot show images: {why}"));
        terminal.see("hint: ");
        assert_eq!(terminal.child.wait().unwrap().code(), Some(2));
    }
}

/// Bytes of another encoding cost the line, not the conversation.
#[test]
fn what_is_typed_and_no_text_is_refused_alone() {
    let mut terminal = Terminal::open(&["--max-tokens", "3"]);
    terminal.keys.write_all(b"caf\xe9\xff\xfe and more\r").unwrap();
    terminal.see("error: the line is not UTF-8");
    terminal.see(PROMPT);
    terminal.type_and_see("Hello\r", "(cut at --max-tokens)");
    terminal.see(PROMPT);
    terminal.keys.write_all(b"/show\r").unwrap();
    terminal.see("you: Hello");
    terminal.see(PROMPT);
    terminal.leave();
}

/// The mode of a terminal: whether it edits lines and shows what is typed by itself.
fn is_cooked(terminal: &Terminal) -> bool {
    // SAFETY: zeros are a value of this struct, and the pointer is to it.
    #[allow(unsafe_code)]
    let mode = unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.keys.as_raw_fd(), &raw mut mode), 0);
        mode
    };
    mode.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == libc::ICANON | libc::ECHO | libc::ISIG
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was() {
    for signal in [libc::SIGTERM, libc::SIGHUP] {
        let mut terminal = Terminal::open(&[]);
        terminal.type_and_see("half a li", "half a li");
        assert!(!is_cooked(&terminal));
        // SAFETY: the process is our own child, which is still to be waited for.
        #[allow(unsafe_code)]
        unsafe {
            libc::kill(terminal.child.id() as i32, signal);
        }
        assert_eq!(terminal.child.wait().unwrap().code(), Some(130));
        assert!(is_cooked(&terminal));
        terminal.see("\u{1b}[?2004l");
        terminal.see("error: interrupted");
    }
    // In the middle of a reply, which Ctrl-C alone would only end.
    let mut terminal = Terminal::open(&["--max-tokens", "4000"]);
    terminal.type_and_see("b\r", "\u{fffd}");
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe {
        libc::kill(terminal.child.id() as i32, libc::SIGTERM);
    }
    assert_eq!(terminal.child.wait().unwrap().code(), Some(130));
    assert!(is_cooked(&terminal));
}

/// A model's name comes from outside.
#[cfg(feature = "nano")]
#[test]
fn names_with_controls_do_not_reach_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nano");
    for file in ["model.safetensors", "image_tokenizer.safetensors", "tokenizer.json"] {
        std::os::unix::fs::symlink(nano.join(file), folder.path().join(file)).unwrap();
    }
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(nano.join("config.json")).unwrap()).unwrap();
    config["name"] = "a\u{9b}1mb\u{202e}c\u{2067}d\u{61c}e\u{1b}[2Jf".into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let image = folder.path().join("a.png");
    image::RgbImage::new(16, 16).save(&image).unwrap();
    let (model, image) = (folder.path().to_str().unwrap(), image.to_str().unwrap());
    for (args, part) in [
        (&["encode", image, "--model", model][..], "a\\u009b1mb\\u202ec\\u2067d\\u061ce\\u001b[2Jf"),
        (&["info", model], "b\\u{202e}c"),
        (&["info", model, "--json"], "b\\u202ec\\u2067d\\u061ce"),
        (&["gen", "a cat", "--dry-run", "--model", model], "b\\u{202e}c"),
        (&["gen", "a cat", "--dry-run", "--json", "--model", model], "b\\u202ec"),
    ] {
        let mut terminal = Terminal::run(args, &[]);
        let mut shown = terminal.see(part);
        assert!(terminal.child.wait().unwrap().success());
        while let Ok(bytes) = terminal.screen.recv_timeout(Duration::from_millis(200)) {
            shown += &String::from_utf8_lossy(&bytes);
        }
        for raw in ["\u{9b}", "\u{202e}", "\u{2067}", "\u{61c}", "\u{1b}[2J"] {
            assert!(!shown.contains(raw), "{args:?}: {shown:?}");
        }
    }
}
