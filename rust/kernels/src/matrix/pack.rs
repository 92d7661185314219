//! From rows as they lie in a file to panels, in parallel, straight into the final buffer.

use super::integer::STEPS;
use super::interleave::InterleavePanel;
use super::round::WeightRounding;
use super::{Layout, PackedMatrix, coded};
use crate::quant::{BlockQ4_0, BlockQ8_0};
use crate::simd::{LANES, prefetch_later};
use crate::{Context, Format, Isa, KernelError};
use half::f16;
use std::ops::Range;
use std::sync::Mutex;

/// Bytes per row, once everything is proven to fit.
pub(super) fn check(format: Format, columns: usize, rows: &[&[u8]]) -> Result<usize, KernelError> {
    let Some(row_bytes) = format.row_bytes(columns) else {
        let expected = format!("a multiple of {} for {}", format.block_len(), format.name());
        return Err(KernelError::Size { what: "number of columns", actual: columns, expected });
    };
    match rows.iter().find(|row| row.len() != row_bytes) {
        Some(row) => {
            let expected = format!("{row_bytes} bytes for {columns} columns of {}", format.name());
            Err(KernelError::Size { what: "size of a row", actual: row.len(), expected })
        }
        None => Ok(row_bytes),
    }
}

/// Whoever holds the rows that are packed: a mapped file is read, and let go of, a piece at a time.
pub trait RowHolder: Sync {
    /// These rows are packed next, by the thread that calls.
    fn begin(&self, _rows: &[&[u8]]) {}
    /// They are packed, and not read again.
    fn end(&self, _rows: &[&[u8]]) {}
}

/// Rows that are in memory anyway.
impl RowHolder for () {}

/// Bytes of rows in a piece, about.
const PIECE: usize = 1 << 20;
/// Pieces for each thread, at least: so many that all are busy to the end.
const PIECES: usize = 4;

/// Writes every panel, its rows rounded first if that is wished for.
pub(super) fn fill(
    context: &Context,
    matrix: &mut PackedMatrix,
    rows: &[&[u8]],
    rounding: Option<&WeightRounding>,
    holder: &dyn RowHolder,
) {
    let row_bytes = rows.first().map_or(0, |row| row.len());
    fill_by(context, matrix, (rows.len(), row_bytes), rounding, |piece, pack| {
        let rows = &rows[piece];
        holder.begin(rows);
        pack(rows);
        holder.end(rows);
    });
}

/// The same for `rows`, so many of so many bytes, which `give` hands over: it is called for each piece, by the thread that packs it.
pub(super) fn fill_by(
    context: &Context,
    matrix: &mut PackedMatrix,
    (rows, row_bytes): (usize, usize),
    rounding: Option<&WeightRounding>,
    give: impl Fn(Range<usize>, &mut dyn FnMut(&[&[u8]])) + Sync,
) {
    let layout = matrix.layout;
    let panel_bytes = matrix.groups() * layout.group_bytes();
    let scale_bytes = matrix.panel_scale_bytes();
    if panel_bytes == 0 || rows == 0 {
        return;
    }
    let fair = rows.div_ceil(LANES * PIECES * context.pool.threads());
    let panels = (PIECE / (LANES * row_bytes).max(1)).clamp(1, fair);
    let weights = matrix.weights.as_mut_slice().chunks_mut(panels * panel_bytes);
    let mut scales = matrix.scales.as_mut_slice().chunks_mut((panels * scale_bytes).max(1));
    // One lock per piece costs nothing beside packing it, and keeps this file free of `unsafe`.
    let pieces: Vec<_> =
        weights.map(|weights| Mutex::new((weights, scales.next().unwrap_or_default()))).collect();
    context.pool.run(pieces.len(), |index| {
        let mut piece = pieces[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (weights, scales) = &mut *piece;
        let first = index * panels * LANES;
        give(first..rows.min(first + panels * LANES), &mut |rows| {
            fill_each(context.isa, layout, (panel_bytes, scale_bytes), rows, rounding, weights, scales);
        });
    });
}

/// Writes the first `panels` panels of a matrix's memory, which were zeros.
pub(super) fn fill_panels(isa: Isa, matrix: &mut PackedMatrix, panels: usize, rows: &[&[u8]]) {
    let panel_bytes = matrix.groups() * matrix.layout.group_bytes();
    let scale_bytes = matrix.panel_scale_bytes();
    let weights = &mut matrix.weights.as_mut_slice()[..panels * panel_bytes];
    let scales = &mut matrix.scales.as_mut_slice()[..panels * scale_bytes];
    if panel_bytes > 0 {
        fill_each(isa, matrix.layout, (panel_bytes, scale_bytes), rows, None, weights, scales);
    }
}

fn fill_each(
    isa: Isa,
    layout: Layout,
    (panel_bytes, scale_bytes): (usize, usize),
    rows: &[&[u8]],
    rounding: Option<&WeightRounding>,
    weights: &mut [u8],
    scales: &mut [u8],
) {
    let mut scales = scales.chunks_exact_mut(scale_bytes.max(1));
    for (weights, rows) in weights.chunks_exact_mut(panel_bytes).zip(rows.chunks(LANES)) {
        fill_panel(isa, layout, rows, rounding, weights, scales.next().unwrap_or_default());
    }
}

/// Writes one panel, which was zeros.
fn fill_panel(
    isa: Isa,
    layout: Layout,
    rows: &[&[u8]],
    rounding: Option<&WeightRounding>,
    weights: &mut [u8],
    scales: &mut [u8],
) {
    let rounded = rounding.map(|rounding| rounding.rows(rows));
    let own: Vec<&[u8]> = match &rounded {
        Some(bytes) => bytes.chunks_exact(bytes.len() / rows.len()).collect(),
        None => rows.to_vec(),
    };
    let rows = own.as_slice();
    match (layout, rows.try_into()) {
        (Layout::Coded(format), _) => coded::pack(isa, format, rows, weights, scales),
        (_, Ok(rows)) if InterleavePanel::knows(layout) => {
            isa.dispatch(InterleavePanel { layout, rows, weights, scales });
        }
        _ => fill_words(layout, rows, weights, scales),
    }
    if matches!(layout, Layout::Int4) {
        write_units(scales);
    }
}

/// Writes what the scales of a panel of Int4 are counted in, after them.
fn write_units(scales: &mut [u8]) {
    let Some((scales, units)) = scales.split_last_chunk_mut::<{ 4 * LANES }>() else { return };
    let mut greatest = [0; LANES];
    for scales in scales.as_chunks::<{ 2 * LANES }>().0 {
        for (greatest, scale) in greatest.iter_mut().zip(scales.as_chunks::<2>().0) {
            // As integers, magnitudes are ordered alike and a NaN is the greatest of all.
            *greatest = (*greatest).max(u16::from_le_bytes(*scale) & 0x7fff);
        }
    }
    for (unit, greatest) in units.as_chunks_mut::<4>().0.iter_mut().zip(greatest) {
        *unit = (f16::from_bits(greatest).to_f32() / STEPS).to_le_bytes();
    }
}

/// Writes one panel, which was zeros, word by word: any number of rows.
pub(super) fn fill_words(layout: Layout, rows: &[&[u8]], weights: &mut [u8], scales: &mut [u8]) {
    match layout {
        Layout::F32 => interleave::<4>(rows, weights),
        Layout::F16 => interleave::<2>(rows, weights),
        Layout::Bf16 => interleave_pairs(rows, weights),
        Layout::Int8 => pack_int8(rows, weights, scales),
        Layout::Int4 => pack_int4(rows, weights, scales),
        Layout::Coded(_) => unreachable!("a layout with a way of its own"),
    }
}

/// Asks for bytes of the row that is in this one's place in the next panel, if rows lie one after the other, as they do mostly:
/// rows are too short, and too many at a time, for the hardware to do that. (Loading files of 4 to 8 bits: 3 to 15 %.)
#[inline(always)]
pub(super) fn ask_ahead(row: &[u8], at: usize, bytes: usize) {
    let first = row.as_ptr().wrapping_add(LANES * row.len() + at);
    for line in 0..bytes.div_ceil(64) {
        prefetch_later(first.wrapping_add(line * 64));
    }
}

/// Bytes of a row that are read at a time: with 16 rows, source and destination stay in the L1 cache.
const BLOCK: usize = 256;

/// Elements of `SIZE` bytes, one after the other, 16 lanes apart.
fn interleave<const SIZE: usize>(rows: &[&[u8]], weights: &mut [u8]) {
    for (block, weights) in weights.chunks_mut(BLOCK * LANES).enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            ask_ahead(row, block * BLOCK, BLOCK);
            let row = &row[row.len().min(block * BLOCK)..row.len().min((block + 1) * BLOCK)];
            let slots = weights.as_chunks_mut::<SIZE>().0.iter_mut().skip(lane).step_by(LANES);
            slots.zip(row.as_chunks::<SIZE>().0).for_each(|(slot, element)| *slot = *element);
        }
    }
}

/// Elements of 2 bytes, two to a lane; the second of the last pair may be missing.
fn interleave_pairs(rows: &[&[u8]], weights: &mut [u8]) {
    interleave::<4>(rows, weights);
    for (lane, row) in rows.iter().enumerate() {
        let (pairs, last) = row.as_chunks::<4>();
        if !last.is_empty() {
            weights[(pairs.len() * LANES + lane) * 4..][..last.len()].copy_from_slice(last);
        }
    }
}

/// One group of a panel: a word of four bytes per step and lane.
fn write_words<const STEPS: usize>(words: [u32; STEPS], lane: usize, weights: &mut [u8]) {
    for (step, word) in weights.as_chunks_mut::<64>().0.iter_mut().zip(words) {
        step.as_chunks_mut::<4>().0[lane] = word.to_le_bytes();
    }
}

fn pack_int8(rows: &[&[u8]], weights: &mut [u8], scales: &mut [u8]) {
    weights.fill(0x80); // lanes without a row hold zeros
    let groups = weights.as_chunks_mut::<512>().0.iter_mut().zip(scales.as_chunks_mut::<32>().0);
    for (group, (weights, scales)) in groups.enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            ask_ahead(row, group * 34, 34);
            let block = BlockQ8_0::from_bytes(&row.as_chunks().0[group]);
            scales.as_chunks_mut::<2>().0[lane] = block.scale;
            let four = |step: usize| u32::from_le_bytes(block.quants.as_chunks::<4>().0[step]) ^ 0x8080_8080;
            write_words::<8>(std::array::from_fn(four), lane, weights);
        }
    }
}

fn pack_int4(rows: &[&[u8]], weights: &mut [u8], scales: &mut [u8]) {
    weights.fill(0x88); // lanes without a row hold zeros
    let groups = weights.as_chunks_mut::<256>().0.iter_mut().zip(scales.as_chunks_mut::<32>().0);
    for (group, (weights, scales)) in groups.enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            ask_ahead(row, group * 18, 18);
            let block = BlockQ4_0::from_bytes(&row.as_chunks().0[group]);
            scales.as_chunks_mut::<2>().0[lane] = block.scale;
            // Weights 0..16 are the low nibbles of the file's bytes, weights 16..32 the high ones.
            let [a, b, c, d] =
                std::array::from_fn(|i| u32::from_le_bytes(block.quants.as_chunks::<4>().0[i]));
            let low = |first: u32, second: u32| first & 0x0f0f_0f0f | (second & 0x0f0f_0f0f) << 4;
            let high = |first: u32, second: u32| first >> 4 & 0x0f0f_0f0f | second & 0xf0f0_f0f0;
            write_words([low(a, b), low(c, d), high(a, b), high(c, d)], lane, weights);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::sample_rows;
    use std::sync::PoisonError;

    /// Every row it was told of, at the begin and at the end.
    #[derive(Default)]
    struct Recorder(Mutex<[Vec<usize>; 2]>);

    impl Recorder {
        fn keep(&self, which: usize, rows: &[&[u8]]) {
            let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            seen[which].extend(rows.iter().map(|row| row.as_ptr().addr()));
        }
    }

    impl RowHolder for Recorder {
        fn begin(&self, rows: &[&[u8]]) {
            self.keep(0, rows);
        }
        fn end(&self, rows: &[&[u8]]) {
            self.keep(1, rows);
        }
    }

    #[test]
    fn a_holder_is_told_of_each_row_once_and_pieces_change_nothing() {
        let columns = 4096;
        for (format, to) in [(Format::Q8_0, None), (Format::F32, None), (Format::F32, Some(Format::Q4_0))] {
            let rows = sample_rows(format, 333, columns); // more than a piece of floats
            let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
            let pack = |threads: usize, holder: &dyn RowHolder| {
                let context = Context::new(threads).expect("threads");
                match to {
                    None => PackedMatrix::pack(&context, format, columns, &rows, holder),
                    Some(to) => PackedMatrix::round(&context, format, to, columns, &rows, holder),
                }
                .expect("packs")
            };
            let mut addresses: Vec<usize> = rows.iter().map(|row| row.as_ptr().addr()).collect();
            addresses.sort_unstable();
            let alone = pack(1, &());
            for threads in [1, 3] {
                let recorder = Recorder::default();
                let matrix = pack(threads, &recorder);
                assert!(matrix.parts() == alone.parts(), "{format:?}");
                for mut seen in recorder.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
                    seen.sort_unstable();
                    assert_eq!(seen, addresses, "{format:?}, {threads} threads");
                }
            }
        }
    }
}
