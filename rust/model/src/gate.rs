//! Gates that the CPU computes together with what they let through: a product of gate and up in one matrix, and the activation after it.

use crate::Program;
use crate::step::{Slice, Step};
use infer_kernels::Activation;

/// What the CPU computes at once.
pub(crate) enum Turn<'a> {
    /// A step.
    Step(&'a Step),
    /// Both steps of a gate.
    Gated(Gated),
}

/// A product of gate and up, and their activation.
pub(crate) struct Gated {
    pub input: Slice,
    pub output: Slice,
    /// Index into [`Program::matrices`].
    pub weight: usize,
    pub activation: Activation,
}

impl Gated {
    /// The first two of some steps, if they are such.
    fn first_of(steps: &[Step]) -> Option<Gated> {
        let &[
            Step::Linear { input, output: both, weight },
            Step::GatedActivation { gate, up, output, activation },
            ..,
        ] = steps
        else {
            return None;
        };
        let half = both.width / 2;
        let part = |first| Slice { offset: both.offset + first, width: half, ..both };
        let halves = gate == part(0) && up == part(half);
        halves.then_some(Gated { input, output, weight, activation })
    }
}

/// Steps in the CPU's turns.
pub(crate) fn turns(mut steps: &[Step]) -> impl Iterator<Item = Turn<'_>> {
    std::iter::from_fn(move || {
        let (turn, len) = match Gated::first_of(steps) {
            Some(gated) => (Turn::Gated(gated), 2),
            None => (Turn::Step(steps.first()?), 1),
        };
        steps = &steps[len..];
        Some(turn)
    })
}

impl Program {
    /// Leaves buffers without memory that the CPU never writes to: it writes gate and up out only where they are two products.
    pub fn release_unused_buffers(&mut self) {
        let mut used = vec![false; self.buffers.len()];
        for turn in turns(&self.steps) {
            match turn {
                Turn::Step(step) => step.clone().visit(&mut |slice, _| used[slice.buffer] = true),
                Turn::Gated(gated) => (used[gated.input.buffer], used[gated.output.buffer]) = (true, true),
            }
        }
        for (buffer, _) in self.buffers.iter_mut().zip(used).filter(|(_, used)| !used) {
            buffer.width = 0;
        }
    }
}
