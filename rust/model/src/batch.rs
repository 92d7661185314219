//! What a forward pass is asked to compute.

use std::ops::Range;

use infer_kernels::{AttentionRows, PAGE_TOKENS};

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
    /// In a split cache the same for the layers that see only a window: as many entries, [`NO_PAGE`] for some of those that no row sees
    /// in such a layer. Else empty.
    pub local_pages: &'a [u32],
    /// Computed with the frequencies of long sequences.
    pub long_context: bool,
}

impl BatchSequence<'_> {
    /// Checks a table of a cache with so many pages, in layers that see at most `window` positions.
    fn check_table(&self, table: &[u32], pages: usize, window: Option<usize>) -> Result<(), ModelError> {
        let bad = |message: String| Err(ModelError::Request(message));
        let end = self.first_position + self.rows;
        if end > table.len() * PAGE_TOKENS {
            return bad(format!("{} pages cannot hold {end} tokens", table.len()));
        }
        let unseen =
            window.map_or(0, |window| (self.first_position + 1).saturating_sub(window) / PAGE_TOKENS);
        for (index, &page) in table.iter().enumerate() {
            if page == NO_PAGE && index >= unseen {
                return bad(format!("page {index} of a sequence is missing, but its rows see it"));
            }
            if page != NO_PAGE && page as usize >= pages {
                return bad(format!("page {page} is outside the cache of {pages} pages"));
            }
        }
        Ok(())
    }

    /// Some of its rows as attention takes them, in the layers that see only a window or in the others.
    pub(crate) fn attention(&self, rows: Range<usize>, local: bool) -> AttentionRows<'_> {
        let end = self.first_position + rows.end;
        AttentionRows {
            first_row: self.first_row + rows.start,
            rows: rows.len(),
            first_position: self.first_position + rows.start,
            pages: &self.table(local)[..end.div_ceil(PAGE_TOKENS)],
        }
    }

    /// Its pages in the layers that see only a window, if `local` says so, or in the others.
    pub(crate) fn table(&self, local: bool) -> &[u32] {
        if local { self.local_pages } else { self.pages }
    }
}

impl Batch<'_> {
    /// Checks that the batch fits the model and the cache, so that kernels may trust it.
    pub(crate) fn check(
        &self,
        spec: &ModelSpec,
        (pages, local_pages): (usize, Option<usize>),
    ) -> Result<(), ModelError> {
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
            sequence.check_table(sequence.pages, pages, spec.page_window())?;
            if let Some(pages) = local_pages {
                sequence.check_table(sequence.local_pages, pages, spec.layer_window())?;
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

    /// Neighbouring rows whose logits are wanted: whose they are, and which of its rows.
    pub(crate) fn wanted_runs(&self) -> impl Iterator<Item = (&BatchSequence<'_>, Range<usize>)> + '_ {
        let runs = self.logit_rows.chunk_by(|row, next| row + 1 == *next);
        runs.flat_map(|run| {
            let (first, end) = (run[0] as usize, run[0] as usize + run.len());
            let from = self.sequences.partition_point(|own| own.first_row + own.rows <= first);
            self.sequences[from..].iter().take_while(move |own| own.first_row < end).map(move |own| {
                let rows = first.max(own.first_row)..end.min(own.first_row + own.rows);
                (own, rows.start - own.first_row..rows.end - own.first_row)
            })
        })
    }

    /// (position, long context) of every row.
    pub(crate) fn positions(&self) -> impl Iterator<Item = (usize, bool)> + '_ {
        self.sequences.iter().flat_map(|sequence| {
            (0..sequence.rows).map(|row| (sequence.first_position + row, sequence.long_context))
        })
    }

    /// Slot in the cache of every row, in the layers that see only a window or in the others; none without a table of them.
    pub(crate) fn slots(&self, local: bool) -> impl Iterator<Item = u32> + '_ {
        let tabled = self.sequences.iter().filter(move |sequence| !sequence.table(local).is_empty());
        tabled.flat_map(move |sequence| {
            (0..sequence.rows).map(move |row| {
                let position = sequence.first_position + row;
                sequence.table(local)[position / PAGE_TOKENS] * PAGE_TOKENS as u32
                    + (position % PAGE_TOKENS) as u32
            })
        })
    }
}
