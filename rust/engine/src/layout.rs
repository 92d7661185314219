//! A batch as arrays of 32-bit integers, which is how a device without pointers of its own reads it.
//!
//! Rows and sequences may be padded to a count that the device prepared itself for (a captured graph). Padding belongs to no
//! sequence: its slot is -1, so that nothing is stored for it.

use crate::batch::Batch;

/// A number in the arrays that stands for none.
const NONE: i32 = -1;

impl Batch {
    /// Values that [`Batch::write_rows`] writes.
    #[must_use]
    pub fn row_values(rows: usize, sequences: usize) -> usize {
        6 * rows + sequences + 1
    }

    /// Writes, one array after the other, padded to `rows` rows and `sequences` sequences:
    ///
    /// ```text
    /// tokens (rows), positions (rows), slots (rows), rope_rows (rows), row_sequence (rows), logit_rows (rows), first_row (sequences + 1)
    /// ```
    ///
    /// A slot is `page * page_tokens + offset in the page`. A rope row is the position, plus `long_context_row` in sequences that use the
    /// long-context variant. Sequence `s` has the rows from `first_row[s]` to `first_row[s + 1]`.
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
        let (by_row, first_row) = out.split_at_mut(6 * rows);
        let mut arrays = by_row.chunks_exact_mut(rows.max(1));
        let mut array = |padding: i32| {
            let array = arrays.next().unwrap_or_default();
            array.fill(padding);
            array
        };
        let (tokens, positions, slots) = (array(0), array(0), array(NONE));
        let (rope_rows, row_sequence, logit_rows) = (array(0), array(NONE), array(0));
        copy(tokens, self.tokens.iter().map(|token| *token as usize));
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

    /// Writes what rows are drawn with, (rows) each, zeros where a row is not: seeds and positions (64 bits), inverse temperatures and `min_p`
    /// (32-bit floats), one after the other. Returns which of the wanted rows are drawn.
    ///
    /// # Errors
    /// An `out` that is not 24 bytes a row, or has fewer rows than are wanted.
    pub fn write_draws(&self, rows: usize, out: &mut [u8]) -> Result<Vec<bool>, String> {
        let wanted = self.logit_rows.len();
        if out.len() != 24 * rows || wanted > rows {
            return Err(format!("{wanted} draws do not fit {rows} rows and {} bytes", out.len()));
        }
        out.fill(0);
        let (seeds, rest) = out.split_at_mut(8 * rows);
        let (positions, rest) = rest.split_at_mut(8 * rows);
        let (temperatures, min_ps) = rest.split_at_mut(4 * rows);
        let mut drawn = vec![false; wanted];
        for (row, draw) in self.draws.iter().enumerate().filter_map(|(row, draw)| Some((row, draw.as_ref()?)))
        {
            seeds[8 * row..][..8].copy_from_slice(&draw.seed.to_le_bytes());
            positions[8 * row..][..8].copy_from_slice(&draw.position.to_le_bytes());
            temperatures[4 * row..][..4].copy_from_slice(&draw.inverse_temperature.to_le_bytes());
            min_ps[4 * row..][..4].copy_from_slice(&draw.min_p.to_le_bytes());
            drawn[row] = true;
        }
        Ok(drawn)
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
    use crate::batch::{BatchSequence, Draw};

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
            copies: Vec::new(),
            tokens: vec![7, 8, 9],
            sequences: vec![sequence(0, 1, 5, &[u32::MAX, 3], true), sequence(1, 2, 3, &[2, 6], false)],
            logit_rows: vec![0, 2],
            draws: Vec::new(),
        }
    }

    #[test]
    fn rows_are_laid_out_and_padded() {
        let mut out = vec![99; Batch::row_values(4, 3)];
        batch().write_rows(4, 3, 4, 100, &mut out).expect("fits");
        let expected: [&[i32]; 7] = [
            &[7, 8, 9, 0],
            &[5, 3, 4, 0],
            &[13, 11, 24, -1],
            &[105, 3, 4, 0],
            &[0, 1, 1, -1],
            &[0, 2, 0, 0],
            &[0, 1, 3, 3],
        ];
        assert_eq!(out, expected.concat());
        assert!(batch().write_rows(2, 3, 4, 0, &mut [0; 16]).is_err(), "too few rows");
        assert!(batch().write_rows(4, 3, 4, 0, &mut [0; 16]).is_err(), "too short");
    }

    #[test]
    fn draws_are_laid_out() {
        let draw = Draw { inverse_temperature: 2.0, min_p: 0.25, seed: 7, position: 9 };
        let batch = Batch { draws: vec![None, Some(draw)], ..batch() };
        let mut out = vec![99; 24 * 3];
        assert_eq!(batch.write_draws(3, &mut out), Ok(vec![false, true]));
        let mut expected = vec![0; 24 * 3];
        expected[8] = 7;
        expected[24 + 8] = 9;
        expected[48 + 4..48 + 8].copy_from_slice(&2.0_f32.to_le_bytes());
        expected[60 + 4..60 + 8].copy_from_slice(&0.25_f32.to_le_bytes());
        assert_eq!(out, expected);
        assert!(batch.write_draws(3, &mut [0; 71]).is_err());
        assert!(batch.write_draws(1, &mut [0; 24]).is_err());
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
