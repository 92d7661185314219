//! Guessing ahead: where drafts come from, and how many a sequence may have.
//!
//! A decoding sequence's step may carry drafts: its rows are the last token and the drafts, all of their logits come back, and `commit.rs`
//! samples row after row with the request's own (seed, position) stream for as long as each sample equals the draft it was fed. Since a
//! row's logits do not depend on how many rows share the call, every token is the one that plain decoding chooses, greedy or
//! sampled; a wrong draft costs rows, never a token. Logits that a wrong draft made are not looked at, and its slots are given back.
//!
//! A draft model keeps its keys and values in pages of the same numbers, computed in step with the target's (the device's duty,
//! [`crate::Device::draft`]), so that sharing, preemption, copies and tiers need no second bookkeeping. Its drafts are drawn with
//! the target's parameters and the very random numbers that the target will draw with: at a temperature two alike distributions
//! then agree far more often than a most likely token would be drawn.
//! Prompt lookup (`lookup.rs`) proposes what followed the last tokens when they stood in the text before.
//! With `num_draft_tokens` a step verifies a tree: this chain and branches beside it (`draft_tree.rs`). The chain is the same as without. Prompt
//! lookup's branches are other things that followed; a draft model's begin with what it held likely in place of its first guesses.

use crate::core::Core;
use crate::draft_tree::Branch;
use crate::error::EngineError;
use crate::lookup::{lookup, lookup_tree};
use crate::request::RequestKind;
use crate::sequence::{Sequence, SequenceId};

/// How tokens are guessed ahead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Speculation {
    /// What followed the same last tokens earlier in the text.
    Ngram {
        /// Drafts in a row per step.
        num_speculative_tokens: usize,
        /// Drafts per step in a tree of several such rows; none: a single row.
        num_draft_tokens: Option<usize>,
        /// Fewest last tokens that must match.
        prompt_lookup_min: usize,
        /// Most last tokens that are compared.
        prompt_lookup_max: usize,
    },
    /// A smaller model with the same vocabulary, run by the device.
    DraftModel {
        /// Drafts in a row per step.
        num_speculative_tokens: usize,
        /// Drafts per step in a tree of several such rows; none: a single row.
        num_draft_tokens: Option<usize>,
    },
}

/// More drafts than this in a row are never right often enough.
const MOST_DRAFTS: usize = 64;

impl Speculation {
    /// Drafts in a row per step.
    #[must_use]
    pub fn num_speculative_tokens(&self) -> usize {
        match self {
            Self::Ngram { num_speculative_tokens, .. } | Self::DraftModel { num_speculative_tokens, .. } => {
                *num_speculative_tokens
            }
        }
    }

    /// Drafts per step, if they are a tree.
    #[must_use]
    pub fn num_draft_tokens(&self) -> Option<usize> {
        match self {
            Self::Ngram { num_draft_tokens, .. } | Self::DraftModel { num_draft_tokens, .. } => {
                *num_draft_tokens
            }
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field that is out of range.
    pub fn validate(&self) -> Result<(), EngineError> {
        let drafts = self.num_speculative_tokens();
        if !(1..=MOST_DRAFTS).contains(&drafts) {
            return Err(EngineError::Config(format!(
                "num_speculative_tokens must be from 1 to {MOST_DRAFTS}, got {drafts}"
            )));
        }
        if let Some(all) = self.num_draft_tokens()
            && !(drafts..=MOST_DRAFTS).contains(&all)
        {
            return Err(EngineError::Config(format!(
                "num_draft_tokens must be from num_speculative_tokens = {drafts}, one row of them, to {MOST_DRAFTS}, got {all}"
            )));
        }
        if let Self::Ngram { prompt_lookup_min: least, prompt_lookup_max: most, .. } = *self
            && !(1..=most).contains(&least)
        {
            return Err(EngineError::Config(format!(
                "prompt_lookup_min must be from 1 to prompt_lookup_max = {most}, got {least}"
            )));
        }
        Ok(())
    }
}

impl Core {
    /// Whether only its last token is to be computed, and the next one then to be chosen.
    pub(crate) fn is_decoding(&self, sequence: &Sequence) -> bool {
        let generates = matches!(self.requests[&sequence.id.request].kind, RequestKind::Generate(_));
        generates && sequence.is_ready() && sequence.remaining() == 1 && !sequence.tokens.output.is_empty()
    }

    /// The most drafts that could all be used: the step itself gives one token, and a change of the position encoding may not be
    /// passed over.
    pub(crate) fn draft_limit(&self, sequence: &Sequence) -> usize {
        let wanted = self.config.speculation.as_ref().map_or(0, Speculation::num_speculative_tokens);
        let left = self.requests[&sequence.id.request].max_output - sequence.tokens.output.len();
        let switch = self.config.context_switch.filter(|_| !sequence.domain.long_context);
        let short = switch.map_or(usize::MAX, |switch| switch.saturating_sub(sequence.tokens.len()));
        wanted.min(left.saturating_sub(1)).min(short)
    }

    /// Drafts by prompt lookup, at most `limit`, and branches beside them.
    pub(crate) fn look_up(&mut self, id: SequenceId, limit: usize) {
        let Some(Speculation::Ngram { prompt_lookup_min, prompt_lookup_max, num_draft_tokens, .. }) =
            self.config.speculation
        else {
            return;
        };
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        let (tokens, least, most) = (&sequence.tokens, prompt_lookup_min, prompt_lookup_max);
        let Some(nodes) = num_draft_tokens else {
            sequence.drafts = lookup(tokens, least, most, limit);
            return;
        };
        let mut paths = lookup_tree(tokens, least, most, limit, nodes).into_iter();
        sequence.drafts = paths.next().unwrap_or_default();
        sequence.branches = paths.map(|drafts| Branch { drafts, ..Branch::default() }).collect();
    }
}
