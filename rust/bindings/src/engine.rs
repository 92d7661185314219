//! `Engine`: a loaded model and the thread that runs requests on it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use infer_engine::{Driver, RequestKind, SubmitOptions};
use numpy::PyArray2;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{Arg, Int};
use crate::device::text_factory;
use crate::error::{engine_error, guarded, refusal};
use crate::info::{MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, ModelInfo};
use crate::kv::{automatic, read_kv_types};
use crate::load::{Loaded, Settings, load, precision};
use crate::metrics::{KvEvent, Moment, engine_metrics, kv_event, moment};
use crate::outside::{OutsideArgs, read_outside};
use crate::owned::Owned;
use crate::params::SamplingParams;
use crate::ready::ReadyQueue;
use crate::request::{Request, empty_logits, fill};
use crate::running::Running;
use crate::settings::{
    MAX_THREADS, OffloadArgs, SpeculationArgs, check_prefix_options, read_load_format, read_offload,
    read_packed_cache, read_quantization, read_speculation, salt, seconds, thread_count,
};
use crate::tier::{load_session, save_session};
use crate::tokenizer::{TextModel, Tokenizer, prompt_ids};
use crate::wait::{briefly, deadline, interruptible, wait_until};
use crate::work::WorkLink;

/// A loaded model and the thread that runs requests on it.
#[pyclass(frozen, module = "infer._core")]
pub struct Engine {
    running: Owned<Running>,
    config: infer_engine::EngineConfig,
    text: Option<Arc<TextModel>>,
    info: ModelInfo,
    threads: usize,
    packed_cache: (&'static str, Option<String>),
    page_bytes: usize,
    began: Duration,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (
        path, *, dtype=Arg::of("auto".to_owned()), threads=None, max_model_len=None, max_num_seqs=None,
        max_num_batched_tokens=None, enable_prefix_caching=Arg::of(true), kv_cache_dtype=None,
        kv_cache_memory_bytes=None, quantization=None, seed=Arg::int(0), mmap=Arg::of(true), packed_cache_dir=None, max_waiting=None,
        priority_patience=Arg::of(10.0), step_time_target=Some(Arg::of(0.1)), speculation=None, kv_offload=None,
        kv_events=Arg::of(false), trace=Arg::of(false), load_format=Arg::of("auto".to_owned()), outside=None
    ), text_signature = "(path, *, dtype='auto', threads=None, max_model_len=None, max_num_seqs=None, \
        max_num_batched_tokens=None, enable_prefix_caching=True, kv_cache_dtype='auto', kv_cache_memory_bytes=None, \
        quantization=None, seed=0, mmap=True, packed_cache_dir=None, max_waiting=None, priority_patience=10.0, step_time_target=0.1, \
        speculation=None, kv_offload=None, kv_events=False, trace=False, load_format='auto', outside=None)")]
    fn new(
        py: Python<'_>,
        path: Arg<PathBuf>,
        dtype: Arg<String>,
        threads: Option<Arg<Int>>,
        max_model_len: Option<Arg<Int>>,
        max_num_seqs: Option<Arg<Int>>,
        max_num_batched_tokens: Option<Arg<Int>>,
        enable_prefix_caching: Arg<bool>,
        kv_cache_dtype: Option<Bound<'_, PyAny>>,
        kv_cache_memory_bytes: Option<Arg<Int>>,
        quantization: Option<Arg<String>>,
        seed: Arg<Int>,
        mmap: Arg<bool>,
        packed_cache_dir: Option<Arg<PathBuf>>,
        max_waiting: Option<Arg<Int>>,
        priority_patience: Arg<f64>,
        step_time_target: Option<Arg<f64>>,
        speculation: Option<SpeculationArgs>,
        kv_offload: Option<OffloadArgs>,
        kv_events: Arg<bool>,
        trace: Arg<bool>,
        load_format: Arg<String>,
        outside: Option<OutsideArgs<'_>>,
    ) -> PyResult<Self> {
        guarded(|| {
            let precision = precision(&dtype.get("dtype", "a string")?)?;
            let target = |time| seconds("step_time_target", time);
            let memory = |bytes: Arg<Int>| bytes.fit("kv_cache_memory_bytes", "None or a number of bytes");
            let (speculation, draft) = speculation.map(read_speculation).transpose()?.unzip();
            let seed = seed.fit("seed", "from 0 to 2**64 - 1")?;
            let settings = Settings {
                path: path.get("path", "a path")?,
                precision,
                kv_types: read_kv_types(kv_cache_dtype.as_ref(), automatic(precision))?,
                quantization: read_quantization(quantization)?,
                threads: threads
                    .map_or(Ok(infer_kernels::default_threads().min(MAX_THREADS)), thread_count)?,
                max_model_len: max_model_len.map(|length| length.positive("max_model_len")).transpose()?,
                max_num_seqs: max_num_seqs
                    .map_or(Ok(MAX_NUM_SEQS), |count| count.positive("max_num_seqs"))?,
                max_num_batched_tokens: max_num_batched_tokens
                    .map_or(Ok(MAX_NUM_BATCHED_TOKENS), |count| count.positive("max_num_batched_tokens"))?,
                enable_prefix_caching: enable_prefix_caching.flag("enable_prefix_caching")?,
                kv_cache_memory_bytes: kv_cache_memory_bytes.map(memory).transpose()?,
                seed,
                mmap: mmap.flag("mmap")?,
                dummy: read_load_format(load_format, seed)?,
                packed_cache_dir: read_packed_cache(packed_cache_dir)?,
                max_waiting: max_waiting.map(|count| count.positive("max_waiting")).transpose()?,
                patience: seconds("priority_patience", priority_patience)?,
                step_time_target: step_time_target.map(target).transpose()?,
                speculation,
                draft: draft.flatten(),
                outside: outside.map(read_outside),
                offload: kv_offload.map(read_offload).transpose()?,
                cache_events: kv_events.flag("kv_events")?,
                trace: trace.flag("trace")?,
            };
            check_prefix_options(&settings)?;
            interruptible(py, "infer-load", move || load(&settings)).map(Self::from_loaded)
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

    /// What came of `packed_cache_dir` ("off", "read", "written" or "failed"), and what is to be told of it.
    #[getter]
    fn packed_cache(&self) -> (&'static str, Option<String>) {
        self.packed_cache.clone()
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

    /// Where an executor outside takes its work; None where this process's CPU computes.
    fn work_link(&self) -> PyResult<Option<WorkLink>> {
        guarded(|| Ok(self.running.get()?.handover().map(WorkLink::new)))
    }

    /// Whether `close` was called.
    #[getter]
    fn closed(&self) -> PyResult<bool> {
        Ok(self.running.get()?.open_driver().is_none())
    }

    /// Queue a prompt; returns at once.
    #[pyo3(signature = (
        prompt, params, *, add_special_tokens=true, final_only=false, ready=None, ready_key=0,
        priority=Arg::int(0), user=None, timeout=None, cache_salt=None
    ), text_signature = "($self, prompt, params, *, add_special_tokens=True, final_only=False, ready=None, ready_key=0, \
        priority=0, user=None, timeout=None, cache_salt=None)")]
    fn submit(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        params: &SamplingParams,
        add_special_tokens: bool,
        final_only: bool,
        ready: Option<&ReadyQueue>,
        ready_key: u64,
        priority: Arg<Int>,
        user: Option<Arg<String>>,
        timeout: Option<Arg<f64>>,
        cache_salt: Option<Arg<String>>,
    ) -> PyResult<Request> {
        guarded(|| {
            let driver = self.driver()?;
            let priority = priority.fit("priority", "an integer of 32 bits")?;
            let user = user.map(|user| user.get("user", "None or a string")).transpose()?.map(Into::into);
            let timeout = timeout.map(|timeout| seconds("timeout", timeout)).transpose()?;
            let cache_salt = salt(cache_salt)?;
            let prompt = prompt_ids(py, self.text.as_ref(), self.info.path(), prompt, add_special_tokens)?;
            let waker = ready.map(|queue| queue.waker(ready_key)).transpose()?;
            // Reads the whole prompt, as the text goes on where the prompt ends.
            let made = || text_factory(self.text.as_deref(), &params.inner, &prompt);
            let text = briefly(py, prompt.len(), made).map_err(refusal)?;
            let kind = RequestKind::Generate(Box::new(params.of_vocabulary(self.config.vocabulary)));
            let options = SubmitOptions { final_only, waker, priority, user, timeout, cache_salt };
            let handle = briefly(py, prompt.len(), || driver.submit(prompt.into(), kind, text, options));
            handle.map(Request::new).map_err(engine_error)
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
            let handle = py.detach(submit).map_err(engine_error)?;
            let array = empty_logits(py, rows, self.config.vocabulary)?;
            fill(py, &handle, &array)?;
            Ok(array)
        })
    }

    /// Wait until a request may be submitted, or the engine is closed; False after `timeout` seconds.
    #[pyo3(signature = (timeout=None))]
    fn wait_for_room(&self, py: Python<'_>, timeout: Option<Arg<f64>>) -> PyResult<bool> {
        guarded(|| {
            let driver = self.driver()?;
            wait_until(py, deadline(timeout)?, |span| driver.wait_for_room(Some(span)))
        })
    }

    /// Write the cached keys and values of a prompt's beginning to one file; how many tokens it holds.
    #[pyo3(signature = (path, token_ids, cache_salt=None))]
    fn save_session(
        &self,
        py: Python<'_>,
        path: Arg<PathBuf>,
        token_ids: &Bound<'_, PyAny>,
        cache_salt: Option<Arg<String>>,
    ) -> PyResult<usize> {
        guarded(|| {
            let driver = self.driver()?;
            self.check_sessions("save_session")?;
            let path = path.get("path", "a path")?;
            let ids = crate::convert::token_ids("token_ids", token_ids)?;
            let (salt, namespace) = (salt(cache_salt)?, self.running.get()?.namespace()?);
            interruptible(py, "infer-session", move || {
                save_session(&driver, &path, &ids, salt, namespace.get()?)
            })
        })
    }

    /// Put a session's keys and values into the cache; its token ids, and how many of them are cached now.
    #[pyo3(signature = (path, cache_salt=None))]
    fn load_session(
        &self,
        py: Python<'_>,
        path: Arg<PathBuf>,
        cache_salt: Option<Arg<String>>,
    ) -> PyResult<(Vec<u32>, usize)> {
        guarded(|| {
            let driver = self.driver()?;
            self.check_sessions("load_session")?;
            let path = path.get("path", "a path")?;
            let (salt, namespace, page_bytes) =
                (salt(cache_salt)?, self.running.get()?.namespace()?, self.page_bytes);
            interruptible(py, "infer-session", move || {
                load_session(&driver, &path, salt, namespace.get()?, page_bytes)
            })
        })
    }

    /// What became findable in the prefix cache and what is not any more since the last call, in order: ("stored", digest, parent,
    /// token ids) and ("removed", digest, None, None); and how many events were dropped because nobody took them.
    fn take_kv_events(&self) -> PyResult<(Vec<KvEvent>, u64)> {
        guarded(|| {
            let journal = self.driver()?.take_cache_events();
            let journal = kept(self.config.cache_events, "kv_events", "kv_events", journal)?;
            Ok((journal.entries.into_iter().map(kv_event).collect(), journal.dropped))
        })
    }

    /// Moments of requests' lives since the last call, in order: (request id, seconds since 1970, what, and the number or the reason
    /// that belongs to it); and how many were dropped because nobody took them.
    fn take_trace(&self) -> PyResult<(Vec<Moment>, u64)> {
        guarded(|| {
            let journal = self.driver()?.take_trace();
            let journal = kept(self.config.trace, "trace_events", "trace", journal)?;
            Ok((journal.entries.iter().map(|event| moment(event, self.began)).collect(), journal.dropped))
        })
    }

    /// Counters since the start, gauges now and distributions.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guarded(|| {
            let stats = self.running.get()?.store_stats();
            engine_metrics(py, &self.driver()?.metrics(), stats)
        })
    }

    /// Refuse new requests and wait for those that live; False after `timeout` seconds. `close` comes after.
    #[pyo3(signature = (timeout=None))]
    fn drain(&self, py: Python<'_>, timeout: Option<Arg<f64>>) -> PyResult<bool> {
        guarded(|| {
            let Some(driver) = self.running.get()?.open_driver() else { return Ok(true) };
            wait_until(py, deadline(timeout)?, |span| driver.drain(Some(span)))
        })
    }

    /// Abort what runs, join the thread, free weights and cache; harmless when repeated.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guarded(|| self.running.get()?.close(py))
    }
}

impl Engine {
    fn from_loaded(loaded: Loaded) -> Self {
        Self {
            config: loaded.driver.config().clone(),
            running: Owned::new(Running::new(loaded.driver, loaded.store, loaded.namespace, loaded.handover)),
            text: loaded.text,
            info: loaded.info,
            threads: loaded.threads,
            packed_cache: loaded.packed_cache,
            page_bytes: loaded.page_bytes,
            began: loaded.began,
        }
    }

    /// Sessions are what the prefix cache holds.
    fn check_sessions(&self, name: &str) -> PyResult<()> {
        match self.config.enable_prefix_caching {
            true => Ok(()),
            false => Err(refusal(format!(
                "{name} needs LLM(enable_prefix_caching=True), which this one was made without"
            ))),
        }
    }

    fn driver(&self) -> PyResult<Arc<Driver>> {
        self.running.get()?.driver()
    }
}

/// A journal, if it is kept.
///
/// # Errors
/// Nobody asked for it when the engine was made: what it would tell is lost.
fn kept<T>(is_kept: bool, name: &str, option: &str, journal: T) -> PyResult<T> {
    match is_kept {
        true => Ok(journal),
        false => Err(refusal(format!("{name}: nothing is recorded; LLM({option}=True) keeps this journal"))),
    }
}
