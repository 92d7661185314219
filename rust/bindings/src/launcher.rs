//! Steps whose graph is there already, begun and ended without Python.
//!
//! A thread that waits for Python's lock while another one computes gets it after five milliseconds, several steps of a small model. So
//! Python does what a step needs once: it captures the graph, and hands it over with the arrays that it reads. From then on the thread that
//! asks for work ([`crate::work::WorkLink::next_work`], which has given the lock up) finds such steps here: it fills the step's pinned
//! arrays, enqueues their copies, the graph and the copies of what it chose, marks the end, and waits for the mark when the step is to be
//! ended. Whatever else there is to do (sizes that have no graph, logits for the caller, pages, draft models) it returns with, as before;
//! a step that Python has enqueued is still ended here, if all of its tokens are drawn.
//! It is the same thread that does both, so that the order of work, and whose GPU is current, are nobody's care.
//!
//! Why not the engine's own thread, which would save handing work over: it would have to wait for Python at each step that is not done
//! here, and the device has the next step to compute while work is handed over.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use infer_engine::{
    Answer, Batch, DRAW_BYTES, DrawKind, Handover, LOGPROB_VALUES, MOST_BRANCHES, SizeFields, SizeLimits,
    StepSize, Ticket, Work, padded,
};
use infer_kernels::PAGE_TOKENS;
use numpy::PyArrayDyn;
use pyo3::prelude::*;

use crate::driver::{Driver, Handle, Pinned, Pointer};
use crate::error::{guarded, refusal};
use crate::owned::Owned;

/// Rows, sequences, rows with logits, pieces of attention if they are bounded, their pages, rows of a decoding sequence, whether graphs are captured.
type LimitArgs = (usize, usize, usize, Option<usize>, usize, usize, bool);

/// Rows, draws, words, page tables; choices, log-probabilities; and an event with what owns it.
type HalfArgs<'py> = (
    Bound<'py, PyArrayDyn<i32>>,
    Bound<'py, PyArrayDyn<u8>>,
    Bound<'py, PyArrayDyn<u32>>,
    Bound<'py, PyArrayDyn<i32>>,
    Bound<'py, PyArrayDyn<i32>>,
    Bound<'py, PyArrayDyn<i32>>,
    Handle,
    Py<PyAny>,
);

/// Where the GPU has the arrays of a step: rows, draws, words, page tables; choices, log-probabilities.
type PlaceArgs = (Pointer, Pointer, Pointer, Pointer, Pointer, Pointer);

/// Steps of one model, padded to sizes, some of which have a graph.
#[pyclass(frozen, module = "infer._core")]
pub struct StepLauncher {
    steps: Owned<Mutex<Steps>>,
}

#[pymethods]
impl StepLauncher {
    #[new]
    #[pyo3(signature = (functions, stream, *, limits, places, halves, long_context_row, small_tables, copies))]
    fn new(
        py: Python<'_>,
        functions: HashMap<String, usize>,
        stream: Handle,
        limits: LimitArgs,
        places: PlaceArgs,
        halves: (HalfArgs<'_>, HalfArgs<'_>),
        long_context_row: usize,
        small_tables: usize,
        copies: bool,
    ) -> PyResult<Self> {
        guarded(|| {
            let (rows, sequences, wanted, pieces, piece_pages, decode_rows, is_captured) = limits;
            let limits =
                SizeLimits { rows, sequences, wanted, pieces, piece_pages, decode_rows, is_captured };
            let halves = [Half::new(halves.0)?, Half::new(halves.1)?];
            let steps = Steps {
                driver: Driver::new(&functions, stream).map_err(refusal)?,
                limits,
                long_context_row,
                small_tables,
                copies: if copies { MOST_BRANCHES } else { 0 },
                table_stride: halves[0].table.stride(py),
                places,
                halves,
                turn: 0,
                graphs: HashMap::new(),
                begun: VecDeque::new(),
            };
            Ok(Self { steps: Owned::new(Mutex::new(steps)) })
        })
    }

    /// The size that a count of sequences is padded to in decoding.
    #[staticmethod]
    fn padded(count: usize) -> usize {
        padded(count)
    }

    /// What a step is padded to.
    fn size(&self, work: PyRef<'_, crate::work::Work>) -> PyResult<SizeFields> {
        guarded(|| Ok(work.batch()?.size(&self.lock()?.limits).into()))
    }

    /// Which half of the pinned memory the step that begins now has: the one that the step before did not have.
    fn turn(&self) -> PyResult<usize> {
        guarded(|| Ok(self.lock()?.turn()))
    }

    /// Steps of this size that draw so, or not at all, are this graph from now on; `owner` keeps it alive.
    fn add(&self, size: SizeFields, kind: Option<u8>, graph: Handle, owner: Py<PyAny>) -> PyResult<()> {
        guarded(|| {
            self.lock()?.graphs.insert((size.into(), kind), Graph { handle: graph, _owner: owner });
            Ok(())
        })
    }

    /// Have the step that Python enqueued last ended here; false where it cannot be, as there are logits for the host.
    fn leave(&self, work: PyRef<'_, crate::work::Work>) -> PyResult<bool> {
        guarded(|| Ok(self.lock()?.leave(&work.ticket().work, work.batch()?)))
    }
}

impl StepLauncher {
    fn lock(&self) -> PyResult<MutexGuard<'_, Steps>> {
        Ok(self.steps.get()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does a piece of work, if it can be done here; false where it is Python's.
    pub fn take(&self, handover: &Handover, ticket: &Ticket) -> bool {
        let Ok(mut steps) = self.lock() else { return false };
        match &*ticket.work {
            Work::Forward(batch) => {
                let begun = steps.begin(&ticket.work, batch);
                let is_here = begun.is_some();
                steps.begun.push_back(begun);
                is_here
            }
            Work::Finish => match steps.begun.pop_front() {
                Some(Some(begun)) => {
                    steps.finish(begun, handover, ticket.number);
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }
}

/// A graph, and what keeps it alive.
struct Graph {
    handle: Handle,
    _owner: Py<PyAny>,
}

/// What one step's arrays are copied from, and its outcome to.
struct Half {
    rows: Pinned<i32>,
    draws: Pinned<u8>,
    words: Pinned<u32>,
    table: Pinned<i32>,
    choices: Pinned<i32>,
    logprobs: Pinned<i32>,
    event: Handle,
    _owner: Py<PyAny>,
}

impl Half {
    fn new((rows, draws, words, table, choices, logprobs, event, owner): HalfArgs<'_>) -> PyResult<Self> {
        Ok(Self {
            rows: Pinned::new(&rows)?,
            draws: Pinned::new(&draws)?,
            words: Pinned::new(&words)?,
            table: Pinned::new(&table)?,
            choices: Pinned::new(&choices)?,
            logprobs: Pinned::new(&logprobs)?,
            event,
            _owner: owner,
        })
    }
}

/// A step that was begun here, or is ended here.
struct Begun {
    work: Arc<Work>,
    half: usize,
    /// Why it could not be enqueued whole.
    outcome: Result<(), String>,
}

struct Steps {
    driver: Driver,
    limits: SizeLimits,
    long_context_row: usize,
    /// Bytes of page tables that are sooner copied whole than by columns.
    small_tables: usize,
    /// Pages that graphs copy at most.
    copies: usize,
    table_stride: usize,
    places: PlaceArgs,
    halves: [Half; 2],
    turn: usize,
    graphs: HashMap<(StepSize, Option<u8>), Graph>,
    /// In order; none for those that Python has begun and will end.
    begun: VecDeque<Option<Begun>>,
}

impl Steps {
    fn turn(&mut self) -> usize {
        self.turn ^= 1;
        self.turn
    }

    /// Ends a step later that Python has begun.
    fn leave(&mut self, work: &Arc<Work>, batch: &Batch) -> bool {
        match self.begun.back_mut() {
            Some(begun @ None) if is_drawn(batch) => {
                let outcome = self.driver.record(self.halves[self.turn].event);
                *begun = Some(Begun { work: Arc::clone(work), half: self.turn, outcome });
                true
            }
            _ => false,
        }
    }

    /// Begins a step, if there is a graph for it and nothing else to be done.
    fn begin(&mut self, work: &Arc<Work>, batch: &Batch) -> Option<Begun> {
        let wanted = batch.logit_rows.len();
        if !is_drawn(batch) || batch.copies.len() > self.copies {
            return None;
        }
        let (size, kind) = (batch.size(&self.limits), batch.draw_kind());
        let graph = self.graphs.get(&(size, (wanted > 0).then_some(kind as u8)))?.handle;
        let half = self.turn();
        let enqueued = self.enqueue(batch, size, kind, graph, half);
        // Also where something went wrong: what was enqueued before reads the half's memory.
        let outcome = enqueued.and(self.driver.record(self.halves[half].event));
        Some(Begun { work: Arc::clone(work), half, outcome })
    }

    fn enqueue(
        &mut self,
        batch: &Batch,
        size: StepSize,
        kind: DrawKind,
        graph: Handle,
        half: usize,
    ) -> Result<(), String> {
        let (driver, half) = (&self.driver, &mut self.halves[half]);
        let (to_rows, to_draws, to_words, to_table, from_choices, from_logprobs) = self.places;
        if kind != DrawKind::Greedy {
            let draws = part(half.draws.values(), DRAW_BYTES * size.wanted)?;
            let words = half.words.values();
            let count = batch.write_draws(size.wanted, draws, words)?;
            driver.upload(to_draws, draws)?;
            if count > 0 {
                driver.upload(to_words, part(words, count)?)?;
            }
        }
        let rows = part(half.rows.values(), Batch::row_values(size.rows, size.sequences))?;
        batch.write_rows(size.rows, size.sequences, PAGE_TOKENS, self.long_context_row, rows)?;
        driver.upload(to_rows, rows)?;
        let stride = self.table_stride;
        let table = half.table.values();
        batch.write_pages(stride, table)?;
        let table = part(table, batch.sequences.len() * stride)?;
        match size_of_val(table) <= self.small_tables {
            true => driver.upload(to_table, table)?,
            false => driver.upload_columns(to_table, table, stride, batch.most_pages())?,
        }
        driver.launch(graph)?;
        let wanted = batch.logit_rows.len();
        if wanted > 0 {
            driver.download(part(half.choices.values(), wanted)?, from_choices)?;
        }
        if kind == DrawKind::Full {
            driver.download(part(half.logprobs.values(), LOGPROB_VALUES * wanted)?, from_logprobs)?;
        }
        Ok(())
    }

    /// Waits for a step and answers for it. When the wait fails, the GPU can do nothing more in this process.
    fn finish(&mut self, begun: Begun, handover: &Handover, number: u64) {
        let Begun { work, half, outcome } = begun;
        let half = &mut self.halves[half];
        let waited = self.driver.wait(half.event);
        let Work::Forward(batch) = &*work else { return };
        let mut read = || batch.read_choices(half.choices.values(), half.logprobs.values());
        let answer = outcome.and_then(|()| waited.clone()).and_then(|()| read());
        handover.answer(number, answer.map(|choices| Answer::Rows { logits: Vec::new(), choices }));
        if let Err(message) = waited {
            handover.stop(&format!("the GPU failed and cannot go on: {message}"));
        }
    }
}

/// Whether the device draws all wanted rows, so that the host has no use for logits.
fn is_drawn(batch: &Batch) -> bool {
    batch.draws.len() == batch.logit_rows.len() && batch.draws.iter().all(Option::is_some)
}

/// The first values.
fn part<T>(values: &mut [T], length: usize) -> Result<&mut [T], String> {
    let known = values.len();
    values
        .get_mut(..length)
        .ok_or_else(|| format!("a bug in infer: a step needs {length} values of the {known} of an array"))
}
