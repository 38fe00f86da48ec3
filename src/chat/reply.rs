//! Reply options, streaming events, and the finished reply.

use std::ops::ControlFlow;

use candle_core::Tensor;
use serde::Serialize;

use super::{Picture, TextSampling};
use crate::backbone::Layout;
use crate::generate::{Event, Sampling};

/// How replies are made.
#[derive(Clone, Debug)]
pub struct ReplyOptions {
    /// How text tokens are sampled.
    pub sampling: TextSampling,
    /// Maximum tokens of a reply; an image counts as one.
    pub max_tokens: usize,
    /// How image codes are sampled, in a model that draws.
    pub image: Option<Sampling>,
    /// Decides all randomness.
    pub seed: u64,
    /// The unconditional row sees the source images without the text, which preserves them; else it
    /// sees nothing.
    pub guide_from_sources: bool,
}

/// What happens while a reply is made.
#[derive(Debug)]
pub enum ReplyEvent<'a> {
    /// A part of the conversation was prefilled.
    Read,
    /// More text.
    Text(&'a str),
    /// An image is being drawn.
    Drawing(Event<'a>),
    /// An image was drawn, with this seed; the observer may name it.
    Drawn(&'a mut Picture, u64),
}

/// Called with every [`ReplyEvent`]. An observer that returns `Break` stops the reply.
pub type ReplyObserver<'a> = &'a mut dyn FnMut(ReplyEvent) -> ControlFlow<()>;

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended it.
    Stop,
    /// It reached the maximum length.
    Length,
    /// The user interrupted it.
    Interrupted,
}

/// A finished reply.
#[derive(Clone, Debug, Serialize)]
pub struct Reply {
    /// Its text.
    pub text: String,
    /// Tokens of the conversation up to it.
    pub prompt_tokens: usize,
    /// How many of them were in the cache.
    pub cached_tokens: usize,
    /// Its text tokens, and one for each of its images.
    pub tokens: usize,
    /// Why it ended.
    pub ending: FinishReason,
}

/// A reply that is being made.
pub(super) struct ReplyState {
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    /// Text tokens and images so far, and their maximum.
    pub tokens: usize,
    pub max_tokens: usize,
    /// Of the last token, (1, 1, hidden).
    pub hidden: Tensor,
    pub layout: Layout,
    /// Which tokens of the vocabulary have occurred.
    pub before: Vec<bool>,
}

/// Why text generation pauses.
pub(super) enum StopReason {
    /// It opens an image.
    Image,
    /// The reply is over.
    End(FinishReason),
}
