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
//! A row is never sorted whole (`cut.rs`), and its passes are vectorized (`vector.rs`).

use std::collections::{HashMap, HashSet};

use thiserror::Error;

use crate::cut::{Candidate, Cutter};
use crate::logprobs::{Scratch, TokenLogprob, token_logprobs};
use crate::params::{SamplingParams, inverse_temperature};
use crate::random::uniform;
use crate::vector::{all_below_infinity, exponentials, first_maximum, sum};

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
    /// A device that chose by itself says so.
    #[error(
        "the model computed a NaN or infinite logit; its weights or this dtype overflow (try dtype=\"float32\")"
    )]
    NoNumber,
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
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
    cutter: Cutter,
    scratch: Scratch,
}

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
        let Some((mut first, mut largest)) = first_maximum(logits) else { return Err(not_finite(logits)) };
        let mut row = logits;
        if !banned.is_empty() || params.changes_logits() {
            self.logits.clear();
            self.logits.extend_from_slice(logits);
            restrict(&mut self.logits, params, banned);
            penalize(&mut self.logits, params, history);
            row = &self.logits;
            (first, largest) = first_maximum(row).ok_or(SampleError::NothingLeft)?;
        }
        if !largest.is_finite() {
            return Err(SampleError::NothingLeft);
        }
        if params.temperature == 0.0 {
            return Ok(first as u32);
        }
        let scale = inverse_temperature(params.temperature);
        exponentials(row, largest, scale, &mut self.weights);
        let draw = uniform(seed, position, 0);
        let chosen = if params.min_p == 0.0 && params.top_k == 0 && params.top_p == 1.0 {
            pick(&self.weights, draw)
        } else {
            self.pick_among_the_likely(params, draw)
        };
        Ok(chosen.unwrap_or(first as u32))
    }

    /// Log-probabilities of the chosen token and of the `count` most likely ones, as outputs have them.
    pub fn logprobs(&mut self, logits: &[f32], chosen: u32, count: u32) -> Vec<TokenLogprob> {
        token_logprobs(logits, chosen, count, &mut self.scratch)
    }

    fn pick_among_the_likely(&mut self, params: &SamplingParams, draw: f64) -> Option<u32> {
        // The most likely token weighs 1, so min_p bounds the weights themselves.
        let least = (params.min_p as f32).max(f32::MIN_POSITIVE);
        self.candidates.clear();
        let all = self.weights.iter().enumerate();
        self.candidates.extend(all.filter(|(_, w)| **w >= least).map(|(id, &weight)| (id as u32, weight)));
        if params.top_k > 0 {
            self.cutter.keep_top_k(&mut self.candidates, params.top_k as usize);
        }
        if params.top_p < 1.0 {
            self.cutter.keep_top_p(&mut self.candidates, params.top_p);
        }
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|&(_, weight)| weight));
        let place = pick(&self.weights, draw)?;
        Some(self.candidates[place as usize].0)
    }
}

/// Refuses NaN and +inf; -inf is a model's way to forbid a token.
pub(crate) fn check(logits: &[f32]) -> Result<(), SampleError> {
    if all_below_infinity(logits) { Ok(()) } else { Err(not_finite(logits)) }
}

fn not_finite(logits: &[f32]) -> SampleError {
    let token = logits.iter().position(|&logit| logit.is_nan() || logit == f32::INFINITY).unwrap_or(0);
    SampleError::NotFinite { token }
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

/// Entries that are summed at once before the drawn one is looked for among them.
const BLOCK: usize = 1024;

/// Inverts the cumulative distribution: the first place at which the running sum of weights exceeds `draw` of the total.
fn pick(weights: &[f32], draw: f64) -> Option<u32> {
    let mut left = draw * weights.chunks(BLOCK).map(sum).sum::<f64>();
    let mut last = None;
    for (block, chunk) in weights.chunks(BLOCK).enumerate() {
        let mass = sum(chunk);
        if mass <= left {
            left -= mass;
        } else {
            for (place, &weight) in chunk.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
                last = Some((block * BLOCK + place) as u32);
                left -= f64::from(weight);
                if left < 0.0 {
                    return last;
                }
            }
        }
    }
    // Rounding can leave a crumb after the drawn block's last weight.
    last.or_else(|| weights.iter().rposition(|&weight| weight > 0.0).map(|place| place as u32))
}
