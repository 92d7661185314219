//! Rotary position embedding (Su et al., 2021): pairs of values of each head are rotated by an angle per position and pair.
//!
//! Angles come as tables, so every way of scaling them (linear, llama3, YaRN, longrope) is the caller's.

use super::elementwise::{SMALL_TASK, rows_per_task};
use crate::simd::{Kernel, LANES, Simd};
use crate::{Context, RowsMut, for_each_row};

/// Which values make a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// Value `i` and value `i + rotary_dim / 2`.
    Half,
    /// Values `2 i` and `2 i + 1`.
    Interleaved,
}

/// Rotates the first `rotary_dim` values of each head: with pair `(a, b)`, `(a cos - b sin, b cos + a sin)`.
///
/// `rows` is (rows, heads * head_dim); `cos` and `sin` are (rows, rotary_dim / 2), contiguous.
///
/// # Panics
/// If the shapes do not fit each other, or `rotary_dim` is odd or beyond `head_dim`.
pub fn rope_in_place(
    context: &Context,
    rows: RowsMut<'_>,
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    rotary_dim: usize,
    style: RopeStyle,
) {
    let pairs = rotary_dim / 2;
    assert!(
        rotary_dim.is_multiple_of(2) && rotary_dim <= head_dim,
        "rotary_dim {rotary_dim} of head_dim {head_dim}"
    );
    assert_eq!(rows.width(), heads * head_dim, "row width differs from heads * head_dim");
    assert_eq!(
        (cos.len(), sin.len()),
        (rows.rows() * pairs, rows.rows() * pairs),
        "cos and sin are not (rows, pairs)"
    );
    if rotary_dim == 0 {
        return;
    }
    let per_task = rows_per_task(rows.width(), SMALL_TASK);
    for_each_row(&context.pool, rows, per_task, |row, values| {
        let cos = &cos[row * pairs..][..pairs];
        let sin = &sin[row * pairs..][..pairs];
        context.isa.dispatch(RopeRow { values, head_dim, cos, sin, style });
    });
}

/// The oracle of [`rope_in_place`]: one head in f64.
pub fn rope_ref(head: &[f32], cos: &[f32], sin: &[f32], style: RopeStyle) -> Vec<f64> {
    let pairs = cos.len();
    let mut output: Vec<f64> = head.iter().map(|&x| f64::from(x)).collect();
    for pair in 0..pairs {
        let (first, second) = match style {
            RopeStyle::Half => (pair, pair + pairs),
            RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
        };
        let (a, b) = (f64::from(head[first]), f64::from(head[second]));
        let (cos, sin) = (f64::from(cos[pair]), f64::from(sin[pair]));
        output[first] = a * cos - b * sin;
        output[second] = b * cos + a * sin;
    }
    output
}

struct RopeRow<'a> {
    values: &'a mut [f32],
    head_dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    style: RopeStyle,
}

impl Kernel for RopeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rotary_dim = self.cos.len() * 2;
        for head in self.values.chunks_exact_mut(self.head_dim) {
            match self.style {
                RopeStyle::Half => rotate_halves(simd, &mut head[..rotary_dim], self.cos, self.sin),
                RopeStyle::Interleaved => rotate_pairs(&mut head[..rotary_dim], self.cos, self.sin),
            }
        }
    }
}

#[inline(always)]
fn rotate_halves<S: Simd>(simd: S, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    let (first, first_tail) = first.as_chunks_mut::<LANES>();
    let (second, second_tail) = second.as_chunks_mut::<LANES>();
    let (cos, cos_tail) = cos.as_chunks::<LANES>();
    let (sin, sin_tail) = sin.as_chunks::<LANES>();
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (x, y) = rotate(simd, simd.load(a), simd.load(b), simd.load(cos), simd.load(sin));
        simd.store(x, a);
        simd.store(y, b);
    }
    if !cos_tail.is_empty() {
        let (a, b) = (simd.load_partial(first_tail), simd.load_partial(second_tail));
        let (x, y) = rotate(simd, a, b, simd.load_partial(cos_tail), simd.load_partial(sin_tail));
        simd.store_partial(x, first_tail);
        simd.store_partial(y, second_tail);
    }
}

#[inline(always)]
fn rotate<S: Simd>(simd: S, a: S::F32, b: S::F32, cos: S::F32, sin: S::F32) -> (S::F32, S::F32) {
    (simd.sub(simd.mul(a, cos), simd.mul(b, sin)), simd.add(simd.mul(b, cos), simd.mul(a, sin)))
}

/// Plain code: the compiler vectorises it with the shuffles that each instruction set has.
#[inline(always)]
fn rotate_pairs(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, &cos), &sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let [a, b] = *pair;
        *pair = [a * cos - b * sin, b * cos + a * sin];
    }
}
