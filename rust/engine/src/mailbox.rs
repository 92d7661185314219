//! The way to the driver's thread, and what it tells everyone: commands in; counters, room in the queue and the journal out.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::journal::{CacheEvent, TraceEvent};
use crate::metrics::EngineMetrics;
use crate::outbox::{Outbox, Waker};
use crate::request::{RequestId, Submission};
use crate::tier::TierPage;

/// Letters to the driver's thread.
pub(crate) enum Command {
    Submit(Submission, Arc<Outbox>, Duration),
    Cancel(RequestId),
    Resume(RequestId),
    /// Read out the pages that hold the beginning of these tokens.
    Export(Box<[u32]>, Option<Arc<str>>, Sender<Result<Vec<TierPage>, String>>),
    /// Fill pages; the answer says how many tokens are in the cache then.
    Import(Vec<TierPage>, Option<Arc<str>>, Sender<Result<usize, String>>),
}

pub(crate) enum Status {
    Open,
    /// No new requests; the thread ends with the last one.
    Draining,
    Closing,
    Ended(String),
}

pub(crate) struct Letters {
    pub commands: VecDeque<Command>,
    pub status: Status,
    pub next_id: RequestId,
    pub metrics: EngineMetrics,
    /// Requests that were never part of a step, those among `commands` included.
    pub waiting: usize,
    /// Submissions that were refused because too many waited.
    pub refused: u64,
    /// To be told, once, that a request may be submitted again.
    pub room_wakers: Vec<Waker>,
    /// The tier has answers.
    pub tier_news: bool,
}

/// What outsiders follow, until they take it.
#[derive(Debug)]
pub struct Journal<T> {
    /// What happened, oldest first.
    pub entries: Vec<T>,
    /// Entries that were dropped because nobody took those before.
    pub dropped: u64,
}

impl<T> Default for Journal<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), dropped: 0 }
    }
}

/// Entries kept before new ones are dropped.
const JOURNAL_LIMIT: usize = 1 << 16;

impl<T> Journal<T> {
    fn append(&mut self, entries: Vec<T>) {
        let room = JOURNAL_LIMIT.saturating_sub(self.entries.len());
        self.dropped += entries.len().saturating_sub(room) as u64;
        self.entries.extend(entries.into_iter().take(room));
    }
}

/// What the driver's thread and everyone else share.
pub(crate) struct Mailbox {
    letters: Mutex<Letters>,
    arrived: Condvar,
    /// Told of room in the queue, and of the end.
    room: Condvar,
    cache_events: Mutex<Journal<CacheEvent>>,
    trace: Mutex<Journal<TraceEvent>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under these locks can leave them half changed, so a poisoned lock is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mailbox {
    pub fn new(metrics: EngineMetrics) -> Self {
        let letters = Letters {
            commands: VecDeque::new(),
            status: Status::Open,
            next_id: 0,
            metrics,
            waiting: 0,
            refused: 0,
            room_wakers: Vec::new(),
            tier_news: false,
        };
        Self {
            letters: Mutex::new(letters),
            arrived: Condvar::new(),
            room: Condvar::new(),
            cache_events: Mutex::default(),
            trace: Mutex::default(),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, Letters> {
        lock(&self.letters)
    }

    pub fn notify(&self) {
        self.arrived.notify_one();
    }

    /// Sends a command, unless the thread has ended.
    pub fn send(&self, command: Command) -> Result<(), EngineError> {
        let mut letters = self.lock();
        if let Status::Ended(why) = &letters.status {
            return Err(EngineError::Closed(why.clone()));
        }
        letters.commands.push_back(command);
        drop(letters);
        self.notify();
        Ok(())
    }

    pub fn cancel(&self, id: RequestId) {
        let _ = self.send(Command::Cancel(id)); // a thread that has ended has cancelled everything
    }

    pub fn resume(&self, id: RequestId) {
        let _ = self.send(Command::Resume(id)); // as above
    }

    /// Waits for letters until `until` says so, at most `timeout`; the driver's thread alone calls this.
    pub fn wait<'a>(
        &self,
        letters: MutexGuard<'a, Letters>,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, Letters> {
        match timeout {
            None => self.arrived.wait(letters).unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => {
                self.arrived.wait_timeout(letters, timeout).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Waits until `ready`, at most `timeout`; whether it was in time.
    pub fn wait_outside(&self, timeout: Option<Duration>, ready: impl Fn(&Letters) -> bool) -> bool {
        let waiting = |letters: &mut Letters| !ready(letters);
        match timeout {
            None => drop(self.room.wait_while(self.lock(), waiting)),
            Some(timeout) => {
                let waited = self.room.wait_timeout_while(self.lock(), timeout, waiting);
                return !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out();
            }
        }
        true
    }

    /// Tells those who wait outside: for room, or for the end.
    pub fn tell(&self, mut letters: MutexGuard<'_, Letters>, config: &EngineConfig) {
        let ended = matches!(letters.status, Status::Ended(_));
        let room = ended || config.check_room(letters.waiting).is_ok();
        let wakers = if room { std::mem::take(&mut letters.room_wakers) } else { Vec::new() };
        drop(letters);
        self.room.notify_all();
        wakers.iter().for_each(|waker| waker());
    }

    /// Files what happened.
    pub fn record(&self, cache_events: Vec<CacheEvent>, trace: Vec<TraceEvent>) {
        if !cache_events.is_empty() {
            lock(&self.cache_events).append(cache_events);
        }
        if !trace.is_empty() {
            lock(&self.trace).append(trace);
        }
    }

    pub fn take_cache_events(&self) -> Journal<CacheEvent> {
        std::mem::take(&mut lock(&self.cache_events))
    }

    pub fn take_trace(&self) -> Journal<TraceEvent> {
        std::mem::take(&mut lock(&self.trace))
    }
}
