//! The engine's device and text, implemented by the model and text rooms.

use infer_engine as core;
use infer_model::{Batch, BatchSequence, CpuModel, KvPage};
use infer_text::Detokenizer;

use crate::tokenizer::TextModel;

/// A model on the CPU, and perhaps a smaller one that guesses for it. Pages of the same number hold the same tokens in both.
pub struct CpuDevice {
    pub model: CpuModel,
    pub draft: Option<CpuModel>,
    /// Logits of `draft`: `logits` is memory of `model`.
    pub draft_logits: Vec<f32>,
}

impl CpuDevice {
    fn copy_pages(&mut self, batch: &core::Batch) -> Result<(), String> {
        for model in [Some(&mut self.model), self.draft.as_mut()].into_iter().flatten() {
            for &(from, to) in &batch.copies {
                model.copy_page(place(from), place(to)).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }
}

impl core::Device for CpuDevice {
    fn forward(&mut self, batch: &core::Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.copy_pages(batch)?;
        if let Some(draft) = &mut self.draft {
            compute(draft, &batch.not_drafted(), &mut Vec::new())?; // there are none
        }
        compute(&mut self.model, batch, logits)
    }

    fn prepare(&mut self) -> bool {
        // What is wrong is told by the next step.
        let mut models = [Some(&mut self.model), self.draft.as_mut()].into_iter().flatten();
        models.any(|model| model.prepare().unwrap_or(false))
    }

    fn share_out(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.model.context().pool.run(tasks, task);
    }

    fn draft(&mut self, batch: &core::Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.copy_pages(batch)?;
        let draft = self.draft.as_mut().ok_or("this engine has no draft model")?;
        compute(draft, batch, &mut self.draft_logits)?;
        logits.clear();
        logits.extend_from_slice(&self.draft_logits);
        Ok(())
    }

    fn export_page(&mut self, page: core::PageRef, bytes: &mut Vec<u8>) -> Result<(), String> {
        self.model.export_page(place(page), bytes).map_err(|error| error.to_string())?;
        if let Some(draft) = &self.draft {
            let mut more = Vec::new();
            draft.export_page(place(page), &mut more).map_err(|error| error.to_string())?;
            bytes.append(&mut more);
        }
        Ok(())
    }

    fn import_page(&mut self, page: core::PageRef, bytes: &[u8]) -> Result<(), String> {
        let (own, more) = bytes.split_at(self.model.page_bytes().min(bytes.len()));
        self.model.import_page(place(page), own).map_err(|error| error.to_string())?;
        match &mut self.draft {
            Some(draft) => draft.import_page(place(page), more).map_err(|error| error.to_string()),
            None if more.is_empty() => Ok(()),
            None => Err(format!("a page takes {} bytes, got {}", own.len(), bytes.len())),
        }
    }
}

fn place(page: core::PageRef) -> KvPage {
    KvPage { page: page.page, local: page.local }
}

fn compute(model: &mut CpuModel, batch: &core::Batch, logits: &mut Vec<f32>) -> Result<(), String> {
    let sequences: Vec<_> = batch.sequences.iter().map(borrow).collect();
    let batch = Batch { tokens: &batch.tokens, sequences: &sequences, logit_rows: &batch.logit_rows };
    model.forward(&batch, logits).map_err(|error| error.to_string())
}

fn borrow(sequence: &core::BatchSequence) -> BatchSequence<'_> {
    BatchSequence {
        first_row: sequence.first_row,
        rows: sequence.rows,
        first_position: sequence.first_position,
        pages: &sequence.pages,
        local_pages: &sequence.local_pages,
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

/// What makes the text of a request's completions; none where nobody wants it.
///
/// # Errors
/// Stop strings that cannot be looked for.
pub fn text_factory(
    model: Option<&TextModel>,
    params: &core::SamplingParams,
    prompt: &[u32],
) -> Result<Option<core::TextFactory>, String> {
    let Some(model) = model.filter(|_| params.detokenize) else { return Ok(None) };
    let (skip, stop) = (params.skip_special_tokens, params.stop.clone());
    let made = Detokenizer::new(&model.tokenizer, skip, stop, params.include_stop_str_in_output);
    let fresh = made.map_err(|error| error.to_string())?.after_prompt(prompt);
    Ok(Some(Box::new(move || Box::new(CompletionText { detokenizer: fresh.clone() }))))
}
