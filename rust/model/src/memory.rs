//! Working memory of the interpreter: the program's buffers for the rows of one batch.

use infer_kernels::{Rows, RowsMut, Scratch};

use crate::Program;
use crate::batch::Batch;
use crate::experts::Routes;
use crate::rope::RopeTable;
use crate::step::Slice;

/// Working memory, kept between calls.
#[derive(Default)]
pub(crate) struct Memory {
    /// Rows of the batch, and after `Select` the wanted ones.
    rows: usize,
    buffers: Vec<Vec<f32>>,
    /// Slot in the cache of every row, and in the cache of layers that see only a window if that is another.
    pub slots: [Vec<u32>; 2],
    /// Cosines and sines of every kind of rotation.
    pub rotations: Vec<(Vec<f32>, Vec<f32>)>,
    pub routes: Routes,
    pub scratch: Scratch,
}

impl Memory {
    /// Sizes the buffers for a batch, and computes slots and rotations of its rows.
    pub fn prepare(&mut self, program: &Program, ropes: &[RopeTable], batch: &Batch<'_>) {
        self.buffers.resize_with(program.buffers.len(), Vec::new);
        for (buffer, values) in program.buffers.iter().zip(&mut self.buffers) {
            let rows = if buffer.wanted { batch.logit_rows.len() } else { batch.tokens.len() };
            let size = rows * buffer.width;
            // Grown to what is needed and never zeroed: every step writes all of the columns that a later one reads.
            if values.len() < size {
                values.resize(size, 0.0);
            } else if buffer.wanted && rows > 0 && values.capacity() > 4 * size.max(1 << 16) {
                values.truncate(size);
                values.shrink_to_fit(); // a long prompt's logits are not kept for ever
            }
        }
        self.rows = batch.tokens.len();
        for (slots, local) in self.slots.iter_mut().zip([false, true]) {
            slots.clear();
            slots.extend(batch.slots(local));
        }
        self.rotations.resize_with(ropes.len(), Default::default);
        for (rope, (cos, sin)) in ropes.iter().zip(&mut self.rotations) {
            cos.clear();
            sin.clear();
            for (position, long_context) in batch.positions() {
                rope.append(position, long_context, cos, sin);
            }
        }
    }

    /// A slice to read.
    pub fn rows(&self, slice: Slice, program: &Program) -> Rows<'_> {
        let stride = program.buffers[slice.buffer].width;
        Rows::new(&self.buffers[slice.buffer][slice.offset..], self.rows, slice.width, stride)
    }

    /// A slice to change.
    pub fn rows_mut(&mut self, slice: Slice, program: &Program) -> RowsMut<'_> {
        let stride = program.buffers[slice.buffer].width;
        RowsMut::new(&mut self.buffers[slice.buffer][slice.offset..], self.rows, slice.width, stride)
    }

    /// Calls `body` with one slice to read and one of another buffer to write.
    pub fn map(
        &mut self,
        program: &Program,
        input: Slice,
        output: Slice,
        body: impl FnOnce(&mut Scratch, Rows<'_>, RowsMut<'_>),
    ) {
        let mut target = std::mem::take(&mut self.buffers[output.buffer]);
        let mut scratch = std::mem::take(&mut self.scratch);
        let stride = program.buffers[output.buffer].width;
        let rows = RowsMut::new(&mut target[output.offset..], self.rows, output.width, stride);
        body(&mut scratch, self.rows(input, program), rows);
        self.scratch = scratch;
        self.buffers[output.buffer] = target;
    }

    /// The same with two slices to read.
    pub fn map_two(
        &mut self,
        program: &Program,
        first: Slice,
        second: Slice,
        output: Slice,
        body: impl FnOnce(Rows<'_>, Rows<'_>, RowsMut<'_>),
    ) {
        let mut target = std::mem::take(&mut self.buffers[output.buffer]);
        let stride = program.buffers[output.buffer].width;
        let rows = RowsMut::new(&mut target[output.offset..], self.rows, output.width, stride);
        body(self.rows(first, program), self.rows(second, program), rows);
        self.buffers[output.buffer] = target;
    }

    /// Lets a buffer and the caller's values change places, if there was a batch yet. A buffer may be of any length before [`Memory::prepare`].
    pub fn exchange(&mut self, slice: Slice, values: &mut Vec<f32>) {
        if let Some(buffer) = self.buffers.get_mut(slice.buffer) {
            std::mem::swap(buffer, values);
        }
    }

    /// Copies the wanted rows of a batch; from here on there are only these.
    pub fn select(&mut self, program: &Program, input: Slice, output: Slice, batch: &Batch<'_>) {
        let mut target = std::mem::take(&mut self.buffers[output.buffer]);
        self.rows = batch.tokens.len(); // of which there are fewer if another buffer's were selected already
        let source = self.rows(input, program);
        let stride = program.buffers[output.buffer].width;
        let wanted = batch.logit_rows;
        let mut rows = RowsMut::new(&mut target[output.offset..], wanted.len(), output.width, stride);
        for (row, from) in wanted.iter().enumerate() {
            rows.row_mut(row).copy_from_slice(source.row(*from as usize));
        }
        self.buffers[output.buffer] = target;
        self.rows = wanted.len();
    }
}
