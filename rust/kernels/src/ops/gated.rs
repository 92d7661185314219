//! The first half of a gated network: gate and up, and the activation that lets one through by the other.
//!
//! A task multiplies some panels of the gate and the same ones of up, and applies the activation while their sums are in its caches:
//! writing both out for all rows, and reading them again, took a twentieth of a long prompt's time, and 64 KB a token of a 1B Llama.
//!
//! Few rows take as long as reading the weights, and going to and fro between gate and up made that a twentieth slower: they are multiplied
//! first, in order. So are weights that are still read from a file, and widths that are no whole panels, since one panel has columns of both.

use super::activation::Gated;
use super::linear::{Precision, Way, check, over_panels};
use super::{Activation, gated_activation, linear};
use crate::matrix::{MANY_ROWS, Output, PackedMatrix};
use crate::simd::LANES;
use crate::{Context, Rows, RowsMut, Scratch};
use std::cell::Cell;

thread_local! {
    /// Memory for sums of a task: (rows, 2, columns of its panels).
    static BOTH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `output = activation(gate) * up`, where `weight` times `input` is gate and up side by side: the same as [`linear()`] and then
/// [`gated_activation`], bit for bit.
///
/// # Panics
/// When shapes do not fit: `input` is (tokens, columns), `output` (tokens, width), `weight` (2 * width, columns), `bias` (2 * width).
pub fn gated_linear(
    context: &Context,
    weight: &PackedMatrix,
    input: Rows<'_>,
    output: RowsMut<'_>,
    bias: Option<&[f32]>,
    activation: Activation,
    precision: Precision,
    scratch: &mut Scratch,
) {
    let (rows, width) = (input.rows(), output.width());
    check(weight, input, (output.rows(), 2 * width), bias);
    if rows == 0 {
        return;
    }
    if rows < MANY_ROWS || weight.is_late() || !width.is_multiple_of(LANES) {
        let mut both = std::mem::take(&mut scratch.gate_up);
        both.resize(both.len().max(rows * 2 * width), 0.0);
        let product = RowsMut::new(&mut both, rows, 2 * width, 2 * width);
        linear(context, weight, input, product, bias, precision, scratch);
        let product = Rows::new(&both, rows, 2 * width, 2 * width);
        let (gate, up) = (product.columns(0, width), product.columns(width, width));
        gated_activation(context, activation, gate, up, output);
        scratch.gate_up = both;
        return;
    }
    if scratch.gate_up.len() >= MANY_ROWS * 2 * width {
        scratch.gate_up = Vec::new(); // of prompts before all weights were packed
    }
    let way = Way::of(context.isa, weight.layout(), precision, rows);
    let rounded = way.round(context, input, &mut scratch.activations);
    let (output, half) = (output.share(), width / LANES);
    over_panels(context, weight, half, rows, |panels| {
        let (first, columns) = (panels.start * LANES, panels.len() * LANES);
        let mut memory = BOTH.take();
        if memory.len() < rows * 2 * columns {
            memory.resize(rows * 2 * columns, 0.0);
        }
        let both = RowsMut::new(&mut memory, rows, 2 * columns, 2 * columns).share();
        for (side, start) in [0, half].into_iter().enumerate() {
            let own = start + panels.start..start + panels.end;
            // Columns of up come after those of the gate.
            let output = Output { rows: both, first: own.start - side * panels.len(), bias };
            weight.with_panels(context.isa, own, |weight, panels| {
                rounded.multiply(context.isa, weight, panels, output);
            });
        }
        for (row, both) in memory.chunks_exact(2 * columns).take(rows).enumerate() {
            let (gate, up) = both.split_at(columns);
            // SAFETY: no other task has these columns, and this one holds one such slice at a time.
            let output = unsafe { output.part_mut(row, first, columns) };
            context.isa.dispatch(Gated { activation, gate, up, output });
        }
        BOTH.set(memory);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{sample_rows, sample_values};
    use crate::{Format, Isa, Pool, RowSource, Windows};
    use std::ops::Range;
    use std::sync::Arc;

    const COLUMNS: usize = 256;

    /// Rows in a file.
    #[derive(Debug)]
    struct Stored(Vec<Vec<u8>>);

    impl RowSource for Stored {
        fn read(&self, rows: Range<usize>, out: &mut [u8]) {
            out.copy_from_slice(&self.0[rows].concat());
        }
    }

    /// A product and its activation, in one call or two.
    fn compute(
        context: &Context,
        weight: &PackedMatrix,
        bias: &[f32],
        rows: usize,
        as_one: bool,
    ) -> Vec<u32> {
        let inputs = sample_values(rows * COLUMNS);
        let input = Rows::new(&inputs, rows, COLUMNS, COLUMNS);
        let width = weight.rows() / 2;
        let mut out = vec![7.0; rows * (width + 3)];
        let output = RowsMut::new(&mut out, rows, width, width + 3);
        let (activation, precision, mut scratch) = (Activation::Silu, Precision::Auto, Scratch::default());
        if as_one {
            let bias = Some(bias);
            gated_linear(context, weight, input, output, bias, activation, precision, &mut scratch);
        } else {
            let mut both = vec![0.0; rows * 2 * width];
            let product = RowsMut::new(&mut both, rows, 2 * width, 2 * width);
            linear(context, weight, input, product, Some(bias), precision, &mut scratch);
            let both = Rows::new(&both, rows, 2 * width, 2 * width);
            gated_activation(context, activation, both.columns(0, width), both.columns(width, width), output);
        }
        out.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn one_step_has_the_bits_of_two() {
        let formats = [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0, Format::Q4_K, Format::Q6_K];
        for isa in Isa::available() {
            for threads in [1, 3] {
                let context = Context { isa, pool: Pool::shared(threads).expect("threads") };
                // Widths of whole panels, of more chunks than threads, and one whose middle panel has columns of both.
                for (format, width) in
                    formats.into_iter().flat_map(|format| [16, 144, 24].map(|width| (format, width)))
                {
                    let stored = sample_rows(format, 2 * width, COLUMNS);
                    let slices: Vec<&[u8]> = stored.iter().map(Vec::as_slice).collect();
                    let bias = sample_values(2 * width);
                    let packed = PackedMatrix::pack(&context, format, COLUMNS, &slices, &()).expect("packs");
                    let source = Arc::new(Stored(stored.clone()));
                    let late = PackedMatrix::later(
                        format,
                        COLUMNS,
                        2 * width,
                        source,
                        &Arc::new(Windows::default()),
                    )
                    .expect("memory");
                    for rows in [0, 1, 5, 16, 40] {
                        let two = compute(&context, &packed, &bias, rows, false);
                        for weight in [&packed, &late] {
                            let one = compute(&context, weight, &bias, rows, true);
                            let late = weight.is_late();
                            assert!(one == two, "{isa:?} {format:?} {width} {rows} {threads} late: {late}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "output rows and width")]
    fn a_width_that_is_not_half_is_refused() {
        let context = Context { isa: Isa::Scalar, pool: Pool::shared(1).expect("a thread") };
        let rows = sample_rows(Format::F32, 48, COLUMNS);
        let slices: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
        let weight = PackedMatrix::pack(&context, Format::F32, COLUMNS, &slices, &()).expect("packs");
        let (inputs, mut out) = (sample_values(COLUMNS), [0.0; 32]);
        let input = Rows::new(&inputs, 1, COLUMNS, COLUMNS);
        let output = RowsMut::new(&mut out, 1, 32, 32);
        let (silu, auto) = (Activation::Silu, Precision::Auto);
        gated_linear(&context, &weight, input, output, None, silu, auto, &mut Scratch::default());
    }
}
