//! A device outside: the engine hands each step's work over to an executor, and waits for its answer.
//!
//! The executor is a loop on a thread that the engine knows nothing of (Python code that drives a GPU): it takes work with
//! [`Handover::next`], and answers with [`Handover::answer`]. The engine never calls it, so there is no callback, and no lock of one
//! world is held while the other runs. Whatever becomes of the executor, nobody waits for ever: one that says it has
//! stopped ([`Handover::stop`]) fails the work at hand and all later work with its reason, and when the device is dropped the
//! executor hears that there is no more work.
//!
//! Work is done in the order in which it is laid down. Steps are begun with one piece of work, which is not answered, and ended with
//! another: so the executor may begin a second step before it waits for the first one.
//!
//! Both sides look for news in a short busy loop before they sleep: waking a thread costs more than many a small kernel. The loop
//! yields, so that where there is one core for both the other side gets it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::batch::Batch;
use crate::device::Device;
use crate::draw::Choice;
use crate::tables::PageRef;

/// How long a side looks before it sleeps: about as long as the other takes between steps of decoding.
const GLANCE: Duration = Duration::from_micros(200);

/// What an executor is to do. Pages of the draft model, if there is one, have the same numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// As [`Device::begin`]. It is not answered: what goes wrong is the answer to its [`Work::Finish`].
    Forward(Batch),
    /// As [`Device::finish`]: of the first [`Work::Forward`] that was not finished.
    Finish,
    /// As [`Device::draft`].
    Draft(Batch),
    /// As [`Device::export_page`].
    Export(PageRef),
    /// As [`Device::import_page`].
    Import(PageRef, Vec<u8>),
}

/// What an executor answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// To [`Work::Finish`] and [`Work::Draft`].
    Rows {
        /// (rows, vocabulary), of all rows or of those that were not chosen from.
        logits: Vec<f32>,
        /// As [`Device::take_choices`].
        choices: Vec<Choice>,
    },
    /// To [`Work::Export`].
    Page(Vec<u8>),
    /// To [`Work::Import`].
    Done,
}

/// Work with its number, which the answer names.
#[derive(Debug, Clone)]
pub struct Ticket {
    /// Answers to an earlier number are dropped.
    pub number: u64,
    /// What to do.
    pub work: Arc<Work>,
}

#[derive(Default)]
struct State {
    /// Number of the latest work.
    number: u64,
    /// Until the executor takes it.
    work: VecDeque<Ticket>,
    /// Number of the work whose answer is awaited; 0 for none.
    awaited: u64,
    answer: Option<Result<Answer, String>>,
    /// Rows were computed since [`Handover::wait_for_rows`] was last answered.
    has_rows: bool,
    /// Why the executor takes no more.
    stopped: Option<String>,
    /// The device was dropped.
    closed: bool,
}

/// The desk over which work and answers go. One executor takes from it, one device puts there.
#[derive(Default)]
pub struct Handover {
    state: Mutex<State>,
    changed: Condvar,
    /// Counts changes, to be looked at without the lock.
    changes: AtomicU64,
    /// Bits of the watts that the executor told of; 0 for none.
    watts: AtomicU64,
}

impl Handover {
    /// The next work; after `timeout` without any, `Ok(None)`.
    ///
    /// # Errors
    /// There will be no more: the engine has closed its device, or the executor said itself that it stopped.
    pub fn next(&self, timeout: Duration) -> Result<Option<Ticket>, Closed> {
        self.glance(|state| !state.work.is_empty() || state.closed || state.stopped.is_some());
        let idle = |state: &mut State| state.work.is_empty() && !state.closed && state.stopped.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match state.closed || state.stopped.is_some() {
            true => Err(Closed),
            false => Ok(state.work.pop_front()),
        }
    }

    /// Answers the work of this number; a sentence for users where it failed. An answer that nobody waits for is dropped.
    pub fn answer(&self, number: u64, answer: Result<Answer, String>) {
        let mut state = self.lock();
        let taken = state.work.front().is_none_or(|next| next.number > number);
        if state.awaited == number && taken && state.answer.is_none() {
            state.has_rows |= matches!(answer, Ok(Answer::Rows { .. }));
            state.answer = Some(answer);
            self.tell(state);
        }
    }

    /// The executor takes no more work: what is at hand and whatever comes fails with this sentence. The first one counts.
    pub fn stop(&self, message: &str) {
        let mut state = self.lock();
        state.stopped.get_or_insert_with(|| message.to_owned());
        self.tell(state);
    }

    /// Waits until rows were computed since the last time that this was answered `Ok(true)`; `Ok(false)` after `timeout`.
    ///
    /// # Errors
    /// As [`Handover::next`].
    pub fn wait_for_rows(&self, timeout: Duration) -> Result<bool, Closed> {
        let idle = |state: &mut State| !state.has_rows && !state.closed && state.stopped.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match state.closed || state.stopped.is_some() {
            true => Err(Closed),
            false => Ok(std::mem::take(&mut state.has_rows)),
        }
    }

    /// The executor tells what its device takes while it computes, in watts.
    pub fn set_watts(&self, watts: f64) {
        self.watts.store(watts.to_bits(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, state: MutexGuard<'_, State>) {
        self.changes.fetch_add(1, Ordering::Release);
        drop(state);
        self.changed.notify_all();
    }

    /// Returns when there is news, or soon.
    fn glance(&self, news: impl Fn(&State) -> bool) {
        let began = Instant::now();
        let mut seen = None;
        while began.elapsed() < GLANCE {
            let changes = self.changes.load(Ordering::Acquire);
            if seen.replace(changes) != Some(changes) && news(&self.lock()) {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// Lays work down.
    fn put<'a>(&self, mut state: MutexGuard<'a, State>, work: Work) -> MutexGuard<'a, State> {
        state.number += 1;
        let number = state.number;
        state.work.push_back(Ticket { number, work: Arc::new(work) });
        state
    }

    fn ask(&self, work: Work) -> Result<Answer, String> {
        let mut state = self.put(self.lock(), work);
        state.answer = None;
        state.awaited = state.number;
        self.tell(state);
        self.glance(|state| state.answer.is_some() || state.stopped.is_some());
        let waits = |state: &mut State| state.answer.is_none() && state.stopped.is_none();
        let waited = self.changed.wait_while(self.lock(), waits);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let answer = state.answer.take();
        state.awaited = 0;
        answer.unwrap_or_else(|| Err(state.stopped.clone().unwrap_or_default()))
    }
}

/// There is no more work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// A device whose executor is elsewhere.
pub struct OutsideDevice {
    handover: Arc<Handover>,
    draws: bool,
    choices: Vec<Choice>,
}

impl OutsideDevice {
    /// A device that hands its work over there, and whether the executor draws all tokens that [`Batch::draws`] asks for.
    #[must_use]
    pub fn new(handover: Arc<Handover>, draws: bool) -> Self {
        Self { handover, draws, choices: Vec::new() }
    }

    fn rows(&mut self, work: Work, logits: &mut Vec<f32>) -> Result<(), String> {
        match self.handover.ask(work)? {
            Answer::Rows { logits: computed, choices } => {
                *logits = computed;
                self.choices = choices;
            }
            other => return Err(mistaken(&other)),
        }
        Ok(())
    }
}

impl Device for OutsideDevice {
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.begin(batch.clone());
        self.finish(logits)
    }

    fn works_ahead(&self) -> bool {
        self.draws
    }

    fn watts(&self) -> Option<f64> {
        let bits = self.handover.watts.load(Ordering::Relaxed);
        (bits != 0).then(|| f64::from_bits(bits))
    }

    fn begin(&mut self, batch: Batch) {
        let state = self.handover.put(self.handover.lock(), Work::Forward(batch));
        self.handover.tell(state);
    }

    fn finish(&mut self, logits: &mut Vec<f32>) -> Result<(), String> {
        self.rows(Work::Finish, logits)
    }

    fn take_choices(&mut self) -> Vec<Choice> {
        std::mem::take(&mut self.choices)
    }

    fn draft(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.rows(Work::Draft(batch.clone()), logits)
    }

    fn export_page(&mut self, page: PageRef, bytes: &mut Vec<u8>) -> Result<(), String> {
        match self.handover.ask(Work::Export(page))? {
            Answer::Page(contents) => *bytes = contents,
            other => return Err(mistaken(&other)),
        }
        Ok(())
    }

    fn import_page(&mut self, page: PageRef, bytes: &[u8]) -> Result<(), String> {
        match self.handover.ask(Work::Import(page, bytes.to_vec()))? {
            Answer::Done => Ok(()),
            other => Err(mistaken(&other)),
        }
    }
}

impl Drop for OutsideDevice {
    fn drop(&mut self) {
        let mut state = self.handover.lock();
        state.closed = true;
        self.handover.tell(state);
    }
}

fn mistaken(answer: &Answer) -> String {
    let kind = match answer {
        Answer::Rows { .. } => "logits",
        Answer::Page(_) => "a page",
        Answer::Done => "that it is done",
    };
    format!("a bug in infer: the executor answered {kind} to other work")
}
