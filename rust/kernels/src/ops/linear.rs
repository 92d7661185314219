//! A weight matrix times input rows.
//!
//! Tasks are chunks of panels, claimed by threads as they come; panels outside, tiles of rows inside, so that a panel
//! is read from memory once. The columns are never split: a result is one chain of additions in the order of the
//! columns, whatever the number of rows, its row's position, the tile, the number of threads and the instruction set. (bfloat16
//! times bfloat16 alone has the instruction set's own order, and a matrix unit adds 256 columns of K-quants exactly.)

use crate::matrix::{
    Activations, BfloatLinear, BfloatTiles, ByteTiles, CodedLinear, FloatLinear, IntegerLinear, IntegerTiles,
    Layout, MANY_ROWS, Output, PAIRED_ROWS, PANELS, PackedMatrix, Pair, PairLine, PairedLinear, Rounding,
    RowTiles, SpanTiles, Tiles,
};
use crate::{Context, Isa, Rows, RowsMut, Scratch};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(test)]
mod tests;

/// Whether activations may be rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Precision {
    /// Exact weights times `f32` activations, whatever the format: the reference.
    Exact,
    /// Formats of 8 bits and fewer are multiplied with activations of 8 bits, one scale per row and 32 columns, over
    /// the 128 or 256 of the format's own blocks, or over 128 of Q4_0, whose own scales are rounded to 12 bits of the greatest of their row;
    /// bfloat16 with activations of bfloat16 where the instruction set multiplies those; others with `f32` activations.
    #[default]
    Auto,
}

/// How a matrix is multiplied: what activations are rounded to, and what multiplies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Bytes(Rounding),
    PairedBytes(Rounding),
    ByteTiles(Rounding),
    Bfloats,
    BfloatTiles,
    Floats,
}

impl Way {
    pub(super) fn of(isa: Isa, layout: Layout, precision: Precision, rows: usize) -> Way {
        // The mistake that tests/api/test_invariance.py must find: several rows take another way than one.
        let other_way = cfg!(feature = "planted") && rows > 1;
        if precision == Precision::Exact || other_way {
            return Way::Floats;
        }
        match layout.rounding() {
            Some(rounding) => match layout {
                _ if isa.has_tiles() && rows >= layout.tiled_rows() => Way::ByteTiles(rounding),
                Layout::Int8 if isa >= Isa::Avx512 && rows >= PAIRED_ROWS => Way::PairedBytes(rounding),
                _ => Way::Bytes(rounding),
            },
            // Its order of additions differs from other instructions': few rows take this way as well.
            None if isa.has_tiles() && matches!(layout, Layout::Bf16) => Way::BfloatTiles,
            None if isa.has_bf16_dots() && matches!(layout, Layout::Bf16) => Way::Bfloats,
            None => Way::Floats,
        }
    }
}

/// Below this many bytes of weights times rows, waking other threads costs more than they gain.
const ALONE: usize = 1 << 16;

/// `output[t][r] = sum over k of weight[r][k] * input[t][k]`, plus `bias[r]`.
///
/// # Panics
/// When shapes do not fit: `input` is (tokens, columns), `output` (tokens, rows), `bias` (rows).
pub fn linear(
    context: &Context,
    weight: &PackedMatrix,
    input: Rows<'_>,
    output: RowsMut<'_>,
    bias: Option<&[f32]>,
    precision: Precision,
    scratch: &mut Scratch,
) {
    check(weight, input, (output.rows(), output.width()), bias);
    if input.rows() == 0 {
        return;
    }
    let way = Way::of(context.isa, weight.layout(), precision, input.rows());
    linear_by(way, context, weight, input, Output::whole(output, bias), scratch);
}

/// Panics when shapes do not fit; those of the output are (rows, width).
pub(super) fn check(weight: &PackedMatrix, input: Rows<'_>, output: (usize, usize), bias: Option<&[f32]>) {
    assert_eq!(input.width(), weight.columns(), "input width");
    assert_eq!(output, (input.rows(), weight.rows()), "output rows and width");
    assert!(bias.is_none_or(|bias| bias.len() == weight.rows()), "bias length");
}

fn linear_by(
    way: Way,
    context: &Context,
    weight: &PackedMatrix,
    input: Rows<'_>,
    output: Output<'_>,
    scratch: &mut Scratch,
) {
    let rounded = way.round(context, input, &mut scratch.activations);
    over_panels(context, weight, weight.panels(), input.rows(), |panels| {
        weight.with_panels(context.isa, panels, |weight, panels| {
            rounded.multiply(context.isa, weight, panels, output);
        });
    });
}

/// Input rows as a way wants them.
pub(super) enum Rounded<'a> {
    Bytes(IntegerTiles<'a>),
    PairedBytes(IntegerTiles<'a>),
    ByteTiles(IntegerTiles<'a>),
    SpanTiles(IntegerTiles<'a>),
    Bfloats(RowTiles<'a, Pair>),
    BfloatTiles(RowTiles<'a, PairLine>),
    Floats(RowTiles<'a, f32>),
}

impl Way {
    /// Rounds input rows, and cuts them into tiles.
    pub(super) fn round<'a>(
        self,
        context: &Context,
        input: Rows<'_>,
        memory: &'a mut Activations,
    ) -> Rounded<'a> {
        let (isa, rows) = (context.isa, input.rows());
        match self {
            Way::Bytes(rounding) => {
                Rounded::Bytes(memory.quantize(context, input, rounding, Tiles::new(isa, rows)))
            }
            Way::PairedBytes(rounding) => {
                Rounded::PairedBytes(memory.quantize(context, input, rounding, Tiles::for_two_panels(rows)))
            }
            Way::ByteTiles(rounding) => {
                let spans = rounding.span > 1;
                let input = memory.quantize(context, input, rounding, Tiles::full(rows, spans));
                if spans { Rounded::SpanTiles(input) } else { Rounded::ByteTiles(input) }
            }
            Way::Bfloats => Rounded::Bfloats(memory.pair(context, input)),
            Way::BfloatTiles => Rounded::BfloatTiles(memory.pair_lines(context, input)),
            Way::Floats => Rounded::Floats(memory.interleave(context, input)),
        }
    }
}

impl Rounded<'_> {
    /// Some panels times all rows.
    pub(super) fn multiply(&self, isa: Isa, weight: &PackedMatrix, panels: Range<usize>, output: Output<'_>) {
        match *self {
            Rounded::Bytes(input) => match weight.layout() {
                Layout::Coded(_) => {
                    let exact = isa.has_tiles();
                    isa.dispatch(CodedLinear { weight, input, output, panels, exact });
                }
                _ => isa.dispatch(IntegerLinear { weight, input, output, panels }),
            },
            Rounded::PairedBytes(input) => isa.dispatch(PairedLinear { weight, input, output, panels }),
            Rounded::ByteTiles(input) => isa.dispatch_tiles(ByteTiles { weight, input, output, panels }),
            Rounded::SpanTiles(input) => isa.dispatch_tiles(SpanTiles { weight, input, output, panels }),
            Rounded::Bfloats(input) => isa.dispatch(BfloatLinear { weight, input, output, panels }),
            Rounded::BfloatTiles(input) => isa.dispatch_tiles(BfloatTiles { weight, input, output, panels }),
            Rounded::Floats(input) => isa.dispatch(FloatLinear { weight, input, output, panels }),
        }
    }
}

/// Hands out chunks of the first `panels` panels, all or a half: small enough to end together, large enough to stream.
pub(super) fn over_panels(
    context: &Context,
    weight: &PackedMatrix,
    panels: usize,
    rows: usize,
    body: impl Fn(Range<usize>) + Sync,
) {
    let threads = context.pool.threads();
    let alone = threads == 1 || weight.bytes().saturating_mul(rows) < ALONE;
    // A matrix unit reads all rows once for a chunk.
    let unit = context.isa.has_tiles() && rows >= MANY_ROWS;
    let chunk = match panels / threads {
        _ if alone => panels.max(1),
        0 | 1 => 1,
        2..8 => 2,
        32..64 if unit => PANELS / 2,
        8..64 => 4,
        _ if unit => PANELS,
        _ => 8,
    };
    // Panels that are read from a file are taken in its order: what the system reads ahead is then what any thread needs next.
    let (late, next) = (weight.is_late(), AtomicUsize::new(0));
    context.pool.run(panels.div_ceil(chunk), |task| {
        let task = if late { next.fetch_add(1, Ordering::Relaxed) } else { task };
        body(task * chunk..panels.min((task + 1) * chunk));
    });
}

/// The oracle: one input row times rows as they lie in a file, without vectors, tiles or threads. Bit for bit what
/// [`linear`] computes.
#[cfg(test)]
fn linear_ref(
    isa: Isa,
    format: crate::Format,
    rows: &[&[u8]],
    input: &[f32],
    bias: Option<&[f32]>,
    precision: Precision,
) -> Vec<f32> {
    let integer = precision == Precision::Auto && format.block_len() > 1;
    let span = Layout::of(format).rounding().map_or(1, |rounding| rounding.span);
    let rounded = crate::matrix::round_ref(input, span);
    let one = |(index, row): (usize, &&[u8])| {
        let sum = match (integer, format.as_grouped()) {
            (true, Some(grouped)) => grouped_ref(isa, grouped, span, row, &rounded),
            (true, None) => integer_ref(format, span, row, &rounded),
            (false, _) => {
                let mut weights = vec![0.0; input.len()];
                crate::dequantize(format, row, &mut weights);
                match format == crate::Format::Bf16 && precision == Precision::Auto {
                    true if isa.has_tiles() => bf16_tiles_ref(&weights, input),
                    true if isa.has_bf16_dots() => bf16_ref(&weights, input),
                    _ => chain(weights.iter().zip(input)),
                }
            }
        };
        sum + bias.map_or(0.0, |bias| bias[index])
    };
    rows.iter().enumerate().map(one).collect()
}

#[cfg(test)]
fn chain<'a>(terms: impl Iterator<Item = (&'a f32, &'a f32)>) -> f32 {
    terms.fold(0.0, |sum, (weight, value)| weight.mul_add(*value, sum))
}

/// Two columns at a time, the odd one first.
#[cfg(test)]
fn bf16_ref(weights: &[f32], input: &[f32]) -> f32 {
    let rounded: Vec<f32> = input.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
    let pairs = weights.chunks(2).zip(rounded.chunks(2));
    chain(pairs.flat_map(|(weights, values)| weights.iter().zip(values).rev()))
}

/// Groups of 32 columns, as a matrix unit adds them.
#[cfg(test)]
fn bf16_tiles_ref(weights: &[f32], input: &[f32]) -> f32 {
    let rounded: Vec<f32> = input.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
    let pair = |values: &[f32]| (values[0], values.get(1).copied().unwrap_or(0.0));
    let groups = weights.chunks(32).zip(rounded.chunks(32));
    groups.fold(0.0, |sum, (weights, values)| {
        let pairs = values.chunks(2).zip(weights.chunks(2));
        crate::simd::add_group(sum, pairs.map(|(values, weights)| (pair(values), pair(weights))))
    })
}

/// A row of Q8_0 or Q4_0 times one of rounded activations, each with its scale. Where spans share a scale of activations, those of weights
/// are counted in steps of the greatest one of the row.
#[cfg(test)]
fn integer_ref(format: crate::Format, span: usize, row: &[u8], rounded: &[(f32, f32)]) -> f32 {
    let mut weights = vec![0.0; rounded.len()];
    crate::dequantize(format, row, &mut weights);
    let scales: Vec<f32> = row
        .chunks(format.block_bytes())
        .map(|block| half::f16::from_le_bytes([block[0], block[1]]).to_f32())
        .collect();
    // Weights divided by their scale are integers again.
    let exact: Vec<i32> = weights
        .chunks(32)
        .zip(&scales)
        .zip(rounded.chunks(32))
        .map(|((weights, scale), rounded)| {
            weights.iter().zip(rounded).map(|(weight, value)| (weight / scale).round() * value.0).sum::<f32>()
                as i32
        })
        .collect();
    if span == 1 {
        let groups = exact.iter().zip(&scales).zip(rounded.chunks(32));
        return groups.fold(0.0, |sum: f32, ((&exact, scale), rounded)| {
            (exact as f32 * scale).mul_add(rounded[0].1, sum)
        });
    }
    let unit = scales.iter().fold(0.0_f32, |greatest, scale| greatest.max(scale.abs())) / 4064.0;
    let steps = |scale: f32| (scale * (1.0 / unit)).round_ties_even() as i32;
    let spans = exact.chunks(span).zip(scales.chunks(span)).zip(rounded.chunks(32 * span));
    let sum = spans.fold(0.0_f32, |sum, ((exact, scales), rounded)| {
        let whole: i32 = exact.iter().zip(scales).map(|(exact, &scale)| exact * steps(scale)).sum();
        (whole as f32).mul_add(rounded[0].1, sum)
    });
    sum * unit
}

/// The same for a format of groups.
#[cfg(test)]
fn grouped_ref(
    isa: Isa,
    grouped: &crate::quant::Grouped,
    span: usize,
    row: &[u8],
    rounded: &[(f32, f32)],
) -> f32 {
    use crate::quant::Scales;
    let halves =
        matches!(grouped.scales, Scales::Steps { halves: true } | Scales::StepsDrops { halves: true });
    let parts = if halves { 2 } else { 1 };
    let mut groups = vec![crate::quant::Group::EMPTY; rounded.len() / 32];
    (grouped.blocks.groups)(row, &mut groups);
    let mut sum = 0.0_f32;
    for (groups, rounded) in groups.chunks(span).zip(rounded.chunks(32 * span)) {
        let (mut inner, mut whole, mut drops, mut rounded_whole) = (0.0_f32, 0_i64, 0_i64, 0.0_f32);
        let unit = grouped.unit_of(&groups[0]);
        let minimum = half::f16::from_bits(groups[0].minimum).to_f32();
        for (group, rounded) in groups.iter().zip(rounded.chunks(32)) {
            for (part, rounded) in rounded.chunks(32 / parts).enumerate() {
                let codes = group.codes[part * 32 / parts..].iter();
                let integers = codes.map(|&code| i64::from(grouped.codes.integer(code)));
                let exact: i64 = integers.zip(rounded).map(|(weight, value)| weight * value.0 as i64).sum();
                let total: i64 = rounded.iter().map(|value| value.0 as i64).sum();
                rounded_whole = (exact as f32).mul_add(f32::from(group.steps[part]), rounded_whole);
                match grouped.scales {
                    Scales::Half | Scales::Brain => inner = exact as f32 * unit,
                    Scales::HalfMinimum => inner = minimum.mul_add(total as f32, exact as f32 * unit),
                    Scales::Shared => whole += exact,
                    Scales::Steps { .. } => whole += i64::from(group.steps[part]) * exact,
                    Scales::StepsDrops { .. } => {
                        whole += i64::from(group.steps[part]) * exact;
                        drops += i64::from(group.drops[part]) * total;
                    }
                }
            }
        }
        if span > 1 {
            let exact = isa.has_tiles() || grouped.scales == Scales::Shared;
            inner = unit * if exact { whole as f32 } else { rounded_whole };
        }
        if grouped.scales.has_drops() {
            inner = (drops as f32).mul_add(-minimum, inner);
        }
        sum = inner.mul_add(rounded[0].1, sum);
    }
    sum
}
