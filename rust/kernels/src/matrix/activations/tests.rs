//! Rounding to 8 bits against its oracle.

use super::*;
use crate::Pool;
use crate::quant::sample_values;

const ROUNDING: Rounding = Rounding { weight_offset: -8, span: 1, halves: false, totals: Totals::None };

#[test]
fn quantizing_equals_the_oracle() {
    for span in [1, 2, 8] {
        quantizing_spans_equals_the_oracle(Rounding { span, ..ROUNDING });
    }
}

fn quantizing_spans_equals_the_oracle(rounding: Rounding) {
    let (rows, groups, span) = (7, 3 * rounding.span, rounding.span);
    let mut values = sample_values(rows * groups * GROUP);
    values[..GROUP].fill(0.0);
    for isa in Isa::available() {
        let context = Context { isa, pool: Pool::shared(2).unwrap() };
        let mut memory = Activations::default();
        let input = Rows::new(&values, rows, groups * GROUP, groups * GROUP);
        let tiles = memory.quantize(&context, input, rounding, Tiles::new(isa, rows));
        for row in 0..rows {
            let expected = round_ref(&values[row * groups * GROUP..][..groups * GROUP], span);
            let index = row / tiles.tiles.full;
            let (tile, width) = (tiles.tile(index), tiles.tiles.width(index));
            for (column, (byte, scale)) in expected.into_iter().enumerate() {
                let at = column / GROUP * width + row % tiles.tiles.full;
                assert_eq!(f32::from(tile.bytes[at][column % GROUP] as i8), byte);
                let own_scale = tile.scales[column / (span * GROUP) * width + row % tiles.tiles.full];
                assert_eq!(own_scale, scale);
                let total: i32 = tile.bytes[at].iter().map(|&byte| i32::from(byte as i8)).sum();
                assert_eq!(tile.offsets[at], -8 * total);
            }
        }
    }
}

#[test]
fn specials_reach_the_scale() {
    for isa in Isa::available() {
        let context = Context { isa, pool: Pool::shared(1).unwrap() };
        for (special, finite) in
            [(f32::NAN, false), (f32::NEG_INFINITY, false), (1e-40, true), (f32::MAX, true)]
        {
            let mut values = [0.5; GROUP];
            if finite {
                values = [0.0; GROUP];
            }
            values[13] = special;
            let mut memory = Activations::default();
            let input = Rows::new(&values, 1, GROUP, GROUP);
            let tile = memory.quantize(&context, input, ROUNDING, Tiles::new(isa, 1)).tile(0);
            assert_eq!(tile.scales[0].is_finite(), finite, "{special}");
            assert_eq!(tile.bytes[0][13], if special == f32::MAX { 127 } else { 0 });
        }
    }
}
