//! A device outside: the engine hands each step's work over to an executor, and waits for its answer.
//!
//! The executor is a loop on a thread that the engine knows nothing of (Python code that drives a GPU): it takes work with
//! [`Handover::next`], and answers with [`Handover::answer`]. The engine never calls it, so there is no callback, and no lock of one
//! world is held while the other runs. Whatever becomes of the executor, nobody waits for ever: one that says it has
//! stopped ([`Handover::stop`]) fails the work at hand and all later work with its reason, and when the device is dropped the
//! executor hears that there is no more work.
//!
//! Both sides look for news in a short busy loop before they sleep: waking a thread costs more than many a small kernel. The loop
//! yields, so that where there is one core for both the other side gets it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::batch::Batch;
use crate::device::Device;
use crate::tables::PageRef;

/// How long a side looks before it sleeps: about as long as the other takes between steps of decoding.
const GLANCE: Duration = Duration::from_micros(200);

/// What an executor is to do. Pages of the draft model, if there is one, have the same numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// As [`Device::forward`].
    Forward(Batch),
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
    /// To [`Work::Forward`] and [`Work::Draft`].
    Rows {
        /// (rows, vocabulary), of all rows or of those that were not chosen from.
        logits: Vec<f32>,
        /// As [`Device::take_choices`].
        choices: Vec<i32>,
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
    work: Option<Ticket>,
    answer: Option<Result<Answer, String>>,
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
}

impl Handover {
    /// The next work; after `timeout` without any, `Ok(None)`.
    ///
    /// # Errors
    /// There will be no more: the engine has closed its device, or the executor said itself that it stopped.
    pub fn next(&self, timeout: Duration) -> Result<Option<Ticket>, Closed> {
        self.glance(|state| state.work.is_some() || state.closed || state.stopped.is_some());
        let idle = |state: &mut State| state.work.is_none() && !state.closed && state.stopped.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match state.closed || state.stopped.is_some() {
            true => Err(Closed),
            false => Ok(state.work.take()),
        }
    }

    /// Answers the work of this number; a sentence for users where it failed. An answer that nobody waits for is dropped.
    pub fn answer(&self, number: u64, answer: Result<Answer, String>) {
        let mut state = self.lock();
        if state.number == number && state.work.is_none() && state.answer.is_none() {
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

    fn ask(&self, work: Work) -> Result<Answer, String> {
        let mut state = self.lock();
        state.number += 1;
        state.answer = None;
        state.work = Some(Ticket { number: state.number, work: Arc::new(work) });
        self.tell(state);
        self.glance(|state| state.answer.is_some() || state.stopped.is_some());
        let waits = |state: &mut State| state.answer.is_none() && state.stopped.is_none();
        let waited = self.changed.wait_while(self.lock(), waits);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let answer = state.answer.take();
        state.work = None;
        answer.unwrap_or_else(|| Err(state.stopped.clone().unwrap_or_default()))
    }
}

/// There is no more work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// A device whose executor is elsewhere.
pub struct OutsideDevice {
    handover: Arc<Handover>,
    choices: Vec<i32>,
}

impl OutsideDevice {
    /// A device that hands its work over there.
    #[must_use]
    pub fn new(handover: Arc<Handover>) -> Self {
        Self { handover, choices: Vec::new() }
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
        self.rows(Work::Forward(batch.clone()), logits)
    }

    fn take_choices(&mut self) -> Vec<i32> {
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
