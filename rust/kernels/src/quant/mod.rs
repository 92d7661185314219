//! Weight formats: one file each, with the format's block, its exact dequantization, its quantizer and their tests.
//!
//! Both directions are bit-equal to ggml's reference functions (`dequantize_row_*`, `quantize_row_*_ref`).

mod bfloat16;
mod float16;
mod float32;
mod q4_0;
mod q8_0;

pub(crate) use q4_0::BlockQ4_0;
pub(crate) use q8_0::BlockQ8_0;

/// What a format's file tells about it.
struct Description {
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    dequantize: fn(&[u8], &mut [f32]),
    quantize: fn(&[f32], &mut Vec<u8>),
}

/// A weight format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the formats' own names
pub enum Format {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
    /// 8-bit integers, one half-precision scale per 32 weights.
    Q8_0,
    /// 4-bit integers, one half-precision scale per 32 weights.
    Q4_0,
}

impl Format {
    const fn description(self) -> &'static Description {
        match self {
            Format::F32 => &float32::DESCRIPTION,
            Format::F16 => &float16::DESCRIPTION,
            Format::Bf16 => &bfloat16::DESCRIPTION,
            Format::Q8_0 => &q8_0::DESCRIPTION,
            Format::Q4_0 => &q4_0::DESCRIPTION,
        }
    }

    /// Its name in GGUF.
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
    (format.description().dequantize)(bytes, out);
}

/// Appends `values`, rounded to `format`.
///
/// # Panics
/// When `values` are not a whole number of blocks.
pub fn quantize(format: Format, values: &[f32], out: &mut Vec<u8>) {
    let bytes = format.row_bytes(values.len());
    assert!(bytes.is_some(), "{} values are no whole number of {} blocks", values.len(), format.name());
    out.reserve(bytes.unwrap_or(0));
    (format.description().quantize)(values, out);
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

    const ALL: [Format; 5] = [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4_0];

    #[test]
    fn quantizing_what_was_dequantized_changes_nothing() {
        let values = sample_values(4096);
        for format in ALL {
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
        assert_eq!(Format::F32.row_bytes(usize::MAX), None);
        assert_eq!(Format::Bf16.row_bytes(3), Some(6));
    }

    #[test]
    #[should_panic(expected = "whole number")]
    fn half_a_block_is_refused() {
        quantize(Format::Q4_0, &[0.0; 16], &mut Vec::new());
    }
}
