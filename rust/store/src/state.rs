//! What the callers' threads and the background thread share.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::directory::{Directory, Name};
use crate::index::Index;
use crate::page::{Page, Wanted};
use crate::{Fetched, StoreOptions, StoreStats, Tuning};

/// Called when [`crate::Store::poll`] has news.
pub(crate) type Waker = Arc<dyn Fn() + Send + Sync>;

/// Everything but the thread's handle.
pub(crate) struct Shared {
    pub options: StoreOptions,
    pub tuning: Tuning,
    pub directory: Directory,
    state: Mutex<State>,
    /// Rings at every change that somebody may wait for: work, answers, an empty queue, the thread's end.
    pub changed: Condvar,
}

/// What the lock guards. No file is touched while it is held.
pub(crate) struct State {
    pub index: Index,
    /// Folders with a file that the index forgot although it may still be there: they are to be listed again.
    pub unsure: Vec<usize>,
    pub stats: StoreStats,
    /// Names of `pending` in order of arrival.
    pub queue: VecDeque<Name>,
    /// Pages to be written, and the one that is being written.
    pub pending: HashMap<Name, Arc<Page>>,
    /// Payload bytes of `pending`.
    pub pending_bytes: usize,
    pub fetches: VecDeque<(u64, Vec<Wanted>)>,
    pub answers: Vec<Fetched>,
    pub waker: Option<Waker>,
    /// Nothing is written before this moment.
    pub paused_until: Option<Instant>,
    /// Set by `close`: what is not written by then is given up.
    pub closing: Option<Instant>,
    /// Queued pages that were not written.
    pub lost: u64,
    /// The background thread has ended, by request or because of a bug of ours.
    pub ended: bool,
}

impl Shared {
    pub fn new(options: StoreOptions, tuning: Tuning, directory: Directory, index: Index) -> Self {
        let state = State {
            index,
            unsure: Vec::new(),
            stats: StoreStats::default(),
            queue: VecDeque::new(),
            pending: HashMap::new(),
            pending_bytes: 0,
            fetches: VecDeque::new(),
            answers: Vec::new(),
            waker: None,
            paused_until: None,
            closing: None,
            lost: 0,
            ended: false,
        };
        Shared { options, tuning, directory, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The state. A thread that panicked with it (a bug of ours) cannot have left a page half there.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, at most until `deadline`; `None` once that has passed.
    pub fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        deadline: Option<Instant>,
    ) -> Option<MutexGuard<'a, State>> {
        let Some(deadline) = deadline else {
            return Some(self.changed.wait(state).unwrap_or_else(PoisonError::into_inner));
        };
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        Some(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl State {
    /// Whether writing pauses after an error.
    pub fn is_paused(&self) -> bool {
        self.paused_until.is_some_and(|until| Instant::now() < until)
    }

    /// Forgets a page that will not be written.
    pub fn lose(&mut self, name: &Name) {
        self.settle(name);
        self.lost = self.lost.saturating_add(1);
        self.stats.refused = self.stats.refused.saturating_add(1);
    }

    /// Forgets a page that was to be written.
    pub fn settle(&mut self, name: &Name) {
        if let Some(page) = self.pending.remove(name) {
            self.pending_bytes = self.pending_bytes.saturating_sub(page.payload.len());
        }
    }

    /// Gives up all that waits to be written.
    pub fn abandon_queue(&mut self) {
        while let Some(name) = self.queue.pop_front() {
            self.lose(&name);
        }
    }

    /// Answers a fetch; the caller then calls the waker, without the lock.
    pub fn answer(&mut self, ticket: u64, pages: Vec<Option<Vec<u8>>>) -> Option<Waker> {
        self.answers.push(Fetched { ticket, pages });
        self.waker.clone()
    }
}
