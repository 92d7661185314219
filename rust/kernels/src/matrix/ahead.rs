//! What kernels ask memory for before they need it.

use crate::simd::Simd;

/// How far ahead of the weights being used others are asked for, in bytes. The hardware alone does not overlap
/// memory and arithmetic. (Half as far costs 8 rows of 4 bits 5 to 10 %, a quarter 20; twice as far gains nothing more.) Only the
/// first of several full tiles asks: for the others weights are in a cache, and asking takes the place of loads, which are what is
/// scarce (`FETCH`; whole prompts on Zen 5: 3 to 4 % of Q4_0, Q8_0 and Q4_K_M).
pub(super) const AHEAD: usize = 8192;

/// The panel after the one that is being multiplied. The first tile of rows takes a panel from memory, and the others find it in
/// a cache: so that memory is not idle meanwhile, each tile asks for its share of the next panel. (16 rows of Q8_0: 11 to 15 %.)
/// Where `SEVERAL` is false there is one tile and nothing to do, at no cost: a test per group cost one row up to a quarter.
#[derive(Clone, Copy)]
pub(super) struct NextPanel<const SEVERAL: bool> {
    next: *const u8,
    turns: usize,
    lines: usize, // per turn
}

impl<const SEVERAL: bool> NextPanel<SEVERAL> {
    /// The share of tile `tile` of `tiles`, to be asked for in at most `turns` turns, given the bytes of the panel at work.
    #[inline(always)]
    pub(super) fn new(weights: &[u8], turns: usize, tile: usize, tiles: usize) -> Self {
        let end = weights.as_ptr_range().end;
        if !SEVERAL || turns == 0 {
            return NextPanel { next: end, turns: 0, lines: 0 };
        }
        let share = (weights.len() / 64).div_ceil(tiles);
        let lines = share.div_ceil(turns).max(1);
        NextPanel { next: end.wrapping_add(tile * share * 64), turns: share.div_ceil(lines), lines }
    }

    /// One of the turns, in any order; those that are too many do nothing.
    #[inline(always)]
    pub(super) fn fetch<S: Simd>(&self, simd: S, turn: usize) {
        if SEVERAL && turn < self.turns {
            for line in 0..self.lines {
                simd.prefetch_later(self.next.wrapping_add((turn * self.lines + line) * 64));
            }
        }
    }
}
