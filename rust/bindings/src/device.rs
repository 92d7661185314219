//! The engine's device and text, implemented by the model and text rooms.

use infer_engine as core;
use infer_model::{Batch, BatchSequence, CpuModel};
use infer_text::Detokenizer;

/// A model on the CPU.
pub struct CpuDevice {
    pub model: CpuModel,
}

impl core::Device for CpuDevice {
    fn forward(&mut self, batch: &core::Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        let sequences: Vec<_> = batch.sequences.iter().map(borrow).collect();
        let batch = Batch { tokens: &batch.tokens, sequences: &sequences, logit_rows: &batch.logit_rows };
        self.model.forward(&batch, logits).map_err(|error| error.to_string())
    }
}

fn borrow(sequence: &core::BatchSequence) -> BatchSequence<'_> {
    BatchSequence {
        first_row: sequence.first_row,
        rows: sequence.rows,
        first_position: sequence.first_position,
        pages: &sequence.pages,
        long_context: sequence.long_context,
    }
}

/// A completion's text.
pub struct CompletionText {
    pub detokenizer: Detokenizer,
}

impl core::TokenText for CompletionText {
    fn push(&mut self, token: u32, may_stop: bool) -> core::TextStep {
        if !may_stop {
            return core::TextStep { text: self.detokenizer.push_without_stops(token), stopped: None };
        }
        let step = self.detokenizer.push(token);
        core::TextStep { text: step.text, stopped: step.stopped.map(|found| found.stop) }
    }

    fn finish(&mut self) -> core::TextStep {
        let text = self.detokenizer.finish();
        core::TextStep { text, stopped: self.detokenizer.stopped().map(|found| found.stop.clone()) }
    }
}
