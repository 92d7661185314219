//! The grids of the IQ formats: lists of vectors of eight or four small integers, of which a block stores indices.
//!
//! The lists are facts of the formats: they were found by search when the formats were made, and no rule gives them again.
//! `grids.bin` holds them one after another, an entry in two bytes, little-endian, its first integer lowest: eight digits
//! of 2 bits, or four of 3 bits. `tests/kernels/generate_quant.py` writes that file from the lists in the `gguf` package.

use super::grouped::spread;

/// A list of vectors: an integer's digit to a byte, the first one lowest.
pub(super) struct Grid<const N: usize> {
    entries: [u64; N],
}

const ALL: &[u8; 2 * (2048 + 256 + 512 + 1024 + 256 + 512)] = include_bytes!("grids.bin");

/// Expands `N` entries of `count` digits of `bits` bits.
const fn grid<const N: usize>(first: usize, count: usize, bits: usize) -> Grid<N> {
    let mut entries = [0; N];
    let mut entry = 0;
    while entry < N {
        let at = 2 * (first + entry);
        let digits = u16::from_le_bytes([ALL[at], ALL[at + 1]]) as u64;
        let mut digit = 0;
        while digit < count {
            entries[entry] |= (digits >> (bits * digit) & ((1 << bits) - 1)) << (8 * digit);
            digit += 1;
        }
        entry += 1;
    }
    Grid { entries }
}

/// IQ1_S and IQ1_M; digits stand for -1, 0, 1.
pub(super) static IQ1: Grid<2048> = grid(0, 8, 2);
/// IQ2_XXS; its digits, and those of the next two, stand for the first integers of [`PAIR_BOOK`].
pub(super) static IQ2_XXS: Grid<256> = grid(2048, 8, 2);
/// IQ2_XS.
pub(super) static IQ2_XS: Grid<512> = grid(2304, 8, 2);
/// IQ2_S.
pub(super) static IQ2_S: Grid<1024> = grid(2816, 8, 2);
/// IQ3_XXS; entries of four.
pub(super) static IQ3_XXS: Grid<256> = grid(3840, 4, 3);
/// IQ3_S; entries of four.
pub(super) static IQ3_S: Grid<512> = grid(4096, 4, 3);

/// What the weights of the IQ2 formats are: the magnitudes, and the same negative (0 does not occur).
pub(super) static PAIR_BOOK: [i8; 16] = [8, 25, 43, 0, -8, -25, -43, 0, 0, 0, 0, 0, 0, 0, 0, 0];

impl<const N: usize> Grid<N> {
    /// An entry's digits.
    #[inline(always)]
    pub(super) fn entry(&self, index: usize) -> u64 {
        self.entries[index]
    }

    /// Eight codes of a book whose upper half, from `1 << NEGATIVE` on, is the negative of the lower one.
    #[inline(always)]
    pub(super) fn eight<const NEGATIVE: u32>(&self, index: usize, signs: u8) -> u64 {
        self.entry(index) | spread(signs) << NEGATIVE
    }

    /// The same of two entries of four.
    #[inline(always)]
    pub(super) fn fours<const NEGATIVE: u32>(&self, indices: [usize; 2], signs: u8) -> u64 {
        self.entry(indices[0]) | self.entry(indices[1]) << 32 | spread(signs) << NEGATIVE
    }
}

/// Eight signs of which seven are stored: the number of negative ones is even.
#[inline(always)]
pub(super) fn even_signs(seven: u8) -> u8 {
    EVEN_SIGNS[usize::from(seven & 127)]
}

static EVEN_SIGNS: [u8; 128] = {
    let mut all = [0; 128];
    let mut seven = 0_u8;
    while seven < 128 {
        all[seven as usize] = seven | ((seven.count_ones() & 1) << 7) as u8;
        seven += 1;
    }
    all
};
