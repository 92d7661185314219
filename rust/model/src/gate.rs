//! Gates that are computed together with what they let through.

use crate::Program;
use crate::step::{Slice, Step};

impl Program {
    /// Makes one step of a product of gate and up together and the activation that follows it. A buffer that no step uses any more gets
    /// no memory.
    pub fn gate(&mut self) {
        let mut steps: Vec<Step> = Vec::with_capacity(self.steps.len());
        for step in std::mem::take(&mut self.steps) {
            match (steps.last(), &step) {
                (
                    Some(&Step::Linear { input, output: both, weight }),
                    &Step::GatedActivation { gate, up, output, activation },
                ) if both == together(gate, up) => {
                    *steps.last_mut().expect("there is one") =
                        Step::GatedLinear { input, output, weight, activation };
                }
                _ => steps.push(step),
            }
        }
        let mut used = vec![false; self.buffers.len()];
        for step in &mut steps {
            step.visit(&mut |slice, _| used[slice.buffer] = true);
        }
        for (buffer, used) in self.buffers.iter_mut().zip(used) {
            buffer.width = if used { buffer.width } else { 0 };
        }
        self.steps = steps;
    }
}

/// The columns of gate and up, if up comes right after the gate; else some that no product has.
fn together(gate: Slice, up: Slice) -> Slice {
    let adjacent =
        gate.buffer == up.buffer && gate.offset + gate.width == up.offset && gate.width == up.width;
    Slice { width: if adjacent { 2 * gate.width } else { 0 }, ..gate }
}
