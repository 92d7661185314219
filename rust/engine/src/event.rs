//! What a step tells the outside.

use crate::logprobs::TokenLogprob;
use crate::metrics::RequestMetrics;
use crate::request::RequestId;

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end-of-sequence token, a stop token or a stop string.
    Stop,
    /// `max_tokens` or `max_model_len` was reached.
    Length,
    /// The request was cancelled.
    Abort,
    /// The request's deadline passed.
    Timeout,
    /// The request failed; its [`EventKind::Done`] says why.
    Error,
}

impl FinishReason {
    /// The name users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Timeout => "timeout",
            Self::Error => "error",
        }
    }
}

/// Which stop token or string ended a completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of `stop`.
    Text(String),
}

/// The end of a completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The stop token or string; none for an end-of-sequence token.
    pub stop: Option<StopReason>,
}

impl Finish {
    pub(crate) fn because(reason: FinishReason) -> Self {
        Self { reason, stop: None }
    }
}

/// Something that happened to a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// To whom.
    pub request: RequestId,
    /// Its figures so far.
    pub metrics: RequestMetrics,
    /// What.
    pub kind: EventKind,
}

/// Kinds of event. A request's last event is its only [`EventKind::Done`].
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// A completion gained a token.
    Token {
        /// Which of the request's completions.
        index: u32,
        /// The token.
        token: u32,
        /// Text that became final.
        text: String,
        /// The token and the most likely others, if asked for.
        logprobs: Option<Vec<TokenLogprob>>,
    },
    /// A completion ended.
    Finished {
        /// Which of the request's completions.
        index: u32,
        /// Text that was held back until now.
        text: String,
        /// Why.
        finish: Finish,
    },
    /// Log-probabilities of further prompt tokens, in order, from the second prompt token on.
    PromptLogprobs(Vec<Vec<TokenLogprob>>),
    /// Logits of further prompt rows, in order: (rows, vocabulary).
    Logits(Vec<f32>),
    /// Nothing more will come.
    Done {
        /// Why the request failed, if it did.
        error: Option<String>,
    },
}
