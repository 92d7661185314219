//! A submitted request as Python sees it.

use std::time::Duration;

use infer_engine as core;
use infer_engine::{RequestHandle, StopReason, TokenLogprob};
use numpy::{PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::Arg;
use crate::error::{guarded, refusal};
use crate::owned::Owned;
use crate::wait::{deadline, wait_until};

/// (token id, log-probability, rank from 1).
type Logprob = (u32, f32, u32);

fn logprobs(rows: &[Vec<TokenLogprob>]) -> Vec<Vec<Logprob>> {
    let row =
        |row: &Vec<TokenLogprob>| row.iter().map(|entry| (entry.token, entry.logprob, entry.rank)).collect();
    rows.iter().map(row).collect()
}

/// A stop token id or a stop string.
#[derive(Clone, IntoPyObject, IntoPyObjectRef)]
pub enum Stop {
    Token(u32),
    Text(String),
}

/// What one completion of a request gained since the last look.
#[pyclass(frozen, get_all, module = "infer._core")]
pub struct Update {
    /// Which of the request's completions, from 0.
    index: u32,
    /// New text, whole characters only.
    text: String,
    /// New tokens.
    token_ids: Vec<u32>,
    /// Per new token: (token id, log-probability, rank from 1), the chosen token first.
    logprobs: Option<Vec<Vec<Logprob>>>,
    /// None while the completion goes on.
    finish_reason: Option<&'static str>,
    /// The stop token id or stop string that ended it.
    stop_reason: Option<Stop>,
}

impl From<core::Update> for Update {
    fn from(update: core::Update) -> Self {
        let stop = update.finish.as_ref().and_then(|finish| finish.stop.clone());
        Self {
            index: update.index,
            text: update.text,
            token_ids: update.token_ids,
            logprobs: update.logprobs.map(|rows| logprobs(&rows)),
            finish_reason: update.finish.map(|finish| finish.reason.name()),
            stop_reason: stop.map(|stop| match stop {
                StopReason::Token(token) => Stop::Token(token),
                StopReason::Text(text) => Stop::Text(text),
            }),
        }
    }
}

/// Times in seconds and counts of tokens.
#[pyclass(frozen, get_all, module = "infer._core")]
pub struct RequestMetrics {
    /// From submission to the first step that computed any of it.
    queue_time: Option<f64>,
    /// From submission to the first generated token.
    time_to_first_token: Option<f64>,
    /// Mean time between tokens of one completion after its first.
    inter_token_latency: Option<f64>,
    /// From submission to the end of the last completion.
    total_time: Option<f64>,
    /// Tokens of the prompt.
    prompt_tokens: u64,
    /// Prompt tokens that the prefix cache held.
    cached_tokens: u64,
    /// Over all completions.
    generated_tokens: u64,
    /// How often a completion gave up its pages and was computed again.
    preemptions: u64,
    /// Prompt tokens among `cached_tokens` that came back from disk.
    restored_tokens: u64,
    /// Guessed tokens that were verified.
    drafted_tokens: u64,
    /// Guessed tokens that were right.
    accepted_tokens: u64,
    /// Those of them that only a branch of the tree had.
    branch_tokens: u64,
    /// Steps in which a completion chose tokens.
    decode_steps: u64,
    /// Energy of its rows, where the device tells.
    joules: Option<f64>,
}

impl From<core::RequestMetrics> for RequestMetrics {
    fn from(metrics: core::RequestMetrics) -> Self {
        let seconds = |span: Option<Duration>| span.map(|span| span.as_secs_f64());
        Self {
            queue_time: seconds(metrics.queue_time()),
            time_to_first_token: seconds(metrics.time_to_first_token()),
            inter_token_latency: seconds(metrics.inter_token_latency()),
            total_time: seconds(metrics.total_time()),
            prompt_tokens: metrics.prompt_tokens,
            cached_tokens: metrics.cached_tokens,
            generated_tokens: metrics.generated_tokens,
            preemptions: metrics.preemptions,
            restored_tokens: metrics.restored_tokens,
            drafted_tokens: metrics.drafted_tokens,
            accepted_tokens: metrics.accepted_tokens,
            branch_tokens: metrics.branch_tokens,
            decode_steps: metrics.decode_steps,
            joules: metrics.microjoules.map(|taken| taken as f64 * 1e-6),
        }
    }
}

/// One submitted prompt and its completions. Dropping the last reference cancels it.
#[pyclass(frozen, module = "infer._core")]
pub struct Request {
    handle: Owned<RequestHandle>,
}

impl Request {
    pub fn new(handle: RequestHandle) -> Self {
        Self { handle: Owned::new(handle) }
    }

    fn updates(handle: &RequestHandle) -> Vec<Update> {
        handle.poll().into_iter().map(Update::from).collect()
    }
}

#[pymethods]
impl Request {
    /// Its number in its engine.
    #[getter]
    fn request_id(&self) -> PyResult<u64> {
        Ok(self.handle.get()?.id())
    }

    /// The prompt's tokens.
    #[getter]
    fn prompt_token_ids(&self) -> PyResult<Vec<u32>> {
        Ok(self.handle.get()?.prompt().to_vec())
    }

    /// Whether all completions have ended and their updates were taken.
    #[getter]
    fn finished(&self) -> PyResult<bool> {
        Ok(self.handle.get()?.is_finished())
    }

    /// Why the request ended with finish_reason "error".
    #[getter]
    fn error(&self) -> PyResult<Option<String>> {
        Ok(self.handle.get()?.error())
    }

    /// Per prompt token as `Update.logprobs`, the first None.
    #[getter]
    fn prompt_logprobs(&self) -> PyResult<Option<Vec<Option<Vec<Logprob>>>>> {
        let rows = self.handle.get()?.prompt_logprobs();
        Ok(rows.map(|rows| std::iter::once(None).chain(logprobs(&rows).into_iter().map(Some)).collect()))
    }

    /// A snapshot; final once the request has finished.
    #[getter]
    fn metrics(&self) -> PyResult<RequestMetrics> {
        Ok(self.handle.get()?.metrics().into())
    }

    /// Take what is there without waiting: at most one update per completion.
    fn poll(&self) -> PyResult<Vec<Update>> {
        guarded(|| Ok(Self::updates(self.handle.get()?)))
    }

    /// Wait for news, then `poll`; [] when the request has finished and everything was taken, or after `timeout` seconds.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<Arg<f64>>) -> PyResult<Vec<Update>> {
        guarded(|| {
            let handle = self.handle.get()?;
            let waited = wait_until(py, deadline(timeout)?, |span| handle.wait(Some(span)));
            waited.inspect_err(|_| handle.cancel())?;
            Ok(Self::updates(handle))
        })
    }

    /// End it with finish_reason "abort"; harmless when it has ended.
    fn cancel(&self) -> PyResult<()> {
        guarded(|| {
            self.handle.get()?.cancel();
            Ok(())
        })
    }
}

/// An array for logits, made by Python, which reports a lack of memory as an exception.
pub fn empty_logits(py: Python<'_>, rows: usize, vocabulary: usize) -> PyResult<Bound<'_, PyArray2<f32>>> {
    let kwargs = PyDict::new(py);
    kwargs.set_item("dtype", "float32")?;
    let made = py.import("numpy")?.getattr("empty")?.call(((rows, vocabulary),), Some(&kwargs));
    let array =
        made.map_err(|error| refusal(format!("logits of {rows} tokens do not fit in memory: {error}")))?;
    Ok(array.cast_into::<PyArray2<f32>>()?)
}

/// Copies chunks into `array` as they come.
pub fn fill(py: Python<'_>, handle: &RequestHandle, array: &Bound<'_, PyArray2<f32>>) -> PyResult<()> {
    let mut view = array.readwrite();
    let values = view.as_slice_mut().map_err(refusal)?;
    let mut filled = 0;
    while !handle.is_finished() {
        wait_until(py, None, |span| handle.wait(Some(span)))?;
        if let Some(rows) = handle.take_logits() {
            values[filled..filled + rows.len()].copy_from_slice(&rows);
            filled += rows.len();
        }
    }
    if filled == values.len() {
        return Ok(());
    }
    Err(refusal(handle.error().unwrap_or_else(|| "this LLM is closed".to_owned())))
}
