//! Tokens of a step drawn at once, by as many threads as the device computes with: a row of 128,000 logits takes a thread up to a
//! millisecond (`top_p` of a flat distribution), which with many rows is a large part of a step. A draw depends on its row and its own
//! sequence alone, so nobody can tell who drew, or when. (Llama 1B in Q4_0, 16 sequences, two threads: 439 tokens a second of 369 with
//! `top_p`, greedily no difference that can be measured; `benches/sampling.py`.)

use std::sync::{Mutex, OnceLock, PoisonError};

use crate::core::Core;
use crate::logprobs::TokenLogprob;
use crate::params::SamplingParams;
use crate::planted::{Bug, planted};
use crate::sampler::{SampleError, Sampler, TokenHistory};
use crate::sequence::{Sequence, SequenceId};

/// Computes so many tasks, by their numbers, in any order.
pub type ShareOut<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Sync));

/// What was drawn from a row.
pub(crate) type DrawnRow = (Result<u32, SampleError>, Option<Vec<TokenLogprob>>);

/// A row that gives its sequence one token.
struct Row<'a> {
    id: SequenceId,
    logits: &'a [f32],
    params: &'a SamplingParams,
    history: &'a TokenHistory,
    banned: &'a [u32],
    seed: u64,
    position: u64,
}

impl Row<'_> {
    fn draw(&self, sampler: &mut Sampler) -> DrawnRow {
        let token =
            sampler.sample(self.logits, self.params, self.history, self.banned, self.seed, self.position);
        let wanted = token.ok().zip(self.params.logprobs);
        (token, wanted.map(|(token, count)| sampler.logprobs(self.logits, token, count)))
    }
}

impl Core {
    /// Draws tokens from logits that are about to be committed, all of the batch's, where sequences have one row each: what
    /// [`Core::commit`] would draw, one after the other.
    pub fn draw_rows(&mut self, logits: &[f32], share_out: ShareOut<'_>) {
        self.drawn_rows.clear();
        let rows = self.single_rows(logits);
        if rows.len() < 2 {
            return;
        }
        let outcomes: Vec<OnceLock<DrawnRow>> = rows.iter().map(|_| OnceLock::new()).collect();
        let samplers = || self.samplers.lock().unwrap_or_else(PoisonError::into_inner);
        share_out(rows.len(), &|index| {
            let mut sampler = samplers().pop().unwrap_or_default();
            outcomes[index].get_or_init(|| rows[index].draw(&mut sampler));
            samplers().push(sampler);
        });
        let ids: Vec<SequenceId> = rows.iter().map(|row| row.id).collect();
        let drawn = ids.into_iter().zip(outcomes);
        self.drawn_rows = drawn.filter_map(|(id, outcome)| Some((id, outcome.into_inner()?))).collect();
    }

    fn single_rows<'a>(&'a self, logits: &'a [f32]) -> Vec<Row<'a>> {
        let (vocabulary, mut rest, mut rows) = (self.config.vocabulary, logits, Vec::new());
        for work in self.in_flight.front().into_iter().flat_map(|flight| &flight.scheduled) {
            let Some((own, others)) = rest.split_at_checked(work.logit_rows() * vocabulary) else { break };
            rest = others;
            let (Some(sequence), 1) = (self.sequences.get(&work.id), work.samples()) else { continue };
            let request = &self.requests[&work.id.request];
            if let Some(params) = request.params().filter(|_| sequence.drafts.is_empty()) {
                rows.push(Row {
                    id: work.id,
                    logits: &own[work.prompt_rows * vocabulary..],
                    params,
                    history: &sequence.history,
                    banned: request.banned(sequence.tokens.output.len()),
                    seed: sequence.seed,
                    position: self.draw_position(sequence),
                });
            }
        }
        rows
    }

    /// The position that a sequence's next token is drawn for.
    pub(crate) fn draw_position(&self, sequence: &Sequence) -> u64 {
        let steps = if planted(Bug::SampleDependsOnStep) { self.counters.steps } else { 0 };
        sequence.tokens.len() as u64 + steps
    }
}

/// Working memory of threads that draw.
pub(crate) type Samplers = Mutex<Vec<Sampler>>;
