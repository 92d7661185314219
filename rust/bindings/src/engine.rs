//! `Engine`: a loaded model and the thread that runs requests on it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use infer_engine::{Driver, EngineMetrics, RequestHandle, RequestKind, SubmitOptions, TextFactory};
use infer_text::Detokenizer;
use numpy::{PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::convert::{Arg, Int, text, token_ids};
use crate::device::CompletionText;
use crate::error::{guarded, refusal};
use crate::info::ModelInfo;
use crate::load::{Loaded, Settings, default_threads, kv_element, load, precision};
use crate::owned::Owned;
use crate::params::SamplingParams;
use crate::ready::ReadyQueue;
use crate::request::Request;
use crate::tokenizer::{TextModel, Tokenizer, encode};
use crate::wait::{interruptible, wait_until};

const CLOSED: &str = "this LLM is closed";

/// More than any machine has cores; each thread costs a stack.
const MAX_THREADS: usize = 1024;

/// The driver until it is closed.
type DriverSlot = Mutex<Option<Arc<Driver>>>;

/// A loaded model and the thread that runs requests on it.
#[pyclass(frozen, module = "infer._core")]
pub struct Engine {
    driver: Owned<DriverSlot>,
    config: infer_engine::EngineConfig,
    text: Option<Arc<TextModel>>,
    info: ModelInfo,
    threads: usize,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (
        path, *, dtype=Arg::of("auto".to_owned()), threads=None, max_model_len=None, max_num_seqs=Arg::int(64),
        max_num_batched_tokens=Arg::int(512), enable_prefix_caching=Arg::of(true),
        kv_cache_dtype=Arg::of("auto".to_owned()), kv_cache_memory_bytes=None, seed=Arg::int(0), mmap=Arg::of(true)
    ), text_signature = "(path, *, dtype='auto', threads=None, max_model_len=None, max_num_seqs=64, \
        max_num_batched_tokens=512, enable_prefix_caching=True, kv_cache_dtype='auto', kv_cache_memory_bytes=None, \
        seed=0, mmap=True)")]
    fn new(
        py: Python<'_>,
        path: Arg<PathBuf>,
        dtype: Arg<String>,
        threads: Option<Arg<Int>>,
        max_model_len: Option<Arg<Int>>,
        max_num_seqs: Arg<Int>,
        max_num_batched_tokens: Arg<Int>,
        enable_prefix_caching: Arg<bool>,
        kv_cache_dtype: Arg<String>,
        kv_cache_memory_bytes: Option<Arg<Int>>,
        seed: Arg<Int>,
        mmap: Arg<bool>,
    ) -> PyResult<Self> {
        guarded(|| {
            let precision = precision(&dtype.get("dtype", "a string")?)?;
            let kv_cache_dtype = kv_cache_dtype.get("kv_cache_dtype", "a string")?;
            let memory = |bytes: Arg<Int>| bytes.fit("kv_cache_memory_bytes", "None or a number of bytes");
            let settings = Settings {
                path: path.get("path", "a path")?,
                precision,
                kv_element: kv_element(&kv_cache_dtype, precision)?,
                threads: threads.map_or(Ok(default_threads().min(MAX_THREADS)), thread_count)?,
                max_model_len: max_model_len.map(|length| length.positive("max_model_len")).transpose()?,
                max_num_seqs: max_num_seqs.positive("max_num_seqs")?,
                max_num_batched_tokens: max_num_batched_tokens.positive("max_num_batched_tokens")?,
                enable_prefix_caching: enable_prefix_caching.flag("enable_prefix_caching")?,
                kv_cache_memory_bytes: kv_cache_memory_bytes.map(memory).transpose()?,
                seed: seed.fit("seed", "from 0 to 2**64 - 1")?,
                mmap: mmap.flag("mmap")?,
            };
            let loaded = interruptible(py, "infer-load", move || load(&settings))?;
            Ok(Self::from_loaded(loaded))
        })
    }

    /// What the model is.
    #[getter]
    fn info(&self) -> ModelInfo {
        self.info.clone()
    }

    /// The model's tokenizer, if it has one.
    #[getter]
    fn tokenizer(&self) -> Option<Tokenizer> {
        self.text.clone().map(Tokenizer::new)
    }

    /// How many threads compute.
    #[getter]
    fn threads(&self) -> usize {
        self.threads
    }

    /// Longest sequence, prompt and completion together.
    #[getter]
    fn max_model_len(&self) -> usize {
        self.config.max_model_len
    }

    /// How many completions run at once.
    #[getter]
    fn max_num_seqs(&self) -> usize {
        self.config.max_num_seqs
    }

    /// How many tokens one step computes at most.
    #[getter]
    fn max_num_batched_tokens(&self) -> usize {
        self.config.max_num_batched_tokens
    }

    /// How many tokens' keys and values fit in the cache at once.
    #[getter]
    fn kv_cache_tokens(&self) -> usize {
        self.config.pages * self.config.page_tokens
    }

    /// Whether `close` was called.
    #[getter]
    fn closed(&self) -> PyResult<bool> {
        Ok(lock(self.driver.get()?).is_none())
    }

    /// Queue a prompt; returns at once.
    #[pyo3(signature = (prompt, params, *, add_special_tokens=true, final_only=false, ready=None, ready_key=0))]
    fn submit(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        params: &SamplingParams,
        add_special_tokens: bool,
        final_only: bool,
        ready: Option<&ReadyQueue>,
        ready_key: u64,
    ) -> PyResult<Request> {
        guarded(|| {
            let driver = self.driver()?;
            let prompt = self.prompt(py, prompt, add_special_tokens)?;
            let waker = ready.map(|queue| queue.waker(ready_key)).transpose()?;
            // Reads the whole prompt, as the text goes on where the prompt ends.
            let text = py.detach(|| self.text_factory(params, &prompt))?;
            let kind = RequestKind::Generate(Box::new(params.inner.clone()));
            let options = SubmitOptions { final_only, waker };
            let handle = py.detach(|| driver.submit(prompt.into(), kind, text, options));
            handle.map(Request::new).map_err(refusal)
        })
    }

    /// Next-token logits after every prefix of `token_ids`: (tokens, vocabulary).
    fn logits<'py>(
        &self,
        py: Python<'py>,
        token_ids: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        guarded(|| {
            let driver = self.driver()?;
            let ids = crate::convert::token_ids("token_ids", token_ids)?;
            let rows = ids.len();
            let submit = || driver.submit(ids.into(), RequestKind::Logits, None, SubmitOptions::default());
            let handle = py.detach(submit).map_err(refusal)?;
            // Through Python, which reports a lack of memory as an exception.
            let kwargs = PyDict::new(py);
            kwargs.set_item("dtype", "float32")?;
            let empty = py.import("numpy")?.getattr("empty")?;
            let made = empty.call(((rows, self.config.vocabulary),), Some(&kwargs));
            let array = made
                .map_err(|error| refusal(format!("logits of {rows} tokens do not fit in memory: {error}")))?;
            let array = array.cast_into::<PyArray2<f32>>()?;
            fill(py, &handle, &array)?;
            Ok(array)
        })
    }

    /// Counters since the start and gauges now.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guarded(|| {
            let EngineMetrics {
                requests_submitted,
                requests_finished,
                requests_aborted,
                requests_failed,
                steps,
                computed_tokens,
                prompt_tokens,
                cached_tokens,
                generated_tokens,
                preemptions,
                running,
                waiting,
                pages_total,
                pages_free,
                pages_evictable,
            } = self.driver()?.metrics();
            let dict = PyDict::new(py);
            for (name, value) in [
                ("requests_submitted", requests_submitted),
                ("requests_finished", requests_finished),
                ("requests_aborted", requests_aborted),
                ("requests_failed", requests_failed),
                ("steps", steps),
                ("computed_tokens", computed_tokens),
                ("prompt_tokens", prompt_tokens),
                ("cached_tokens", cached_tokens),
                ("generated_tokens", generated_tokens),
                ("preemptions", preemptions),
                ("running", running),
                ("waiting", waiting),
                ("pages_total", pages_total),
                ("pages_free", pages_free),
                ("pages_evictable", pages_evictable),
            ] {
                dict.set_item(name, value)?;
            }
            Ok(dict)
        })
    }

    /// Abort what runs, join the thread, free weights and cache; harmless when repeated.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guarded(|| match lock(self.driver.get()?).take() {
            // A step may be in flight, and Ctrl-C need not wait for it.
            Some(driver) => interruptible(py, "infer-close", move || {
                driver.close();
                Ok(())
            }),
            None => Ok(()),
        })
    }
}

impl Engine {
    fn from_loaded(loaded: Loaded) -> Self {
        let Loaded { driver, text, info, threads } = loaded;
        let config = driver.config().clone();
        Self { driver: Owned::new(Mutex::new(Some(Arc::new(driver)))), config, text, info, threads }
    }

    fn driver(&self) -> PyResult<Arc<Driver>> {
        lock(self.driver.get()?).clone().ok_or_else(|| refusal(CLOSED))
    }

    fn prompt(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        add_special_tokens: bool,
    ) -> PyResult<Vec<u32>> {
        if !prompt.is_instance_of::<PyString>() {
            return token_ids("prompt", prompt);
        }
        let Some(model) = &self.text else {
            return Err(refusal(format!(
                "{} has no tokenizer; give token ids instead of text",
                self.info.path()
            )));
        };
        encode(py, model, text("prompt", prompt)?, add_special_tokens)
    }

    fn text_factory(&self, params: &SamplingParams, prompt: &[u32]) -> PyResult<Option<TextFactory>> {
        let Some(model) = self.text.as_ref().filter(|_| params.inner.detokenize) else { return Ok(None) };
        let params = &params.inner;
        let stop = params.stop.clone();
        let made = Detokenizer::new(
            &model.tokenizer,
            params.skip_special_tokens,
            stop,
            params.include_stop_str_in_output,
        );
        let fresh = made.map_err(refusal)?.after_prompt(prompt);
        Ok(Some(Box::new(move || Box::new(CompletionText { detokenizer: fresh.clone() }))))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let Ok(slot) = self.driver.get() else { return };
        let Some(driver) = lock(slot).take() else { return };
        // The last step may still run: other Python threads go on meanwhile.
        let closing = Arc::clone(&driver);
        if Python::try_attach(|py| py.detach(|| closing.close())).is_none() {
            driver.close();
        }
    }
}

fn thread_count(threads: Arg<Int>) -> PyResult<usize> {
    let count = threads.positive("threads")?;
    if count > MAX_THREADS {
        return Err(refusal(format!("threads must be at most {MAX_THREADS}, got {count}")));
    }
    Ok(count)
}

fn lock(slot: &DriverSlot) -> std::sync::MutexGuard<'_, Option<Arc<Driver>>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Copies chunks into `array` as they come.
fn fill(py: Python<'_>, handle: &RequestHandle, array: &Bound<'_, PyArray2<f32>>) -> PyResult<()> {
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
    Err(refusal(handle.error().unwrap_or_else(|| CLOSED.to_owned())))
}
