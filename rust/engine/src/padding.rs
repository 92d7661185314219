//! What a step is padded to for a device that prepares itself for steps of few sizes (a captured graph for each).
//!
//! Steps of decoding, in which every row's logits are wanted and sequences have a few rows each, are padded finely; others, which hold
//! prompts, by a thirty-second or so.

use crate::batch::Batch;

/// Most rows of a step of decoding that a device prepares itself for.
const MOST_DECODE_ROWS: usize = 512;

/// Most rows with logits of other steps that a device prepares itself for.
const MOST_PROMPT_WANTED: usize = 256;

/// Larger steps with prompts are padded to a multiple of so many rows, and the engine cuts them to one: `EngineConfig::row_unit`.
pub const PROMPT_ROW_UNIT: usize = 64;

/// What a device's steps are bounded by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeLimits {
    /// Most rows.
    pub rows: usize,
    /// Most sequences.
    pub sequences: usize,
    /// Most rows with logits.
    pub wanted: usize,
    /// Most pieces that the attention of decoding is divided into, or none: there is always room.
    pub pieces: Option<usize>,
    /// Pages of a piece.
    pub piece_pages: usize,
    /// Most rows that a decoding sequence has.
    pub decode_rows: usize,
    /// Whether the device prepares itself at all.
    pub is_captured: bool,
}

/// What a step is padded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepSize {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Rows with logits.
    pub wanted: usize,
    /// No sequence has more rows than one that decodes.
    pub only_decode: bool,
    /// There is no room for the pieces of its attention.
    pub is_plain: bool,
    /// Steps of this size are worth a preparation.
    pub is_captured: bool,
}

/// The fields of a [`StepSize`], in their order.
pub type SizeFields = (usize, usize, usize, bool, bool, bool);

impl From<StepSize> for SizeFields {
    fn from(size: StepSize) -> Self {
        let StepSize { rows, sequences, wanted, only_decode, is_plain, is_captured } = size;
        (rows, sequences, wanted, only_decode, is_plain, is_captured)
    }
}

impl From<SizeFields> for StepSize {
    fn from((rows, sequences, wanted, only_decode, is_plain, is_captured): SizeFields) -> Self {
        Self { rows, sequences, wanted, only_decode, is_plain, is_captured }
    }
}

/// The size that a count of decoding rows or sequences is padded to: a power of two up to 8, then a multiple of 8, 16 or 32.
#[must_use]
pub fn padded(count: usize) -> usize {
    match count {
        0..=8 => count.max(1).next_power_of_two(),
        9..=64 => count.next_multiple_of(8),
        65..=256 => count.next_multiple_of(16),
        _ => count.next_multiple_of(32),
    }
}

/// The rows that a step with prompts is padded to: few sizes, and few rows for nothing where rows cost time. Steps that the engine cuts
/// for their time (`EngineConfig::whole_rows`) are of such sizes already.
fn padded_prompt(count: usize) -> usize {
    match count {
        0..=64 => count.next_power_of_two().max(16),
        65..=1024 => count.next_multiple_of(PROMPT_ROW_UNIT),
        _ => count.next_multiple_of((count.next_power_of_two() >> 5).max(128)),
    }
}

/// A power of four: what such a step's sequences, and its rows with logits, are padded to.
fn padded_widely(count: usize) -> usize {
    if count < 2 { count } else { 1 << count.next_power_of_two().ilog2().next_multiple_of(2) }
}

impl Batch {
    /// What the step is padded to.
    #[must_use]
    pub fn size(&self, limits: &SizeLimits) -> StepSize {
        let (rows, sequences, wanted) = (self.tokens.len(), self.sequences.len(), self.logit_rows.len());
        let only_decode = self.most_rows() <= limits.decode_rows;
        let pieces = || self.decode_pieces(limits.piece_pages, limits.decode_rows);
        let is_plain = limits.pieces.is_some_and(|most| pieces() > most);
        let is_captured = limits.is_captured && !is_plain;
        let as_it_is = StepSize { rows, sequences, wanted, only_decode, is_plain, is_captured: false };
        if only_decode && wanted == rows {
            let (size, sequences) = (padded(rows), padded(sequences));
            let most = MOST_DECODE_ROWS.min(limits.wanted).min(limits.rows);
            return match is_captured && size <= most && sequences <= limits.sequences {
                true => StepSize { rows: size, sequences, wanted: size, is_captured, ..as_it_is },
                false => as_it_is,
            };
        }
        let size = padded_prompt(rows).min(limits.rows);
        if is_plain || wanted > MOST_PROMPT_WANTED {
            return StepSize { rows: size, ..as_it_is };
        }
        let sequences = padded_widely(sequences).min(limits.sequences);
        // Nearly as many as sequences, where it is more than one, and nearly free: one size for both.
        let wanted = match wanted {
            0 | 1 => wanted,
            _ => sequences.min(MOST_PROMPT_WANTED).max(padded_widely(wanted)).min(limits.wanted).min(size),
        };
        StepSize { rows: size, sequences, wanted, only_decode: false, is_plain, is_captured }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::BatchSequence;

    const LIMITS: SizeLimits = SizeLimits {
        rows: 2048,
        sequences: 64,
        wanted: 512,
        pieces: Some(100),
        piece_pages: 4,
        decode_rows: 8,
        is_captured: true,
    };

    /// A step of sequences with so many rows and pages each, of the last of which so many have logits.
    fn batch(sequences: &[(usize, usize)], wanted: usize) -> Batch {
        let mut batch = Batch::default();
        for &(rows, pages) in sequences {
            batch.sequences.push(BatchSequence {
                first_row: batch.tokens.len(),
                rows,
                first_position: 0,
                pages: vec![0; pages],
                local_pages: Vec::new(),
                long_context: false,
                drafted: 0,
            });
            batch.tokens.resize(batch.tokens.len() + rows, 0);
        }
        let rows = batch.tokens.len() as u32;
        batch.logit_rows = (rows - wanted as u32..rows).collect();
        batch
    }

    fn shape(size: StepSize) -> (usize, usize, usize, bool) {
        (size.rows, size.sequences, size.wanted, size.is_captured)
    }

    #[test]
    fn decoding_is_padded_finely() {
        let sizes = [1, 2, 3, 5, 8, 9, 64, 65, 257].map(padded);
        assert_eq!(sizes, [1, 2, 4, 8, 8, 16, 64, 80, 288]);
        assert_eq!(shape(batch(&[(1, 1); 3], 3).size(&LIMITS)), (4, 4, 4, true));
        assert_eq!(shape(batch(&[(3, 1); 3], 9).size(&LIMITS)), (16, 4, 16, true), "with drafts");
        assert_eq!(shape(batch(&[(1, 1); 65], 65).size(&LIMITS)), (65, 65, 65, false), "too many sequences");
        let plain = batch(&[(1, 400), (1, 4)], 2).size(&LIMITS);
        assert_eq!((shape(plain), plain.is_plain), ((2, 2, 2, false), true), "too many pieces");
        let unbounded = SizeLimits { pieces: None, ..LIMITS };
        assert_eq!(shape(batch(&[(1, 400), (1, 4)], 2).size(&unbounded)), (2, 2, 2, true));
        let eager = SizeLimits { is_captured: false, ..LIMITS };
        assert_eq!(shape(batch(&[(1, 1); 3], 3).size(&eager)), (3, 3, 3, false));
    }

    #[test]
    fn prompts_are_padded_to_few_sizes() {
        assert_eq!([1, 17, 65, 1025, 5000].map(padded_prompt), [16, 32, 128, 1152, 5120]);
        assert_eq!([0, 1, 2, 4, 5, 17].map(padded_widely), [0, 1, 4, 4, 16, 64]);
        let size = batch(&[(100, 7)], 1).size(&LIMITS);
        assert_eq!((shape(size), size.only_decode), ((128, 1, 1, true), false));
        assert_eq!(shape(batch(&[(100, 7), (1, 1), (1, 1)], 3).size(&LIMITS)), (128, 4, 4, true));
        assert_eq!(shape(batch(&[(100, 7)], 0).size(&LIMITS)), (128, 1, 0, true));
        assert_eq!(
            shape(batch(&[(2000, 130)], 300).size(&LIMITS)),
            (2048, 1, 300, false),
            "logits of prompts"
        );
    }

    #[test]
    fn steps_that_the_engine_cuts_are_not_padded() {
        for rows in 512..=8192_usize {
            let step = 1 << (rows.ilog2() - 3);
            let cut = rows / step * step;
            assert_eq!(padded_prompt(cut), cut);
        }
    }
}
