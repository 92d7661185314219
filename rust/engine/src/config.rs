//! The engine's fixed sizes.

use std::time::Duration;

use crate::digest::Digest;
use crate::error::EngineError;
use crate::planted::{Bug, planted};
use crate::speculative::Speculation;

/// Layers that see only the last positions, beside others that see all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalLayers {
    /// Positions that the widest of them sees.
    pub window: usize,
    /// Pages for their keys and values.
    pub pages: usize,
}

/// Fixed sizes of an engine; checked once by [`EngineConfig::validate`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Pages in the key-value cache.
    pub pages: usize,
    /// Tokens per page.
    pub page_tokens: usize,
    /// Sequences that may be part of one step.
    pub max_num_seqs: usize,
    /// Rows (tokens) that one step may compute.
    pub max_num_batched_tokens: usize,
    /// Longest sequence, prompt and generated tokens together.
    pub max_model_len: usize,
    /// Keep the pages of finished sequences for later prompts that begin alike.
    pub enable_prefix_caching: bool,
    /// Length of a row of logits.
    pub vocabulary: usize,
    /// Sequences longer than this are computed with the long-context variant of the position encoding, from position 0
    /// (Phi-3's longrope).
    pub context_switch: Option<usize>,
    /// Tokens that end a completion unless it ignores them.
    pub eos_token_ids: Vec<u32>,
    /// Seed that requests without one derive theirs from, together with their number.
    pub seed: u64,
    /// Logits (floats) of whole-prompt requests and of drafts that one step may produce; bounds memory when vocabularies are large.
    pub max_logit_values: usize,
    /// Requests that may wait for their first step; more are refused with [`EngineError::Full`]. None: any number.
    pub max_waiting: Option<usize>,
    /// A priority class that has waited this long since it was last served is served next, whatever its priority.
    pub patience: Duration,
    /// How long a step should take at most that carries running completions besides prompts: prompts get fewer rows then, by what a row
    /// cost lately, unless all of those completions are [`crate::RequestOptions::final_only`]. None: as many as `max_num_batched_tokens` allows.
    pub step_time_target: Option<Duration>,
    /// A power of two; 1 for a device that takes any number of rows. One that pads steps: those that are cut for
    /// [`EngineConfig::step_time_target`] and have eight times as many rows or more get a multiple of it, the more rows the larger.
    pub row_unit: usize,
    /// If every layer sees only so many last positions: pages wholly before that are given up.
    pub window: Option<usize>,
    /// If only some layers do: these have pages of their own.
    pub local: Option<LocalLayers>,
    /// How tokens are guessed ahead.
    pub speculation: Option<Speculation>,
    /// Keys the digests of pages. Secret: who knows it can tell from a digest what was asked.
    pub digest_key: Digest,
    /// Say how tokens are drawn ([`crate::Batch::draws`]), for a device that draws them itself.
    pub device_draws: bool,
    /// Keep a journal of what becomes findable; see [`crate::Core::take_cache_events`].
    pub cache_events: bool,
    /// Keep a journal of requests' lives; see [`crate::Core::take_trace`].
    pub trace: bool,
    /// Check after every stroke that the books agree, and panic if not: for tests, since it costs time with every page there is.
    pub check_invariants: bool,
}

impl EngineConfig {
    /// Logits one step may produce unless told otherwise: 64 MiB of floats.
    pub const MAX_LOGIT_VALUES: usize = 1 << 24;

    /// How long a priority class waits at most unless told otherwise.
    pub const PATIENCE: Duration = Duration::from_secs(10);

    /// What a running completion waits for its next token at most because of prompts, unless told otherwise.
    pub const STEP_TIME_TARGET: Duration = Duration::from_millis(100);

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// Names the first field that does not.
    pub fn validate(&self) -> Result<(), EngineError> {
        let positive = [
            ("page_tokens", self.page_tokens),
            ("max_num_seqs", self.max_num_seqs),
            ("max_model_len", self.max_model_len),
            ("vocabulary", self.vocabulary),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(EngineError::Config(format!("{name} must be at least 1, got 0")));
            }
        }
        if !self.row_unit.is_power_of_two() {
            return Err(EngineError::Config(format!(
                "row_unit must be a power of two, got {}",
                self.row_unit
            )));
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(EngineError::Config(format!(
                "max_num_batched_tokens ({}) must be at least max_num_seqs ({}), or running sequences could not all advance",
                self.max_num_batched_tokens, self.max_num_seqs
            )));
        }
        let too_many = self.pages.checked_mul(self.page_tokens).is_none() || self.pages >= u32::MAX as usize;
        if too_many || self.most_pages(self.max_model_len) > self.pages {
            return Err(EngineError::Config(format!(
                "a key-value cache of {} pages of {} tokens cannot hold one sequence of max_model_len = {}; lower max_model_len \
                 or give the cache more memory",
                self.pages, self.page_tokens, self.max_model_len
            )));
        }
        self.validate_windows()?;
        self.speculation.as_ref().map_or(Ok(()), Speculation::validate)
    }

    fn validate_windows(&self) -> Result<(), EngineError> {
        let windows = [self.window, self.local.map(|local| local.window)];
        if windows.contains(&Some(0)) {
            return Err(EngineError::Config("window must be at least 1 position, or none; got 0".to_owned()));
        }
        let Some(local) = self.local else { return Ok(()) };
        if self.window.is_some() {
            return Err(EngineError::Config(
                "window is for models all of whose layers have one, and local for others".to_owned(),
            ));
        }
        if local.pages >= u32::MAX as usize || self.most_local_pages(self.max_model_len) > local.pages {
            return Err(EngineError::Config(format!(
                "{} pages of {} tokens for the layers with a window of {} positions cannot hold one sequence of max_model_len = {} that is \
                 computed {} tokens at a time; give the cache more memory, or lower max_model_len or max_num_batched_tokens",
                local.pages, self.page_tokens, local.window, self.max_model_len, self.max_num_batched_tokens
            )));
        }
        Ok(())
    }

    /// Refuses a request when as many wait as may.
    pub(crate) fn check_room(&self, waiting: usize) -> Result<(), EngineError> {
        match self.max_waiting {
            Some(most) if waiting >= most && !planted(Bug::MaxWaitingIsIgnored) => {
                Err(EngineError::Full(format!(
                    "{waiting} requests wait already and max_waiting is {most}; submit again when one has started, or raise max_waiting"
                )))
            }
            _ => Ok(()),
        }
    }

    /// The most pages that a sequence of `tokens` tokens holds at once: all of them, or what its window and one step span.
    pub(crate) fn most_pages(&self, tokens: usize) -> usize {
        pages_at_once(tokens, self.page_tokens, self.window, self.max_num_batched_tokens)
    }

    /// The same in the layers that see only a window, where others see everything; 0 without such layers.
    pub(crate) fn most_local_pages(&self, tokens: usize) -> usize {
        let seen = |local: LocalLayers| {
            pages_at_once(tokens, self.page_tokens, Some(local.window), self.max_num_batched_tokens)
        };
        self.local.map_or(0, seen)
    }

    /// The most rows, up to `rows`, of a step that a device need not pad: an eighth of them is lost at most.
    pub(crate) fn whole_rows(&self, rows: usize) -> usize {
        if self.row_unit == 1 || rows < 8 * self.row_unit {
            return rows;
        }
        let step = 1 << (rows.ilog2() - 3);
        rows / step * step
    }

    /// Pages that hold `tokens` tokens.
    pub(crate) fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Most rows whose logits one step gives, by default: those of whole prompts and of drafts, and one for each sequence.
    #[must_use]
    pub fn most_logit_rows(vocabulary: usize, max_num_seqs: usize, max_num_batched_tokens: usize) -> usize {
        let many = (Self::MAX_LOGIT_VALUES / vocabulary.max(1)).max(1);
        many.saturating_add(max_num_seqs).min(max_num_batched_tokens)
    }

    /// Rows of whole prompts and of drafts whose logits one step may produce.
    pub(crate) fn logit_rows(&self) -> usize {
        (self.max_logit_values / self.vocabulary).max(1)
    }
}

/// The most pages of `page_tokens` tokens that a sequence of `tokens` tokens holds at once in layers that see at most `window` positions,
/// when a step computes up to `rows` of its tokens: all of them, or what the window and one step span. Whoever divides memory
/// counts with it as well.
#[must_use]
pub fn pages_at_once(tokens: usize, page_tokens: usize, window: Option<usize>, rows: usize) -> usize {
    let all = tokens.div_ceil(page_tokens);
    // The window begins anywhere in its first page, and so does the step's last page end; and one page before the window stays for
    // a prompt that begins with the same tokens (`LocalPages::first_kept`).
    let spanned = |window: usize| window.saturating_add(rows).div_ceil(page_tokens).saturating_add(2);
    window.map_or(all, |window| all.min(spanned(window)))
}
