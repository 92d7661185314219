//! The state machine: requests in, batches out, logits in, events out. Deterministic: the same calls give the same answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::cache::PageCache;
use crate::config::EngineConfig;
use crate::error::{EngineError, refuse};
use crate::event::{Event, EventKind, Finish, FinishReason};
use crate::metrics::{EngineMetrics, RequestMetrics};
use crate::prefix::Domain;
use crate::random::stream_seed;
use crate::request::{Request, RequestId, RequestKind, Submission};
use crate::sampler::{Sampler, TokenHistory};
use crate::sequence::{Sequence, SequenceId, Tokens};

/// One step's work.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// The rows' tokens: (rows).
    pub tokens: Vec<u32>,
    /// The rows' sequences, one after the other.
    pub sequences: Vec<BatchSequence>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSequence {
    /// Its first row in the batch.
    pub first_row: usize,
    /// How many rows.
    pub rows: usize,
    /// Position of its first row in the sequence.
    pub first_position: usize,
    /// Its page table, enough for all its positions.
    pub pages: Vec<u32>,
    /// Use the long-context variant of the position encoding.
    pub long_context: bool,
}

/// What a sequence contributes to the step in flight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scheduled {
    pub id: SequenceId,
    pub rows: usize,
    /// Prompt rows whose logits come back, ahead of the sampled one.
    pub prompt_rows: usize,
    /// Whether the last row's logits choose a token.
    pub samples: bool,
}

/// The engine without a thread, a device or a clock.
pub struct Core {
    pub(crate) config: EngineConfig,
    pub(crate) cache: PageCache,
    pub(crate) requests: BTreeMap<RequestId, Request>,
    pub(crate) sequences: BTreeMap<SequenceId, Sequence>,
    /// Sequences that may hold pages, in order of arrival.
    pub(crate) running: BTreeSet<SequenceId>,
    /// Sequences without pages, in order of arrival.
    pub(crate) waiting: BTreeSet<SequenceId>,
    pub(crate) in_flight: Option<Vec<Scheduled>>,
    /// Cancelled while a step that touches their pages was in flight.
    pub(crate) cancelled: Vec<RequestId>,
    pub(crate) sampler: Sampler,
    pub(crate) events: Vec<Event>,
    pub(crate) counters: EngineMetrics,
    last_id: Option<RequestId>,
}

impl Core {
    /// An idle engine.
    ///
    /// # Errors
    /// When the sizes do not fit together; see [`EngineConfig::validate`].
    pub fn new(config: EngineConfig) -> Result<Self, EngineError> {
        config.validate()?;
        Ok(Self {
            cache: PageCache::new(config.pages, config.page_tokens),
            config,
            requests: BTreeMap::new(),
            sequences: BTreeMap::new(),
            running: BTreeSet::new(),
            waiting: BTreeSet::new(),
            in_flight: None,
            cancelled: Vec::new(),
            sampler: Sampler::default(),
            events: Vec::new(),
            counters: EngineMetrics::default(),
            last_id: None,
        })
    }

    /// The sizes it was made with.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Queues a request.
    ///
    /// # Errors
    /// When it could never be served; see [`Submission::validate`].
    pub fn submit(&mut self, submission: Submission, now: Duration) -> Result<(), EngineError> {
        submission.validate(&self.config)?;
        let id = submission.id;
        if self.last_id.is_some_and(|last| id <= last) {
            return refuse(format!("request number {id} is not higher than all before"));
        }
        self.last_id = Some(id);
        let prompt_tokens = submission.prompt.len() as u64;
        let metrics = RequestMetrics { arrival: now, prompt_tokens, ..RequestMetrics::default() };
        self.counters.requests_submitted += 1;
        self.counters.prompt_tokens += prompt_tokens;
        self.requests.insert(id, Request::new(submission, &self.config, metrics));
        self.spawn(SequenceId { request: id, index: 0 });
        Ok(())
    }

    /// Ends a request with [`FinishReason::Abort`]; at once, or when the step in flight that reads its pages is over.
    /// Unknown and ended requests are ignored.
    pub fn cancel(&mut self, id: RequestId, now: Duration) {
        if self.in_flight.is_some() {
            self.cancelled.push(id);
        } else {
            self.end_request(id, FinishReason::Abort, None, now);
        }
    }

    /// The consumer of a [`RequestKind::Logits`] request has taken the last chunk.
    pub fn resume(&mut self, id: RequestId) {
        if let Some(sequence) = self.sequences.get_mut(&SequenceId { request: id, index: 0 }) {
            sequence.blocked = false;
        }
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Whether no request lives.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }

    /// Requests that have not ended.
    pub fn live_requests(&self) -> impl Iterator<Item = RequestId> + '_ {
        self.requests.keys().copied()
    }

    /// Whether some request could be part of the next step.
    #[must_use]
    pub fn has_runnable(&self) -> bool {
        self.sequences.values().any(|sequence| !sequence.blocked)
    }

    /// Counters and gauges.
    #[must_use]
    pub fn metrics(&self) -> EngineMetrics {
        EngineMetrics {
            running: self.running.len() as u64,
            waiting: self.waiting.len() as u64,
            pages_total: self.cache.pool.total() as u64,
            pages_free: self.cache.pool.free() as u64,
            pages_evictable: self.cache.pool.evictable() as u64,
            ..self.counters
        }
    }

    /// Makes a request's completion and lets it wait for pages.
    pub(crate) fn spawn(&mut self, id: SequenceId) {
        let request = &self.requests[&id.request];
        let engine_seed = self.config.seed;
        let seed = match &request.kind {
            RequestKind::Generate(params) => {
                params.seed.unwrap_or_else(|| stream_seed(engine_seed, id.request))
            }
            RequestKind::Logits => 0,
        };
        // Completion 0 draws from the request's own stream, so n = 1 and the first of n agree.
        let seed = if id.index == 0 { seed } else { stream_seed(seed, u64::from(id.index)) };
        let repetition = request.params().is_some_and(|params| params.repetition_penalty != 1.0);
        let prompt = if repetition { request.prompt.iter().copied().collect() } else { Default::default() };
        let sequence = Sequence {
            id,
            tokens: Tokens { prompt: Arc::clone(&request.prompt), output: Vec::new() },
            computed: 0,
            pages: Vec::new(),
            sealed: 0,
            domain: Domain {
                long_context: self.config.context_switch.is_some_and(|switch| request.prompt.len() > switch),
                private_to: (!self.config.enable_prefix_caching).then_some(id.request),
            },
            delivered: 0,
            blocked: false,
            history: TokenHistory { prompt, output: Default::default() },
            seed,
            text: request.text.as_ref().map(|make| make()),
            first_token: None,
            last_token: Duration::ZERO,
        };
        self.sequences.insert(id, sequence);
        self.waiting.insert(id);
    }

    /// Ends one completion, and its request with the last one.
    pub(crate) fn end_sequence(&mut self, id: SequenceId, text: String, finish: Finish, now: Duration) {
        self.drop_sequence(id, now);
        let reason = finish.reason;
        self.emit(id.request, EventKind::Finished { index: id.index, text, finish });
        if self.requests[&id.request].ended.iter().all(|&ended| ended) {
            self.close_request(id.request, reason, None, now);
        }
    }

    /// Ends all completions of a request that have not ended, and the request.
    pub(crate) fn end_request(
        &mut self,
        id: RequestId,
        reason: FinishReason,
        error: Option<String>,
        now: Duration,
    ) {
        let Some(request) = self.requests.get(&id) else { return };
        let generates = request.params().is_some();
        let open: Vec<u32> =
            (0..).zip(&request.ended).filter(|&(_, &ended)| !ended).map(|(index, _)| index).collect();
        for index in open {
            self.drop_sequence(SequenceId { request: id, index }, now);
            if generates {
                let finish = Finish::because(reason);
                self.emit(id, EventKind::Finished { index, text: String::new(), finish });
            }
        }
        self.close_request(id, reason, error, now);
    }

    /// Gives back everything a completion holds.
    fn drop_sequence(&mut self, id: SequenceId, now: Duration) {
        debug_assert!(self.in_flight.is_none(), "a step in flight keeps its pages");
        let request = self.requests.get_mut(&id.request).expect("a completion ends before its request");
        request.ended[id.index as usize] = true;
        request.metrics.finished = Some(now);
        self.running.remove(&id);
        self.waiting.remove(&id);
        if let Some(mut sequence) = self.sequences.remove(&id) {
            if let Some(first) = sequence.first_token {
                request.metrics.generating += sequence.last_token.saturating_sub(first);
                request.metrics.intervals += sequence.tokens.output.len() as u64 - 1;
            }
            self.cache.release_all(&mut sequence.pages);
        }
    }

    fn close_request(&mut self, id: RequestId, reason: FinishReason, error: Option<String>, now: Duration) {
        self.requests.get_mut(&id).expect("a request is closed once").metrics.finished = Some(now);
        self.emit(id, EventKind::Done { error });
        self.requests.remove(&id);
        match reason {
            FinishReason::Stop | FinishReason::Length => self.counters.requests_finished += 1,
            FinishReason::Abort => self.counters.requests_aborted += 1,
            FinishReason::Error => self.counters.requests_failed += 1,
        }
    }

    pub(crate) fn emit(&mut self, id: RequestId, kind: EventKind) {
        let metrics = self.requests[&id].metrics;
        self.events.push(Event { request: id, metrics, kind });
    }
}
