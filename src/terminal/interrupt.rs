//! What Ctrl-C and the signals that end a process mean.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::{clear_line, report};
use crate::error::{Error, Kind, Result};

/// Whether the user has interrupted.
#[derive(Clone)]
pub struct Stop(Arc<AtomicBool>, Arc<AtomicU8>);

/// What Ctrl-C means.
#[repr(u8)]
enum Meaning {
    /// The end of the process, if its work does not end within a moment.
    End,
    /// Its end at once: a conversation waits for the user.
    Leave,
    /// The end of a reply; once more, of the process.
    Hush,
}

impl Stop {
    /// `Break` once the user pressed Ctrl-C.
    pub fn check(&self) -> ControlFlow<()> {
        if self.0.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// A conversation waits for the user: Ctrl-C leaves it.
    pub fn waiting(&self) {
        self.1.store(Meaning::Leave as u8, Ordering::Relaxed);
    }

    /// A reply is on its way: Ctrl-C ends it and no more.
    pub fn speaking(&self) {
        self.0.store(false, Ordering::Relaxed);
        self.1.store(Meaning::Hush as u8, Ordering::Relaxed);
    }
}

/// Runs before the process ends on Ctrl-C.
static CLEAN: OnceLock<fn()> = OnceLock::new();

/// As [`interrupts`], and `clean` is called where a process is ended in the middle of its work.
pub fn interrupts_after(clean: fn()) -> Result<Stop> {
    let _ = CLEAN.set(clean);
    interrupts()
}

/// Takes over Ctrl-C, SIGTERM and SIGHUP: work stops at its next step or, where that takes too
/// long, the process ends, with the terminal as it was. Where the system grants no thread to wait
/// for them, they end the process as usual.
pub fn interrupts() -> Result<Stop> {
    static STOP: OnceLock<Stop> = OnceLock::new();
    if let Some(stop) = STOP.get() {
        return Ok(stop.clone());
    }
    let stop = STOP.get_or_init(|| Stop(Arc::default(), Arc::new(AtomicU8::new(Meaning::End as u8))));
    #[cfg(unix)]
    mode::remember();
    watch(move |typed| {
        let again = stop.0.swap(true, Ordering::Relaxed);
        let meaning = stop.1.load(Ordering::Relaxed);
        if typed && meaning == Meaning::Hush as u8 && !again {
            return;
        }
        if meaning == Meaning::End as u8 || !typed && meaning == Meaning::Hush as u8 {
            std::thread::sleep(Duration::from_millis(700));
        }
        // Still here: loading, or inside a long pass. Files are renamed into place, so none is left
        // half.
        if let Some(clean) = CLEAN.get() {
            clean();
        }
        clear_line();
        #[cfg(unix)]
        mode::restore();
        report(&interrupted(), false);
        std::process::exit(Kind::Interrupted as i32);
    })
    .map_err(|e| Error::new(Kind::Failure, format!("cannot watch for Ctrl-C: {e}")))?;
    Ok(stop.clone())
}

/// The error of a run that the user stopped.
pub fn interrupted() -> Error {
    Error::new(Kind::Interrupted, "interrupted")
}

/// Calls `handle` on every signal to terminate; its argument is whether it is Ctrl-C.
#[cfg(unix)]
fn watch(mut handle: impl FnMut(bool) + Send + 'static) -> io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;
    // `nohup` has the end of the terminal ignored, and so it stays.
    let wanted = [SIGINT, SIGTERM].into_iter().chain(Some(SIGHUP).filter(|_| !mode::is_ignored(SIGHUP)));
    let wanted: Vec<_> = wanted.collect();
    let (send, signals) = std::sync::mpsc::channel::<Signals>();
    // The thread first: without it, signals keep their usual meaning.
    let thread = std::thread::Builder::new().name("signals".into()).spawn(move || {
        let Ok(mut signals) = signals.recv() else { return };
        signals.forever().for_each(|signal| handle(signal == SIGINT));
    });
    if thread.is_ok() {
        // The thread waits for them.
        let _ = send.send(Signals::new(wanted)?);
    }
    Ok(())
}

/// Calls `handle` on Ctrl-C.
#[cfg(not(unix))]
fn watch(mut handle: impl FnMut(bool) + Send + 'static) -> io::Result<()> {
    ctrlc::set_handler(move || handle(true)).map_err(io::Error::other)
}

/// Lets writes beyond a limit of file size (`ulimit -f`) fail as on a full disk; the signal would
/// end the process and leave its temporary files.
pub fn ignore_file_size_signal() {
    #[cfg(unix)]
    // SAFETY: ignoring a signal runs no code of ours.
    #[allow(unsafe_code)]
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// The mode of the terminal, and of signals.
#[cfg(unix)]
mod mode {
    use std::io::{self, IsTerminal, Write};
    use std::sync::OnceLock;

    /// As it was when the program began.
    static MODE: OnceLock<libc::termios> = OnceLock::new();

    fn current() -> Option<libc::termios> {
        // SAFETY: all zeros is a value of this struct of numbers.
        #[allow(unsafe_code)]
        let mut mode = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a variable of the type that the call expects.
        #[allow(unsafe_code)]
        let got = unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut mode) };
        (got == 0).then_some(mode)
    }

    pub fn remember() {
        if let Some(mode) = current() {
            let _ = MODE.set(mode);
        }
    }

    /// Ends the mode in which a line is edited, if a line is being edited.
    pub fn restore() {
        let (Some(old), Some(now)) = (MODE.get(), current()) else { return };
        if old.c_lflag == now.c_lflag && old.c_oflag == now.c_oflag {
            return;
        }
        // SAFETY: the pointer is to a mode that the terminal had before.
        #[allow(unsafe_code)]
        unsafe {
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, old);
        }
        let mut out = io::stdout();
        if out.is_terminal() {
            // Turns off bracketed paste, and starts a new line.
            let _ = out.write_all(b"\x1b[?2004l\r\n").and_then(|()| out.flush());
        }
    }

    pub fn is_ignored(signal: libc::c_int) -> bool {
        // SAFETY: all zeros is a value of this struct, and the call writes no more than that.
        #[allow(unsafe_code)]
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &raw mut old) == 0 && old.sa_sigaction == libc::SIG_IGN
        }
    }
}
