//! The state machine: requests in, batches out, logits in, events out. Deterministic: the same calls give the same answers.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::ahead::Flight;
use crate::cache::PageCache;
use crate::config::EngineConfig;
use crate::costs::Costs;
use crate::draft_round::DraftRound;
use crate::draw::Changes;
use crate::draw_rows::{DrawnRows, Samplers};
use crate::error::{EngineError, refuse};
use crate::event::{Event, EventKind, Finish, FinishReason};
use crate::journal::{CacheEvent, TraceEvent, TraceKind};
use crate::metrics::{EngineMetrics, RequestMetrics};
use crate::pages::PagePool;
use crate::planted::{Bug, planted};
use crate::prefix::Domain;
use crate::queue::{Fairness, User, WaitingQueue};
use crate::random::stream_seed;
use crate::request::{Request, RequestId, RequestKind, Submission};
use crate::sampler::{Sampler, TokenHistory};
use crate::sequence::{Rank, Sequence, SequenceId, Tokens};
use crate::tables::PageTables;
use crate::tier::{Fetch, Tier};

/// The engine without a thread, a device or a clock.
pub struct Core {
    pub(crate) config: EngineConfig,
    pub(crate) cache: PageCache,
    pub(crate) requests: BTreeMap<RequestId, Request>,
    pub(crate) sequences: BTreeMap<SequenceId, Sequence>,
    /// Sequences that may hold pages.
    pub(crate) running: BTreeSet<Rank>,
    /// Sequences without pages.
    pub(crate) waiting: WaitingQueue,
    pub(crate) fairness: Fairness,
    /// Steps that were handed out, the oldest first; the second one was planned ahead.
    pub(crate) in_flight: VecDeque<Flight>,
    /// When the last step came back.
    pub(crate) step_ended: Duration,
    /// What the device takes while it computes, in watts.
    pub(crate) watts: Option<f64>,
    /// Steps planned ahead since the last that was not.
    pub(crate) steps_ahead: usize,
    /// The last plan admitted what it could, and since then nothing came or went.
    pub(crate) admitted_all: bool,
    pub(crate) draft_round: Option<DraftRound>,
    /// Cancelled while a step that touches their pages was in flight.
    pub(crate) cancelled: Vec<(RequestId, FinishReason)>,
    pub(crate) deadlines: BTreeSet<(Duration, RequestId)>,
    /// Fetches to hand to the tier, and who waits for those that were.
    pub(crate) fetches: Vec<Fetch>,
    pub(crate) tickets: HashMap<u64, SequenceId>,
    pub(crate) next_ticket: u64,
    pub(crate) costs: Costs,
    pub(crate) sampler: Sampler,
    pub(crate) samplers: Samplers,
    /// Of the step in flight, from [`Core::draw_rows`].
    pub(crate) drawn: DrawnRows,
    pub(crate) events: Vec<Event>,
    pub(crate) trace: Vec<TraceEvent>,
    pub(crate) counters: EngineMetrics,
    /// Requests that were never part of a step.
    pub(crate) unscheduled: usize,
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
            cache: PageCache::new(&config),
            config,
            requests: BTreeMap::new(),
            sequences: BTreeMap::new(),
            running: BTreeSet::new(),
            waiting: WaitingQueue::default(),
            fairness: Fairness::default(),
            in_flight: VecDeque::new(),
            step_ended: Duration::ZERO,
            watts: None,
            steps_ahead: 0,
            admitted_all: false,
            draft_round: None,
            cancelled: Vec::new(),
            deadlines: BTreeSet::new(),
            fetches: Vec::new(),
            tickets: HashMap::new(),
            next_ticket: 0,
            costs: Costs::default(),
            sampler: Sampler::default(),
            samplers: Samplers::default(),
            drawn: DrawnRows::default(),
            events: Vec::new(),
            trace: Vec::new(),
            counters: EngineMetrics::default(),
            unscheduled: 0,
            last_id: None,
        })
    }

    /// The sizes it was made with.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Where pages go that fall out of memory. Call before the first request.
    pub fn set_tier(&mut self, tier: Arc<dyn Tier>) {
        self.cache.set_tier(tier);
    }

    /// What the device takes while it computes, in watts, for the steps committed from now on.
    pub fn set_watts(&mut self, watts: Option<f64>) {
        self.watts = watts.filter(|watts| watts.is_finite() && *watts >= 0.0);
    }

    /// Queues a request.
    ///
    /// # Errors
    /// When it could never be served (see [`Submission::validate`]), or as many requests wait as may.
    pub fn submit(&mut self, submission: Submission, now: Duration) -> Result<(), EngineError> {
        submission.validate(&self.config)?;
        let id = submission.id;
        if self.last_id.is_some_and(|last| id <= last) {
            return refuse(format!("request number {id} is not higher than all before"));
        }
        self.config.check_room(self.unscheduled)?;
        self.last_id = Some(id);
        let prompt_tokens = submission.prompt.len() as u64;
        let metrics = RequestMetrics { arrival: now, prompt_tokens, ..RequestMetrics::default() };
        self.counters.requests_submitted += 1;
        self.counters.prompt_tokens += prompt_tokens;
        self.fairness.arrive(&submission.options.user);
        self.deadlines.extend(submission.options.deadline.map(|deadline| (deadline, id)));
        self.unscheduled += 1;
        self.requests.insert(id, Request::new(submission, &self.config, metrics));
        self.trace(id, TraceKind::Queued, now);
        self.spawn(SequenceId { request: id, index: 0 }, now);
        Ok(())
    }

    /// Ends a request with [`FinishReason::Abort`]; at once, or when the step in flight that reads its pages is over.
    /// Unknown and ended requests are ignored.
    pub fn cancel(&mut self, id: RequestId, now: Duration) {
        self.stop(id, FinishReason::Abort, now);
    }

    fn stop(&mut self, id: RequestId, reason: FinishReason, now: Duration) {
        if !self.in_flight.is_empty() {
            self.cancelled.extend((!planted(Bug::CancelDuringStepIsLost)).then_some((id, reason)));
        } else {
            self.end_request(id, reason, None, now);
        }
    }

    /// Ends requests whose deadline has passed; part of every [`Core::next_batch`], and for times when there is no batch.
    pub fn expire(&mut self, now: Duration) {
        while let Some(&(deadline, id)) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now) {
            self.deadlines.remove(&(deadline, id));
            if !planted(Bug::DeadlineIsForgotten) {
                self.stop(id, FinishReason::Timeout, now);
            }
        }
    }

    /// When the next deadline passes.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
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

    /// What became findable in the prefix cache and what is not any more, since the last call; if `cache_events` is on.
    pub fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        self.cache.take_journal()
    }

    /// Moments of requests' lives since the last call; if `trace` is on.
    pub fn take_trace(&mut self) -> Vec<TraceEvent> {
        std::mem::take(&mut self.trace)
    }

    pub(crate) fn trace(&mut self, request: RequestId, kind: TraceKind, at: Duration) {
        if self.config.trace {
            self.trace.push(TraceEvent { request, at, kind });
        }
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

    /// Requests that were never part of a step: what [`EngineConfig::max_waiting`] bounds.
    #[must_use]
    pub fn unscheduled_requests(&self) -> usize {
        self.unscheduled
    }

    /// Whether some request could be part of the next step.
    #[must_use]
    pub fn has_runnable(&self) -> bool {
        self.sequences.values().any(Sequence::is_ready)
    }

    /// Counters and gauges.
    #[must_use]
    pub fn metrics(&self) -> EngineMetrics {
        let local = |count: fn(&PagePool) -> usize| {
            self.cache.local.as_ref().map_or(0, |local| count(&local.pool) as u64)
        };
        EngineMetrics {
            running: self.running.len() as u64,
            waiting: self.waiting.len() as u64,
            pages_total: self.cache.pool.total() as u64,
            pages_free: self.cache.pool.free() as u64,
            pages_evictable: self.cache.pool.evictable() as u64,
            local_pages_total: local(PagePool::total),
            local_pages_free: local(PagePool::free),
            local_pages_evictable: local(PagePool::evictable),
            ..self.counters.clone()
        }
    }

    pub(crate) fn user(&self, id: RequestId) -> User {
        self.requests[&id].options.user.clone()
    }

    /// Makes a request's completion and lets it wait for pages.
    pub(crate) fn spawn(&mut self, id: SequenceId, now: Duration) {
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
        let history = TokenHistory { prompt, output: Default::default() };
        let domain = Domain {
            long_context: self.config.context_switch.is_some_and(|switch| request.prompt.len() > switch),
            private_to: (!self.config.enable_prefix_caching).then_some(id.request),
            salt: request.options.cache_salt.clone(),
        };
        let sequence = Sequence {
            id,
            priority: request.options.priority,
            preemptions: 0,
            tokens: Tokens { prompt: Arc::clone(&request.prompt), output: Vec::new() },
            computed: 0,
            tables: PageTables::default(),
            sealed: 0,
            tail: self.cache.root(&domain),
            domain,
            copy_from: None,
            restoring: None,
            drafts: Vec::new(),
            branches: Vec::new(),
            delivered: 0,
            blocked: false,
            changes: self.config.device_draws.then(|| Changes::new(request, &history, 0)).flatten(),
            history,
            seed,
            text: request.text.as_ref().map(|make| make()),
            first_token: None,
            last_token: Duration::ZERO,
        };
        self.admitted_all = false;
        self.waiting.insert(&sequence, request.options.user.clone(), now);
        self.sequences.insert(id, sequence);
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
            let id = SequenceId { request: id, index };
            let text = if reason == FinishReason::Timeout { self.held_text(id) } else { String::new() };
            self.drop_sequence(id, now);
            if generates {
                let finish = Finish::because(reason);
                self.emit(id.request, EventKind::Finished { index, text, finish });
            }
        }
        self.close_request(id, reason, error, now);
    }

    /// Gives back everything a completion holds.
    fn drop_sequence(&mut self, id: SequenceId, now: Duration) {
        self.admitted_all = false;
        if self.sequences.contains_key(&id) && !planted(Bug::EndedSequenceKeepsPages) {
            self.give_up_pages(id);
        }
        let request = self.requests.get_mut(&id.request).expect("a completion ends before its request");
        request.ended[id.index as usize] = true;
        request.metrics.finished = Some(now);
        if let Some(sequence) = self.sequences.remove(&id) {
            self.running.remove(&sequence.rank());
            if !planted(Bug::EndedSequenceStaysQueued) {
                self.waiting.remove(&sequence, &request.options.user);
            }
            if let Some(first) = sequence.first_token {
                request.metrics.generating += sequence.last_token.saturating_sub(first);
                request.metrics.intervals += sequence.tokens.output.len() as u64 - 1;
            }
        }
    }

    fn close_request(&mut self, id: RequestId, reason: FinishReason, error: Option<String>, now: Duration) {
        let request = self.requests.get_mut(&id).expect("a request is closed once");
        request.metrics.finished = Some(now);
        let metrics = request.metrics;
        self.emit(id, EventKind::Done { error });
        self.trace(id, TraceKind::Ended { reason }, now);
        let request = self.requests.remove(&id).expect("it was there");
        self.fairness.leave(&request.options.user);
        if let Some(deadline) = request.options.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        self.unscheduled -= usize::from(metrics.first_scheduled.is_none());
        self.counters.ended(reason, &metrics);
    }

    pub(crate) fn emit(&mut self, id: RequestId, kind: EventKind) {
        let metrics = self.requests[&id].metrics;
        self.events.push(Event { request: id, metrics, kind });
    }
}
