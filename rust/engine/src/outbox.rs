//! Where a request's news waits until its consumer takes it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::event::{Event, EventKind, Finish, FinishReason};
use crate::logprobs::TokenLogprob;
use crate::mailbox::Mailbox;
use crate::metrics::RequestMetrics;
use crate::request::{Prompt, RequestId, RequestKind};

/// Called, on the driver's thread and holding no lock, when a request has news that nobody was told of.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// What one completion gained since the last look.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Update {
    /// Which of the request's completions.
    pub index: u32,
    /// New text.
    pub text: String,
    /// New tokens.
    pub token_ids: Vec<u32>,
    /// For each new token; none when not asked for.
    pub logprobs: Option<Vec<Vec<TokenLogprob>>>,
    /// Set when the completion has ended.
    pub finish: Option<Finish>,
}

/// The shared half of a request: the driver puts, the consumer takes.
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
    waker: Option<Waker>,
    final_only: bool,
}

#[derive(Default)]
struct State {
    updates: Vec<Option<Update>>,
    ended: Vec<bool>,
    /// Updates carry log-probabilities.
    logprobs: bool,
    /// Log-probabilities of the prompt; none when not asked for.
    prompt_logprobs: Option<Vec<Vec<TokenLogprob>>>,
    logits: Option<Vec<f32>>,
    metrics: RequestMetrics,
    error: Option<String>,
    done: bool,
    /// The waker was called and nothing was taken since.
    signalled: bool,
}

impl State {
    fn update(&mut self, index: u32) -> &mut Update {
        let logprobs = self.logprobs.then(Vec::new);
        self.updates[index as usize].get_or_insert_with(|| Update { index, logprobs, ..Update::default() })
    }

    fn file(&mut self, kind: EventKind) {
        match kind {
            EventKind::Token { index, token, text, logprobs } => {
                let update = self.update(index);
                update.token_ids.push(token);
                update.text.push_str(&text);
                if let (Some(rows), Some(row)) = (&mut update.logprobs, logprobs) {
                    rows.push(row);
                }
            }
            EventKind::Finished { index, text, finish } => {
                self.ended[index as usize] = true;
                let update = self.update(index);
                update.text.push_str(&text);
                update.finish = Some(finish);
            }
            EventKind::PromptLogprobs(rows) => self.prompt_logprobs.get_or_insert_default().extend(rows),
            EventKind::Logits(rows) => self.logits = Some(rows),
            EventKind::Done { error } => (self.done, self.error) = (true, error),
        }
    }

    fn has_news(&self, final_only: bool) -> bool {
        let visible = |update: &Update| update.finish.is_some() || !final_only;
        self.done || self.logits.is_some() || self.updates.iter().flatten().any(visible)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under these locks can leave them half changed, so a poisoned lock is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outbox {
    pub fn new(kind: &RequestKind, final_only: bool, waker: Option<Waker>) -> Self {
        let mut state = State::default();
        if let RequestKind::Generate(params) = kind {
            let completions = params.n as usize;
            (state.updates, state.ended) = (vec![None; completions], vec![false; completions]);
            state.logprobs = params.logprobs.is_some();
            state.prompt_logprobs = params.prompt_logprobs.map(|_| Vec::new());
        }
        Self { state: Mutex::new(state), changed: Condvar::new(), waker, final_only }
    }

    /// Files what a step did to the request, all of it before anyone looks.
    pub fn put(&self, events: impl Iterator<Item = Event>) {
        let mut state = lock(&self.state);
        for event in events {
            state.metrics = event.metrics;
            state.file(event.kind);
        }
        self.signal(state);
    }

    /// Ends a request that the engine can no longer serve, unless it has ended already.
    pub fn abandon(&self, reason: FinishReason, message: &str) {
        let mut state = lock(&self.state);
        if state.done {
            return;
        }
        for index in 0..state.updates.len() {
            if !std::mem::replace(&mut state.ended[index], true) {
                state.update(index as u32).finish = Some(Finish::because(reason));
            }
        }
        (state.done, state.error) = (true, Some(message.to_owned()));
        self.signal(state);
    }

    fn signal(&self, mut state: MutexGuard<'_, State>) {
        if !state.has_news(self.final_only) {
            return;
        }
        let told = std::mem::replace(&mut state.signalled, true);
        // A finished request is told again: the consumer may have taken its last update before the end was known.
        let wake = !told || state.done;
        drop(state);
        self.changed.notify_all();
        if let Some(waker) = self.waker.as_ref().filter(|_| wake) {
            waker();
        }
    }
}

/// A submitted request. Dropping the handle cancels the request.
pub struct RequestHandle {
    id: RequestId,
    prompt: Prompt,
    outbox: Arc<Outbox>,
    mailbox: Weak<Mailbox>,
}

impl RequestHandle {
    pub(crate) fn new(id: RequestId, prompt: Prompt, outbox: Arc<Outbox>, mailbox: Weak<Mailbox>) -> Self {
        Self { id, prompt, outbox, mailbox }
    }

    /// The request's number.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The prompt's tokens.
    #[must_use]
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// Takes what is there: at most one update per completion, in order.
    #[must_use]
    pub fn poll(&self) -> Vec<Update> {
        let mut state = lock(&self.outbox.state);
        state.signalled = false;
        let final_only = self.outbox.final_only;
        let slots = state.updates.iter_mut();
        slots.filter_map(|slot| slot.take_if(|update| update.finish.is_some() || !final_only)).collect()
    }

    /// Takes the chunk of logits that is there, (rows, vocabulary), and lets the request go on.
    #[must_use]
    pub fn take_logits(&self) -> Option<Vec<f32>> {
        let mut state = lock(&self.outbox.state);
        state.signalled = false;
        let rows = state.logits.take()?;
        drop(state);
        if let Some(mailbox) = self.mailbox.upgrade() {
            mailbox.resume(self.id);
        }
        Some(rows)
    }

    /// Waits for news or the end; false when `timeout` passed first.
    #[must_use]
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = lock(&self.outbox.state);
        while !state.has_news(self.outbox.final_only) {
            let changed = &self.outbox.changed;
            state = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return false,
                Some(left) => changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        true
    }

    /// Whether the request has ended and everything was taken.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let state = lock(&self.outbox.state);
        state.done && state.logits.is_none() && state.updates.iter().all(Option::is_none)
    }

    /// Why the request failed, if it did.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        lock(&self.outbox.state).error.clone()
    }

    /// Its figures so far.
    #[must_use]
    pub fn metrics(&self) -> RequestMetrics {
        lock(&self.outbox.state).metrics
    }

    /// Log-probabilities of the prompt's tokens from the second on, if asked for and once all are there.
    #[must_use]
    pub fn prompt_logprobs(&self) -> Option<Vec<Vec<TokenLogprob>>> {
        let state = lock(&self.outbox.state);
        state.prompt_logprobs.as_ref().filter(|rows| rows.len() + 1 == self.prompt.len()).cloned()
    }

    /// Ends the request with [`FinishReason::Abort`]; harmless when it has ended.
    pub fn cancel(&self) {
        if lock(&self.outbox.state).done {
            return;
        }
        if let Some(mailbox) = self.mailbox.upgrade() {
            mailbox.cancel(self.id);
        }
    }
}

impl Drop for RequestHandle {
    fn drop(&mut self) {
        self.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;

    fn rows(prompt: &[u32], asked: Option<u32>) -> Option<usize> {
        let params = SamplingParams { prompt_logprobs: asked, ..SamplingParams::default() };
        let outbox = Outbox::new(&RequestKind::Generate(Box::new(params)), false, None);
        let handle = RequestHandle::new(1, prompt.into(), Arc::new(outbox), Weak::new());
        handle.prompt_logprobs().map(|rows| rows.len())
    }

    #[test]
    fn a_prompt_of_one_token_has_prompt_logprobs_only_when_asked() {
        assert_eq!(rows(&[7], None), None);
        assert_eq!(rows(&[7], Some(0)), Some(0));
        assert_eq!(rows(&[7, 8], Some(0)), None, "not all are there yet");
    }
}
