//! `WorkLink` and `Work`: the engine's work for an executor in Python, and its answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use infer_engine::{Answer, Batch, Choice, Closed, Handover, Ticket};
use infer_kernels::PAGE_TOKENS;
use numpy::{
    PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyReadwriteArray2, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::convert::Arg;
use crate::error::{guarded, refusal};
use crate::launcher::StepLauncher;
use crate::owned::Owned;
use crate::wait::{deadline, wait_until};

/// Where an executor takes its work from. It does not keep the engine alive.
#[pyclass(frozen, module = "infer._core")]
pub struct WorkLink {
    handover: Owned<Arc<Handover>>,
}

impl WorkLink {
    pub fn new(handover: Arc<Handover>) -> Self {
        Self { handover: Owned::new(handover) }
    }

    fn answer(&self, work: &Work, answer: Result<Answer, String>) -> PyResult<()> {
        self.handover.get()?.answer(work.ticket.number, answer);
        Ok(())
    }
}

#[pymethods]
impl WorkLink {
    /// Wait for work that `launcher` does not do; None when there will be no more.
    #[pyo3(signature = (timeout=None, launcher=None))]
    fn next_work(
        &self,
        py: Python<'_>,
        timeout: Option<Arg<f64>>,
        launcher: Option<Bound<'_, StepLauncher>>,
    ) -> PyResult<Option<Work>> {
        guarded(|| {
            let handover = self.handover.get()?;
            let launcher = launcher.as_ref().map(Bound::get);
            let taken = std::sync::Mutex::new(None);
            let hold = || taken.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let came = wait_until(py, deadline(timeout)?, |span| match next(handover, launcher, span) {
                Ok(None) => false,
                Ok(Some(ticket)) => {
                    *hold() = Some(ticket);
                    true
                }
                Err(_) => true,
            })?;
            if !came {
                return Err(refusal("no work came in time"));
            }
            Ok(hold().take().map(|ticket| Work { ticket }))
        })
    }

    /// Answer "finish" and "draft": logits (rows, vocabulary) of all wanted rows of `step`; or with `choices`, of those that are not drawn.
    #[pyo3(signature = (work, step, logits, choices=None, logprobs=None))]
    fn finish_rows(
        &self,
        py: Python<'_>,
        work: &Work,
        step: &Work,
        logits: PyReadonlyArray2<'_, f32>,
        choices: Option<PyReadonlyArray1<'_, i32>>,
        logprobs: Option<PyReadonlyArray2<'_, i32>>,
    ) -> PyResult<()> {
        guarded(|| {
            let logits = logits.as_slice().map_err(refusal)?;
            // Who gives Python's lock up may wait long for it.
            let logits = if logits.is_empty() { Vec::new() } else { py.detach(|| logits.to_vec()) };
            let choices = match &choices {
                Some(choices) => {
                    let told = logprobs.as_ref().map(|told| told.as_slice().map_err(refusal)).transpose()?;
                    let choices = choices.as_slice().map_err(refusal)?;
                    step.batch()?.read_choices(choices, told.unwrap_or_default()).map_err(refusal)?
                }
                None => Vec::new(),
            };
            self.answer(work, Ok(Answer::Rows { logits, choices }))
        })
    }

    /// Answer "draft" with what was chosen in several rounds: (rounds, rows).
    fn finish_rounds(&self, work: &Work, choices: PyReadonlyArray2<'_, i32>) -> PyResult<()> {
        guarded(|| {
            let chosen = choices.as_slice().map_err(refusal)?.iter();
            let choices = chosen.map(|&token| Choice { token, logprobs: None }).collect();
            self.answer(work, Ok(Answer::Rows { logits: Vec::new(), choices }))
        })
    }

    /// Answer "export".
    fn finish_page(&self, work: &Work, page: PyReadonlyArray1<'_, u8>) -> PyResult<()> {
        guarded(|| self.answer(work, Ok(Answer::Page(page.as_slice().map_err(refusal)?.to_vec()))))
    }

    /// Answer "import".
    fn finish(&self, work: &Work) -> PyResult<()> {
        guarded(|| self.answer(work, Ok(Answer::Done)))
    }

    /// Answer any work that failed, with a sentence for the users whose requests it was.
    fn fail(&self, work: &Work, message: String) -> PyResult<()> {
        guarded(|| self.answer(work, Err(message)))
    }

    /// Wait until a step was done since the last call; False when there will be no more.
    fn wait_for_rows(&self, py: Python<'_>) -> PyResult<bool> {
        guarded(|| {
            let handover = self.handover.get()?;
            let closed = AtomicBool::new(false);
            wait_until(py, None, |span| {
                let waited = handover.wait_for_rows(span);
                closed.fetch_or(waited.is_err(), Ordering::Relaxed);
                waited.unwrap_or(true)
            })?;
            Ok(!closed.into_inner())
        })
    }

    /// Tell what the device takes while it computes, in watts.
    fn report_power(&self, watts: f64) -> PyResult<()> {
        guarded(|| {
            self.handover.get()?.set_watts(watts);
            Ok(())
        })
    }

    /// Take no more work: what is at hand and whatever comes fails with this sentence. Harmless when repeated.
    fn stop(&self, message: &str) -> PyResult<()> {
        guarded(|| {
            self.handover.get()?.stop(message);
            Ok(())
        })
    }
}

/// The next work that the launcher does not do.
fn next(
    handover: &Handover,
    launcher: Option<&StepLauncher>,
    timeout: Duration,
) -> Result<Option<Ticket>, Closed> {
    loop {
        let ticket = handover.next(timeout)?;
        let is_done =
            ticket.as_ref().zip(launcher).is_some_and(|(ticket, launcher)| launcher.take(handover, ticket));
        if !is_done {
            return Ok(ticket);
        }
    }
}

/// One step's work.
#[pyclass(frozen, module = "infer._core")]
pub struct Work {
    ticket: Ticket,
}

impl Work {
    /// The work.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// The rows of a step.
    pub fn batch(&self) -> PyResult<&Batch> {
        match &*self.ticket.work {
            infer_engine::Work::Forward(batch) | infer_engine::Work::Draft(batch) => Ok(batch),
            _ => Err(refusal("only \"forward\" and \"draft\" have rows")),
        }
    }
}

#[pymethods]
impl Work {
    /// "forward", "finish", "draft", "export" or "import".
    #[getter]
    fn kind(&self) -> &'static str {
        match &*self.ticket.work {
            infer_engine::Work::Forward(_) => "forward",
            infer_engine::Work::Finish => "finish",
            infer_engine::Work::Draft(_) => "draft",
            infer_engine::Work::Export(_) => "export",
            infer_engine::Work::Import(..) => "import",
        }
    }

    /// How many tokens "draft" may draw for each row by itself.
    #[getter]
    fn rounds(&self) -> PyResult<usize> {
        Ok(self.batch()?.rounds)
    }

    /// A "draft" so many positions later, of what the rows before chose.
    fn advanced(&self, positions: usize) -> PyResult<Work> {
        let batch = self.batch()?.advanced(positions);
        let work = Arc::new(infer_engine::Work::Draft(batch));
        Ok(Work { ticket: Ticket { number: self.ticket.number, work } })
    }

    /// Rows to compute.
    #[getter]
    fn rows(&self) -> PyResult<usize> {
        Ok(self.batch()?.tokens.len())
    }

    /// Sequences that they belong to.
    #[getter]
    fn sequences(&self) -> PyResult<usize> {
        Ok(self.batch()?.sequences.len())
    }

    /// Rows whose logits are wanted.
    #[getter]
    fn logit_rows(&self) -> PyResult<usize> {
        Ok(self.batch()?.logit_rows.len())
    }

    /// Which of the wanted rows are drawn.
    #[getter]
    fn drawn(&self) -> PyResult<Vec<bool>> {
        Ok(self.batch()?.drawn())
    }

    /// What draws need: 0 the largest logits, 1 draws, 2 changes before or log-probabilities after them.
    #[getter]
    fn draw_kind(&self) -> PyResult<u8> {
        Ok(self.batch()?.draw_kind() as u8)
    }

    /// Fill `out` with how rows are drawn, and `words` with what that refers to; how many there are. See `_core.pyi`.
    fn write_draws(
        &self,
        rows: usize,
        mut out: PyReadwriteArray1<'_, u8>,
        mut words: PyReadwriteArray1<'_, u32>,
    ) -> PyResult<usize> {
        guarded(|| {
            let (out, words) = (out.as_slice_mut().map_err(refusal)?, words.as_slice_mut().map_err(refusal)?);
            self.batch()?.write_draws(rows, out, words).map_err(refusal)
        })
    }

    /// Pages of the sequence that has the most.
    #[getter]
    fn most_pages(&self) -> PyResult<usize> {
        Ok(self.batch()?.most_pages())
    }

    /// Pages to copy before anything is computed, one after the other: (from, to).
    #[getter]
    fn copies(&self) -> PyResult<Vec<(u32, u32)>> {
        Ok(self.batch()?.copies.iter().map(|(from, to)| (from.page, to.page)).collect())
    }

    /// The page to export or import.
    #[getter]
    fn page(&self) -> PyResult<u32> {
        match *self.ticket.work {
            infer_engine::Work::Export(page) | infer_engine::Work::Import(page, _) => Ok(page.page),
            _ => Err(refusal("only \"export\" and \"import\" have a page")),
        }
    }

    /// What the page to import holds.
    #[getter]
    fn contents<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        match &*self.ticket.work {
            infer_engine::Work::Import(_, contents) => Ok(PyBytes::new(py, contents)),
            _ => Err(refusal("only \"import\" has contents")),
        }
    }

    /// The rows that a draft model has not computed yet.
    fn not_drafted(&self) -> PyResult<Self> {
        let work = Arc::new(infer_engine::Work::Forward(self.batch()?.not_drafted()));
        Ok(Self { ticket: Ticket { number: self.ticket.number, work } })
    }

    /// Fill `out` with the rows' arrays, one after the other, padded to `rows` and `sequences`; see `_core.pyi`.
    fn write_rows(
        &self,
        rows: usize,
        sequences: usize,
        long_context_row: usize,
        mut out: PyReadwriteArray1<'_, i32>,
    ) -> PyResult<()> {
        guarded(|| {
            let out = out.as_slice_mut().map_err(refusal)?;
            self.batch()?.write_rows(rows, sequences, PAGE_TOKENS, long_context_row, out).map_err(refusal)
        })
    }

    /// Fill each sequence's row of `table`, (sequences, most pages), with its pages.
    fn write_pages(&self, mut table: PyReadwriteArray2<'_, i32>) -> PyResult<()> {
        guarded(|| {
            let stride = table.shape()[1];
            self.batch()?.write_pages(stride, table.as_slice_mut().map_err(refusal)?).map_err(refusal)
        })
    }
}
