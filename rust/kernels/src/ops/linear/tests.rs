//! Every instruction set, layout and precision against the oracle, bit for bit, over awkward shapes.

use super::{Output, Precision, Way, linear, linear_by, linear_ref};
use crate::quant::{sample_rows, sample_values};
use crate::{
    Context, Format, Isa, KernelError, PackedMatrix, Pool, RowSource, Rows, RowsMut, Scratch, Windows,
};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

const PRECISIONS: [Precision; 2] = [Precision::Exact, Precision::Auto];

struct Weight {
    format: Format,
    columns: usize,
    rows: Vec<Vec<u8>>,
    bias: Vec<f32>,
}

impl Weight {
    fn new(format: Format, rows: usize, columns: usize) -> Weight {
        Weight { format, columns, rows: sample_rows(format, rows, columns), bias: sample_values(rows) }
    }

    fn slices(&self) -> Vec<&[u8]> {
        self.rows.iter().map(Vec::as_slice).collect()
    }

    /// `linear` of rows that lie 3 values further apart than they need, into such rows.
    fn compute(
        &self,
        context: &Context,
        inputs: &[f32],
        precision: Precision,
        with_bias: bool,
    ) -> Vec<Vec<f32>> {
        let matrix = PackedMatrix::pack(context, self.format, self.columns, &self.slices(), &()).unwrap();
        let (count, width, stride) = (inputs.len() / self.columns, self.rows.len(), self.rows.len() + 3);
        let spread: Vec<f32> =
            inputs.chunks(self.columns).flat_map(|row| row.iter().copied().chain([f32::NAN; 3])).collect();
        let mut out = vec![7.0; count * stride];
        let input = Rows::new(&spread, count, self.columns, self.columns + 3);
        let bias = with_bias.then_some(&self.bias[..]);
        let mut scratch = Scratch::default();
        linear(
            context,
            &matrix,
            input,
            RowsMut::new(&mut out, count, width, stride),
            bias,
            precision,
            &mut scratch,
        );
        assert!(out.chunks(stride).all(|row| row[width..] == [7.0; 3]), "written past the row");
        out.chunks(stride).map(|row| row[..width].to_vec()).collect()
    }

    /// The same in a way that the instruction set need not take, from rows without gaps.
    fn compute_by(&self, way: Way, context: &Context, inputs: &[f32]) -> Vec<Vec<f32>> {
        let matrix = PackedMatrix::pack(context, self.format, self.columns, &self.slices(), &()).unwrap();
        let (count, width) = (inputs.len() / self.columns, self.rows.len());
        let mut out = vec![0.0; count * width];
        let input = Rows::new(inputs, count, self.columns, self.columns);
        let output = Output::whole(RowsMut::new(&mut out, count, width, width), Some(&self.bias));
        linear_by(way, context, &matrix, input, output, &mut Scratch::default());
        out.chunks(width).map(<[f32]>::to_vec).collect()
    }

    fn reference(&self, isa: Isa, inputs: &[f32], precision: Precision, with_bias: bool) -> Vec<Vec<f32>> {
        let bias = with_bias.then_some(&self.bias[..]);
        inputs
            .chunks(self.columns)
            .map(|row| linear_ref(isa, self.format, &self.slices(), row, bias, precision))
            .collect()
    }
}

fn context(isa: Isa, threads: usize) -> Context {
    Context { isa, pool: Pool::shared(threads).unwrap() }
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
}

#[test]
fn every_isa_layout_and_shape_equals_the_oracle() {
    for isa in Isa::available() {
        let context = context(isa, 2);
        for &format in Format::ALL {
            let columns: &[usize] = match format.block_len() {
                1 => &[1, 7, 33, 320],
                32 => &[32, 288],
                128 => &[128, 640],
                _ => &[256, 768],
            };
            for (&columns, rows) in
                columns.iter().flat_map(|columns| [1, 16, 37, 80].map(|rows| (columns, rows)))
            {
                let weight = Weight::new(format, rows, columns);
                let inputs = sample_values(70 * columns);
                for precision in PRECISIONS {
                    let expected = weight.reference(isa, &inputs, precision, true);
                    for count in [1, 2, 3, 4, 5, 8, 9, 17, 70] {
                        let got = weight.compute(&context, &inputs[..count * columns], precision, true);
                        let what = (isa, format, rows, columns, count, precision);
                        assert_eq!(bits(&got), bits(&expected[..count]), "{what:?}");
                    }
                }
            }
        }
    }
}

/// Rows in memory, for a matrix that is packed later.
impl RowSource for Weight {
    fn read(&self, rows: Range<usize>, out: &mut [u8]) {
        out.copy_from_slice(&self.rows[rows].concat());
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:?} x {} of {:?}", self.rows.len(), self.columns, self.format)
    }
}

#[test]
fn before_it_is_packed_a_matrix_gives_the_same_bits() {
    let wide = [(Format::Bf16, 8192), (Format::Q8_0, 8192), (Format::Q6_K, 8192)]; // a panel is a window
    let each = Format::ALL.iter().map(|&format| (format, 256.max(format.block_len())));
    for (format, columns) in each.chain(wide) {
        let weight = Arc::new(Weight::new(format, 85, columns));
        let inputs = sample_values(40 * columns);
        for isa in Isa::available() {
            let (context, windows) = (context(isa, 2), Arc::new(Windows::default()));
            let source: Arc<dyn RowSource> = Arc::clone(&weight) as _;
            let mut matrix = PackedMatrix::later(format, columns, 85, source, &windows).unwrap();
            let packed = PackedMatrix::pack(&context, format, columns, &weight.slices(), &()).unwrap();
            for count in [1, 3, 40] {
                for precision in PRECISIONS {
                    let multiply = |matrix: &PackedMatrix| {
                        let mut out = vec![0.0_f32; count * 85];
                        let input = Rows::new(&inputs[..count * columns], count, columns, columns);
                        let output = RowsMut::new(&mut out, count, 85, 85);
                        linear(&context, matrix, input, output, None, precision, &mut Scratch::default());
                        out.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
                    };
                    assert_eq!(multiply(&matrix), multiply(&packed), "{:?}", (format, isa, count, precision));
                }
            }
            let row = |matrix: &PackedMatrix, row| {
                let mut values = vec![0.0; columns];
                matrix.unpack_row(row, &mut values);
                values
            };
            assert_eq!([0, 84].map(|of| row(&matrix, of)), [0, 84].map(|of| row(&packed, of)));
            assert!(matrix.is_late());
            matrix.pack_late(&context);
            assert!(!matrix.is_late() && matrix.parts() == packed.parts(), "{format:?} {isa:?}");
        }
    }
}

/// How a matrix unit multiplies a format, and the instruction set whose oracle has the same bits.
fn tiled_way(format: Format) -> Option<(Way, Isa)> {
    let context = Context::new(1).unwrap();
    let layout = PackedMatrix::pack(&context, format, 256, &[], &()).unwrap().layout();
    match (layout.rounding(), format) {
        (Some(rounding), _) => Some((Way::ByteTiles(rounding), Isa::Amx)),
        (None, Format::Bf16) => Some((Way::BfloatTiles, Isa::Amx)),
        (None, _) => None,
    }
}

#[test]
fn tiles_equal_the_oracle_with_and_without_a_matrix_unit() {
    let ways = Format::ALL.iter().filter_map(|&format| Some((format, tiled_way(format)?)));
    for (format, (way, oracle)) in ways {
        // Blocks of columns and what is left of them, spans too; panels that are not full, an odd number of panels.
        let narrow = if format.block_len() > 32 { 1280 } else { 1312 };
        for (columns, rows) in
            [(256, 37), (narrow, 20), (if format == Format::Bf16 { 1193 } else { 1024 }, 100)]
        {
            let weight = Weight::new(format, rows, columns);
            let inputs = sample_values(70 * columns);
            let expected = bits(&weight.reference(oracle, &inputs, Precision::Auto, true));
            for (isa, count) in
                Isa::available().into_iter().flat_map(|isa| [1, 3, 16, 17, 40, 70].map(|n| (isa, n)))
            {
                let got = weight.compute_by(way, &context(isa, 2), &inputs[..count * columns]);
                assert_eq!(bits(&got), expected[..count], "{isa:?} {format:?} {columns} {rows} {count}");
            }
        }
    }
}

#[test]
fn matrix_units_take_small_bfloat16_for_zeros() {
    // A chain for even columns and one for odd ones: 1 + 2^-24 rounds to 1, and 2^-24 + 2^-24 is exact.
    let rows = |values: &[f32]| -> Vec<u8> {
        values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect()
    };
    let tiny = 2.0_f32.powi(-24);
    let mut ordered = [0.0; 64];
    (ordered[0], ordered[1], ordered[2], ordered[3]) = (1.0, tiny, tiny, tiny);
    let mut small = [0.0; 64];
    (small[5], small[40]) = (1e-39, 2.0_f32.powi(-100));
    let mut inputs = vec![1.0; 64];
    inputs[40] = 2.0_f32.powi(-30);
    let weight = Weight {
        format: Format::Bf16,
        columns: 64,
        rows: vec![rows(&ordered), rows(&small)],
        bias: vec![0.0; 2],
    };
    for isa in Isa::available() {
        let got = weight.compute_by(Way::BfloatTiles, &context(isa, 1), &inputs);
        assert_eq!(got, [[1.0 + 2.0 * tiny, 0.0]], "{isa:?}");
    }
}

#[test]
fn close_to_double_precision() {
    for &format in Format::ALL {
        let weight = Weight::new(format, 48, 2048);
        let inputs = sample_values(3 * 2048);
        for (precision, tolerance) in PRECISIONS.into_iter().zip([2e-6, 6e-3]) {
            let got = weight.compute(&context(Isa::detect(), 2), &inputs, precision, false);
            for (input, got) in inputs.chunks(2048).zip(got) {
                for (row, got) in weight.rows.iter().zip(got) {
                    let mut values = vec![0.0; 2048];
                    crate::dequantize(format, row, &mut values);
                    let terms = values.iter().zip(input).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let (sum, size) =
                        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    let error = (f64::from(got) - sum).abs() / size;
                    assert!(error < tolerance, "{format:?} {precision:?} {error}");
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_company_or_the_threads() {
    for &format in Format::ALL {
        let columns = if format.block_len() > 32 { 512 } else { 544 };
        let weight = Weight::new(format, 100, columns);
        let inputs = sample_values(41 * columns);
        for isa in Isa::available() {
            for precision in PRECISIONS {
                let together = bits(&weight.compute(&context(isa, 1), &inputs, precision, true));
                assert_eq!(together, bits(&weight.compute(&context(isa, 3), &inputs, precision, true)));
                for position in [0, 1, 6, 8, 39, 40] {
                    let alone = &inputs[position * columns..(position + 1) * columns];
                    let alone = bits(&weight.compute(&context(isa, 2), alone, precision, true));
                    assert_eq!(alone[0], together[position], "{isa:?} {format:?} {precision:?} {position}");
                }
            }
        }
    }
}

#[test]
fn rows_of_several_blocks_equal_rows_alone() {
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4_K, Format::Q6_K] {
        let columns = 8192;
        let weight = Weight::new(format, 150, columns);
        let inputs = sample_values(70 * columns);
        for isa in Isa::available() {
            let context = context(isa, 2);
            let together = weight.compute(&context, &inputs, Precision::Auto, false);
            for position in [0, 33, 69] {
                let alone = &inputs[position * columns..][..columns];
                let alone = weight.compute(&context, alone, Precision::Auto, false);
                assert_eq!(
                    bits(&together[position..=position]),
                    bits(&alone),
                    "{isa:?} {format:?} {position}"
                );
            }
        }
    }
}

#[test]
fn codes_with_minima_are_not_offset() {
    // Kernels load no offsets for them.
    for &format in Format::ALL {
        let has_minima = format.as_grouped().is_some_and(|grouped| grouped.scales.has_minima());
        if has_minima {
            let rounding = crate::matrix::Layout::of(format).rounding().unwrap();
            assert_eq!(rounding.weight_offset, 0, "{format:?}");
        }
    }
}

#[test]
fn pairs_of_panels_equal_the_oracle() {
    let rounding = crate::matrix::Layout::of(Format::Q8_0).rounding().unwrap();
    // One panel, an odd number, and several blocks; last tiles of four, six and eight rows, whole and not.
    for (rows, columns) in [(9, 64), (37, 2080), (530, 4096)] {
        let weight = Weight::new(Format::Q8_0, rows, columns);
        let inputs = sample_values(66 * columns);
        let expected = bits(&weight.reference(Isa::Scalar, &inputs, Precision::Auto, true));
        for (isa, count) in
            Isa::available().into_iter().flat_map(|isa| [17, 18, 19, 20, 21, 22, 66].map(|n| (isa, n)))
        {
            let way = Way::PairedBytes(rounding);
            let got = weight.compute_by(way, &context(isa, 2), &inputs[..count * columns]);
            assert_eq!(bits(&got), expected[..count], "{isa:?} {rows} {columns} {count}");
        }
    }
}

#[test]
fn extremes_of_the_integer_layouts() {
    // The greatest sums: all weights of the smallest or greatest code, all activations +-127.
    for (format, fill, scales_at) in [
        (Format::Q8_0, 0x80, &[0][..]),
        (Format::Q8_0, 0x7f, &[0]),
        (Format::Q4_0, 0x00, &[0]),
        (Format::Q4_0, 0xff, &[0]),
        (Format::Q5_0, 0x00, &[0]),
        (Format::Q5_0, 0xff, &[0]),
        (Format::Q2_K, 0xff, &[80, 82]),
        (Format::Q3_K, 0xff, &[108]),
        (Format::Q4_K, 0xff, &[0, 2]),
        (Format::Q5_K, 0xff, &[0, 2]),
        (Format::Q6_K, 0x80, &[208]),
        (Format::TQ2_0, 0xff, &[64]),
        (Format::IQ4_NL, 0x00, &[0]),
        (Format::IQ4_NL, 0xff, &[0]),
        (Format::IQ4_XS, 0x00, &[0]),
        (Format::IQ2_XS, 0xff, &[0]),
    ] {
        let columns = format.block_len().max(64);
        let mut row = vec![fill; format.row_bytes(columns).unwrap()];
        for block in row.chunks_mut(format.block_bytes()) {
            for &at in scales_at {
                block[at..][..2].copy_from_slice(&half::f16::from_f32(0.25).to_le_bytes());
            }
        }
        let weight = Weight { format, columns, rows: vec![row; 20], bias: vec![0.0; 20] };
        for input in [vec![3.0; 33 * columns], vec![-3.0; 33 * columns]] {
            for isa in Isa::available() {
                let expected = weight.reference(isa, &input, Precision::Auto, false);
                let got = weight.compute(&context(isa, 1), &input, Precision::Auto, false);
                assert_eq!(bits(&got), bits(&expected), "{isa:?} {format:?} {fill}");
            }
        }
    }
}

#[test]
fn a_nan_is_not_lost() {
    for &format in Format::ALL {
        let columns = format.block_len().max(64);
        let weight = Weight::new(format, 20, columns);
        let mut input = sample_values(columns);
        input[40] = f32::NAN;
        for isa in Isa::available() {
            for precision in PRECISIONS {
                let got = weight.compute(&context(isa, 1), &input, precision, false);
                assert!(got[0].iter().all(|value| value.is_nan()), "{isa:?} {format:?} {precision:?}");
            }
        }
    }
}

#[test]
fn a_scratch_serves_any_sequence_of_shapes() {
    let context = context(Isa::detect(), 2);
    let mut scratch = Scratch::default();
    for (format, columns, count) in [(Format::Q8_0, 320, 9), (Format::F32, 33, 3), (Format::Q8_0, 64, 2)] {
        let weight = Weight::new(format, 24, columns);
        let matrix = PackedMatrix::pack(&context, format, columns, &weight.slices(), &()).unwrap();
        let inputs = sample_values(count * columns);
        let mut out = vec![0.0; count * 24];
        let (input, output) =
            (Rows::new(&inputs, count, columns, columns), RowsMut::new(&mut out, count, 24, 24));
        linear(&context, &matrix, input, output, None, Precision::Auto, &mut scratch);
        assert_eq!(out, weight.reference(context.isa, &inputs, Precision::Auto, false).concat());
    }
}

#[test]
fn packing_refuses_wrong_sizes() {
    let context = Context::new(1).unwrap();
    let error = PackedMatrix::pack(&context, Format::Q4_0, 48, &[], &()).unwrap_err();
    assert!(matches!(error, KernelError::Size { actual: 48, .. }), "{error}");
    let error = PackedMatrix::pack(&context, Format::F16, 3, &[&[0; 6], &[0; 5]], &()).unwrap_err();
    assert_eq!(error.to_string(), "size of a row is 5, expected 6 bytes for 3 columns of F16");
    let empty = PackedMatrix::pack(&context, Format::F16, 3, &[], &()).unwrap();
    assert_eq!((empty.rows(), empty.columns(), empty.format()), (0, 3, Format::F16));
}
