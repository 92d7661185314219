//! Activation functions, alone and as the gate of a product.

use super::elementwise::{LaneMap, SMALL_TASK, map_in_place, rows_per_task};
use super::math::{erf, erf_ref, exp};
use crate::simd::{Kernel, LANES, Simd};
use crate::{Context, Rows, RowsMut, for_each_row};

/// A function applied to every value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x / 2 * (1 + erf(x / sqrt(2)))`.
    GeluErf,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    ReluSquared,
}

impl Activation {
    /// The function of one value in f64: the oracle of the vector kernels.
    pub fn reference(self, x: f64) -> f64 {
        match self {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
            Activation::GeluErf => 0.5 * x * (1.0 + erf_ref(x / std::f64::consts::SQRT_2)),
            Activation::Relu => x.max(0.0),
            Activation::ReluSquared => x.max(0.0) * x.max(0.0),
        }
    }
}

impl<S: Simd> LaneMap<S> for Activation {
    #[inline(always)]
    fn apply(&self, simd: S, x: S::F32) -> S::F32 {
        let one = simd.splat(1.0);
        match *self {
            Activation::Silu => simd.div(x, simd.add(one, exp(simd, simd.sub(simd.splat(0.0), x)))),
            Activation::GeluTanh => {
                // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)): one exponential, and no cancellation for negative x.
                let cubic = simd.mul_add(simd.mul(x, x), simd.splat(-0.071_354_814), simd.splat(-1.595_769));
                simd.div(x, simd.add(one, exp(simd, simd.mul(x, cubic))))
            }
            Activation::GeluErf => {
                let half = simd.mul(x, simd.splat(0.5));
                simd.mul_add(half, erf(simd, simd.mul(x, simd.splat(std::f32::consts::FRAC_1_SQRT_2))), half)
            }
            Activation::Relu => simd.max(simd.splat(0.0), x),
            Activation::ReluSquared => {
                let positive = simd.max(simd.splat(0.0), x);
                simd.mul(positive, positive)
            }
        }
    }
}

/// `output = activation(gate) * up`, all (rows, width).
///
/// # Panics
/// If the shapes differ.
pub fn gated_activation(
    context: &Context,
    activation: Activation,
    gate: Rows<'_>,
    up: Rows<'_>,
    output: RowsMut<'_>,
) {
    let shape = (output.rows(), output.width());
    assert_eq!((gate.rows(), gate.width()), shape, "gate and output differ in shape");
    assert_eq!((up.rows(), up.width()), shape, "up and output differ in shape");
    for_each_row(&context.pool, output, rows_per_task(shape.1, SMALL_TASK / 4), |row, output| {
        context.isa.dispatch(Gated { activation, gate: gate.row(row), up: up.row(row), output });
    });
}

/// `rows = activation(rows)`, (rows, width).
pub fn activation_in_place(context: &Context, activation: Activation, rows: RowsMut<'_>) {
    let per_task = rows_per_task(rows.width(), SMALL_TASK / 4);
    for_each_row(&context.pool, rows, per_task, |_, values| {
        context.isa.dispatch(Alone { activation, values })
    });
}

/// `output = activation(gate) * up` of a row.
pub(super) struct Gated<'a> {
    pub(super) activation: Activation,
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) output: &'a mut [f32],
}

impl Kernel for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (gate, gate_tail) = self.gate.as_chunks::<LANES>();
        let (up, up_tail) = self.up.as_chunks::<LANES>();
        let (output, output_tail) = self.output.as_chunks_mut::<LANES>();
        for ((gate, up), output) in gate.iter().zip(up).zip(output) {
            simd.store(simd.mul(self.activation.apply(simd, simd.load(gate)), simd.load(up)), output);
        }
        if !output_tail.is_empty() {
            let activated = self.activation.apply(simd, simd.load_partial(gate_tail));
            simd.store_partial(simd.mul(activated, simd.load_partial(up_tail)), output_tail);
        }
    }
}

struct Alone<'a> {
    activation: Activation,
    values: &'a mut [f32],
}

impl Kernel for Alone<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        map_in_place(simd, self.values, self.activation);
    }
}
