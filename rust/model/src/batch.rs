//! What a forward pass is asked to compute.

use infer_kernels::PAGE_TOKENS;

use crate::{ModelError, ModelSpec};

/// In [`BatchSequence::pages`]: no page. Its positions lie wholly before every layer's window.
pub const NO_PAGE: u32 = u32::MAX;

/// Rows of several sequences, to be computed together. Prefill, decode and verification differ only in row counts.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// One token id per row; the rows of a sequence are neighbours.
    pub tokens: &'a [u32],
    /// Which rows belong to whom. They cover all rows in order.
    pub sequences: &'a [BatchSequence<'a>],
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [u32],
}

/// The rows of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct BatchSequence<'a> {
    /// First row in the batch.
    pub first_row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Position of the first row in its sequence; all earlier positions are in the cache.
    pub first_position: usize,
    /// Pages of the sequence, enough for its last row; [`NO_PAGE`] for some of those that no row sees in any layer.
    pub pages: &'a [u32],
    /// Computed with the frequencies of long sequences.
    pub long_context: bool,
}

impl Batch<'_> {
    /// Checks that the batch fits the model and the cache, so that kernels may trust it.
    pub(crate) fn check(&self, spec: &ModelSpec, pages: usize) -> Result<(), ModelError> {
        let bad = |message: String| Err(ModelError::Request(message));
        if let Some(token) = self.tokens.iter().find(|token| **token as usize >= spec.vocabulary) {
            return bad(format!("token id {token} is outside the vocabulary of {} tokens", spec.vocabulary));
        }
        let mut next = 0;
        for sequence in self.sequences {
            if sequence.first_row != next || sequence.rows == 0 {
                return bad("the sequences of a batch must cover its rows in order".to_owned());
            }
            next += sequence.rows;
            let end = sequence.first_position + sequence.rows;
            if end > sequence.pages.len() * PAGE_TOKENS {
                return bad(format!("{} pages cannot hold {end} tokens", sequence.pages.len()));
            }
            let unseen = unseen_pages(spec, sequence.first_position);
            for (index, &page) in sequence.pages.iter().enumerate() {
                if page == NO_PAGE && index >= unseen {
                    return bad(format!("page {index} of a sequence is missing, but its rows see it"));
                }
                if page != NO_PAGE && page as usize >= pages {
                    return bad(format!("page {page} is outside the cache of {pages} pages"));
                }
            }
        }
        if next != self.tokens.len() {
            return bad(format!("the sequences cover {next} of {} rows", self.tokens.len()));
        }
        let ascending = self.logit_rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.logit_rows.last().is_some_and(|row| *row as usize >= self.tokens.len()) {
            return bad("logit rows must be ascending rows of the batch".to_owned());
        }
        Ok(())
    }

    /// (position, long context) of every row.
    pub(crate) fn positions(&self) -> impl Iterator<Item = (usize, bool)> + '_ {
        self.sequences.iter().flat_map(|sequence| {
            (0..sequence.rows).map(|row| (sequence.first_position + row, sequence.long_context))
        })
    }

    /// Slot in the cache of every row.
    pub(crate) fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.sequences.iter().flat_map(|sequence| {
            (0..sequence.rows).map(|row| {
                let position = sequence.first_position + row;
                sequence.pages[position / PAGE_TOKENS] * PAGE_TOKENS as u32 + (position % PAGE_TOKENS) as u32
            })
        })
    }
}

/// How many pages at the beginning of a sequence lie wholly before what rows from `first_position` on see in any layer.
fn unseen_pages(spec: &ModelSpec, first_position: usize) -> usize {
    spec.page_window().map_or(0, |window| (first_position + 1).saturating_sub(window) / PAGE_TOKENS)
}
