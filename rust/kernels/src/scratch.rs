//! Working memory that operations reuse, so that a model's step allocates nothing once it has seen its largest batch.

use crate::matrix::Activations;
use crate::ops::AttentionScratch;

/// Working memory of [`linear`](crate::linear), [`gated_linear`](crate::gated_linear) and [`attention`](crate::attention); its contents
/// mean nothing between calls.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Input rows as `linear` wants them.
    pub(crate) activations: Activations,
    /// Gate and up of `gated_linear`, where it writes them out: (rows, 2 * width).
    pub(crate) gate_up: Vec<f32>,
    /// Tasks, scores and partial results of `attention`.
    pub(crate) attention: AttentionScratch,
}
