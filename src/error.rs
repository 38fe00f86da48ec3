//! The error type of the whole crate: a sentence, a hint with an exact command, an exit code, and
//! the chain of its causes.

use std::fmt;
use std::path::Path;

/// What went wrong, in the terms a script cares about; its value is the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A failure at run time, or a batch of which a part failed.
    Failure = 1,
    /// Bad usage or bad input.
    Usage = 2,
    /// A model that is missing or corrupt.
    Model = 3,
    /// Out of memory.
    Memory = 4,
    /// Non-finite numbers in the model's output.
    NonFinite = 5,
    /// Stopped by the user.
    Interrupted = 130,
}

/// One sentence that says what happened, and, where there is one, a hint that says what to type.
#[derive(Debug)]
pub struct Error {
    /// Decides the exit code.
    pub kind: Kind,
    /// One sentence without a final period.
    pub message: String,
    /// Names an exact command or flag.
    pub hint: Option<String>,
    /// The error of the operating system or a library behind it; `-v` prints it and its own causes.
    pub cause: Option<anyhow::Error>,
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` without a hint.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, cause: None }
    }

    /// Bad usage or input (exit code 2).
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// A missing or corrupt model (exit code 3).
    pub fn model(message: impl Into<String>) -> Self {
        Self::new(Kind::Model, message)
    }

    /// A file or folder cannot be written, for the reason `e` (exit code 1).
    pub fn unwritten(path: &Path, e: &dyn fmt::Display) -> Self {
        Self::new(Kind::Failure, format!("cannot write {}: {e}", path.display()))
            .hint("check the folder's permissions and free space: df -h")
    }

    /// `what` a model gave is not finite (exit code 5).
    pub fn non_finite(what: &str) -> Self {
        Self::new(Kind::NonFinite, format!("the model produced {what} that are not finite"))
            .hint("check the weights: nextflow info MODEL")
    }

    /// The same error with a hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error with its cause.
    pub fn because(mut self, cause: impl Into<anyhow::Error>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// The causes, the nearest first, without those that say the same as the error before them.
    pub fn causes(&self) -> Vec<String> {
        let chain = self.cause.iter().flat_map(anyhow::Error::chain).map(|cause| match cause.downcast_ref() {
            Some(cause) => told(cause),
            None => cause.to_string(),
        });
        let mut causes: Vec<String> = Vec::new();
        for cause in chain {
            if causes.last().unwrap_or(&self.message) != &cause {
                causes.push(cause);
            }
        }
        causes
    }

    /// The process exit code.
    pub fn exit_code(&self) -> u8 {
        self.kind as u8
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

/// The text of a candle error, without the backtrace that it prints if RUST_BACKTRACE is set.
pub fn told(e: &candle_core::Error) -> String {
    match e {
        candle_core::Error::WithBacktrace { inner, .. } => told(inner),
        e => e.to_string(),
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        let message = told(&e);
        if message.contains("OUT_OF_MEMORY") {
            return Self::new(Kind::Memory, "the GPU has no memory left for this")
                .hint("--quant q8_0, --quant q4_K, or a smaller --size; nextflow gen --dry-run prints what each takes")
                .because(e);
        }
        Self::new(Kind::Failure, message).because(e)
    }
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::new(Kind::Failure, e.to_string()).because(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_gpu_is_no_plain_failure() {
        let full = candle_core::Error::Msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".into());
        assert_eq!(Error::from(full).exit_code(), 4);
        assert_eq!(Error::from(candle_core::Error::Msg("shapes differ".into())).exit_code(), 1);
    }

    #[test]
    fn causes_are_a_chain_without_repetitions() {
        let io = || std::io::Error::other("disk on fire");
        let inner = Error::model("a.safetensors is cut off").because(io());
        let outer = Error::usage("cannot draw").because(inner).hint("draw less");
        assert_eq!(outer.causes(), ["a.safetensors is cut off", "disk on fire"]);
        assert_eq!((outer.exit_code(), outer.hint.as_deref()), (2, Some("draw less")));
        let source = std::error::Error::source(&outer).unwrap();
        assert_eq!(
            (source.to_string().as_str(), source.source().unwrap().to_string().as_str()),
            ("a.safetensors is cut off", "disk on fire")
        );
        assert!(Error::from(io()).causes().is_empty() && Error::usage("x").causes().is_empty());
    }
}
