//! The online softmax: weights of one chunk's scores, and the merging of chunks.

use crate::ops::elementwise::{Cap, LaneMap};
use crate::ops::math::exp;
use crate::simd::{LANES, Simd};
use std::ops::Range;

/// The scalars of a softmax over some positions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    /// Greatest score.
    pub greatest: f32,
    /// Sum of the weights `exp(score - greatest)`.
    pub sum: f32,
}

impl Partial {
    /// Over no positions at all.
    pub const EMPTY: Partial = Partial { greatest: f32::NEG_INFINITY, sum: 0.0 };

    /// A chunk of which a row saw nothing; one whose scores were all -infinity has a sum of NaN.
    fn is_empty(self) -> bool {
        self.greatest == f32::NEG_INFINITY && self.sum == 0.0
    }
}

/// Turns scores into weights.
pub(super) struct Weigh<S: Simd> {
    scale: S::F32,
    cap: Option<Cap<S>>,
}

impl<S: Simd> Weigh<S> {
    #[inline(always)]
    pub fn new(simd: S, scale: f32, softcap: Option<f32>) -> Weigh<S> {
        #[allow(clippy::manual_map)]
        // a closure might not be inlined, and would then lack the instruction set
        let cap = match softcap {
            Some(cap) => Some(Cap::new(simd, cap)),
            None => None,
        };
        Weigh { scale: simd.splat(scale), cap }
    }

    /// Replaces one row's scores of the `visible` positions by their weights. Lanes outside get weight 0 inside the first and the
    /// last visible page, and are left alone elsewhere.
    #[inline(always)]
    pub fn row(&self, simd: S, scores: &mut [f32], visible: Range<usize>) -> Partial {
        let pages = visible.start / LANES..visible.end.div_ceil(LANES);
        let blocks = &mut scores.as_chunks_mut::<LANES>().0[pages.clone()];
        let mut greatest = simd.splat(f32::NEG_INFINITY);
        for (page, lanes) in pages.zip(blocks.iter_mut()) {
            let mut score = simd.mul(simd.load(lanes), self.scale);
            if let Some(cap) = &self.cap {
                score = cap.apply(simd, score);
            }
            if visible.start > page * LANES || visible.end < (page + 1) * LANES {
                score = mask(simd, score, page * LANES, &visible);
            }
            greatest = simd.max(score, greatest);
            simd.store(score, lanes);
        }
        let greatest = simd.reduce_max(greatest);
        let shift = simd.splat(greatest);
        let mut sum = simd.splat(0.0);
        for lanes in blocks {
            let weight = exp(simd, simd.sub(simd.load(lanes), shift));
            sum = simd.add(sum, weight);
            simd.store(weight, lanes);
        }
        Partial { greatest, sum: simd.reduce_sum(sum) }
    }
}

/// -infinity in the lanes whose position, `first` plus the lane's number, is not visible.
#[inline(always)]
fn mask<S: Simd>(simd: S, score: S::F32, first: usize, visible: &Range<usize>) -> S::F32 {
    const NUMBERS: [i32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let position = simd.add_i32(simd.load_i32(&NUMBERS), simd.splat_i32(first as i32));
    let hidden = simd.to_bits(simd.splat(f32::NEG_INFINITY));
    let bits = simd.to_bits(score);
    let bits = simd.select_greater_i32(simd.splat_i32(visible.start as i32), position, hidden, bits);
    let bits = simd.select_greater_i32(simd.splat_i32(visible.end as i32), position, bits, hidden);
    simd.from_bits(bits)
}

/// Adds a chunk's partial result to a row's total.
#[inline(always)]
pub(super) fn merge<S: Simd>(
    simd: S,
    total: &mut Partial,
    sums: &mut [f32],
    chunk: Partial,
    partials: &[f32],
) {
    if chunk.is_empty() {
        return;
    }
    let greatest = if chunk.greatest > total.greatest { chunk.greatest } else { total.greatest };
    let old = exp(simd, simd.splat(total.greatest - greatest));
    let new = exp(simd, simd.splat(chunk.greatest - greatest));
    for (sums, partials) in sums.as_chunks_mut::<LANES>().0.iter_mut().zip(partials.as_chunks::<LANES>().0) {
        let scaled = simd.mul(simd.load(partials), new);
        simd.store(simd.mul_add(simd.load(sums), old, scaled), sums);
    }
    let sum = simd.mul_add(simd.splat(total.sum), old, simd.mul(simd.splat(chunk.sum), new));
    *total = Partial { greatest, sum: simd.reduce_max(sum) };
}
