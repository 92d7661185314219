//! Tokens of a step drawn at once, and log-probabilities of prompts computed, by as many threads as the device computes with: a row of
//! 128,000 logits takes a thread up to a millisecond (`top_p` of a flat distribution), which with many rows is a large part of a step.
//! A draw depends on its row and its own sequence alone, so nobody can tell who drew, or when. (Llama 1B in Q4_0, 16 sequences, two
//! threads: 439 tokens a second of 369 with `top_p`, greedily no difference that can be measured; `benches/sampling.py`.)

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::core::Core;
use crate::logprobs::TokenLogprob;
use crate::params::SamplingParams;
use crate::planted::{Bug, planted};
use crate::sampler::{SampleError, Sampler, TokenHistory, check};
use crate::sequence::{Sequence, SequenceId};

/// Computes so many tasks, by their numbers, in any order.
pub type ShareOut<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Sync));

/// What was drawn from a row.
pub(crate) type DrawnRow = (Result<u32, SampleError>, Option<Vec<TokenLogprob>>);

/// The log-probabilities of a prompt's token.
pub(crate) type PromptLogprobs = Result<Vec<TokenLogprob>, SampleError>;

/// What was drawn and computed before a step is committed.
#[derive(Debug, Default)]
pub(crate) struct DrawnRows {
    pub tokens: HashMap<SequenceId, DrawnRow>,
    pub prompts: HashMap<SequenceId, Vec<PromptLogprobs>>,
}

/// Working memory of threads that draw.
pub(crate) type Samplers = Mutex<Vec<Sampler>>;

/// A row that gives its sequence a token.
pub(crate) struct Row<'a> {
    id: SequenceId,
    logits: &'a [f32],
    params: &'a SamplingParams,
    history: &'a TokenHistory,
    banned: &'a [u32],
    seed: u64,
    position: u64,
}

impl Row<'_> {
    pub fn draw(&self, sampler: &mut Sampler) -> DrawnRow {
        let token =
            sampler.sample(self.logits, self.params, self.history, self.banned, self.seed, self.position);
        let wanted = token.ok().zip(self.params.logprobs);
        (token, wanted.map(|(token, count)| sampler.logprobs(self.logits, token, count)))
    }
}

/// A row of a prompt, the token behind it, and how many others are wanted.
pub(crate) struct PromptRow<'a> {
    id: SequenceId,
    logits: &'a [f32],
    token: u32,
    count: u32,
}

impl PromptRow<'_> {
    pub fn logprobs(&self, sampler: &mut Sampler) -> PromptLogprobs {
        check(self.logits)?;
        Ok(sampler.logprobs(self.logits, self.token, self.count))
    }
}

impl Core {
    /// Draws tokens from logits that are about to be committed, all of the batch's, where sequences have one row each, and computes what
    /// is wanted of prompts: what [`Core::commit`] would do, one after the other.
    pub fn draw_rows(&mut self, logits: &[f32], share_out: ShareOut<'_>) {
        self.drawn = DrawnRows::default();
        let (rows, prompts) = self.rows_in_flight(logits);
        if rows.len() + prompts.len() < 2 {
            return;
        }
        let drawn: Vec<OnceLock<DrawnRow>> = rows.iter().map(|_| OnceLock::new()).collect();
        let told: Vec<OnceLock<PromptLogprobs>> = prompts.iter().map(|_| OnceLock::new()).collect();
        let samplers = || self.samplers.lock().unwrap_or_else(PoisonError::into_inner);
        let compute = |index: usize| {
            let mut sampler = samplers().pop().unwrap_or_default();
            match index.checked_sub(rows.len()) {
                None => drop(drawn[index].set(rows[index].draw(&mut sampler))),
                Some(index) => drop(told[index].set(prompts[index].logprobs(&mut sampler))),
            }
            samplers().push(sampler);
        };
        share_out(rows.len() + prompts.len(), &compute);
        let mut all = DrawnRows::default();
        for (row, drawn) in rows.iter().zip(drawn) {
            all.tokens.extend(drawn.into_inner().map(|drawn| (row.id, drawn)));
        }
        for (row, told) in prompts.iter().zip(told) {
            all.prompts.entry(row.id).or_default().extend(told.into_inner());
        }
        self.drawn = all;
    }

    fn rows_in_flight<'a>(&'a self, logits: &'a [f32]) -> (Vec<Row<'a>>, Vec<PromptRow<'a>>) {
        let (vocabulary, mut rest) = (self.config.vocabulary, logits);
        let (mut rows, mut prompts) = (Vec::new(), Vec::new());
        for work in self.in_flight.front().into_iter().flat_map(|flight| &flight.scheduled) {
            let Some((own, others)) = rest.split_at_checked(work.logit_rows() * vocabulary) else { break };
            rest = others;
            let Some(sequence) = self.sequences.get(&work.id) else { continue };
            let (prompt, sampled) = own.split_at(work.prompt_rows * vocabulary);
            prompts.extend(self.rows_of_prompt(work.id, prompt));
            if work.samples() == 1 && sequence.drafts.is_empty() {
                rows.extend(self.row_of(work.id, sampled));
            }
        }
        (rows, prompts)
    }

    /// A row that gives a sequence its next token; none if nobody wants one of it.
    pub(crate) fn row_of<'a>(&'a self, id: SequenceId, logits: &'a [f32]) -> Option<Row<'a>> {
        let (request, sequence) = (&self.requests[&id.request], &self.sequences[&id]);
        Some(Row {
            id,
            logits,
            params: request.params()?,
            history: &sequence.history,
            banned: request.banned(sequence.tokens.output.len()),
            seed: sequence.seed,
            position: self.draw_position(sequence),
        })
    }

    /// The next rows of a prompt, none of them delivered yet; none if their logits themselves are wanted.
    pub(crate) fn rows_of_prompt<'a>(&'a self, id: SequenceId, logits: &'a [f32]) -> Vec<PromptRow<'a>> {
        let request = &self.requests[&id.request];
        let Some(params) = request.params() else { return Vec::new() };
        let count = params.prompt_logprobs.unwrap_or(0);
        let tokens = request.prompt.iter().skip(self.sequences[&id].delivered + 1);
        let rows = logits.chunks_exact(self.config.vocabulary).zip(tokens);
        rows.map(|(logits, &token)| PromptRow { id, logits, token, count }).collect()
    }

    /// The position that a sequence's next token is drawn for.
    fn draw_position(&self, sequence: &Sequence) -> u64 {
        let steps = if planted(Bug::SampleDependsOnStep) { self.counters.steps } else { 0 };
        sequence.tokens.len() as u64 + steps
    }
}
