//! How a device draws tokens itself: what `sampler.rs` does with a row of logits, as plain numbers, in the same order and with the same
//! random numbers, so that nobody can tell who drew.
//!
//! What changes single logits (biases, bans, penalties) is a list of tokens, kept with its sequence and extended by a token each step; where
//! the last token is not known yet (`ahead.rs`), the device adds it itself. Rows that need more than fits are left to the sampler.

use std::collections::HashMap;
use std::sync::Arc;

use crate::batch::Batch;
use crate::core::Core;
use crate::logprobs::TokenLogprob;
use crate::params::{SamplingParams, inverse_temperature};
use crate::request::Request;
use crate::sampler::{SampleError, TokenHistory};
use crate::sequence::Sequence;

/// Most likely tokens whose log-probabilities a device tells.
pub const MOST_LOGPROBS: u32 = 32;

/// Words of 32 bits that the changes ([`CHANGE_WORDS`] each) and masks of a step may take.
pub const MOST_DRAW_WORDS: usize = 1 << 20;

/// Words of one change, as a device reads it.
pub const CHANGE_WORDS: usize = 4;

/// How a row's token is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// Logits are multiplied by it; 0: the largest is taken, the lowest id among equals.
    pub inverse_temperature: f32,
    /// Tokens less likely than this part of the most likely one are impossible.
    pub min_p: f32,
    /// Of the others so many most likely ones are left; 0: all.
    pub top_k: u32,
    /// Of those, the fewest most likely ones that hold this share of their probability.
    pub top_p: f64,
    /// The completion's own seed.
    pub seed: u64,
    /// Position of the token; see [`crate::uniform`], whose draw 0 it is.
    pub position: u64,
    /// Divides positive and multiplies negative logits of tokens that were seen.
    pub repetition: f32,
    /// Subtracted once per time that a token was generated.
    pub frequency: f32,
    /// Subtracted from logits of tokens that were generated.
    pub presence: f32,
    /// The first of its changes in [`Batch::changes`], and how many.
    pub changes: (u32, u32),
    /// Where in [`Batch::allowed`] its mask begins, a bit for every token, the lowest first; none: all are allowed.
    pub allowed: Option<u32>,
    /// How many most likely tokens' log-probabilities are wanted, beside the chosen one's, at most [`MOST_LOGPROBS`].
    pub logprobs: Option<u32>,
    /// The step before chose a token, by this wanted row, that is not counted in the changes yet and must be.
    pub uncounted: Option<u32>,
}

/// What a device chose for a row that it drew.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// The token; -1 where a logit is NaN or infinite, -2 where none is left to choose from.
    pub token: i32,
    /// As the draw wants them: of the chosen token first, then of the most likely ones in order, each token once.
    pub logprobs: Option<Vec<TokenLogprob>>,
}

impl Choice {
    /// The token, or why there is none.
    pub(crate) fn token(&self) -> Result<u32, SampleError> {
        let failure = if self.token == -2 { SampleError::NothingLeft } else { SampleError::NoNumber };
        u32::try_from(self.token).map_err(|_| failure)
    }
}

/// What changes a token's logit before anything else is looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// The token.
    pub token: u32,
    /// Added first; minus infinity forbids the token.
    pub bias: f32,
    /// It stands in the prompt or was generated: the repetition penalty applies.
    pub seen: bool,
    /// How often it was generated.
    pub count: u32,
}

/// A sequence's changes.
#[derive(Debug)]
pub(crate) struct Changes {
    list: Vec<Change>,
    places: HashMap<u32, usize>,
    /// Stop tokens are forbidden now.
    bans: bool,
    counts: bool,
}

impl Changes {
    /// None where nothing is ever changed.
    pub fn new(request: &Request, history: &TokenHistory, generated: usize) -> Option<Self> {
        let params = request.params()?;
        let (banned, counts) = (request.banned(generated), params.has_penalties());
        if params.logit_bias.is_empty() && banned.is_empty() && !counts {
            return None;
        }
        let bans = !banned.is_empty();
        let mut changes = Self { list: Vec::new(), places: HashMap::new(), bans, counts };
        params.logit_bias.iter().for_each(|(&token, &bias)| changes.of(token).bias = bias);
        banned.iter().for_each(|&token| changes.of(token).bias = f32::NEG_INFINITY);
        history.prompt.iter().for_each(|&token| changes.of(token).seen = true);
        for (&token, &count) in &history.output {
            let change = changes.of(token);
            (change.seen, change.count) = (true, count);
        }
        Some(changes)
    }

    fn of(&mut self, token: u32) -> &mut Change {
        let place = *self.places.entry(token).or_insert_with(|| {
            self.list.push(Change { token, bias: 0.0, seen: false, count: 0 });
            self.list.len() - 1
        });
        &mut self.list[place]
    }

    /// A token was generated.
    pub fn count(&mut self, token: u32) {
        if self.counts {
            let change = self.of(token);
            (change.seen, change.count) = (true, change.count + 1);
        }
    }

    /// Whether stop tokens are still forbidden, or not, as they are now.
    pub fn holds(&self, banned: &[u32]) -> bool {
        self.bans != banned.is_empty()
    }
}

/// A bit for every token of a vocabulary, set where it is allowed.
pub(crate) fn mask(params: &SamplingParams, vocabulary: usize) -> Option<Arc<[u32]>> {
    let mut words = vec![0; vocabulary.div_ceil(32)];
    for &token in params.allowed_token_ids.as_ref()? {
        words[token as usize / 32] |= 1 << (token % 32);
    }
    Some(words.into())
}

/// A draw on its way into a batch.
pub(crate) struct Drawn<'a> {
    draw: Draw,
    changes: &'a [Change],
    allowed: Option<&'a Arc<[u32]>>,
}

impl Drawn<'_> {
    /// With log-probabilities of so many most likely tokens, or without.
    pub fn telling(mut self, logprobs: Option<u32>) -> Self {
        self.draw.logprobs = logprobs;
        self
    }

    /// Words that it takes beside the draw itself.
    pub fn words(&self) -> usize {
        self.changes.len() * CHANGE_WORDS + self.allowed.map_or(0, |mask| mask.len())
    }

    /// Puts `count` draws into a batch, of this position and those after it; with changes there can only be one.
    pub fn put(self, count: usize, uncounted: Option<u32>, batch: &mut Batch) {
        let Self { mut draw, changes, allowed } = self;
        draw.changes = (batch.changes.len() as u32, changes.len() as u32);
        batch.changes.extend_from_slice(changes);
        if let Some(mask) = allowed {
            draw.allowed = Some(batch.allowed.len() as u32);
            batch.allowed.extend_from_slice(mask);
        }
        draw.uncounted = uncounted;
        let first = draw.position;
        batch
            .draws
            .extend((0..count as u64).map(|place| Some(Draw { position: first + place, ..draw.clone() })));
    }
}

impl Core {
    /// How a device draws the token that comes `ahead` places after the next one of a sequence, whose row is one of `rows` that are drawn; none
    /// where the sampler must.
    pub(crate) fn draw<'a>(&'a self, sequence: &'a Sequence, ahead: usize, rows: usize) -> Option<Drawn<'a>> {
        let request = &self.requests[&sequence.id.request];
        let params = request.params()?;
        let banned = request.banned(sequence.tokens.output.len() + ahead);
        let changes = match &sequence.changes {
            // Each row of several would need changes of its own.
            Some(changes) => (rows == 1 && changes.holds(banned)).then_some(changes.list.as_slice())?,
            None => &[],
        };
        let draw = Draw {
            inverse_temperature: match params.temperature == 0.0 {
                true => 0.0,
                false => inverse_temperature(params.temperature),
            },
            min_p: params.min_p as f32,
            top_k: params.top_k,
            top_p: params.top_p,
            seed: sequence.seed,
            position: (sequence.tokens.len() + ahead) as u64,
            repetition: params.repetition_penalty as f32,
            frequency: params.frequency_penalty as f32,
            presence: params.presence_penalty as f32,
            changes: (0, 0),
            allowed: None,
            logprobs: params.logprobs,
            uncounted: None,
        };
        let told = params.logprobs.is_none_or(|count| count <= MOST_LOGPROBS);
        told.then_some(Drawn { draw, changes, allowed: request.allowed.as_ref() })
    }
}
