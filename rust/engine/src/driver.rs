//! The engine on a thread of its own.
//!
//! One thread (`worker.rs`) owns the [`Core`] and the device; everyone else talks to it through a mailbox (a mutex and condition variables)
//! and hears from it through outboxes. It sleeps whenever nothing can run. Whatever breaks, every accepted request ends: a device that
//! fails or panics ends the requests of that step, and a bug that kills the thread ends all of them.

use std::collections::HashMap;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::clock::Clock;
use crate::config::EngineConfig;
use crate::core::Core;
use crate::device::Device;
use crate::error::EngineError;
use crate::journal::{CacheEvent, TraceEvent};
use crate::mailbox::{Command, Journal, Letters, Mailbox, Status};
use crate::metrics::EngineMetrics;
use crate::outbox::{Outbox, RequestHandle, Waker};
use crate::request::{Prompt, RequestKind, RequestOptions, Submission};
use crate::text::TextFactory;
use crate::tier::{Tier, TierPage};
use crate::worker::{CLOSED, Worker};

/// How a request is to be served, and how its news are to be told.
#[derive(Default)]
pub struct SubmitOptions {
    /// Withhold updates until a completion ends.
    pub final_only: bool,
    /// Told of news.
    pub waker: Option<Waker>,
    /// Lower is served first; 0 is usual.
    pub priority: i32,
    /// Whom it is for; see [`RequestOptions::user`].
    pub user: Option<Arc<str>>,
    /// It ends with [`crate::FinishReason::Timeout`] so long after its submission.
    pub timeout: Option<Duration>,
    /// It shares cached pages only with requests of the same salt.
    pub cache_salt: Option<Arc<str>>,
}

/// A running engine. Any number of threads may submit; dropping it closes it.
pub struct Driver {
    mailbox: Arc<Mailbox>,
    thread: Mutex<Option<JoinHandle<()>>>,
    config: EngineConfig,
    clock: Arc<dyn Clock>,
}

impl Driver {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the sizes do not fit together, or the system gives no thread.
    pub fn start<D: Device + 'static>(
        config: EngineConfig,
        device: D,
        tier: Option<Arc<dyn Tier>>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, EngineError> {
        let mut core = Core::new(config.clone())?;
        let mailbox = Arc::new(Mailbox::new(core.metrics()));
        if let Some(tier) = &tier {
            core.set_tier(Arc::clone(tier));
            let mailbox = Arc::downgrade(&mailbox);
            tier.set_waker(Arc::new(move || {
                if let Some(mailbox) = mailbox.upgrade() {
                    mailbox.lock().tier_news = true;
                    mailbox.notify();
                }
            }));
        }
        let worker = Worker {
            core,
            device,
            tier,
            clock: Arc::clone(&clock),
            mailbox: Arc::clone(&mailbox),
            outboxes: HashMap::new(),
            logits: Vec::new(),
            tier_fails: false,
        };
        let thread =
            std::thread::Builder::new().name("infer-engine".to_owned()).spawn(move || worker.run()).map_err(
                |error| EngineError::Config(format!("the engine's thread could not be started: {error}")),
            )?;
        Ok(Self { mailbox, thread: Mutex::new(Some(thread)), config, clock })
    }

    /// The engine's sizes.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Queues a request.
    ///
    /// # Errors
    /// When it could never be served, as many requests wait as may, or the engine is closed.
    pub fn submit(
        &self,
        prompt: Prompt,
        kind: RequestKind,
        text: Option<TextFactory>,
        options: SubmitOptions,
    ) -> Result<RequestHandle, EngineError> {
        let now = self.clock.now();
        let SubmitOptions { final_only, waker, priority, user, timeout, cache_salt } = options;
        let deadline = timeout.and_then(|timeout| now.checked_add(timeout));
        let options = RequestOptions { priority, user, deadline, cache_salt, final_only };
        let mut submission = Submission { id: 0, prompt: Arc::clone(&prompt), kind, text, options };
        submission.validate(&self.config)?;
        let outbox = Arc::new(Outbox::new(&submission.kind, final_only, waker));
        let mut letters = self.mailbox.lock();
        match &letters.status {
            Status::Open => {}
            Status::Draining | Status::Closing => return Err(EngineError::Closed(CLOSED.to_owned())),
            Status::Ended(why) => return Err(EngineError::Closed(why.clone())),
        }
        if let Err(error) = self.config.check_room(letters.waiting) {
            letters.refused += 1;
            return Err(error);
        }
        letters.waiting += 1;
        let id = letters.next_id;
        letters.next_id += 1;
        submission.id = id;
        letters.commands.push_back(Command::Submit(submission, Arc::clone(&outbox), now));
        drop(letters);
        self.mailbox.notify();
        Ok(RequestHandle::new(id, prompt, outbox, Arc::downgrade(&self.mailbox)))
    }

    /// Waits until a request may be submitted (or the engine has ended); false when `timeout` passed first.
    #[must_use]
    pub fn wait_for_room(&self, timeout: Option<Duration>) -> bool {
        self.mailbox.wait_outside(timeout, |letters| self.has_room(letters))
    }

    /// Calls `waker` once as soon as a request may be submitted (or the engine has ended).
    pub fn on_room(&self, waker: Waker) {
        let mut letters = self.mailbox.lock();
        if self.has_room(&letters) {
            drop(letters);
            waker();
        } else {
            letters.room_wakers.push(waker);
        }
    }

    fn has_room(&self, letters: &Letters) -> bool {
        !matches!(letters.status, Status::Open) || self.config.check_room(letters.waiting).is_ok()
    }

    /// Counters and gauges after the last step.
    #[must_use]
    pub fn metrics(&self) -> EngineMetrics {
        let letters = self.mailbox.lock();
        EngineMetrics { requests_refused: letters.refused, ..letters.metrics.clone() }
    }

    /// What happened to the prefix cache since the last call, if `cache_events` is on.
    #[must_use]
    pub fn take_cache_events(&self) -> Journal<CacheEvent> {
        self.mailbox.take_cache_events()
    }

    /// Moments of requests since the last call, if `trace` is on.
    #[must_use]
    pub fn take_trace(&self) -> Journal<TraceEvent> {
        self.mailbox.take_trace()
    }

    /// Reads out the cached pages that hold the beginning of `tokens`.
    ///
    /// # Errors
    /// When the device cannot, or the engine is closed.
    pub fn export_session(
        &self,
        tokens: &[u32],
        cache_salt: Option<Arc<str>>,
    ) -> Result<Vec<TierPage>, EngineError> {
        let (reply, answer) = channel();
        self.mailbox.send(Command::Export(tokens.into(), cache_salt, reply))?;
        let answer = answer.recv().map_err(|_| EngineError::Closed(CLOSED.to_owned()))?;
        answer.map_err(EngineError::Request)
    }

    /// Puts consecutive pages, from a sequence's first on, into the cache, and says how many tokens of them are there then: fewer than
    /// given when memory is short.
    ///
    /// # Errors
    /// When a page does not belong to this model, or the engine is closed.
    pub fn import_session(
        &self,
        pages: Vec<TierPage>,
        cache_salt: Option<Arc<str>>,
    ) -> Result<usize, EngineError> {
        let full = |page: &TierPage| page.name.tokens.len() == self.config.page_tokens;
        let outside =
            |page: &TierPage| page.name.tokens.iter().any(|&token| token as usize >= self.config.vocabulary);
        let lengths = pages.iter().rev().skip(1).all(full)
            && pages
                .last()
                .is_none_or(|page| (1..=self.config.page_tokens).contains(&page.name.tokens.len()));
        if !lengths || pages.iter().any(outside) {
            return Err(EngineError::Request("the session's pages do not fit this model".to_owned()));
        }
        let (reply, answer) = channel();
        self.mailbox.send(Command::Import(pages, cache_salt, reply))?;
        let answer = answer.recv().map_err(|_| EngineError::Closed(CLOSED.to_owned()))?;
        answer.map_err(EngineError::Request)
    }

    /// Refuses new requests and waits for those that live; false when `timeout` passed first. [`Driver::close`] comes after.
    #[must_use]
    pub fn drain(&self, timeout: Option<Duration>) -> bool {
        let mut letters = self.mailbox.lock();
        if matches!(letters.status, Status::Open) {
            letters.status = Status::Draining;
        }
        drop(letters);
        self.mailbox.notify();
        self.mailbox.wait_outside(timeout, |letters| matches!(letters.status, Status::Ended(_)))
    }

    /// Aborts what runs and waits for the thread, which drops the device. Harmless when repeated.
    pub fn close(&self) {
        let mut letters = self.mailbox.lock();
        if matches!(letters.status, Status::Open | Status::Draining) {
            letters.status = Status::Closing;
        }
        drop(letters);
        self.mailbox.notify();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A waker runs on that very thread; it cannot wait for itself.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id()) {
            let _ = thread.join(); // a panic was already turned into failed requests
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.close();
    }
}
