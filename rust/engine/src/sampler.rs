//! From one row of logits to one token, in vLLM's published order:
//!
//! 1. a NaN or +inf anywhere, or no finite logit at all, fails the request
//! 2. `allowed_token_ids`
//! 3. `min_tokens` (stop tokens become impossible), `logit_bias`
//! 4. `repetition_penalty`, then `frequency_penalty`, `presence_penalty`
//! 5. temperature 0: the largest logit, lowest id among equals; else logits / `temperature`
//! 6. `min_p`, then `top_k` (exactly k: lower ids win ties), then `top_p` over what is left, renormalized
//! 7. one draw keyed by (seed, position), turned into a token by inverting the cumulative distribution
//!
//! A row is never sorted whole: candidates are selected in growing portions until the cut is known.

use std::collections::{HashMap, HashSet};

use thiserror::Error;

use crate::logprobs::keep_most_likely;
use crate::params::SamplingParams;
use crate::random::uniform;

/// Why a row of logits gives no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SampleError {
    /// The model's numbers overflowed.
    #[error(
        "the model computed a NaN or infinite logit for token {token}; its weights or this dtype overflow (try dtype=\"float32\")"
    )]
    NotFinite {
        /// The first such token.
        token: usize,
    },
    /// Nothing is left to choose from.
    #[error("no token is left to choose from after allowed_token_ids, min_tokens and logit_bias")]
    NothingLeft,
}

/// What the penalties know about a sequence.
#[derive(Debug, Clone, Default)]
pub struct TokenHistory {
    /// Tokens of the prompt; kept only when there is a repetition penalty.
    pub prompt: HashSet<u32>,
    /// How often each token was generated.
    pub output: HashMap<u32, u32>,
}

/// Working memory of sampling, reused from row to row.
#[derive(Debug, Default)]
pub struct Sampler {
    logits: Vec<f32>,
    candidates: Vec<(u32, f32)>,
    pub(crate) scratch: Vec<(u32, f32)>,
}

/// How many candidates are looked at first when only `top_p` cuts.
const FIRST_PORTION: usize = 256;

impl Sampler {
    /// Chooses the token at `position` of a sequence.
    ///
    /// `logits`: (vocabulary). `banned` tokens are impossible (stop tokens before `min_tokens`). `seed` is the completion's own.
    ///
    /// # Errors
    /// See [`SampleError`].
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        history: &TokenHistory,
        banned: &[u32],
        seed: u64,
        position: u64,
    ) -> Result<u32, SampleError> {
        check(logits)?;
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        restrict(&mut self.logits, params, banned);
        penalize(&mut self.logits, params, history);
        let best = argmax(&self.logits).ok_or(SampleError::NothingLeft)?;
        if params.temperature == 0.0 {
            return Ok(best);
        }
        let largest = f64::from(self.logits[best as usize]);
        let draw = uniform(seed, position, 0);
        let weight = |logit: f32| ((f64::from(logit) - largest) / params.temperature).exp();
        if params.min_p == 0.0 && params.top_k == 0 && params.top_p == 1.0 {
            let total: f64 = self.logits.iter().map(|&logit| weight(logit)).sum();
            let all = self.logits.iter().enumerate().map(|(id, &logit)| (id as u32, weight(logit)));
            return Ok(invert(all, draw * total).unwrap_or(best));
        }
        self.select(params, &weight);
        let total: f64 = self.candidates.iter().map(|&(_, logit)| weight(logit)).sum();
        let chosen = self.candidates.iter().map(|&(id, logit)| (id, weight(logit)));
        Ok(invert(chosen, draw * total).unwrap_or(best))
    }

    /// Leaves in `candidates` what min_p, top_k and top_p leave.
    fn select(&mut self, params: &SamplingParams, weight: &impl Fn(f32) -> f64) {
        self.candidates.clear();
        let possible = self.logits.iter().enumerate().map(|(id, &logit)| (id as u32, logit));
        // The most likely token weighs 1, so min_p bounds the weights themselves; -inf never passes.
        self.candidates.extend(possible.filter(|&(_, l)| l > f32::NEG_INFINITY && weight(l) >= params.min_p));
        if params.top_k > 0 {
            keep_most_likely(&mut self.candidates, params.top_k as usize);
        }
        if params.top_p < 1.0 {
            self.keep_top_p(params.top_p, weight);
        }
    }

    fn keep_top_p(&mut self, top_p: f64, weight: &impl Fn(f32) -> f64) {
        let total: f64 = self.candidates.iter().map(|&(_, logit)| weight(logit)).sum();
        let mut portion = FIRST_PORTION;
        loop {
            self.scratch.clone_from(&self.candidates);
            keep_most_likely(&mut self.scratch, portion);
            let mut sum = 0.0;
            let reached = self.scratch.iter().position(|&(_, logit)| {
                sum += weight(logit);
                sum >= top_p * total
            });
            if let Some(last) = reached {
                self.scratch.truncate(last + 1);
            } else if self.scratch.len() < self.candidates.len() {
                portion *= 8;
                continue;
            }
            std::mem::swap(&mut self.candidates, &mut self.scratch);
            return;
        }
    }
}

/// Refuses NaN and +inf; -inf is a model's way to forbid a token.
pub(crate) fn check(logits: &[f32]) -> Result<(), SampleError> {
    // The fold has no branch, so it vectorizes; the position is looked for only in the bad case.
    let fine = logits.iter().fold(true, |fine, &logit| fine & (logit < f32::INFINITY));
    if fine {
        return Ok(());
    }
    let token = logits.iter().position(|&logit| logit.is_nan() || logit == f32::INFINITY).unwrap_or(0);
    Err(SampleError::NotFinite { token })
}

fn restrict(logits: &mut [f32], params: &SamplingParams, banned: &[u32]) {
    if let Some(allowed) = &params.allowed_token_ids {
        let kept: Vec<(u32, f32)> = allowed.iter().map(|&token| (token, logits[token as usize])).collect();
        logits.fill(f32::NEG_INFINITY);
        for (token, logit) in kept {
            logits[token as usize] = logit;
        }
    }
    for &token in banned {
        logits[token as usize] = f32::NEG_INFINITY;
    }
    for (&token, &bias) in &params.logit_bias {
        logits[token as usize] += bias;
    }
}

fn penalize(logits: &mut [f32], params: &SamplingParams, history: &TokenHistory) {
    let repetition = params.repetition_penalty as f32;
    if repetition != 1.0 {
        let generated = history.output.keys().filter(|token| !history.prompt.contains(token));
        for &token in history.prompt.iter().chain(generated) {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        }
    }
    let (frequency, presence) = (params.frequency_penalty as f32, params.presence_penalty as f32);
    if frequency != 0.0 || presence != 0.0 {
        for (&token, &count) in &history.output {
            logits[token as usize] -= frequency * count as f32 + presence;
        }
    }
}

/// The largest logit's token, lowest id among equals; none if all are -inf or a penalty overflowed.
fn argmax(logits: &[f32]) -> Option<u32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !largest.is_finite() {
        return None;
    }
    logits.iter().position(|&logit| logit == largest).map(|token| token as u32)
}

/// The first token at which the running sum of weights exceeds `target`.
fn invert(weights: impl Iterator<Item = (u32, f64)>, target: f64) -> Option<u32> {
    let mut sum = 0.0;
    let mut last = None;
    for (token, weight) in weights {
        sum += weight;
        if weight > 0.0 {
            last = Some(token);
        }
        if sum > target {
            return Some(token);
        }
    }
    last // rounding left the sum just below the target
}
