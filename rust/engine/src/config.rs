//! The engine's fixed sizes.

use crate::error::EngineError;

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
    /// Logits (floats) of whole-prompt requests that one step may produce; bounds memory when vocabularies are large.
    pub max_logit_values: usize,
}

impl EngineConfig {
    /// Logits one step may produce unless told otherwise: 64 MiB of floats.
    pub const MAX_LOGIT_VALUES: usize = 1 << 24;

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
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(EngineError::Config(format!(
                "max_num_batched_tokens ({}) must be at least max_num_seqs ({}), or running sequences could not all advance",
                self.max_num_batched_tokens, self.max_num_seqs
            )));
        }
        let capacity = self.pages.checked_mul(self.page_tokens);
        if capacity.is_none_or(|tokens| tokens < self.max_model_len) || u32::try_from(self.pages).is_err() {
            return Err(EngineError::Config(format!(
                "a key-value cache of {} pages of {} tokens cannot hold one sequence of max_model_len = {}; lower max_model_len \
                 or give the cache more memory",
                self.pages, self.page_tokens, self.max_model_len
            )));
        }
        Ok(())
    }

    /// Pages that hold `tokens` tokens.
    pub(crate) fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Whole-prompt rows whose logits one step may produce.
    pub(crate) fn prompt_logit_rows(&self) -> usize {
        (self.max_logit_values / self.vocabulary).max(1)
    }
}
