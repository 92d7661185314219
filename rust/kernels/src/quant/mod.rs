//! Weight formats: one file each, with the format's block, its exact dequantization, its quantizer and their tests.
//!
//! Dequantization is bit-equal to ggml's reference functions (`dequantize_row_*`), and so is the quantizer of Q8_0
//! (`quantize_row_q8_0_ref`); the formats of 4 bits are rounded with a smaller error than theirs, see `fit.rs`.
//! `tests/quant.rs` compares every format of GGUF with the blocks and values that `tests/kernels/generate_quant.py` wrote.

mod bfloat16;
mod fit;
mod float16;
mod float32;
mod grids;
mod grouped;
mod int4_g128;
mod iq1_m;
mod iq1_s;
mod iq2_s;
mod iq2_xs;
mod iq2_xxs;
mod iq3_s;
mod iq3_xxs;
mod iq4_nl;
mod iq4_xs;
mod mxfp4;
mod packed;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod tq1_0;
mod tq2_0;

use crate::Isa;

pub(crate) use grouped::{Blocks, Codes, GROUP, Group, Grouped, Planes, Scales};
pub use packed::PackedFormat;
pub(crate) use q4_0::BlockQ4_0;
pub(crate) use q8_0::BlockQ8_0;

/// What a format's file tells about it.
struct Description {
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    values: Values,
    /// Where we have a quantizer.
    quantize: Option<Quantize>,
}

/// Appends values as blocks.
type Quantize = fn(Isa, &[f32], &mut Vec<u8>);

/// How a format is dequantized.
enum Values {
    By(fn(&[u8], &mut [f32])),
    Grouped(&'static Grouped),
}

impl Description {
    /// A format of groups, which we read only.
    const fn grouped(name: &'static str, format: &'static Grouped) -> Description {
        let Blocks { len, bytes, .. } = format.blocks;
        Description {
            name,
            block_len: len,
            block_bytes: bytes,
            values: Values::Grouped(format),
            quantize: None,
        }
    }
}

/// Makes the enum, the list of it and the way to descriptions from one row per format.
macro_rules! formats {
    ($($(#[$meta:meta])* $variant:ident $module:ident;)*) => {
        /// A weight format.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types)] // the formats' own names
        pub enum Format {
            $($(#[$meta])* $variant,)*
        }

        impl Format {
            /// Every format.
            pub const ALL: &'static [Format] = &[$(Format::$variant),*];

            const fn description(self) -> &'static Description {
                match self {
                    $(Format::$variant => &$module::DESCRIPTION,)*
                }
            }
        }
    };
}

formats! {
    /// IEEE 754 single precision.
    F32 float32;
    /// IEEE 754 half precision.
    F16 float16;
    /// The upper half of single precision.
    Bf16 bfloat16;
    /// 8-bit integers, one half-precision scale per 32 weights.
    Q8_0 q8_0;
    /// 4-bit integers, one half-precision scale per 32 weights.
    Q4_0 q4_0;
    /// 4-bit integers, one half-precision scale and minimum per 32 weights.
    Q4_1 q4_1;
    /// 5-bit integers, one half-precision scale per 32 weights.
    Q5_0 q5_0;
    /// 5-bit integers, one half-precision scale and minimum per 32 weights.
    Q5_1 q5_1;
    /// 2-bit integers, a 4-bit scale and minimum per 16 weights.
    Q2_K q2_k;
    /// 3-bit integers, a 6-bit scale per 16 weights.
    Q3_K q3_k;
    /// 4-bit integers, a 6-bit scale and minimum per 32 weights.
    Q4_K q4_k;
    /// 5-bit integers, a 6-bit scale and minimum per 32 weights.
    Q5_K q5_k;
    /// 6-bit integers, an 8-bit scale per 16 weights.
    Q6_K q6_k;
    /// Indices into a grid of ternary vectors, a 3-bit scale per 32 weights.
    IQ1_S iq1_s;
    /// The same, a scale per 16 weights.
    IQ1_M iq1_m;
    /// Indices into a grid of 256 vectors of eight, a 4-bit scale per 32 weights.
    IQ2_XXS iq2_xxs;
    /// Indices into a grid of 512 vectors of eight, a 4-bit scale per 16 weights.
    IQ2_XS iq2_xs;
    /// Indices into a grid of 1024 vectors of eight, a 4-bit scale per 16 weights.
    IQ2_S iq2_s;
    /// Indices into a grid of 256 vectors of four, a 4-bit scale per 32 weights.
    IQ3_XXS iq3_xxs;
    /// Indices into a grid of 512 vectors of four, a 4-bit scale per 32 weights.
    IQ3_S iq3_s;
    /// 4-bit indices into 16 integers, one half-precision scale per 32 weights.
    IQ4_NL iq4_nl;
    /// The same, a 6-bit scale per 32 weights.
    IQ4_XS iq4_xs;
    /// Ternary, five weights in a byte.
    TQ1_0 tq1_0;
    /// Ternary, four weights in a byte.
    TQ2_0 tq2_0;
    /// 4-bit floats, a power of two per 32 weights.
    MXFP4 mxfp4;
    /// 4-bit integers, one half-precision scale per 128 weights; no type of GGUF.
    INT4_G128 int4_g128;
}

impl Format {
    /// The format of this name: for all but INT4_G128, that in GGUF.
    pub fn from_name(name: &str) -> Option<Format> {
        Format::ALL.iter().copied().find(|format| format.name() == name)
    }

    /// Whether [`quantize`] can write it.
    pub const fn is_writable(self) -> bool {
        self.description().quantize.is_some()
    }

    /// Whether it holds floats, which lose nothing but digits: what may be rounded further.
    pub const fn is_float(self) -> bool {
        self.block_len() == 1
    }

    /// What groups of it hold; none for floats, Q8_0 and Q4_0.
    pub(crate) const fn as_grouped(self) -> Option<&'static Grouped> {
        match self.description().values {
            Values::By(_) => None,
            Values::Grouped(format) => Some(format),
        }
    }

    /// Its name: for all but INT4_G128, that in GGUF.
    pub const fn name(self) -> &'static str {
        self.description().name
    }

    /// Weights per block: row lengths are multiples of it.
    pub const fn block_len(self) -> usize {
        self.description().block_len
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        self.description().block_bytes
    }

    /// Bytes of a row of `columns` weights; none when that is no whole number of blocks, or too large.
    pub const fn row_bytes(self, columns: usize) -> Option<usize> {
        if columns.is_multiple_of(self.block_len()) {
            (columns / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }
}

/// Writes the exact `f32` values of whole blocks.
///
/// # Panics
/// When `bytes` and `out` are not the same whole number of blocks.
pub fn dequantize(format: Format, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        format.row_bytes(out.len()),
        Some(bytes.len()),
        "bytes of {} {} values",
        out.len(),
        format.name()
    );
    match format.description().values {
        Values::By(dequantize) => dequantize(bytes, out),
        Values::Grouped(grouped) => grouped.dequantize(bytes, out),
    }
}

/// Appends `values`, rounded to `format`: a block depends on its own values alone, and on no instruction set.
///
/// # Panics
/// When `values` are not a whole number of blocks, or the format cannot be written ([`Format::is_writable`]).
pub fn quantize(format: Format, values: &[f32], out: &mut Vec<u8>) {
    quantize_with(Isa::Scalar, format, values, out);
}

/// The same, bit for bit, with the help of an instruction set.
///
/// # Panics
/// As [`quantize`], or when this machine lacks the instruction set.
pub fn quantize_with(isa: Isa, format: Format, values: &[f32], out: &mut Vec<u8>) {
    let bytes = format.row_bytes(values.len());
    assert!(bytes.is_some(), "{} values are no whole number of {} blocks", values.len(), format.name());
    out.reserve(bytes.unwrap_or(0));
    match format.description().quantize {
        Some(quantize) => quantize(isa, values, out),
        None => panic!("there is no quantizer for {}", format.name()),
    }
}

/// Values between -4 and 4 with many magnitudes, the same in every run and in the scripts that made the expected
/// hashes: 32-bit state `s = s * 1664525 + 1013904223`, value `(s as i32) / 2^29` over `1 << (s / 2^8 % 8)`.
#[cfg(test)]
pub(crate) fn sample_values(count: usize) -> Vec<f32> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (f64::from(state as i32) / f64::from(1 << 29) / f64::from(1 << (state / 256 % 8))) as f32
    };
    (0..count).map(|_| next()).collect()
}

/// Rows of `columns` weights in a format: quantized values, or random codes whose units lie around 1 / 64.
#[cfg(test)]
pub(crate) fn sample_rows(format: Format, rows: usize, columns: usize) -> Vec<Vec<u8>> {
    if format.is_writable() {
        let values = sample_values(rows * columns + 17);
        let row = |index: usize| {
            let mut bytes = Vec::new();
            quantize(format, &values[17 + index * columns..][..columns], &mut bytes);
            bytes
        };
        return (0..rows).map(row).collect();
    }
    let row_bytes = format.row_bytes(columns).expect("whole blocks");
    let bytes: Vec<u8> = sample_values(rows * row_bytes).iter().map(|value| value.to_bits() as u8).collect();
    // Where blocks have half-precision numbers: the position of their upper bytes.
    let upper: &[usize] = match format {
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[1, 3],
        Format::Q2_K => &[81, 83],
        Format::Q3_K => &[109],
        Format::Q6_K => &[209],
        Format::TQ1_0 => &[53],
        Format::TQ2_0 => &[65],
        Format::IQ1_M => &[55],
        Format::MXFP4 => &[],
        _ => &[1],
    };
    let mut out: Vec<Vec<u8>> = bytes.chunks(row_bytes).map(<[u8]>::to_vec).collect();
    for block in out.iter_mut().flat_map(|row| row.chunks_mut(format.block_bytes())) {
        upper.iter().for_each(|&at| block[at] = block[at] & 0x83 | 0x24);
        if format == Format::MXFP4 {
            block[0] = 120 + block[0] % 4;
        }
    }
    out
}

/// FNV-1a, 64 bits.
#[cfg(test)]
fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantizing_what_was_dequantized_changes_nothing() {
        let values = sample_values(4096);
        for format in Format::ALL.iter().copied().filter(|format| format.is_writable()) {
            let (mut once, mut twice) = (Vec::new(), Vec::new());
            quantize(format, &values, &mut once);
            let mut exact = vec![0.0; values.len()];
            dequantize(format, &once, &mut exact);
            quantize(format, &exact, &mut twice);
            let mut again = vec![0.0; values.len()];
            dequantize(format, &twice, &mut again);
            let error = exact.iter().zip(&again).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error <= 2e-3, "{} {error}", format.name());
        }
    }

    #[test]
    fn row_bytes_are_checked() {
        assert_eq!(Format::Q4_0.row_bytes(64), Some(36));
        assert_eq!(Format::Q8_0.row_bytes(64), Some(68));
        assert_eq!(Format::Q8_0.row_bytes(63), None);
        assert_eq!(Format::INT4_G128.row_bytes(256), Some(132));
        assert_eq!(Format::INT4_G128.row_bytes(64), None);
        assert_eq!(Format::F32.row_bytes(usize::MAX), None);
        assert_eq!(Format::Bf16.row_bytes(3), Some(6));
    }

    #[test]
    #[should_panic(expected = "whole number")]
    fn half_a_block_is_refused() {
        quantize(Format::Q4_0, &[0.0; 16], &mut Vec::new());
    }
}
