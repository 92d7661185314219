//! The layout of grouped formats: codes of 4, 5 or 6 bits, and scales as the format has them, so that a matrix takes
//! about the room of its file and loses nothing.
//!
//! 32 columns of a panel are four lines of 64 bytes with the codes' low 4 bits, as in Int4, and then their upper bits:
//! one line whose bytes hold a fifth bit for each of eight steps of four columns, or two lines whose bytes hold two upper
//! bits for each of four steps.
//!
//! The scales of a panel are a list of records of 16 rows: a unit for each row in 16 bits, a unit of minima if the format
//! has them, and where units are counted in steps, for each of the record's eight groups a byte per row: the step of the
//! first half, of the second one if it has its own, and the same for minima.

mod exact;
mod kernel;
mod planes;
mod record;
mod scales;
mod unpack;

pub(super) use exact::{unpack_groups, unpack_lane};
pub(crate) use kernel::CodedLinear;
pub(super) use scales::{load_drops, load_steps, load_units, record_of};
pub(super) use unpack::{Book, Five, Nibbles, Six, Unpack, line};

use super::GROUP;
use super::pack::ask_ahead;
use crate::Isa;
use crate::quant::{Blocks, Codes, Group, Grouped, Scales};
use crate::simd::LANES;
use planes::PlanePanel;

/// Groups in a record whose units are counted in steps.
const SPAN: usize = 8;

/// Bytes of 32 columns of a panel.
pub(super) const fn group_bytes(codes: Codes) -> usize {
    match codes {
        Codes::Nibbles(_) | Codes::Book(_) => 256,
        Codes::Five(_) => 256 + 64,
        Codes::Six(_) => 256 + 128,
    }
}

/// Bytes of scales per group of a panel: a record's share.
pub(super) const fn scale_bytes(scales: Scales) -> usize {
    let (span, record) = record(scales);
    record / span
}

/// Groups in a record. Activations have a scale for as many columns, as in llama.cpp, whose blocks of K-quants meet blocks
/// of 256 activations: a sum is multiplied with it once per record.
pub(super) const fn span(scales: Scales) -> usize {
    record(scales).0
}

/// Groups and bytes of a record.
const fn record(scales: Scales) -> (usize, usize) {
    match scales {
        Scales::Half | Scales::Brain => (1, 2 * LANES),
        Scales::Shared => (4, 2 * LANES),
        Scales::HalfMinimum => (1, 4 * LANES),
        Scales::Steps { halves } => (SPAN, 2 * LANES + SPAN * LANES * parts(halves)),
        Scales::StepsDrops { halves } => (SPAN, 4 * LANES + SPAN * 2 * LANES * parts(halves)),
    }
}

const fn parts(halves: bool) -> usize {
    if halves { 2 } else { 1 }
}

/// Parts of a group that have scales of their own.
pub(super) const fn parts_of(scales: Scales) -> usize {
    parts(scales.has_halves())
}

/// What must be added to codes to make them integers again.
pub(super) const fn offset(codes: Codes) -> i32 {
    match codes {
        Codes::Nibbles(offset) | Codes::Five(offset) | Codes::Six(offset) => -(offset as i32),
        Codes::Book(_) => -128, // of the bytes that codes stand for
    }
}

/// The bytes that codes stand for: integers offset by 128.
pub(super) const fn table(codes: Codes) -> [u8; 16] {
    let mut bytes = [0; 16];
    if let Codes::Book(integers) = codes {
        let mut code = 0;
        while code < 16 {
            bytes[code] = integers[code] as u8 ^ 0x80;
            code += 1;
        }
    }
    bytes
}

/// Bits of the upper bits of codes, after the low 4.
const fn upper_bits(codes: Codes) -> usize {
    match codes {
        Codes::Nibbles(_) | Codes::Book(_) => 0,
        Codes::Five(_) => 1,
        Codes::Six(_) => 2,
    }
}

/// Writes a panel, which was zeros; rows that are missing stay so.
pub(super) fn pack(isa: Isa, format: &Grouped, rows: &[&[u8]], weights: &mut [u8], scales: &mut [u8]) {
    match (&format.blocks.planes, rows.try_into()) {
        (Some(planes), Ok(rows)) => isa.dispatch(PlanePanel { format, planes, rows, weights, scales }),
        _ => pack_rows(format, rows, weights, scales),
    }
}

/// The same row by row: any format and number of rows.
fn pack_rows(format: &Grouped, rows: &[&[u8]], weights: &mut [u8], scales: &mut [u8]) {
    match upper_bits(format.codes) {
        0 => pack_codes::<0>(format, rows, weights, scales),
        1 => pack_codes::<1>(format, rows, weights, scales),
        _ => pack_codes::<2>(format, rows, weights, scales),
    }
}

/// The same with so many upper bits; each kind of scales is compiled for itself.
fn pack_codes<const UPPER: usize>(format: &Grouped, rows: &[&[u8]], weights: &mut [u8], scales: &mut [u8]) {
    let blocks = &format.blocks;
    let pack = match format.scales {
        Scales::Half | Scales::Brain => pack_blocks::<UPPER, PLAIN>,
        Scales::Shared => pack_blocks::<UPPER, SHARED>,
        Scales::HalfMinimum => pack_blocks::<UPPER, MINIMUM>,
        Scales::Steps { halves: false } => pack_blocks::<UPPER, STEPS>,
        Scales::Steps { halves: true } => pack_blocks::<UPPER, HALF_STEPS>,
        Scales::StepsDrops { halves: false } => pack_blocks::<UPPER, DROPS>,
        Scales::StepsDrops { halves: true } => pack_blocks::<UPPER, HALF_DROPS>,
    };
    pack(blocks, rows, weights, scales);
}

/// Kinds of scales that are packed alike, as constants.
const PACKED: [Scales; 7] = [
    Scales::Half,
    Scales::Shared,
    Scales::HalfMinimum,
    Scales::Steps { halves: false },
    Scales::Steps { halves: true },
    Scales::StepsDrops { halves: false },
    Scales::StepsDrops { halves: true },
];
const PLAIN: usize = 0;
const SHARED: usize = 1;
const MINIMUM: usize = 2;
const STEPS: usize = 3;
const HALF_STEPS: usize = 4;
const DROPS: usize = 5;
const HALF_DROPS: usize = 6;

/// Groups that are unpacked at a time: what a record with steps spans.
const STRETCH: usize = SPAN;

fn pack_blocks<const UPPER: usize, const KIND: usize>(
    blocks: &Blocks,
    rows: &[&[u8]],
    weights: &mut [u8],
    scales: &mut [u8],
) {
    let kind = const { PACKED[KIND] };
    let (span, record) = const { record(PACKED[KIND]) };
    let stretch_bytes = STRETCH * GROUP / blocks.len * blocks.bytes;
    let line = 256 + 64 * UPPER;
    let mut groups = [Group::EMPTY; STRETCH];
    let stretches =
        weights.chunks_mut(STRETCH * line).zip(scales.chunks_mut(STRETCH / span * record)).enumerate();
    for (stretch, (weights, scales)) in stretches {
        for (lane, row) in rows.iter().enumerate() {
            ask_ahead(row, stretch * stretch_bytes, stretch_bytes);
            let bytes = &row[stretch * stretch_bytes..];
            let bytes = &bytes[..stretch_bytes.min(bytes.len())];
            let count = bytes.len() / blocks.bytes * blocks.len / GROUP;
            (blocks.groups)(bytes, &mut groups[..count]);
            for (group, weights) in groups[..count].iter().zip(weights.chunks_exact_mut(line)) {
                write_codes::<UPPER>(&group.codes, lane, weights);
            }
            let records = groups[..count].chunks(span).zip(scales.chunks_exact_mut(record));
            for (groups, record) in records {
                write_scales(kind, groups, lane, record);
            }
        }
    }
}

#[inline(always)]
fn write_codes<const UPPER: usize>(codes: &[u8; GROUP], lane: usize, weights: &mut [u8]) {
    let words: [u32; 8] = std::array::from_fn(|step| u32::from_le_bytes(codes.as_chunks::<4>().0[step]));
    let lines = weights.as_chunks_mut::<64>().0;
    let mut write = |line: usize, word: u32| {
        lines[line].as_chunks_mut::<4>().0[lane] = word.to_le_bytes();
    };
    for (line, pair) in words.as_chunks::<2>().0.iter().enumerate() {
        write(line, pair[0] & 0x0f0f_0f0f | (pair[1] & 0x0f0f_0f0f) << 4);
    }
    let steps = 8_usize.checked_div(UPPER).unwrap_or(0); // whose upper bits fill a line
    for line in 0..UPPER {
        let bits = |step: usize| (words[line * steps + step] >> 4 & 0x0303_0303) << (UPPER * step);
        write(4 + line, (0..steps).fold(0, |word, step| word | bits(step)));
    }
}

/// A row's part of a record, from the groups that share it.
#[inline(always)]
fn write_scales(kind: Scales, groups: &[Group], lane: usize, record: &mut [u8]) {
    let Some(first) = groups.first() else { return };
    record[2 * lane..][..2].copy_from_slice(&first.scale.to_le_bytes());
    if kind.has_minima() {
        record[2 * (LANES + lane)..][..2].copy_from_slice(&first.minimum.to_le_bytes());
    }
    for (index, group) in groups.iter().enumerate() {
        for half in 0..parts(kind.has_halves()) {
            if let Some(at) = step_at(kind, index, half) {
                record[at + lane] = group.steps[half] as u8;
            }
            if let Some(at) = drop_at(kind, index, half) {
                record[at + lane] = group.drops[half] as u8;
            }
        }
    }
}

/// Where a record holds the steps of a group's half.
const fn step_at(kind: Scales, group: usize, half: usize) -> Option<usize> {
    match kind {
        Scales::Steps { halves } => Some(2 * LANES + (group * parts(halves) + half) * LANES),
        Scales::StepsDrops { halves } => Some(4 * LANES + (group * 2 * parts(halves) + half) * LANES),
        Scales::Half | Scales::Shared | Scales::Brain | Scales::HalfMinimum => None,
    }
}

/// Where a record holds the drops of a group's half.
const fn drop_at(kind: Scales, group: usize, half: usize) -> Option<usize> {
    match kind {
        Scales::StepsDrops { halves } => {
            Some(4 * LANES + (group * 2 * parts(halves) + parts(halves) + half) * LANES)
        }
        _ => None,
    }
}
