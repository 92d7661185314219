//! Draws and choices as a device of plain arrays reads and writes them: cuda/sampler.cu has the same structures.

use crate::batch::Batch;
use crate::draw::{Choice, Draw, MOST_LOGPROBS};
use crate::logprobs::TokenLogprob;

/// Bytes of a draw.
pub const DRAW_BYTES: usize = 72;

/// 32-bit values in which a device tells the log-probabilities of a row: the chosen token's and its rank, then tokens, then their
/// log-probabilities.
pub const LOGPROB_VALUES: usize = 2 + 2 * MOST_LOGPROBS as usize;

/// What the draws of a step need a device to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrawKind {
    /// Take the largest logits, or nothing.
    Greedy = 0,
    /// Draw, of all tokens or of some, by their logits as they are.
    Sampled = 1,
    /// Change logits before, or tell log-probabilities afterwards.
    Full = 2,
}

impl Draw {
    fn kind(&self) -> DrawKind {
        if self.changes.1 > 0 || self.uncounted.is_some() || self.logprobs.is_some() {
            DrawKind::Full
        } else if self.inverse_temperature != 0.0 || self.allowed.is_some() {
            DrawKind::Sampled
        } else {
            DrawKind::Greedy
        }
    }

    /// Its 72 bytes, little-endian: 64-bit seed, position and `top_p`; floats inverse temperature and `min_p`; `top_k`; floats repetition,
    /// frequency and presence; first change, changes, first word of the mask (where `masks` is all masks' first) or -1, log-probabilities or -1, row of the step before whose
    /// token is to be counted or -1, and nothing.
    fn bytes(&self, masks: u32) -> [u8; DRAW_BYTES] {
        let or_none = |value: Option<u32>| value.unwrap_or(u32::MAX);
        let longs = [self.seed, self.position, self.top_p.to_bits()];
        let words = [
            self.inverse_temperature.to_bits(),
            self.min_p.to_bits(),
            self.top_k,
            self.repetition.to_bits(),
            self.frequency.to_bits(),
            self.presence.to_bits(),
            self.changes.0,
            self.changes.1,
            or_none(self.allowed.map(|first| masks + first)),
            or_none(self.logprobs),
            or_none(self.uncounted),
            0,
        ];
        let mut bytes = [0; DRAW_BYTES];
        let (first, rest) = bytes.split_at_mut(24);
        first
            .chunks_exact_mut(8)
            .zip(longs)
            .for_each(|(out, value)| out.copy_from_slice(&value.to_le_bytes()));
        rest.chunks_exact_mut(4).zip(words).for_each(|(out, word)| out.copy_from_slice(&word.to_le_bytes()));
        bytes
    }
}

/// A row that is drawn greedily, and of which nobody asks.
const NOTHING: Draw = Draw {
    inverse_temperature: 0.0,
    min_p: 0.0,
    top_k: 0,
    top_p: 1.0,
    seed: 0,
    position: 0,
    repetition: 1.0,
    frequency: 0.0,
    presence: 0.0,
    changes: (0, 0),
    allowed: None,
    logprobs: None,
    uncounted: None,
};

impl Batch {
    /// What a device has to do for all draws.
    #[must_use]
    pub fn draw_kind(&self) -> DrawKind {
        self.draws.iter().flatten().map(Draw::kind).max().unwrap_or(DrawKind::Greedy)
    }

    /// For each of the wanted rows, whether a device draws it.
    #[must_use]
    pub fn drawn(&self) -> Vec<bool> {
        let mut drawn: Vec<bool> = self.draws.iter().map(Option::is_some).collect();
        drawn.resize(self.logit_rows.len(), false);
        drawn
    }

    /// Writes how wanted rows are drawn, [`DRAW_BYTES`] each, padded to `rows`; and the words that they refer to: changes, of four words
    /// each (token, bias, twice the count plus whether it was seen, and one that the device uses), then masks. Returns how many
    /// words there are.
    ///
    /// # Errors
    /// An `out` that is not of so many rows, fewer rows than are wanted, or words that do not fit.
    pub fn write_draws(&self, rows: usize, out: &mut [u8], words: &mut [u32]) -> Result<usize, String> {
        let (wanted, needed) = (self.logit_rows.len(), self.draw_words());
        if out.len() != DRAW_BYTES * rows || wanted > rows || needed > words.len() {
            return Err(format!(
                "{wanted} draws with {needed} words do not fit {rows} rows, {} bytes and {} words",
                out.len(),
                words.len()
            ));
        }
        let draws = self.draws.iter().map(|draw| draw.as_ref().unwrap_or(&NOTHING));
        let draws = draws.chain(std::iter::repeat(&NOTHING));
        let before = needed - self.allowed.len();
        let rows = out.chunks_exact_mut(DRAW_BYTES).zip(draws);
        rows.for_each(|(out, draw)| out.copy_from_slice(&draw.bytes(before as u32)));
        let (changes, masks) = words.split_at_mut(before);
        for (out, change) in changes.chunks_exact_mut(4).zip(&self.changes) {
            let seen = change.count << 1 | u32::from(change.seen);
            out.copy_from_slice(&[change.token, change.bias.to_bits(), seen, 0]);
        }
        masks[..self.allowed.len()].copy_from_slice(&self.allowed);
        Ok(needed)
    }

    /// What a device chose, of a token for every wanted row and, where some draw wants them, [`LOGPROB_VALUES`] values for every wanted row.
    ///
    /// # Errors
    /// Fewer values, or a count that is not what was asked for.
    pub fn read_choices(&self, tokens: &[i32], logprobs: &[i32]) -> Result<Vec<Choice>, String> {
        let mut choices = Vec::new();
        for (row, draw) in self.draws.iter().enumerate() {
            let Some(draw) = draw else { continue };
            let token = *tokens.get(row).ok_or("a choice is missing")?;
            let values = logprobs.get(row * LOGPROB_VALUES..(row + 1) * LOGPROB_VALUES);
            let told = match draw.logprobs.filter(|_| token >= 0) {
                Some(count) => {
                    Some(read_logprobs(token, count, values.ok_or("log-probabilities are missing")?))
                }
                None => None,
            };
            choices.push(Choice { token, logprobs: told });
        }
        Ok(choices)
    }
}

/// The chosen token first, then those of the most likely ones that it is not.
fn read_logprobs(chosen: i32, count: u32, values: &[i32]) -> Vec<TokenLogprob> {
    let float = |value: i32| f32::from_bits(value.cast_unsigned());
    let entry = |token: i32, logprob, rank| TokenLogprob { token: token.cast_unsigned(), logprob, rank };
    let (tokens, likelihoods) = values[2..].split_at(MOST_LOGPROBS as usize);
    let first = entry(chosen, float(values[0]), values[1].cast_unsigned());
    let others = tokens.iter().zip(likelihoods).zip(1..=count).filter(|((token, _), _)| **token != chosen);
    let others = others.map(|((token, value), rank)| entry(*token, float(*value), rank));
    std::iter::once(first).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draw::Change;

    #[test]
    fn draws_are_laid_out() {
        let draw = Draw { top_p: 0.5, seed: 7, changes: (1, 2), allowed: Some(0), ..NOTHING };
        let change = |token, count| Change { token, bias: 1.0, seen: count > 0, count };
        let batch = Batch {
            logit_rows: vec![0, 2],
            draws: vec![None, Some(draw)],
            changes: vec![change(9, 0), change(5, 3)],
            allowed: vec![0xF0],
            ..Batch::default()
        };
        let (mut out, mut words) = (vec![99; DRAW_BYTES * 3], vec![99; 10]);
        assert_eq!(batch.write_draws(3, &mut out, &mut words), Ok(9));
        assert_eq!(words[..9], [9, 1.0_f32.to_bits(), 0, 0, 5, 1.0_f32.to_bits(), 7, 0, 0xF0]);
        assert_eq!(out[..DRAW_BYTES], NOTHING.bytes(8));
        assert_eq!(out[DRAW_BYTES], 7);
        assert_eq!(out[DRAW_BYTES + 16..][..8], 0.5_f64.to_le_bytes());
        assert_eq!(out[DRAW_BYTES + 48..][..16], [1, 0, 0, 0, 2, 0, 0, 0, 8, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!((batch.drawn(), batch.draw_kind()), (vec![false, true], DrawKind::Full));
        assert!(batch.write_draws(3, &mut out, &mut [0; 8]).is_err(), "too few words");
        assert!(batch.write_draws(1, &mut [0; DRAW_BYTES], &mut words).is_err(), "too few rows");
    }

    #[test]
    fn choices_are_read() {
        let wanting = Draw { logprobs: Some(2), ..NOTHING };
        let batch = Batch { draws: vec![Some(NOTHING), None, Some(wanting)], ..Batch::default() };
        let mut logprobs = vec![0; 3 * LOGPROB_VALUES];
        let own = &mut logprobs[2 * LOGPROB_VALUES..];
        let float = |value: f32| value.to_bits().cast_signed();
        own[..4].copy_from_slice(&[float(-2.0), 2, 6, 4]);
        own[2 + MOST_LOGPROBS as usize..][..2].copy_from_slice(&[float(-1.0), float(-2.0)]);
        let choices = batch.read_choices(&[3, 0, 4], &logprobs).expect("all is there");
        assert_eq!(choices[0], Choice { token: 3, logprobs: None });
        let entry = |token, logprob, rank| TokenLogprob { token, logprob, rank };
        assert_eq!(choices[1].logprobs, Some(vec![entry(4, -2.0, 2), entry(6, -1.0, 1)]));
        assert!(batch.read_choices(&[3, 0], &logprobs).is_err());
        assert!(batch.read_choices(&[3, 0, 4], &[]).is_err());
    }
}
