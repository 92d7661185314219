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
//! Prompt lookup (Saxena, 2023) proposes what followed the last tokens when they stood in the text before.

use crate::batch::{Batch, BatchSequence};
use crate::core::Core;
use crate::draw::{Choice, MOST_DRAW_WORDS};
use crate::error::EngineError;
use crate::request::RequestKind;
use crate::sequence::{Sequence, SequenceId, Tokens};

/// How tokens are guessed ahead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Speculation {
    /// What followed the same last tokens earlier in the text.
    Ngram {
        /// Drafts per step.
        num_speculative_tokens: usize,
        /// Fewest last tokens that must match.
        prompt_lookup_min: usize,
        /// Most last tokens that are compared.
        prompt_lookup_max: usize,
    },
    /// A smaller model with the same vocabulary, run by the device.
    DraftModel {
        /// Drafts per step.
        num_speculative_tokens: usize,
    },
}

/// More drafts than this in a row are never right often enough.
const MOST_DRAFTS: usize = 64;

impl Speculation {
    /// Drafts per step.
    #[must_use]
    pub fn num_speculative_tokens(&self) -> usize {
        match self {
            Self::Ngram { num_speculative_tokens, .. } | Self::DraftModel { num_speculative_tokens } => {
                *num_speculative_tokens
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

/// The sequences that a draft model guesses for in this round, and how many more tokens for each.
#[derive(Debug)]
pub(crate) struct DraftRound {
    open: Vec<Guessing>,
}

/// A sequence that a draft model guesses for.
#[derive(Debug, Clone, Copy)]
struct Guessing {
    id: SequenceId,
    /// More tokens that may be guessed.
    left: usize,
    /// A device may draw the next one itself.
    drawn: bool,
}

impl Core {
    /// The next rows for the draft model: the last token of every sequence that guesses on, one row each, logits wanted for all.
    /// None when the round is over. Call before [`Core::next_batch`], and [`Core::commit_draft`] after each. Before the rows are
    /// computed, the pages of [`Core::take_saves`] must have been read.
    ///
    /// # Panics
    /// When a step is in flight.
    pub fn next_draft(&mut self) -> Option<Batch> {
        let Some(Speculation::DraftModel { .. }) = self.config.speculation else { return None };
        assert!(self.in_flight.is_empty(), "drafts are made between steps");
        if self.draft_round.is_none() {
            self.draft_round = Some(DraftRound { open: self.open_draft_round() });
        }
        let mut round = self.draft_round.take()?;
        let most = round.open.iter().map(|guessing| guessing.left).min().unwrap_or(0);
        let mut batch = Batch { rounds: most, ..Batch::default() };
        for (row, guessing) in round.open.iter_mut().enumerate() {
            let sequence = &self.sequences[&guessing.id];
            let last = sequence.tokens.len() - 1;
            batch.tokens.push(sequence.drafts.last().copied().unwrap_or_else(|| sequence.tokens.at(last)));
            batch.sequences.push(BatchSequence {
                first_row: row,
                rows: 1,
                first_position: last + sequence.drafts.len(),
                pages: sequence.tables.pages.clone(),
                local_pages: sequence.tables.locals.clone(),
                long_context: sequence.domain.long_context,
                drafted: 0,
            });
            batch.logit_rows.push(row as u32);
            let drawn = self.draw(sequence, sequence.drafts.len(), 1);
            let drawn = drawn.filter(|drawn| batch.draw_words() + drawn.words() <= MOST_DRAW_WORDS);
            guessing.drawn = drawn.is_some();
            // Whoever cannot be drawn, now or some tokens later, ends what a device does by itself.
            let more = 1..if guessing.drawn { batch.rounds } else { 0 };
            let can = |ahead: &usize| self.draw(sequence, sequence.drafts.len() + ahead, 1).is_some();
            batch.rounds = 1 + more.take_while(can).count();
            match drawn {
                Some(drawn) => drawn.silent().put(1, None, &mut batch),
                None => batch.draws.push(None),
            }
        }
        let empty = round.open.is_empty();
        self.draft_round = Some(round);
        (!empty).then_some(batch)
    }

    /// Takes the draft model's logits for the last [`Core::next_draft`]: (rows, vocabulary), or what the device chose and the logits of the
    /// other rows, as [`Core::commit_choices`], or its choices of several rounds. Rows that give no token end their sequence's guessing.
    pub fn commit_draft(&mut self, logits: &[f32], choices: &[Choice]) {
        let Some(round) = &mut self.draft_round else { return };
        let open = std::mem::take(&mut round.open);
        let mut next = Vec::with_capacity(open.len());
        let (mut rows, mut chosen) = (logits.chunks_exact(self.config.vocabulary), choices.iter());
        let (count, rounds) = (open.len(), choices.len() / open.len().max(1));
        for (place, guessing) in open.into_iter().enumerate() {
            let Guessing { id, mut left, drawn } = guessing;
            let first = match drawn && !choices.is_empty() {
                true => chosen.next().and_then(|choice| choice.token().ok()),
                false => rows.next().and_then(|logits| self.draft_token(id, logits)),
            };
            let later = (1..rounds).map(|round| choices[round * count + place].token().ok());
            for token in std::iter::once(first).chain(later) {
                let ends = |token| self.requests[&id.request].stop_tokens.binary_search(&token).is_ok();
                left = if token.is_none_or(ends) { 0 } else { left - 1 };
                self.sequences.get_mut(&id).expect("it was open").drafts.extend(token);
                if left == 0 {
                    break;
                }
            }
            if left > 0 {
                next.push(Guessing { left, ..guessing });
            }
        }
        self.draft_round = Some(DraftRound { open: next });
    }

    /// The draft model failed: what it guessed in this round is dropped, and the step is computed without.
    pub fn drop_drafts(&mut self) {
        self.sequences.values_mut().for_each(|sequence| sequence.drafts.clear());
        self.draft_round = Some(DraftRound { open: Vec::new() });
    }

    fn draft_token(&mut self, id: SequenceId, logits: &[f32]) -> Option<u32> {
        let request = &self.requests[&id.request];
        let params = request.params()?;
        let sequence = &self.sequences[&id];
        let ahead = sequence.drafts.len();
        let banned = request.banned(sequence.tokens.output.len() + ahead);
        let position = (sequence.tokens.len() + ahead) as u64;
        // Penalties do not see the drafts before: that can only make a draft wrong.
        self.sampler.sample(logits, params, &sequence.history, banned, sequence.seed, position).ok()
    }

    /// Decoding sequences in the order of their ranks, with as many drafts as rows, pages and their own ends allow.
    fn open_draft_round(&mut self) -> Vec<Guessing> {
        let decoding: Vec<SequenceId> = self
            .running
            .iter()
            .map(|rank| rank.id)
            .filter(|id| self.is_decoding(&self.sequences[id]))
            .collect();
        let mut rows = self.config.max_num_batched_tokens.saturating_sub(decoding.len());
        let mut logit_rows = self.config.logit_rows();
        let mut open = Vec::new();
        for id in decoding {
            let sequence = &self.sequences[&id];
            let reach = self.reach(sequence).saturating_sub(sequence.tokens.len());
            let wanted = self.draft_limit(sequence).min(rows).min(logit_rows).min(reach);
            if wanted > 0 {
                self.extend_pages(id, 1 + wanted);
                open.push(Guessing { id, left: wanted, drawn: false });
                (rows, logit_rows) = (rows - wanted, logit_rows - wanted);
            }
        }
        open
    }

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

    /// Drafts by prompt lookup, at most `limit`.
    pub(crate) fn look_up(&mut self, id: SequenceId, limit: usize) {
        if let Some(Speculation::Ngram { prompt_lookup_min, prompt_lookup_max, .. }) = self.config.speculation
        {
            let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
            sequence.drafts = lookup(&sequence.tokens, prompt_lookup_min, prompt_lookup_max, limit);
        }
    }
}

/// What followed the longest earlier occurrence of the last `least..=most` tokens, the latest among equals; at most `limit` tokens.
fn lookup(tokens: &Tokens, least: usize, most: usize, limit: usize) -> Vec<u32> {
    let len = tokens.len();
    let matching = |end: usize| {
        (0..most.min(end)).take_while(|&back| tokens.at(end - 1 - back) == tokens.at(len - 1 - back)).count()
    };
    let mut best = (0, 0);
    // `end` is where an earlier occurrence ends: at least one token follows it.
    for end in (least..len).rev() {
        let length = matching(end);
        if length >= least && length > best.0 {
            best = (length, end);
            if length == most {
                break;
            }
        }
    }
    let mut drafts = Vec::new();
    if let (1.., end) = best {
        // What follows may run into the end of the text: then the text is taken to repeat itself.
        for place in end..end + limit {
            drafts.push(if place < len { tokens.at(place) } else { drafts[place - len] });
        }
    }
    drafts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafts(prompt: &[u32], output: &[u32], least: usize, most: usize, limit: usize) -> Vec<u32> {
        lookup(&Tokens { prompt: prompt.into(), output: output.to_vec() }, least, most, limit)
    }

    #[test]
    fn lookup_continues_the_longest_then_latest_occurrence() {
        assert_eq!(drafts(&[1, 2, 3, 4, 9, 2, 3], &[], 1, 3, 2), [4, 9]);
        assert_eq!(drafts(&[1, 2, 3, 4, 7, 3, 5], &[2, 3], 1, 3, 4), [4, 7, 3, 5], "two tokens beat one");
        assert_eq!(drafts(&[3, 4, 3, 5], &[3], 1, 3, 4), [5, 3, 5, 3], "the latest among equals");
        assert_eq!(drafts(&[1, 2, 3], &[4], 1, 3, 4), []);
        assert_eq!(drafts(&[3, 4, 3], &[], 2, 3, 4), [], "one token is too few");
        assert_eq!(drafts(&[5, 6, 5, 6, 5], &[], 1, 2, 5), [6, 5, 6, 5, 6], "what repeats goes on repeating");
        assert_eq!(drafts(&[1], &[], 1, 3, 4), []);
    }
}
