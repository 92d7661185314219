//! The production core against a fake device and clock, from a seed: random requests, arrivals, cancellations, failures, pools from
//! one page up. The core's own invariants run at every step (debug builds); here the outside is checked: every request gets exactly
//! the tokens it gets alone, one terminal event, nothing after it, everything given back, and the same seed gives the same log.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use common::{FakeDevice, TagText, VOCABULARY, expected_logits, mix};
use infer_engine::{
    Core, EngineConfig, Event, EventKind, FinishReason, Prompt, RequestId, RequestKind, SamplingParams,
    Submission, TextFactory,
};

/// Random numbers of a simulation.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = mix(self.0, 1);
        (self.0 % sides as u64) as usize
    }

    fn chance(&mut self, one_in: usize) -> bool {
        self.roll(one_in) == 0
    }
}

fn random_config(dice: &mut Dice) -> EngineConfig {
    let page_tokens = [1, 2, 4, 16][dice.roll(4)];
    let mut config = common::config(1 + dice.roll(24), page_tokens);
    config.max_model_len = 1 + dice.roll(config.pages * page_tokens);
    config.max_num_seqs = 1 + dice.roll(6);
    config.max_num_batched_tokens = config.max_num_seqs + dice.roll(24);
    config.enable_prefix_caching = !dice.chance(4);
    config.context_switch = dice.chance(3).then(|| 1 + dice.roll(config.max_model_len));
    config.max_logit_values = VOCABULARY * (1 + dice.roll(8));
    config.seed = dice.roll(100) as u64;
    config
}

fn random_params(dice: &mut Dice) -> SamplingParams {
    let mut params =
        SamplingParams { n: 1 + dice.roll(3) as u32 * dice.roll(2) as u32, ..SamplingParams::default() };
    params.temperature = [0.0, 0.7, 1.3][dice.roll(3)];
    params.top_k = [0, 5][dice.roll(2)];
    params.top_p = [1.0, 0.9][dice.roll(2)];
    params.min_p = [0.0, 0.05][dice.roll(2)];
    params.repetition_penalty = [1.0, 1.2][dice.roll(2)];
    params.frequency_penalty = [0.0, 0.5][dice.roll(2)];
    params.seed = dice.chance(2).then(|| dice.roll(1000) as u64);
    params.max_tokens = if dice.chance(4) { None } else { Some(1 + dice.roll(20)) };
    params.min_tokens = params.max_tokens.map_or(0, |max| dice.roll(max.min(4)));
    params.ignore_eos = dice.chance(3);
    params.stop_token_ids = if dice.chance(3) { vec![7] } else { vec![] };
    params.stop = if dice.chance(3) { vec!["<9>".to_owned()] } else { vec![] };
    params.logprobs = dice.chance(3).then(|| dice.roll(4) as u32);
    params.prompt_logprobs = dice.chance(5).then(|| dice.roll(3) as u32);
    params
}

#[derive(Clone)]
struct Planned {
    prompt: Prompt,
    kind: RequestKind,
}

/// Prompts begin alike now and then, so that prefixes are shared.
fn random_request(dice: &mut Dice, config: &EngineConfig, stems: &[Vec<u32>]) -> Planned {
    let stem = &stems[dice.roll(stems.len())];
    let mut prompt = stem[..dice.roll(stem.len() + 1)].to_vec();
    prompt.extend((0..=dice.roll(6)).map(|_| dice.roll(VOCABULARY) as u32));
    prompt.truncate(config.max_model_len.saturating_sub(1).max(1));
    let kind = if dice.chance(6) {
        RequestKind::Logits
    } else {
        RequestKind::Generate(Box::new(random_params(dice)))
    };
    Planned { prompt: prompt.into(), kind }
}

fn submission(id: RequestId, planned: &Planned) -> Submission {
    let stop = match &planned.kind {
        RequestKind::Generate(params) => params.stop.first().cloned(),
        RequestKind::Logits => None,
    };
    let text: TextFactory = Box::new(move || Box::new(TagText { stop: stop.clone(), held: String::new() }));
    Submission { id, prompt: planned.prompt.clone(), kind: planned.kind.clone(), text: Some(text) }
}

/// All that a request's consumer sees, with pieces joined.
#[derive(Default, Debug, PartialEq, Clone)]
struct Seen {
    tokens: BTreeMap<u32, Vec<u32>>,
    text: BTreeMap<u32, String>,
    logprobs: BTreeMap<u32, String>,
    prompt_logprobs: String,
    /// Bits, since NaN equals nothing.
    logits: Vec<u32>,
    ends: BTreeMap<u32, (FinishReason, String)>,
    done: Option<Option<String>>,
}

impl Seen {
    fn add(&mut self, event: &Event) {
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

    fn ended_by(&self, reason: FinishReason) -> bool {
        self.ends.values().any(|end| end.0 == reason)
    }
}

/// A core, its device and everything that was seen.
struct World {
    core: Core,
    device: FakeDevice,
    seen: BTreeMap<RequestId, Seen>,
    log: Vec<Event>,
    now: Duration,
    steps: usize,
}

impl World {
    fn new(config: &EngineConfig) -> Self {
        let core = Core::new(config.clone()).expect("a valid configuration");
        let device = FakeDevice::new(config);
        Self { core, device, seen: BTreeMap::new(), log: Vec::new(), now: Duration::ZERO, steps: 0 }
    }

    fn collect(&mut self) -> Vec<RequestId> {
        let mut resumable = Vec::new();
        for event in self.core.take_events() {
            self.seen.entry(event.request).or_default().add(&event);
            if matches!(event.kind, EventKind::Logits(_)) {
                resumable.push(event.request);
            }
            self.log.push(event);
        }
        resumable
    }

    /// One step, with a cancellation while it is in flight.
    fn step(&mut self, cancel_in_flight: Option<RequestId>) -> bool {
        self.now += Duration::from_millis(3);
        let Some(batch) = self.core.next_batch(self.now) else { return false };
        if let Some(id) = cancel_in_flight {
            self.core.cancel(id, self.now);
        }
        let mut logits = Vec::new();
        match self.device.compute(&batch, &mut logits) {
            Ok(()) => self.core.commit(&logits, self.now),
            Err(message) => self.core.fail(&message, self.now),
        }
        self.steps += 1;
        true
    }
}

/// What a request sees when nobody else is there and pages abound.
fn alone(config: &EngineConfig, id: RequestId, planned: &Planned, nan_every: Option<u64>) -> Seen {
    let pages = config.pages * 4 + 4;
    let roomy = EngineConfig { pages, max_num_batched_tokens: 4096, max_num_seqs: 64, ..config.clone() };
    let mut world = World::new(&roomy);
    world.device.nan_every = nan_every;
    world
        .core
        .submit(submission(id, planned), Duration::ZERO)
        .expect("accepted in the crowd, so accepted alone");
    while !world.core.is_idle() {
        assert!(world.step(None), "a lone request always runs");
        for id in world.collect() {
            world.core.resume(id);
        }
    }
    world.seen.remove(&id).expect("it was seen")
}

struct Outcome {
    log: Vec<Event>,
    steps: usize,
    preemptions: u64,
    cached: u64,
}

/// Runs `requests` random requests; everything follows from `seed`.
fn simulate(seed: u64, requests: usize, faults: bool) -> Outcome {
    let mut dice = Dice(mix(seed, 0xFEED));
    let config = random_config(&mut dice);
    let stems: Vec<Vec<u32>> =
        (0..3).map(|_| (0..dice.roll(40)).map(|_| dice.roll(VOCABULARY) as u32).collect()).collect();
    let mut world = World::new(&config);
    if faults {
        world.device.failing = (0..4).map(|_| 1 + dice.roll(200)).collect();
        world.device.nan_every = dice.chance(2).then_some(61);
    }
    let mut planned = BTreeMap::new();
    let mut blocked = Vec::new();
    let mut cancelled = HashSet::new();
    let mut next = 0;
    while next < requests as u64 || !world.core.is_idle() {
        while next < requests as u64 && (dice.chance(3) || world.core.is_idle()) {
            let request = random_request(&mut dice, &config, &stems);
            if world.core.submit(submission(next, &request), world.now).is_ok() {
                planned.insert(next, request);
            }
            next += 1;
        }
        let victim = |dice: &mut Dice| dice.roll(next as usize + 1) as u64;
        let at_once = dice.chance(12).then(|| victim(&mut dice));
        if let Some(id) = at_once {
            cancelled.insert(id);
            world.core.cancel(id, world.now);
        }
        let in_flight = dice.chance(12).then(|| victim(&mut dice));
        cancelled.extend(in_flight);
        let stepped = world.step(in_flight);
        blocked.extend(world.collect());
        for id in at_once.into_iter().chain(in_flight.filter(|_| stepped)) {
            let ended = world.seen.get(&id).is_some_and(|seen| seen.done.is_some());
            assert!(
                ended || !planned.contains_key(&id),
                "seed {seed}: request {id} outlived its cancellation"
            );
        }
        // Consumers of logits take their time, unless everybody waits for them.
        if !stepped || dice.chance(3) {
            blocked.drain(..).for_each(|id| world.core.resume(id));
        }
        assert!(world.steps < requests * 2000, "seed {seed}: no progress");
    }
    check_outcome(seed, &config, &world, &planned, &cancelled);
    let metrics = world.core.metrics();
    Outcome {
        log: world.log,
        steps: world.steps,
        preemptions: metrics.preemptions,
        cached: metrics.cached_tokens,
    }
}

fn check_outcome(
    seed: u64,
    config: &EngineConfig,
    world: &World,
    planned: &BTreeMap<RequestId, Planned>,
    cancelled: &HashSet<RequestId>,
) {
    let metrics = world.core.metrics();
    assert_eq!(
        metrics.pages_free + metrics.pages_evictable,
        metrics.pages_total,
        "seed {seed}: pages came back"
    );
    let ended = metrics.requests_finished + metrics.requests_aborted + metrics.requests_failed;
    assert_eq!((ended, metrics.running, metrics.waiting), (planned.len() as u64, 0, 0), "seed {seed}");
    for (&id, request) in planned {
        let seen = &world.seen[&id];
        let done = seen.done.as_ref().unwrap_or_else(|| panic!("seed {seed}: request {id} never ended"));
        let device_failed = done.as_deref().is_some_and(|message| message.starts_with("step"));
        if cancelled.contains(&id) || device_failed {
            check_truncated(seed, config, id, request, seen, world.device.nan_every);
            continue;
        }
        assert!(!seen.ended_by(FinishReason::Abort), "seed {seed}: request {id} was aborted by itself");
        let expected = alone(config, id, request, world.device.nan_every);
        if done.is_some() {
            // The first bad row ends the request; which of its completions meets it first depends on the company.
            assert_eq!(done, expected.done.as_ref().unwrap(), "seed {seed}: request {id}");
        } else {
            assert_eq!(seen, &expected, "seed {seed}: request {id}");
        }
        if matches!(request.kind, RequestKind::Logits) && done.is_none() {
            let long = config.context_switch.is_some_and(|switch| request.prompt.len() > switch);
            let expected = expected_logits(&request.prompt, long);
            let fine =
                |(bits, logit): (&u32, &f32)| *bits == logit.to_bits() || f32::from_bits(*bits).is_nan();
            assert_eq!(seen.logits.len(), expected.len(), "seed {seed}: request {id}");
            assert!(seen.logits.iter().zip(&expected).all(fine), "seed {seed}: request {id}");
        }
    }
}

/// A request that was cut short saw a beginning of what it sees alone.
fn check_truncated(
    seed: u64,
    config: &EngineConfig,
    id: RequestId,
    request: &Planned,
    seen: &Seen,
    nan_every: Option<u64>,
) {
    let whole = alone(config, id, request, nan_every);
    if whole.done.as_ref().is_some_and(Option::is_some) {
        return; // a completion that met NaN alone ends others at a moment that depends on the company
    }
    for (index, tokens) in &seen.tokens {
        let expected = &whole.tokens[index];
        assert!(expected.starts_with(tokens), "seed {seed}: request {id} {tokens:?} {expected:?}");
        assert!(whole.text[index].starts_with(&seen.text[index]), "seed {seed}: request {id}");
    }
    assert!(whole.logits.starts_with(&seen.logits), "seed {seed}: request {id}");
    assert!(whole.prompt_logprobs.starts_with(&seen.prompt_logprobs), "seed {seed}: request {id}");
}

/// Runs of the simulation; `INFER_SIMULATIONS` asks for more.
fn simulations() -> u64 {
    std::env::var("INFER_SIMULATIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(400)
}

#[test]
fn every_request_gets_in_a_crowd_what_it_gets_alone() {
    let (mut steps, mut preemptions, mut cached) = (0, 0, 0);
    for seed in 0..simulations() {
        let outcome = simulate(seed, 20, false);
        steps += outcome.steps;
        preemptions += outcome.preemptions;
        cached += outcome.cached;
    }
    // The test is worth little if pages never run out and prefixes never meet.
    assert!(
        steps > 10_000 && preemptions > 500 && cached > 1_000,
        "{steps} steps, {preemptions} preemptions, {cached} cached"
    );
}

#[test]
fn failures_stay_with_the_requests_they_hit() {
    for seed in 0..simulations() {
        simulate(mix(seed, 5), 20, true);
    }
}

#[test]
fn the_same_seed_gives_the_same_log() {
    for seed in 0..20 {
        let log = || format!("{:?}", simulate(seed, 20, true).log);
        assert!(log() == log(), "seed {seed}");
    }
}
