//! Root-mean-square and layer normalisation of rows, whole or in groups (heads).
//!
//! Sums use one order for every width and instruction set: value `i` is added in lane `i % 16` of accumulator `i / 16 % 4`, the
//! accumulators are added pairwise, the lanes by a tree.

use super::elementwise::{SMALL_TASK, rows_per_task};
use crate::simd::{Kernel, LANES, Simd};
use crate::{Context, Rows, RowsMut, for_each_row};

/// What is normalised away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + epsilon)` (Zhang and Sennrich, 2019).
    Rms,
    /// `(x - mean(x)) / sqrt(variance(x) + epsilon)` (Ba, Kiros and Hinton, 2016).
    Layer,
}

/// A normalisation and its weights.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// What is normalised away.
    pub kind: NormKind,
    /// A row is cut into this many equal groups, each normalised alone: 1 for the whole row, heads for per-head normalisation.
    pub groups: usize,
    /// Factors after normalising: one per value of a group (the groups share them), or one per value of a row.
    pub weight: Option<&'a [f32]>,
    /// Added last; sized as `weight`.
    pub bias: Option<&'a [f32]>,
    /// Added to the mean square or the variance.
    pub epsilon: f32,
}

/// `output = norm(input)`, both (rows, width).
///
/// # Panics
/// If the shapes differ, `groups` does not divide the width, or a weight or bias has another length than stated.
pub fn norm(context: &Context, norm: &Norm<'_>, input: Rows<'_>, output: RowsMut<'_>) {
    assert_eq!(
        (input.rows(), input.width()),
        (output.rows(), output.width()),
        "input and output differ in shape"
    );
    norm.check(input.width());
    for_each_row(&context.pool, output, rows_per_task(input.width(), SMALL_TASK), |row, values| {
        values.copy_from_slice(input.row(row));
        context.isa.dispatch(NormRow { norm, values });
    });
}

/// `rows = norm(rows)`, (rows, width).
///
/// # Panics
/// As [`norm`].
pub fn norm_in_place(context: &Context, norm: &Norm<'_>, rows: RowsMut<'_>) {
    norm.check(rows.width());
    let per_task = rows_per_task(rows.width(), SMALL_TASK);
    for_each_row(&context.pool, rows, per_task, |_, values| context.isa.dispatch(NormRow { norm, values }));
}

/// The oracle of [`norm`]: one row in f64.
pub fn norm_ref(norm: &Norm<'_>, row: &[f32]) -> Vec<f64> {
    norm.check(row.len());
    let width = row.len() / norm.groups;
    let mut output = Vec::with_capacity(row.len());
    for (group, values) in row.chunks_exact(width).enumerate() {
        let mean = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => values.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64,
        };
        let square = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (square + f64::from(norm.epsilon)).sqrt();
        for (i, &x) in values.iter().enumerate() {
            let weight = norm.part(norm.weight, group, width).map_or(1.0, |weight| f64::from(weight[i]));
            let bias = norm.part(norm.bias, group, width).map_or(0.0, |bias| f64::from(bias[i]));
            output.push((f64::from(x) - mean) * scale * weight + bias);
        }
    }
    output
}

impl<'a> Norm<'a> {
    fn check(&self, width: usize) {
        assert!(
            self.groups > 0 && width.is_multiple_of(self.groups),
            "{} groups do not divide {width}",
            self.groups
        );
        for parameters in [self.weight, self.bias].into_iter().flatten() {
            let length = parameters.len();
            assert!(
                length == width || length == width / self.groups,
                "{length} parameters for a row of {width} values"
            );
        }
    }

    /// The part of a weight or bias that belongs to a group of `width` values.
    #[inline(always)]
    fn part(&self, parameters: Option<&'a [f32]>, group: usize, width: usize) -> Option<&'a [f32]> {
        parameters.map(|all| if all.len() == width { all } else { &all[group * width..][..width] })
    }
}

struct NormRow<'a> {
    norm: &'a Norm<'a>,
    values: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.values.len() / self.norm.groups;
        if width == 0 {
            return;
        }
        for (group, values) in self.values.chunks_exact_mut(width).enumerate() {
            let mean = match self.norm.kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => sum::<S, false>(simd, values, 0.0) / width as f32,
            };
            let square = sum::<S, true>(simd, values, mean) / width as f32;
            let shift = simd.splat(mean);
            let scale = simd.splat(1.0 / (square + self.norm.epsilon).sqrt());
            let weight = self.norm.part(self.norm.weight, group, width);
            let bias = self.norm.part(self.norm.bias, group, width);
            apply(simd, values, Affine { shift, scale, weight, bias });
        }
    }
}

/// The sum of all values, or of their squared distances from `mean`, in the order that this file's header states.
#[inline(always)]
fn sum<S: Simd, const SQUARES: bool>(simd: S, values: &[f32], mean: f32) -> f32 {
    let shift = simd.splat(mean);
    let mut sums = [simd.splat(0.0); 4];
    let (blocks, rest) = values.as_chunks::<{ 4 * LANES }>();
    for block in blocks {
        for (sum, lanes) in sums.iter_mut().zip(block.as_chunks::<LANES>().0) {
            *sum = add_term::<S, SQUARES>(simd, *sum, simd.load(lanes), shift);
        }
    }
    for (sum, lanes) in sums.iter_mut().zip(rest.chunks(LANES)) {
        let mut padded = [mean; LANES]; // adds nothing: the plain sum is always taken with mean 0
        padded[..lanes.len()].copy_from_slice(lanes);
        *sum = add_term::<S, SQUARES>(simd, *sum, simd.load(&padded), shift);
    }
    simd.reduce_sum(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])))
}

#[inline(always)]
fn add_term<S: Simd, const SQUARES: bool>(simd: S, sum: S::F32, x: S::F32, shift: S::F32) -> S::F32 {
    let centred = simd.sub(x, shift);
    if SQUARES { simd.mul_add(centred, centred, sum) } else { simd.add(sum, centred) }
}

/// What is done to every value once the sums are known.
struct Affine<'a, S: Simd> {
    shift: S::F32,
    scale: S::F32,
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
}

impl<S: Simd> Affine<'_, S> {
    /// `(x - shift) * scale * weight + bias`, where `x` are the values from `at` on, up to `end`.
    #[inline(always)]
    fn apply(&self, simd: S, x: S::F32, at: usize, end: usize) -> S::F32 {
        let mut y = simd.mul(simd.sub(x, self.shift), self.scale);
        if let Some(weight) = self.weight {
            y = simd.mul(y, load(simd, &weight[at..end]));
        }
        if let Some(bias) = self.bias {
            y = simd.add(y, load(simd, &bias[at..end]));
        }
        y
    }
}

#[inline(always)]
fn apply<S: Simd>(simd: S, values: &mut [f32], affine: Affine<'_, S>) {
    let (blocks, tail) = values.as_chunks_mut::<LANES>();
    let end = blocks.len() * LANES;
    for (block, values) in blocks.iter_mut().enumerate() {
        let at = block * LANES;
        simd.store(affine.apply(simd, simd.load(values), at, at + LANES), values);
    }
    if !tail.is_empty() {
        simd.store_partial(affine.apply(simd, simd.load_partial(tail), end, end + tail.len()), tail);
    }
}

#[inline(always)]
fn load<S: Simd>(simd: S, values: &[f32]) -> S::F32 {
    match values.first_chunk::<LANES>() {
        Some(lanes) => simd.load(lanes),
        None => simd.load_partial(values),
    }
}
