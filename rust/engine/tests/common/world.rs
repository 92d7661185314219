//! A core with a fake device, tier and clock, and everything that its consumers see.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use infer_engine::{
    Batch, CacheEvent, Choice, Core, Device, Digest, EngineConfig, Event, EventKind, FinishReason, Offer,
    RequestId, Save, Tier, TierPage,
};

use super::tier::FakeTier;
use super::{FakeDevice, mix};

/// All that a request's consumer sees, with pieces joined.
#[derive(Default, Debug, PartialEq, Clone)]
pub struct Seen {
    pub tokens: BTreeMap<u32, Vec<u32>>,
    pub text: BTreeMap<u32, String>,
    pub logprobs: BTreeMap<u32, String>,
    pub prompt_logprobs: String,
    /// Bits, since NaN equals nothing.
    pub logits: Vec<u32>,
    pub ends: BTreeMap<u32, (FinishReason, String)>,
    pub done: Option<Option<String>>,
}

impl Seen {
    pub fn add(&mut self, event: &Event) {
        assert!(self.done.is_none(), "nothing comes after the terminal event");
        match &event.kind {
            EventKind::Token { index, token, text, logprobs } => {
                assert!(!self.ends.contains_key(index), "no token after the end");
                self.tokens.entry(*index).or_default().push(*token);
                self.text.entry(*index).or_default().push_str(text);
                self.logprobs.entry(*index).or_default().push_str(&format!("{logprobs:?}"));
            }
            EventKind::Finished { index, text, finish } => {
                self.text.entry(*index).or_default().push_str(text);
                let end = (finish.reason, format!("{:?}", finish.stop));
                assert!(self.ends.insert(*index, end).is_none(), "a completion ends once");
            }
            EventKind::PromptLogprobs(rows) => {
                rows.iter().for_each(|row| self.prompt_logprobs += &format!("{row:?}"))
            }
            EventKind::Logits(rows) => self.logits.extend(rows.iter().map(|logit| logit.to_bits())),
            EventKind::Done { error } => self.done = Some(error.clone()),
        }
    }

    pub fn ended_by(&self, reason: FinishReason) -> bool {
        self.ends.values().any(|end| end.0 == reason)
    }
}

/// Logits, and what was drawn.
type Rows = (Vec<f32>, Vec<Choice>);

thread_local! {
    static STEPS: Cell<u64> = const { Cell::new(0) };
}

/// Steps of all cores that this thread drove, panics included.
pub fn steps_so_far() -> u64 {
    STEPS.get()
}

/// A core, its device and tier, and everything that was seen.
pub struct World {
    pub core: Core,
    pub device: FakeDevice,
    pub tier: Option<FakeTier>,
    pub seen: BTreeMap<RequestId, Seen>,
    pub log: Vec<Event>,
    pub now: Duration,
    pub steps: usize,
    /// Digests that can be found, by the journal.
    pub findable: HashSet<Digest>,
    /// What every digest ever stood for: its parent and its tokens.
    named: HashMap<Digest, (Digest, Vec<u32>)>,
    /// Requests whose consumers have a chunk of logits and did not ask for more.
    unread: HashSet<RequestId>,
    /// When the last step was put together.
    pub began: Duration,
    /// Steps are begun while one is in flight, where that can be planned; the device draws.
    pub ahead: bool,
    /// Outcomes of steps in flight, oldest first: logits and choices.
    outcomes: VecDeque<Result<Rows, String>>,
    pub steps_ahead: usize,
}

impl World {
    pub fn new(config: &EngineConfig, tier: Option<FakeTier>) -> Self {
        let mut core = Core::new(config.clone()).expect("a valid configuration");
        if let Some(tier) = &tier {
            core.set_tier(Arc::new(tier.clone()));
        }
        let device = FakeDevice::new(config);
        Self {
            core,
            device,
            tier,
            seen: BTreeMap::new(),
            log: Vec::new(),
            now: Duration::ZERO,
            steps: 0,
            findable: HashSet::new(),
            named: HashMap::new(),
            unread: HashSet::new(),
            began: Duration::ZERO,
            ahead: false,
            outcomes: VecDeque::new(),
            steps_ahead: 0,
        }
    }

    pub fn collect(&mut self) -> Vec<RequestId> {
        let mut resumable = Vec::new();
        for event in self.core.take_events() {
            self.seen.entry(event.request).or_default().add(&event);
            if matches!(event.kind, EventKind::Logits(_)) {
                assert!(self.unread.insert(event.request), "no chunk before the last one was taken");
                resumable.push(event.request);
            }
            self.log.push(event);
        }
        for event in self.core.take_cache_events() {
            match event {
                CacheEvent::Stored { digest, parent, tokens } => {
                    assert!(self.findable.insert(digest), "stored once");
                    let contents = (parent, tokens.to_vec());
                    let known = self.named.entry(digest).or_insert_with(|| contents.clone());
                    assert_eq!(*known, contents, "a digest stands for one content");
                }
                CacheEvent::Removed { digest } => {
                    assert!(self.findable.remove(&digest), "removed what was stored")
                }
            }
        }
        resumable
    }

    /// A consumer took its chunk.
    pub fn resume(&mut self, id: RequestId) {
        self.unread.remove(&id);
        self.core.resume(id);
    }

    /// One step, with a cancellation while it is in flight.
    pub fn step(&mut self, cancel_in_flight: Option<RequestId>) -> bool {
        STEPS.set(STEPS.get() + 1);
        self.now += Duration::from_millis(3);
        self.began = self.now;
        if self.core.steps_in_flight() == 0 && !self.begin() {
            return false;
        }
        let early = self.steps.is_multiple_of(2);
        if let Some(id) = cancel_in_flight.filter(|_| early) {
            self.core.cancel(id, self.now);
        }
        self.begin_ahead();
        if let Some(id) = cancel_in_flight.filter(|_| !early) {
            self.core.cancel(id, self.now);
        }
        self.finish();
        true
    }

    /// Plans a step with everything known, and begins it.
    fn begin(&mut self) -> bool {
        self.make_drafts();
        let batch = self.core.next_batch(self.now);
        let saves = self.core.take_saves(usize::from(batch.is_some()));
        self.save(saves);
        for fetch in self.core.take_fetches() {
            self.tier.as_ref().expect("only a tier is asked").fetch(fetch.ticket, fetch.wanted);
        }
        batch.is_some_and(|batch| self.compute(&batch))
    }

    /// Begins the step after the one in flight, most of the times that it can be planned.
    fn begin_ahead(&mut self) {
        if !self.ahead || mix(self.steps as u64, 3).is_multiple_of(9) {
            return self.core.expire(self.now);
        }
        if let Some(batch) = self.core.next_ahead(self.now) {
            self.steps_ahead += 1;
            let saves = self.core.take_saves(1);
            self.save(saves);
            self.compute(&batch);
        }
    }

    /// What a device does is done in order, so it may be done at once.
    fn compute(&mut self, batch: &Batch) -> bool {
        let mut logits = Vec::new();
        self.device.draws = self.ahead;
        let outcome = self.device.compute(batch, &mut logits);
        self.outcomes.push_back(outcome.map(|()| (logits, self.device.take_choices())));
        self.now += Duration::from_micros(150 * batch.tokens.len() as u64);
        true
    }

    fn finish(&mut self) {
        match self.outcomes.pop_front().expect("a step in flight has an outcome") {
            Ok((logits, choices)) => {
                if choices.is_empty() && self.steps % 2 == 1 {
                    // In another order than they are committed in.
                    self.core.draw_rows(&logits, &|tasks, task| (0..tasks).rev().for_each(task));
                }
                self.core.commit_choices(&logits, choices, self.now);
            }
            Err(message) => self.core.fail(&message, self.now),
        }
        self.steps += 1;
    }

    /// Waits until nothing is in flight.
    pub fn finish_all(&mut self) {
        while self.core.steps_in_flight() > 0 {
            self.finish();
        }
    }

    pub fn make_drafts(&mut self) {
        let mut logits = Vec::new();
        self.device.draws = self.ahead;
        while let Some(batch) = self.core.next_draft() {
            let saves = self.core.take_saves(0);
            self.save(saves);
            // Now and then the draft model fails.
            match mix(self.steps as u64, batch.tokens.len() as u64).is_multiple_of(29) {
                true => self.core.drop_drafts(),
                false => {
                    self.device.draft(&batch, &mut logits).expect("the fake draft model succeeds");
                    let choices = self.device.take_choices();
                    self.core.commit_draft(&logits, &choices);
                }
            }
        }
    }

    pub fn save(&mut self, saves: Vec<Save>) {
        for save in saves {
            let mut payload = Vec::new();
            self.device.export_page(save.page, &mut payload).expect("the fake device reads out");
            let tier = self.tier.as_ref().expect("only a tier is given pages");
            if tier.put(TierPage { name: save.name.clone(), payload }) != Offer::Taken {
                self.core.offer_again(&save);
            }
        }
    }

    /// The tier answers one fetch, if there is one.
    pub fn restore(&mut self) -> bool {
        let Some(fetched) = self.tier.as_ref().and_then(FakeTier::answer_one) else { return false };
        let Some(places) = self.core.restore_pages(fetched.ticket) else { return true };
        let pages = places.iter().zip(fetched.pages.iter().map_while(Option::as_ref));
        let filled = pages.take_while(|(page, bytes)| self.device.import_page(**page, bytes).is_ok()).count();
        self.core.restored(fetched.ticket, filled, self.now);
        true
    }
}
