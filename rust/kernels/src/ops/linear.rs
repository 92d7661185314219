//! A weight matrix times input rows.
//!
//! Tasks are chunks of panels, claimed by threads as they come; panels outside, tiles of rows inside, so that a panel
//! is read from memory once. The columns are never split: a result is one chain of additions in the order of the
//! columns, whatever the number of rows, its row's position, the tile, the number of threads and the instruction set.

use crate::matrix::{BfloatLinear, CodedLinear, FloatLinear, IntegerLinear, Layout, Output, PackedMatrix};
use crate::{Context, Isa, Rows, RowsMut, Scratch};
use std::ops::Range;

#[cfg(test)]
mod tests;

/// Whether activations may be rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Precision {
    /// Exact weights times `f32` activations, whatever the format: the reference.
    Exact,
    /// Formats of 8 bits and fewer are multiplied with activations of 8 bits, one scale per row and 32 columns;
    /// bfloat16 with activations of bfloat16 where the instruction set multiplies those; others with `f32` activations.
    #[default]
    Auto,
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
    assert_eq!(input.width(), weight.columns(), "input width");
    assert_eq!(output.width(), weight.rows(), "output width");
    assert_eq!(input.rows(), output.rows(), "output rows");
    assert!(bias.is_none_or(|bias| bias.len() == weight.rows()), "bias length");
    if input.rows() == 0 {
        return;
    }
    // The mistake that tests/api/test_invariance.py must find: several rows take another way than one.
    let other_way = cfg!(feature = "planted") && input.rows() > 1;
    let precision = if other_way { Precision::Exact } else { precision };
    let output = Output { rows: output.share(), bias };
    let rounding = weight.layout().rounding().filter(|_| precision == Precision::Auto);
    if let Some(rounding) = rounding {
        let input = scratch.activations.quantize(context, input, rounding);
        over_panels(context, weight, output.rows.rows(), |panels| match weight.layout() {
            Layout::Coded(_) => context.isa.dispatch(CodedLinear { weight, input, output, panels }),
            _ => context.isa.dispatch(IntegerLinear { weight, input, output, panels }),
        });
    } else if rounds_to_bf16(context.isa, weight.layout(), precision) {
        let input = scratch.activations.pair(context, input);
        over_panels(context, weight, output.rows.rows(), |panels| {
            context.isa.dispatch(BfloatLinear { weight, input, output, panels });
        });
    } else {
        let input = scratch.activations.interleave(context, input);
        over_panels(context, weight, output.rows.rows(), |panels| {
            context.isa.dispatch(FloatLinear { weight, input, output, panels });
        });
    }
}

/// Whether activations are rounded to bfloat16, as the weights are.
fn rounds_to_bf16(isa: Isa, layout: Layout, precision: Precision) -> bool {
    isa.has_bf16_dots() && matches!(layout, Layout::Bf16) && precision == Precision::Auto
}

/// Hands out chunks of panels: small enough to end together, large enough to stream.
fn over_panels(context: &Context, weight: &PackedMatrix, rows: usize, body: impl Fn(Range<usize>) + Sync) {
    let (panels, threads) = (weight.panels(), context.pool.threads());
    let alone = threads == 1 || weight.bytes().saturating_mul(rows) < ALONE;
    let chunk = match panels / threads {
        _ if alone => panels.max(1),
        0 | 1 => 1,
        2..8 => 2,
        8..64 => 4,
        _ => 8,
    };
    context.pool.run(panels.div_ceil(chunk), |task| {
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
    let rounded = crate::matrix::round_ref(input);
    let one = |(index, row): (usize, &&[u8])| {
        let sum = match (integer, format.as_grouped()) {
            (true, Some(grouped)) => grouped_ref(format, grouped, row, &rounded),
            (true, None) => integer_ref(format, row, &rounded),
            (false, _) => {
                let mut weights = vec![0.0; input.len()];
                crate::dequantize(format, row, &mut weights);
                match isa.has_bf16_dots() && format == crate::Format::Bf16 && precision == Precision::Auto {
                    true => bf16_ref(&weights, input),
                    false => chain(weights.iter().zip(input)),
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

/// A row of Q8_0 or Q4_0 times one of rounded activations, each with its scale.
#[cfg(test)]
fn integer_ref(format: crate::Format, row: &[u8], rounded: &[(f32, f32)]) -> f32 {
    let mut weights = vec![0.0; rounded.len()];
    crate::dequantize(format, row, &mut weights);
    let mut sum = 0.0_f32;
    for group in 0..rounded.len() / 32 {
        let scale_bytes = &row[group * format.block_bytes()..][..2];
        let scale = half::f16::from_le_bytes([scale_bytes[0], scale_bytes[1]]).to_f32();
        let columns = group * 32..group * 32 + 32;
        // Weights divided by their scale are integers again.
        let exact: f32 = columns.clone().map(|k| (weights[k] / scale).round() * rounded[k].0).sum();
        sum = exact.mul_add(scale * rounded[group * 32].1, sum);
    }
    sum
}

/// The same for a format of groups.
#[cfg(test)]
fn grouped_ref(
    format: crate::Format,
    grouped: &crate::quant::Grouped,
    row: &[u8],
    rounded: &[(f32, f32)],
) -> f32 {
    use crate::quant::Scales;
    let halves =
        matches!(grouped.scales, Scales::Steps { halves: true } | Scales::StepsDrops { halves: true });
    let parts = if halves { 2 } else { 1 };
    let per_block = format.block_len() / 32;
    let mut sum = 0.0_f32;
    for (index, rounded) in rounded.chunks(32).enumerate() {
        let block = &row[index / per_block * format.block_bytes()..][..format.block_bytes()];
        let group = (grouped.group)(block, index % per_block);
        let (scales, minima) = (grouped.scales_of(&group), grouped.minima_of(&group));
        for (part, rounded) in rounded.chunks(32 / parts).enumerate() {
            let integers = group.integers[part * 32 / parts..].iter();
            let exact: f32 = integers.zip(rounded).map(|(&weight, value)| f32::from(weight) * value.0).sum();
            let scale = rounded[0].1;
            sum = exact.mul_add(scales[part] * scale, sum);
            if grouped.scales.has_minima() {
                let total: f32 = rounded.iter().map(|value| value.0).sum();
                sum = minima[part].mul_add(scale * total, sum);
            }
        }
    }
    sum
}
