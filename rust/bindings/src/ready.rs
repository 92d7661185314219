//! One queue for the news of many requests.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use infer_engine::Waker;
use pyo3::prelude::*;

use crate::convert::Arg;
use crate::error::guarded;
use crate::owned::Owned;
use crate::wait::{deadline, wait_until};

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    keys: VecDeque<u64>,
    queued: HashSet<u64>,
    woken: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, key: u64) {
        let mut state = self.lock();
        if state.queued.insert(key) {
            state.keys.push_back(key);
        }
        drop(state);
        self.changed.notify_one();
    }

    fn wait(&self, timeout: Duration) -> bool {
        let empty = |state: &mut State| state.keys.is_empty() && !state.woken;
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, empty);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn take(&self) -> Vec<u64> {
        let mut state = self.lock();
        state.woken = false;
        state.queued.clear();
        state.keys.drain(..).collect()
    }
}

/// Where many requests report that they have news, for one thread that serves them all.
#[pyclass(frozen, module = "infer._core")]
pub struct ReadyQueue {
    shared: Owned<Arc<Shared>>,
}

impl ReadyQueue {
    /// Reports `key` here.
    pub fn waker(&self, key: u64) -> PyResult<Waker> {
        let shared = Arc::clone(self.shared.get()?);
        Ok(Arc::new(move || shared.push(key)))
    }
}

#[pymethods]
impl ReadyQueue {
    #[new]
    fn new() -> Self {
        Self { shared: Owned::new(Arc::default()) }
    }

    /// Keys of requests with news, each once; [] after `timeout` seconds or `wake`.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<Arg<f64>>) -> PyResult<Vec<u64>> {
        guarded(|| {
            let shared = self.shared.get()?;
            wait_until(py, deadline(timeout)?, |span| shared.wait(span))?;
            Ok(shared.take())
        })
    }

    /// Make the waiting thread return, possibly with [].
    fn wake(&self) -> PyResult<()> {
        guarded(|| {
            let shared = self.shared.get()?;
            shared.lock().woken = true;
            shared.changed.notify_one();
            Ok(())
        })
    }
}
