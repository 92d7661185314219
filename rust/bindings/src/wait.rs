//! Waiting without the GIL, and without being deaf to signals.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::convert::Arg;
use crate::error::{describe_panic, refusal};

/// How long nobody looks for signals.
const GLANCE: Duration = Duration::from_millis(50);
/// Bytes or tokens that are read in less than a millisecond, whatever is done with them.
const BRIEF: usize = 2048;
/// How long a thread sleeps that no signal reaches, so that an idle program stays idle.
const SLEEP: Duration = Duration::from_secs(60);

/// A deadline from Python's `timeout` in seconds.
///
/// # Errors
/// A timeout that is negative, NaN or no number.
pub fn deadline(timeout: Option<Arg<f64>>) -> PyResult<Option<Instant>> {
    let Some(timeout) = timeout else { return Ok(None) };
    let seconds = timeout.get("timeout", "None or a number of seconds")?;
    if seconds.is_nan() || seconds < 0.0 {
        return Err(refusal(format!("timeout must be None or at least 0 seconds, got {seconds}")));
    }
    let span = Duration::try_from_secs_f64(seconds).ok();
    Ok(span.and_then(|span| Instant::now().checked_add(span)))
}

/// Calls `wait` with short timeouts until it says true (then true), the deadline passes (then false), or a signal handler raises.
pub fn wait_until(
    py: Python<'_>,
    deadline: Option<Instant>,
    wait: impl Fn(Duration) -> bool + Send + Sync,
) -> PyResult<bool> {
    let mut glance = GLANCE;
    loop {
        let left = deadline.map_or(glance, |at| at.saturating_duration_since(Instant::now()));
        if py.detach(|| wait(left.min(glance))) {
            return Ok(true);
        }
        py.check_signals()?;
        if deadline.is_some_and(|at| Instant::now() >= at) {
            return Ok(false);
        }
        if glance == GLANCE && !is_main_thread(py)? {
            glance = SLEEP;
        }
    }
}

/// Python runs signal handlers on its main thread alone: other threads have nothing to look for.
fn is_main_thread(py: Python<'_>) -> PyResult<bool> {
    let threading = py.import("threading")?;
    Ok(threading.call_method0("current_thread")?.is(threading.call_method0("main_thread")?))
}

/// Whether Python's other threads never run again. An exception on its way stays on it: objects are dropped while one is, too.
pub fn is_exiting(py: Python<'_>) -> bool {
    let pending = PyErr::take(py);
    let asked = py.import("sys").and_then(|sys| sys.call_method0("is_finalizing")?.extract());
    if let Some(pending) = pending {
        pending.restore(py);
    }
    asked.unwrap_or(true)
}

/// Runs work on an input of so many bytes or tokens that never waits long: with Python's lock where that is less than a millisecond's,
/// since a thread that gives the lock up beside one that computes in Python has it back five milliseconds later.
pub fn briefly<T: Send>(py: Python<'_>, size: usize, work: impl FnOnce() -> T + Send) -> T {
    if size <= BRIEF { work() } else { py.detach(work) }
}

/// Runs `work` on a thread of its own while this one looks for signals. When a signal handler raises, the work's result is dropped as
/// soon as it is there.
pub fn interruptible<T: Send + 'static>(
    py: Python<'_>,
    name: &str,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> PyResult<T> {
    let (sender, mut receiver) = sync_channel(1);
    let run = move || {
        let outcome =
            catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(describe_panic(&*panic)));
        let _ = sender.send(outcome); // nobody listens after a signal
    };
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    let thread = thread.map_err(|error| refusal(format!("cannot start a thread: {error}")))?;
    loop {
        let (news, back) = py.detach(move || (receiver.recv_timeout(GLANCE), receiver));
        receiver = back;
        match news {
            Ok(outcome) => {
                // The thread is about to end; after the join it no longer counts as one of the process's.
                let _ = py.detach(|| thread.join());
                return outcome.map_err(refusal);
            }
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(refusal("a bug in infer: a helper thread vanished"));
            }
        }
    }
}
