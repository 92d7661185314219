//! What runs for an engine until it is closed: whoever closes first does it, and everyone else waits for that.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use infer_engine::{Driver, Handover};
use infer_store::{Store, StoreStats};
use pyo3::prelude::*;

use crate::backend::Namespace;
use crate::error::refusal;
use crate::wait::{interruptible, is_exiting};

const CLOSED: &str = "this LLM is closed";
/// How long closing waits for pages to be written.
const LAST_WRITES: Duration = Duration::from_secs(10);

/// The engine's thread, and the one that writes pages to the disk, if there is one.
pub struct Running {
    driver: Mutex<Option<Arc<Driver>>>,
    store: Mutex<Option<Arc<Store>>>,
    /// What pages belong to; it may have files open.
    namespace: Mutex<Option<Namespace>>,
    /// Where an executor outside finds its work.
    handover: Option<Arc<Handover>>,
    ended: Arc<OnceLock<()>>,
}

impl Running {
    pub fn new(
        driver: Driver,
        store: Option<Arc<Store>>,
        namespace: Namespace,
        handover: Option<Arc<Handover>>,
    ) -> Self {
        Self {
            driver: Mutex::new(Some(Arc::new(driver))),
            store: Mutex::new(store),
            namespace: Mutex::new(Some(namespace)),
            handover,
            ended: Arc::default(),
        }
    }

    /// The engine's thread; none once it is closed.
    pub fn open_driver(&self) -> Option<Arc<Driver>> {
        lock(&self.driver).clone()
    }

    /// The engine's thread.
    ///
    /// # Errors
    /// It is closed.
    pub fn driver(&self) -> PyResult<Arc<Driver>> {
        self.open_driver().ok_or_else(|| refusal(CLOSED))
    }

    /// What pages belong to.
    ///
    /// # Errors
    /// It is closed.
    pub fn namespace(&self) -> PyResult<Namespace> {
        lock(&self.namespace).clone().ok_or_else(|| refusal(CLOSED))
    }

    /// What the disk holds and did, where pages go there.
    pub fn store_stats(&self) -> Option<StoreStats> {
        lock(&self.store).as_ref().map(|store| store.stats())
    }

    pub fn handover(&self) -> Option<Arc<Handover>> {
        self.handover.clone()
    }

    /// Aborts what runs and joins the threads; harmless when repeated.
    pub fn close(&self, py: Python<'_>) -> PyResult<()> {
        // The lock must be free before the GIL is let go: other threads take it while they hold the GIL.
        let (driver, store) = (lock(&self.driver).take(), lock(&self.store).take());
        drop(lock(&self.namespace).take());
        let ended = Arc::clone(&self.ended);
        let telling = driver.is_some().then(|| Telling(Arc::clone(&ended)));
        // A step may be in flight, and Ctrl-C need not wait for it.
        interruptible(py, "infer-close", move || {
            let _telling = telling;
            // Whoever closes it after another waits for the other.
            driver.map_or_else(|| *ended.wait(), |driver| driver.close());
            // What the engine handed over last is still on its way to the disk.
            let _ = store.map(|store| store.flush(Some(LAST_WRITES)));
            Ok(())
        })
    }

    /// An executor on a Python thread does nothing more once the interpreter exits.
    fn stop_executor(&self) {
        if let Some(handover) = &self.handover {
            handover.stop("the interpreter is exiting");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(driver) = lock(&self.driver).take() else { return };
        // The last step may still run: other Python threads go on meanwhile, unless the interpreter is exiting.
        let closing = Arc::clone(&driver);
        let close = |py: Python<'_>| {
            if self.handover.is_some() && is_exiting(py) {
                self.stop_executor();
            }
            py.detach(|| closing.close());
        };
        if Python::try_attach(close).is_none() {
            self.stop_executor();
            driver.close();
        }
    }
}

/// Tells those who wait for the end, whatever ended it: a panic, too, or that there was no thread to close it on.
struct Telling(Arc<OnceLock<()>>);

impl Drop for Telling {
    fn drop(&mut self) {
        let _ = self.0.set(());
    }
}

fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}
