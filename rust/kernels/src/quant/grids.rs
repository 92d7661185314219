//! The grids of the IQ formats: lists of vectors of eight or four small integers, of which a block stores indices.
//!
//! The lists are facts of the formats: they were found by search when the formats were made, and no rule gives them again.
//! `grids.bin` holds them one after another, an entry in two bytes, little-endian, its first integer lowest: eight digits
//! of 2 bits, or four of 3 bits. `tests/kernels/generate_quant.py` writes that file from the lists in the `gguf` package.

/// A list of entries.
pub(super) struct Grid {
    entries: &'static [u8],
}

const ALL: &[u8; 2 * (2048 + 256 + 512 + 1024 + 256 + 512)] = include_bytes!("grids.bin");

const fn grid(first: usize, count: usize) -> Grid {
    Grid { entries: ALL.split_at(2 * first).1.split_at(2 * count).0 }
}

/// IQ1_S and IQ1_M; digits stand for -1, 0, 1.
pub(super) static IQ1: Grid = grid(0, 2048);
/// IQ2_XXS; its digits, and those of the next two, stand for [`PAIR_VALUES`].
pub(super) static IQ2_XXS: Grid = grid(2048, 256);
/// IQ2_XS.
pub(super) static IQ2_XS: Grid = grid(2304, 512);
/// IQ2_S.
pub(super) static IQ2_S: Grid = grid(2816, 1024);
/// IQ3_XXS; entries of four.
pub(super) static IQ3_XXS: Grid = grid(3840, 256);
/// IQ3_S; entries of four.
pub(super) static IQ3_S: Grid = grid(4096, 512);

/// Magnitudes in the IQ2 formats.
const PAIR_VALUES: [i8; 4] = [8, 25, 43, 0];

/// What the weights of the IQ2 formats are: the magnitudes, and the same negative (0 does not occur).
pub(super) static PAIR_BOOK: [i8; 16] = [8, 25, 43, 0, -8, -25, -43, 0, 0, 0, 0, 0, 0, 0, 0, 0];

impl Grid {
    /// Eight digits of an entry.
    pub(super) fn eight(&self, index: usize) -> [u8; 8] {
        let entry = super::grouped::word(self.entries, 2 * index);
        std::array::from_fn(|i| (entry >> (2 * i) & 3) as u8)
    }

    /// Four digits of an entry.
    pub(super) fn four(&self, index: usize) -> [u8; 4] {
        let entry = super::grouped::word(self.entries, 2 * index);
        std::array::from_fn(|i| (entry >> (3 * i) & 7) as u8)
    }

    /// Eight signed magnitudes of the IQ2 formats; set bits of `signs` negate.
    pub(super) fn pairs(&self, index: usize, signs: u8) -> [i8; 8] {
        signed(self.eight(index).map(|digit| PAIR_VALUES[usize::from(digit)]), signs)
    }
}

/// Negates where `signs` has bits.
pub(super) fn signed(values: [i8; 8], signs: u8) -> [i8; 8] {
    std::array::from_fn(|i| if signs >> i & 1 == 0 { values[i] } else { -values[i] })
}

/// Eight signs of which seven are stored: the number of negative ones is even.
pub(super) fn even_signs(seven: u8) -> u8 {
    seven & 127 | (((seven & 127).count_ones() & 1) << 7) as u8
}
