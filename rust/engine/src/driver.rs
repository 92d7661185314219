//! The engine on a thread of its own.
//!
//! One thread owns the [`Core`] and the device; everyone else talks to it through a mailbox (a mutex and a condition variable) and hears
//! from it through outboxes. It sleeps whenever nothing can run. Whatever breaks, every accepted request ends: a device that fails or
//! panics ends the requests of that step, and a bug that kills the thread ends all of them.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::clock::Clock;
use crate::config::EngineConfig;
use crate::core::{Batch, Core};
use crate::error::EngineError;
use crate::event::{EventKind, FinishReason};
use crate::metrics::EngineMetrics;
use crate::outbox::{Outbox, RequestHandle, Waker};
use crate::request::{Prompt, RequestId, RequestKind, Submission};
use crate::text::TextFactory;

/// What computes batches: any backend.
pub trait Device: Send {
    /// Computes a batch and replaces `logits` with those of `batch.logit_rows`: (logit_rows, vocabulary).
    ///
    /// # Errors
    /// A sentence for the users whose requests were part of the batch.
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String>;
}

/// How news of a request is to be told.
#[derive(Default)]
pub struct SubmitOptions {
    /// Withhold updates until a completion ends.
    pub final_only: bool,
    /// Told of news.
    pub waker: Option<Waker>,
}

enum Command {
    Submit(Submission, Arc<Outbox>, Duration),
    Cancel(RequestId),
    Resume(RequestId),
}

enum Status {
    Open,
    Closing,
    Ended(String),
}

struct Letters {
    commands: VecDeque<Command>,
    status: Status,
    next_id: RequestId,
    metrics: EngineMetrics,
}

/// The way to the driver's thread.
pub(crate) struct Mailbox {
    letters: Mutex<Letters>,
    arrived: Condvar,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, command: Command) {
        self.lock().commands.push_back(command);
        self.arrived.notify_one();
    }

    pub fn cancel(&self, id: RequestId) {
        self.send(Command::Cancel(id));
    }

    pub fn resume(&self, id: RequestId) {
        self.send(Command::Resume(id));
    }
}

/// A running engine. Any number of threads may submit; dropping it closes it.
pub struct Driver {
    mailbox: Arc<Mailbox>,
    thread: Mutex<Option<JoinHandle<()>>>,
    config: EngineConfig,
    clock: Arc<dyn Clock>,
}

const CLOSED: &str = "the engine is closed";

impl Driver {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the sizes do not fit together, or the system gives no thread.
    pub fn start<D: Device + 'static>(
        config: EngineConfig,
        device: D,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, EngineError> {
        let core = Core::new(config.clone())?;
        let letters =
            Letters { commands: VecDeque::new(), status: Status::Open, next_id: 0, metrics: core.metrics() };
        let mailbox = Arc::new(Mailbox { letters: Mutex::new(letters), arrived: Condvar::new() });
        let worker = Worker {
            core,
            device,
            clock: Arc::clone(&clock),
            mailbox: Arc::clone(&mailbox),
            outboxes: HashMap::new(),
            logits: Vec::new(),
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
    /// When it could never be served, or the engine is closed.
    pub fn submit(
        &self,
        prompt: Prompt,
        kind: RequestKind,
        text: Option<TextFactory>,
        options: SubmitOptions,
    ) -> Result<RequestHandle, EngineError> {
        let mut submission = Submission { id: 0, prompt: Arc::clone(&prompt), kind, text };
        submission.validate(&self.config)?;
        let outbox = Arc::new(Outbox::new(&submission.kind, options.final_only, options.waker));
        let now = self.clock.now();
        let mut letters = self.mailbox.lock();
        match &letters.status {
            Status::Open => {}
            Status::Closing => return Err(EngineError::Closed(CLOSED.to_owned())),
            Status::Ended(why) => return Err(EngineError::Closed(why.clone())),
        }
        let id = letters.next_id;
        letters.next_id += 1;
        submission.id = id;
        letters.commands.push_back(Command::Submit(submission, Arc::clone(&outbox), now));
        drop(letters);
        self.mailbox.arrived.notify_one();
        Ok(RequestHandle::new(id, prompt, outbox, Arc::downgrade(&self.mailbox)))
    }

    /// Counters and gauges after the last step.
    #[must_use]
    pub fn metrics(&self) -> EngineMetrics {
        self.mailbox.lock().metrics
    }

    /// Aborts what runs and waits for the thread, which drops the device. Harmless when repeated.
    pub fn close(&self) {
        let mut letters = self.mailbox.lock();
        if matches!(letters.status, Status::Open) {
            letters.status = Status::Closing;
        }
        drop(letters);
        self.mailbox.arrived.notify_one();
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

/// What lives on the thread.
struct Worker<D> {
    core: Core,
    device: D,
    clock: Arc<dyn Clock>,
    mailbox: Arc<Mailbox>,
    outboxes: HashMap<RequestId, Arc<Outbox>>,
    logits: Vec<f32>,
}

impl<D: Device> Worker<D> {
    fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let (reason, why) = match outcome {
            Ok(()) => (FinishReason::Abort, CLOSED.to_owned()),
            Err(panic) => {
                (FinishReason::Error, format!("the engine stopped by a bug in infer: {}", describe(&*panic)))
            }
        };
        let mut letters = self.mailbox.lock();
        letters.status = Status::Ended(why.clone());
        for command in letters.commands.drain(..) {
            if let Command::Submit(submission, outbox, _) = command {
                self.outboxes.insert(submission.id, outbox);
            }
        }
        drop(letters);
        for outbox in self.outboxes.values() {
            outbox.abandon(reason, &why);
        }
    }

    /// Steps until the engine is closed.
    fn serve(&mut self) {
        let mut can_step = false;
        while let Some(commands) = self.receive(can_step) {
            for command in commands {
                self.obey(command);
            }
            can_step = self.step();
            self.deliver();
        }
        let now = self.clock.now();
        for id in self.core.live_requests().collect::<Vec<_>>() {
            self.core.cancel(id, now);
        }
        self.deliver();
    }

    /// New commands; waits for some unless there is work. None when the engine is closing.
    fn receive(&self, can_step: bool) -> Option<VecDeque<Command>> {
        let mut letters = self.mailbox.lock();
        loop {
            if !matches!(letters.status, Status::Open) {
                return None;
            }
            if can_step || !letters.commands.is_empty() {
                return Some(std::mem::take(&mut letters.commands));
            }
            letters = self.mailbox.arrived.wait(letters).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission, outbox, arrival) => {
                let id = submission.id;
                match self.core.submit(submission, arrival) {
                    Ok(()) => drop(self.outboxes.insert(id, outbox)),
                    Err(error) => outbox.abandon(FinishReason::Error, &error.to_string()),
                }
            }
            Command::Cancel(id) => self.core.cancel(id, self.clock.now()),
            Command::Resume(id) => self.core.resume(id),
        }
    }

    /// One step; false when nothing could run.
    fn step(&mut self) -> bool {
        let Some(batch) = self.core.next_batch(self.clock.now()) else { return false };
        let outcome = catch_unwind(AssertUnwindSafe(|| self.device.forward(&batch, &mut self.logits)));
        let now = self.clock.now();
        match outcome {
            Ok(Ok(())) => self.core.commit(&self.logits, now),
            Ok(Err(message)) => self.core.fail(&message, now),
            Err(panic) => self.core.fail(&format!("a bug in infer: {}", describe(&*panic)), now),
        }
        true
    }

    /// Files what happened; the counters first, so that whoever hears of an end finds it counted.
    fn deliver(&mut self) {
        self.mailbox.lock().metrics = self.core.metrics();
        let mut events = self.core.take_events().into_iter().peekable();
        while let Some(id) = events.peek().map(|event| event.request) {
            let mut done = false;
            let own = std::iter::from_fn(|| events.next_if(|event| event.request == id));
            let own = own.inspect(|event| done |= matches!(event.kind, EventKind::Done { .. }));
            match self.outboxes.get(&id) {
                Some(outbox) => outbox.put(own),
                None => own.for_each(drop),
            }
            if done {
                self.outboxes.remove(&id);
            }
        }
    }
}

fn describe(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown panic")
}
