//! A batch as arrays of 32-bit integers, which is how a device without pointers of its own reads it.
//!
//! Rows and sequences may be padded to a count that the device prepared itself for (a captured graph). Padding belongs to no
//! sequence: its slot is -1, so that nothing is stored for it.

use crate::batch::Batch;
use crate::draft_tree::MOST_BRANCHES;

/// A number in the arrays that stands for none.
const NONE: i32 = -1;

impl Batch {
    /// Values that [`Batch::write_rows`] writes.
    #[must_use]
    pub fn row_values(rows: usize, sequences: usize) -> usize {
        6 * rows + sequences + 1 + 2 * MOST_BRANCHES
    }

    /// Writes, one array after the other, padded to `rows` rows and `sequences` sequences:
    ///
    /// ```text
    /// tokens (rows), positions (rows), slots (rows), rope_rows (rows), row_sequence (rows), logit_rows (rows), first_row (sequences + 1),
    /// copies (MOST_BRANCHES, 2)
    /// ```
    ///
    /// A token that the step before chose is `-1 - place`, where that step's wanted row `place` chose it. A slot is `page * page_tokens + offset in the page`. A rope row is the position, plus `long_context_row` in sequences that use the
    /// long-context variant. Sequence `s` has the rows from `first_row[s]` to `first_row[s + 1]`.
    /// Copies, from and to, are padded with -1, and are none if there are more than fit.
    ///
    /// # Errors
    /// Counts that are smaller than the batch's, or an `out` of another length.
    pub fn write_rows(
        &self,
        rows: usize,
        sequences: usize,
        page_tokens: usize,
        long_context_row: usize,
        out: &mut [i32],
    ) -> Result<(), String> {
        let (own_rows, own) = (self.tokens.len(), self.sequences.len());
        if own_rows > rows || own > sequences || out.len() != Self::row_values(rows, sequences) {
            return Err(format!(
                "{own_rows} rows of {own} sequences do not fit {rows} rows, {sequences} sequences and {} values",
                out.len()
            ));
        }
        let (by_row, rest) = out.split_at_mut(6 * rows);
        let (first_row, copies) = rest.split_at_mut(sequences + 1);
        copies.fill(NONE);
        if self.copies.len() <= MOST_BRANCHES {
            copy(copies, self.copies.iter().flat_map(|(from, to)| [from.page as usize, to.page as usize]));
        }
        let mut arrays = by_row.chunks_exact_mut(rows.max(1));
        let mut array = |padding: i32| {
            let array = arrays.next().unwrap_or_default();
            array.fill(padding);
            array
        };
        let (tokens, positions, slots) = (array(0), array(0), array(NONE));
        let (rope_rows, row_sequence, logit_rows) = (array(0), array(NONE), array(0));
        copy(tokens, self.tokens.iter().map(|token| *token as usize));
        for &(row, place) in &self.follows {
            tokens[row as usize] = !(place as i32);
        }
        copy(logit_rows, self.logit_rows.iter().map(|row| *row as usize));
        first_row.fill(own_rows as i32);
        for (index, sequence) in self.sequences.iter().enumerate() {
            let (first, position) = (sequence.first_row, sequence.first_position);
            let range = first..first + sequence.rows;
            let rope_row = position + if sequence.long_context { long_context_row } else { 0 };
            first_row[index] = first as i32;
            copy(&mut positions[range.clone()], position..position + sequence.rows);
            copy(&mut rope_rows[range.clone()], rope_row..rope_row + sequence.rows);
            row_sequence[range.clone()].fill(index as i32);
            let slot = |at: usize| sequence.pages[at / page_tokens] as usize * page_tokens + at % page_tokens;
            copy(&mut slots[range], (position..position + sequence.rows).map(slot));
        }
        Ok(())
    }

    /// Pages of the sequence that has the most.
    #[must_use]
    pub fn most_pages(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.pages.len()).max().unwrap_or(0)
    }

    /// Rows of the sequence that has the most.
    #[must_use]
    pub fn most_rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.rows).max().unwrap_or(0)
    }

    /// Pieces of `pages` pages that the rows of decoding sequences, those of at most `most_rows` rows, would read if each row read
    /// alone: no fewer than a device makes that lets rows of a sequence share pieces.
    #[must_use]
    pub fn decode_pieces(&self, pages: usize, most_rows: usize) -> usize {
        let decoding = self.sequences.iter().filter(|sequence| sequence.rows <= most_rows);
        decoding.map(|sequence| sequence.rows * sequence.pages.len().div_ceil(pages.max(1))).sum()
    }

    /// Writes each sequence's pages at the beginning of its row of `table`, (sequences, stride); what follows them is left as it is.
    /// Pages that there are none of are -1.
    ///
    /// # Errors
    /// A table that is too small.
    pub fn write_pages(&self, stride: usize, table: &mut [i32]) -> Result<(), String> {
        let most = self.most_pages();
        if most > stride || table.len() < self.sequences.len() * stride {
            return Err(format!(
                "{} sequences of up to {most} pages do not fit a table of {} pages, {stride} a sequence",
                self.sequences.len(),
                table.len()
            ));
        }
        for (sequence, row) in self.sequences.iter().zip(table.chunks_exact_mut(stride.max(1))) {
            row.iter_mut().zip(&sequence.pages).for_each(|(place, page)| *place = *page as i32);
        }
        Ok(())
    }
}

fn copy(array: &mut [i32], values: impl Iterator<Item = usize>) {
    array.iter_mut().zip(values).for_each(|(place, value)| *place = value as i32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::BatchSequence;
    use crate::tables::PageRef;

    fn batch() -> Batch {
        let sequence = |first_row, rows, first_position, pages: &[u32], long_context| BatchSequence {
            first_row,
            rows,
            first_position,
            pages: pages.to_vec(),
            local_pages: Vec::new(),
            long_context,
            drafted: 0,
        };
        Batch {
            tokens: vec![7, 8, 9],
            sequences: vec![sequence(0, 1, 5, &[u32::MAX, 3], true), sequence(1, 2, 3, &[2, 6], false)],
            logit_rows: vec![0, 2],
            follows: vec![(2, 5)],
            copies: vec![(PageRef::new(4, u32::MAX), PageRef::new(6, u32::MAX))],
            ..Batch::default()
        }
    }

    #[test]
    fn rows_are_laid_out_and_padded() {
        let mut out = vec![99; Batch::row_values(4, 3)];
        batch().write_rows(4, 3, 4, 100, &mut out).expect("fits");
        let expected: [&[i32]; 7] = [
            &[7, 8, -6, 0],
            &[5, 3, 4, 0],
            &[13, 11, 24, -1],
            &[105, 3, 4, 0],
            &[0, 1, 1, -1],
            &[0, 2, 0, 0],
            &[0, 1, 3, 3],
        ];
        let (arrays, copies) = out.split_at(28);
        assert_eq!(arrays, expected.concat());
        assert_eq!((copies.len(), &copies[..4]), (2 * MOST_BRANCHES, &[4, 6, -1, -1][..]));
        let many = Batch { copies: batch().copies.repeat(MOST_BRANCHES + 1), ..batch() };
        many.write_rows(4, 3, 4, 100, &mut out).expect("fits");
        assert!(out[28..].iter().all(|&page| page == -1), "more copies than fit");
        assert!(batch().write_rows(2, 3, 4, 0, &mut [0; 16]).is_err(), "too few rows");
        assert!(batch().write_rows(4, 3, 4, 0, &mut [0; 16]).is_err(), "too short");
    }

    #[test]
    fn pages_are_laid_out() {
        let mut table = vec![99; 6];
        batch().write_pages(3, &mut table).expect("fits");
        assert_eq!(table, [-1, 3, 99, 2, 6, 99]);
        assert_eq!((batch().most_rows(), batch().decode_pieces(1, 2)), (2, 6));
        assert_eq!((batch().decode_pieces(2, 2), batch().decode_pieces(1, 1)), (3, 2));
        assert!(batch().write_pages(1, &mut table).is_err());
        assert!(batch().write_pages(3, &mut table[..5]).is_err());
    }
}
