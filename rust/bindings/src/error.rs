//! The one exception, and the way every failure takes to it.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use infer_engine::EngineError;
use pyo3::PyErr;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

pyo3::create_exception!(
    infer,
    InferError,
    PyException,
    "A request, a model file or an engine state that cannot be served; the message says what would be right."
);

pyo3::create_exception!(
    infer,
    QueueFullError,
    InferError,
    "As many requests wait as `max_waiting` allows; the same call may succeed when one of them has started."
);

/// The engine's errors as exceptions.
pub fn engine_error(error: EngineError) -> PyErr {
    match error {
        EngineError::Full(message) => QueueFullError::new_err(message),
        EngineError::Config(message) | EngineError::Request(message) | EngineError::Closed(message) => {
            refusal(message)
        }
    }
}

/// A refusal.
pub fn refusal(message: impl Display) -> PyErr {
    InferError::new_err(message.to_string())
}

/// Runs a method's body; a panic in it, always a bug of ours, becomes an exception.
pub fn guarded<T>(body: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(refusal(describe_panic(&*panic))))
}

/// What a caught panic is called in an error.
pub fn describe_panic(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    format!("a bug in infer: {text}")
}
