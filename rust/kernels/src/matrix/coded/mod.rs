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
mod unpack;

pub(super) use exact::{unpack_groups, unpack_lane};
pub(crate) use kernel::CodedLinear;
pub(super) use kernel::load_scales;
pub(super) use unpack::{Book, Five, Nibbles, Six, Unpack};

use super::GROUP;
use crate::quant::{Codes, Grouped, Scales};
use crate::simd::LANES;

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
pub(super) fn pack(
    format: &Grouped,
    block: (usize, usize), // weights and bytes
    rows: &[&[u8]],
    weights: &mut [u8],
    scales: &mut [u8],
) {
    let book = code_of_integers(format.codes);
    let groups_per_block = block.0 / GROUP;
    for (index, weights) in weights.chunks_exact_mut(group_bytes(format.codes)).enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            let bytes = &row[index / groups_per_block * block.1..][..block.1];
            let group = (format.group)(bytes, index % groups_per_block);
            let codes = encode(format.codes, &book, group.integers);
            write_codes(&codes, upper_bits(format.codes), lane, weights);
            write_scales(format.scales, &group, index, lane, scales);
        }
    }
}

/// The code of each integer of a book, indexed by its bits.
fn code_of_integers(codes: Codes) -> [u8; 256] {
    let mut all = [0; 256];
    if let Codes::Book(integers) = codes {
        for (code, &integer) in integers.iter().enumerate().rev() {
            all[usize::from(integer as u8)] = code as u8;
        }
    }
    all
}

/// The codes of integers.
#[inline]
fn encode(codes: Codes, book: &[u8; 256], integers: [i8; GROUP]) -> [u8; GROUP] {
    match codes {
        Codes::Nibbles(offset) | Codes::Five(offset) | Codes::Six(offset) => {
            integers.map(|integer| integer.wrapping_add(offset) as u8)
        }
        Codes::Book(_) => integers.map(|integer| book[usize::from(integer as u8)]),
    }
}

fn write_codes(codes: &[u8; GROUP], upper: usize, lane: usize, weights: &mut [u8]) {
    let words: [u32; 8] = std::array::from_fn(|step| u32::from_le_bytes(codes.as_chunks::<4>().0[step]));
    let mut write = |line: usize, word: u32| {
        weights[line * 64 + lane * 4..][..4].copy_from_slice(&word.to_le_bytes());
    };
    for (line, pair) in words.as_chunks::<2>().0.iter().enumerate() {
        write(line, pair[0] & 0x0f0f_0f0f | (pair[1] & 0x0f0f_0f0f) << 4);
    }
    let steps = 8_usize.checked_div(upper).unwrap_or(0); // whose upper bits fill a line
    for line in 0..upper {
        let bits = |step: usize| (words[line * steps + step] >> 4 & 0x0303_0303) << (upper * step);
        write(4 + line, (0..steps).fold(0, |word, step| word | bits(step)));
    }
}

fn write_scales(kind: Scales, group: &crate::quant::Group, index: usize, lane: usize, scales: &mut [u8]) {
    let (span, bytes) = record(kind);
    let record = &mut scales[index / span * bytes..][..bytes];
    record[2 * lane..][..2].copy_from_slice(&group.scale.to_le_bytes());
    if kind.has_minima() {
        record[2 * (LANES + lane)..][..2].copy_from_slice(&group.minimum.to_le_bytes());
    }
    for half in 0..parts(kind.has_halves()) {
        if let Some(at) = step_at(kind, index % span, half) {
            record[at + lane] = group.steps[half] as u8;
        }
        if let Some(at) = drop_at(kind, index % span, half) {
            record[at + lane] = group.drops[half] as u8;
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
