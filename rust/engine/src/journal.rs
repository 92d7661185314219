//! What outsiders may want to follow: which pages can be found, and what becomes of requests.
//!
//! KV events have vLLM's shape (stored with parent and tokens, removed), so that routers which place requests by
//! their prefixes can listen to this engine too.

use std::time::Duration;

use crate::digest::Digest;
use crate::event::FinishReason;
use crate::request::RequestId;

/// A change of what the prefix cache in memory holds. Only full pages are told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEvent {
    /// A page can be found from now on.
    Stored {
        /// What it is called.
        digest: Digest,
        /// The page before it, or its domain's root.
        parent: Digest,
        /// Its tokens.
        tokens: Box<[u32]>,
    },
    /// A page cannot be found any more.
    Removed {
        /// What it was called.
        digest: Digest,
    },
}

/// A moment in a request's life, on the engine's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceEvent {
    /// Whose.
    pub request: RequestId,
    /// When.
    pub at: Duration,
    /// What.
    pub kind: TraceKind,
}

/// Kinds of [`TraceEvent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceKind {
    /// It was accepted.
    Queued,
    /// A completion was given pages and a place in the steps; of its tokens so many were found in the cache.
    Scheduled {
        /// Tokens that need not be computed.
        cached_tokens: usize,
    },
    /// A completion waits for pages of the tier.
    Restoring {
        /// How many.
        pages: usize,
    },
    /// A completion gave up its pages.
    Preempted,
    /// A completion chose its first token.
    FirstToken,
    /// It ended.
    Ended {
        /// Why its last completion ended.
        reason: FinishReason,
    },
}
