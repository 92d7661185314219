//! Figures of one request and of the whole engine.

use std::time::Duration;

use crate::event::FinishReason;
use crate::histogram::{Histogram, SECONDS, TOKENS};

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
    /// Prompt tokens among `cached_tokens` that came back from a tier.
    pub restored_tokens: u64,
    /// Drafts that were verified.
    pub drafted_tokens: u64,
    /// Drafts that were right.
    pub accepted_tokens: u64,
    /// Those of them that only a branch beside the chain had.
    pub branch_tokens: u64,
    /// Steps in which a completion chose tokens, over all completions.
    pub decode_steps: u64,
    /// Energy of its rows, in millionths of a joule, where the device tells what it takes.
    pub microjoules: Option<u64>,
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
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineMetrics {
    /// Requests accepted.
    pub requests_submitted: u64,
    /// Requests that ended by themselves.
    pub requests_finished: u64,
    /// Requests cancelled.
    pub requests_aborted: u64,
    /// Requests whose deadline passed.
    pub requests_timed_out: u64,
    /// Requests that failed.
    pub requests_failed: u64,
    /// Submissions refused because too many waited.
    pub requests_refused: u64,
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
    /// Prompt and generated tokens that were looked for in the prefix cache: what `cached_tokens` is a part of when nothing is preempted.
    pub prefix_queries: u64,
    /// Pages that were copied to be written further.
    pub copied_pages: u64,
    /// Pages handed to the tier.
    pub saved_pages: u64,
    /// Pages asked of the tier.
    pub fetched_pages: u64,
    /// Pages that came back from the tier, whole and right.
    pub restored_pages: u64,
    /// Pages that a sliding window left behind.
    pub window_pages: u64,
    /// Drafts that were verified.
    pub drafted_tokens: u64,
    /// Drafts that were right.
    pub accepted_tokens: u64,
    /// Those of them that only a branch beside the chain had.
    pub branch_tokens: u64,
    /// Times that a completion chose tokens: with speculation each may give several.
    pub decode_steps: u64,
    /// Energy of all steps in joules, where the device tells what it takes.
    pub joules: Option<f64>,
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
    /// Pages of the layers that see only a window, where the others see everything; else 0.
    pub local_pages_total: u64,
    /// Those that are empty now.
    pub local_pages_free: u64,
    /// Those held by nobody now, kept for later prompts.
    pub local_pages_evictable: u64,
    /// Distributions.
    pub histograms: Histograms,
}

/// Distributions since the start; times in seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Histograms {
    /// From submission to the first step, of every request that came so far.
    pub queue_time: Histogram,
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of a completion; tokens that one step gave share its time.
    pub inter_token_latency: Histogram,
    /// From submission to the end.
    pub total_time: Histogram,
    /// Lengths of prompts that ended, in tokens.
    pub prompt_tokens: Histogram,
    /// Generated tokens of requests that ended.
    pub generated_tokens: Histogram,
    /// Rows of a step.
    pub step_tokens: Histogram,
    /// From the making of a batch to its commit.
    pub step_time: Histogram,
}

impl Default for Histograms {
    fn default() -> Self {
        let seconds = || Histogram::new(SECONDS);
        let tokens = || Histogram::new(TOKENS);
        Self {
            queue_time: seconds(),
            time_to_first_token: seconds(),
            inter_token_latency: seconds(),
            total_time: seconds(),
            prompt_tokens: tokens(),
            generated_tokens: tokens(),
            step_tokens: tokens(),
            step_time: seconds(),
        }
    }
}

impl Histograms {
    /// Name and distribution of each.
    #[must_use]
    pub fn all(&self) -> [(&'static str, &Histogram); 8] {
        [
            ("queue_time", &self.queue_time),
            ("time_to_first_token", &self.time_to_first_token),
            ("inter_token_latency", &self.inter_token_latency),
            ("total_time", &self.total_time),
            ("prompt_tokens", &self.prompt_tokens),
            ("generated_tokens", &self.generated_tokens),
            ("step_tokens", &self.step_tokens),
            ("step_time", &self.step_time),
        ]
    }
}

impl EngineMetrics {
    /// Counts a request that ended.
    pub(crate) fn ended(&mut self, reason: FinishReason, request: &RequestMetrics) {
        *match reason {
            FinishReason::Stop | FinishReason::Length => &mut self.requests_finished,
            FinishReason::Abort => &mut self.requests_aborted,
            FinishReason::Timeout => &mut self.requests_timed_out,
            FinishReason::Error => &mut self.requests_failed,
        } += 1;
        let histograms = &mut self.histograms;
        histograms.prompt_tokens.add(request.prompt_tokens as f64);
        histograms.generated_tokens.add(request.generated_tokens as f64);
        if let Some(total) = request.total_time() {
            histograms.total_time.add(total.as_secs_f64());
        }
    }
}
