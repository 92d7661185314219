//! What computes batches: any backend.

use crate::batch::Batch;
use crate::draw::Choice;
use crate::tables::PageRef;

/// A backend with its model and its pages.
pub trait Device: Send {
    /// Makes the batch's copies, computes its rows, and replaces `logits` with those of `batch.logit_rows`: (logit_rows, vocabulary).
    /// A device with a draft model computes the same rows with it, but for those already drafted, so that both models'
    /// pages hold the same tokens.
    ///
    /// # Errors
    /// A sentence for the users whose requests were part of the batch.
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String>;

    /// After [`Device::forward`], [`Device::finish`] or [`Device::draft`]: what was chosen for the rows that [`Batch::draws`] has draws of, in their order.
    /// `logits` then has the other rows alone. Empty: the device chose nothing, and `logits` has all rows.
    fn take_choices(&mut self) -> Vec<Choice> {
        Vec::new()
    }

    /// Whether steps may be begun while one is computed. Such a device draws every token of [`Batch::draws`] itself, and does in the order
    /// in which it is asked whatever it is asked for: steps, pages read out, pages filled.
    fn works_ahead(&self) -> bool {
        false
    }

    /// Begins a step, which [`Device::finish`] ends; at most two are begun and not ended. Only for devices that work ahead.
    fn begin(&mut self, batch: Batch) {
        let _ = batch;
    }

    /// Waits for the first step that was begun and not ended: what [`Device::forward`] does otherwise.
    ///
    /// # Errors
    /// As [`Device::forward`].
    fn finish(&mut self, logits: &mut Vec<f32>) -> Result<(), String> {
        let _ = logits;
        Err("this device does not work ahead".to_owned())
    }

    /// Does a part of what was put off when the model was loaded; false when there is nothing left. Asked for while nothing else is to be done.
    fn prepare(&mut self) -> bool {
        false
    }

    /// Computes tasks 0 to `tasks` - 1, in any order, with as many threads as the device computes with: what is left for the engine after
    /// a step ([`crate::Core::draw_rows`]).
    fn share_out(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }

    /// Watts that the device took lately while it computed, if it knows.
    fn watts(&self) -> Option<f64> {
        None
    }

    /// Makes the batch's copies, in both models, and computes its rows with the draft model alone; [`Device::take_choices`] tells what it chose.
    ///
    /// # Errors
    /// A sentence; the drafts of this step are then done without.
    fn draft(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        let _ = (batch, logits);
        Err("this device has no draft model".to_owned())
    }

    /// Replaces `bytes` with a page's contents, the draft model's included: always as many, undefined for the layers whose page
    /// is not there.
    ///
    /// # Errors
    /// Why the page cannot be read; it is then not kept.
    fn export_page(&mut self, page: PageRef, bytes: &mut Vec<u8>) -> Result<(), String> {
        let _ = (page, bytes);
        Err("this device cannot read pages out".to_owned())
    }

    /// Fills a page with what [`Device::export_page`] gave, but for the layers whose page is not there.
    ///
    /// # Errors
    /// Why the bytes are no page; the page's contents are then undefined, and computed again.
    fn import_page(&mut self, page: PageRef, bytes: &[u8]) -> Result<(), String> {
        let _ = (page, bytes);
        Err("this device cannot fill pages".to_owned())
    }
}
