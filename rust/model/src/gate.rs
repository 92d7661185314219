//! Gates that the CPU computes together with what they let through: a product of gate and up in one matrix, and the activation after it.

use crate::Program;
use crate::step::{Slice, Step};
use infer_kernels::Activation;

/// Both steps.
pub(crate) struct Gated {
    pub input: Slice,
    pub output: Slice,
    /// Index into [`Program::matrices`].
    pub weight: usize,
    pub activation: Activation,
}

impl Gated {
    /// The first two of some steps, if they are such.
    pub fn first_of(steps: &[Step]) -> Option<Gated> {
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

impl Program {
    /// Leaves buffers without memory that the CPU never writes to: it writes gate and up out only where they are two products.
    pub fn release_unused_buffers(&mut self) {
        let mut used = vec![false; self.buffers.len()];
        let mut at = 0;
        while at < self.steps.len() {
            match Gated::first_of(&self.steps[at..]) {
                Some(Gated { input, output, .. }) => {
                    (used[input.buffer], used[output.buffer]) = (true, true);
                    at += 2;
                }
                None => {
                    self.steps[at].visit(&mut |slice, _| used[slice.buffer] = true);
                    at += 1;
                }
            }
        }
        for (buffer, _) in self.buffers.iter_mut().zip(used).filter(|(_, used)| !used) {
            buffer.width = 0;
        }
    }
}
