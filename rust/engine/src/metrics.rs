//! Figures of one request and of the whole engine.

use std::time::Duration;

/// Times and counts of one request. Times are on the engine's clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestMetrics {
    /// When it was submitted.
    pub arrival: Duration,
    /// When the first step that computed any of it was put together.
    pub first_scheduled: Option<Duration>,
    /// When its first generated token was there.
    pub first_token: Option<Duration>,
    /// When its last completion ended.
    pub finished: Option<Duration>,
    /// Sum over completions of the time between their first and last token.
    pub generating: Duration,
    /// Sum over completions of tokens after their first.
    pub intervals: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Prompt tokens that the prefix cache held when the request first ran.
    pub cached_tokens: u64,
    /// Generated tokens of all completions.
    pub generated_tokens: u64,
    /// How often a completion gave up its pages and had to be computed again.
    pub preemptions: u64,
}

impl RequestMetrics {
    /// From submission to the first step.
    #[must_use]
    pub fn queue_time(&self) -> Option<Duration> {
        self.first_scheduled.map(|at| at.saturating_sub(self.arrival))
    }

    /// From submission to the first token.
    #[must_use]
    pub fn time_to_first_token(&self) -> Option<Duration> {
        self.first_token.map(|at| at.saturating_sub(self.arrival))
    }

    /// Mean time between a completion's tokens after its first.
    #[must_use]
    pub fn inter_token_latency(&self) -> Option<Duration> {
        (self.intervals > 0).then(|| self.generating.div_f64(self.intervals as f64))
    }

    /// From submission to the end.
    #[must_use]
    pub fn total_time(&self) -> Option<Duration> {
        self.finished.map(|at| at.saturating_sub(self.arrival))
    }
}

/// Counters since the start, and gauges of the present.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineMetrics {
    /// Requests accepted.
    pub requests_submitted: u64,
    /// Requests that ended by themselves.
    pub requests_finished: u64,
    /// Requests cancelled.
    pub requests_aborted: u64,
    /// Requests that failed.
    pub requests_failed: u64,
    /// Steps computed.
    pub steps: u64,
    /// Rows computed, prompt and generated.
    pub computed_tokens: u64,
    /// Tokens of accepted prompts.
    pub prompt_tokens: u64,
    /// Prompt tokens that the prefix cache held.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Sequences that gave up their pages.
    pub preemptions: u64,
    /// Sequences with pages now.
    pub running: u64,
    /// Sequences waiting for pages now.
    pub waiting: u64,
    /// Pages in the cache.
    pub pages_total: u64,
    /// Pages empty now.
    pub pages_free: u64,
    /// Pages held by nobody now, kept for later prompts.
    pub pages_evictable: u64,
}
