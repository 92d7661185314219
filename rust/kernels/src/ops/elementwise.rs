//! Sums and scalings of whole rows.

use super::math::tanh;
use crate::simd::{Kernel, LANES, Simd};
use crate::{Context, Rows, RowsMut, for_each_row};

/// Fewest values worth waking another thread for, where a value costs about a nanosecond divided by the lanes.
pub(super) const SMALL_TASK: usize = 1 << 16;

/// Rows that make a task of at least `values` values.
pub(super) fn rows_per_task(width: usize, values: usize) -> usize {
    values.div_ceil(width.max(1))
}

/// A function of one vector. A trait and not a closure, because only functions can be told to be inlined always, and a function
/// over vectors that is not inlined is compiled without its instruction set.
pub(super) trait LaneMap<S: Simd> {
    /// The function's value in every lane.
    fn apply(&self, simd: S, x: S::F32) -> S::F32;
}

/// `values = map(values)`.
#[inline(always)]
pub(super) fn map_in_place<S: Simd, M: LaneMap<S>>(simd: S, values: &mut [f32], map: M) {
    let (blocks, tail) = values.as_chunks_mut::<LANES>();
    for lanes in blocks {
        simd.store(map.apply(simd, simd.load(lanes)), lanes);
    }
    if !tail.is_empty() {
        simd.store_partial(map.apply(simd, simd.load_partial(tail)), tail);
    }
}

/// `destination += scale * source`, both (rows, width); one rounding per value.
///
/// # Panics
/// If the shapes differ.
pub fn add_in_place(context: &Context, destination: RowsMut<'_>, source: Rows<'_>, scale: f32) {
    let shape = (destination.rows(), destination.width());
    assert_eq!((source.rows(), source.width()), shape, "source and destination differ in shape");
    for_each_row(&context.pool, destination, rows_per_task(shape.1, SMALL_TASK), |row, destination| {
        context.isa.dispatch(AddScaled { destination, source: source.row(row), scale });
    });
}

/// `rows *= scale`, (rows, width).
pub fn scale_in_place(context: &Context, rows: RowsMut<'_>, scale: f32) {
    let per_task = rows_per_task(rows.width(), SMALL_TASK);
    for_each_row(&context.pool, rows, per_task, |_, values| context.isa.dispatch(Scale { values, scale }));
}

/// `rows = cap * tanh(rows / cap)`, (rows, width): bounds values smoothly to (-cap, cap).
pub fn softcap_in_place(context: &Context, rows: RowsMut<'_>, cap: f32) {
    let per_task = rows_per_task(rows.width(), SMALL_TASK / 4);
    for_each_row(&context.pool, rows, per_task, |_, values| context.isa.dispatch(Softcap { values, cap }));
}

struct AddScaled<'a> {
    destination: &'a mut [f32],
    source: &'a [f32],
    scale: f32,
}

impl Kernel for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = simd.splat(self.scale);
        let (source, source_tail) = self.source.as_chunks::<LANES>();
        let (destination, tail) = self.destination.as_chunks_mut::<LANES>();
        for (source, destination) in source.iter().zip(destination) {
            simd.store(simd.mul_add(scale, simd.load(source), simd.load(destination)), destination);
        }
        if !tail.is_empty() {
            let sum = simd.mul_add(scale, simd.load_partial(source_tail), simd.load_partial(tail));
            simd.store_partial(sum, tail);
        }
    }
}

struct Scale<'a> {
    values: &'a mut [f32],
    scale: f32,
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = simd.splat(self.scale);
        map_in_place(simd, self.values, Factor::<S>(scale));
    }
}

struct Softcap<'a> {
    values: &'a mut [f32],
    cap: f32,
}

impl Kernel for Softcap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        map_in_place(simd, self.values, Cap::new(simd, self.cap));
    }
}

/// A factor, in all lanes.
struct Factor<S: Simd>(S::F32);

impl<S: Simd> LaneMap<S> for Factor<S> {
    #[inline(always)]
    fn apply(&self, simd: S, x: S::F32) -> S::F32 {
        simd.mul(x, self.0)
    }
}

/// A soft bound, in all lanes.
pub(super) struct Cap<S: Simd> {
    cap: S::F32,
    inverse: S::F32,
}

impl<S: Simd> Cap<S> {
    #[inline(always)]
    pub(super) fn new(simd: S, cap: f32) -> Cap<S> {
        Cap { cap: simd.splat(cap), inverse: simd.splat(1.0 / cap) }
    }
}

impl<S: Simd> LaneMap<S> for Cap<S> {
    #[inline(always)]
    fn apply(&self, simd: S, x: S::F32) -> S::F32 {
        simd.mul(self.cap, tanh(simd, simd.mul(x, self.inverse)))
    }
}
