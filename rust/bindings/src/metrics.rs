//! The engine's figures as Python sees them.

use std::time::Duration;

use infer_engine::{CacheEvent, EngineMetrics, RequestId, TraceEvent, TraceKind};
use infer_store::StoreStats;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Counters, gauges and distributions by name.
pub fn engine_metrics<'py>(
    py: Python<'py>,
    metrics: &EngineMetrics,
    store: Option<StoreStats>,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in [
        ("requests_submitted", metrics.requests_submitted),
        ("requests_finished", metrics.requests_finished),
        ("requests_aborted", metrics.requests_aborted),
        ("requests_timed_out", metrics.requests_timed_out),
        ("requests_failed", metrics.requests_failed),
        ("requests_refused", metrics.requests_refused),
        ("steps", metrics.steps),
        ("computed_tokens", metrics.computed_tokens),
        ("prompt_tokens", metrics.prompt_tokens),
        ("prefix_queries", metrics.prefix_queries),
        ("cached_tokens", metrics.cached_tokens),
        ("generated_tokens", metrics.generated_tokens),
        ("preemptions", metrics.preemptions),
        ("copied_pages", metrics.copied_pages),
        ("saved_pages", metrics.saved_pages),
        ("fetched_pages", metrics.fetched_pages),
        ("restored_pages", metrics.restored_pages),
        ("window_pages", metrics.window_pages),
        ("drafted_tokens", metrics.drafted_tokens),
        ("accepted_tokens", metrics.accepted_tokens),
        ("branch_tokens", metrics.branch_tokens),
        ("decode_steps", metrics.decode_steps),
        ("running", metrics.running),
        ("waiting", metrics.waiting),
        ("pages_total", metrics.pages_total),
        ("pages_free", metrics.pages_free),
        ("pages_evictable", metrics.pages_evictable),
        ("local_pages_total", metrics.local_pages_total),
        ("local_pages_free", metrics.local_pages_free),
        ("local_pages_evictable", metrics.local_pages_evictable),
    ] {
        dict.set_item(name, value)?;
    }
    dict.set_item("joules", metrics.joules)?;
    let histograms = PyDict::new(py);
    for (name, histogram) in metrics.histograms.all() {
        let entry = PyDict::new(py);
        entry.set_item("bounds", histogram.bounds)?;
        entry.set_item("counts", &histogram.counts)?;
        entry.set_item("sum", histogram.sum)?;
        entry.set_item("count", histogram.count())?;
        histograms.set_item(name, entry)?;
    }
    dict.set_item("histograms", histograms)?;
    if let Some(stats) = store {
        dict.set_item("offload", store_metrics(py, &stats)?)?;
    }
    Ok(dict)
}

fn store_metrics<'py>(py: Python<'py>, stats: &StoreStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in [
        ("pages", stats.pages),
        ("bytes", stats.bytes),
        ("queued", stats.queued),
        ("writes", stats.writes),
        ("reads", stats.reads),
        ("hits", stats.hits),
        ("damaged", stats.damaged),
        ("evicted", stats.evicted),
        ("refused", stats.refused),
        ("io_errors", stats.io_errors),
    ] {
        dict.set_item(name, value)?;
    }
    Ok(dict)
}

/// Kind, digest, parent's digest, tokens.
pub type KvEvent = (&'static str, [u8; 32], Option<[u8; 32]>, Option<Vec<u32>>);

/// A change of the prefix cache.
pub fn kv_event(event: CacheEvent) -> KvEvent {
    match event {
        CacheEvent::Stored { digest, parent, tokens } => {
            ("stored", digest, Some(parent), Some(tokens.into_vec()))
        }
        CacheEvent::Removed { digest } => ("removed", digest, None, None),
    }
}

/// Request, seconds since 1970, what happened, cached tokens or pages, finish reason.
pub type Moment = (RequestId, f64, &'static str, Option<usize>, Option<&'static str>);

/// A moment of a request's life.
pub fn moment(event: &TraceEvent, began: Duration) -> Moment {
    let (what, count, reason) = match event.kind {
        TraceKind::Queued => ("queued", None, None),
        TraceKind::Scheduled { cached_tokens } => ("scheduled", Some(cached_tokens), None),
        TraceKind::Restoring { pages } => ("restoring", Some(pages), None),
        TraceKind::Preempted => ("preempted", None, None),
        TraceKind::FirstToken => ("first_token", None, None),
        TraceKind::Ended { reason } => ("ended", None, Some(reason.name())),
    };
    (event.request, (began + event.at).as_secs_f64(), what, count, reason)
}
