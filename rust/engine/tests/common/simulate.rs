//! One run of the simulation: a random configuration and random requests, from a seed, and what must be true of the outcome.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use infer_engine::{
    Device, EngineConfig, EngineMetrics, Event, FinishReason, LocalLayers, RequestId, RequestKind,
    RequestOptions,
};

use super::requests::{Dice, Planned, random_config, random_request, submission};
use super::tier::FakeTier;
use super::world::{Seen, World};
use super::{VOCABULARY, expected_logits, mix};

#[cfg(feature = "planted")]
use infer_engine::plant as replant;

#[cfg(not(feature = "planted"))]
fn replant(_: Option<()>) -> Option<()> {
    None
}

/// What a request sees when nobody else is there and pages abound.
fn alone(config: &EngineConfig, id: RequestId, planned: &Planned, nan_every: Option<u64>) -> Seen {
    let removed = replant(None); // what is right is told by an engine without the bug
    let pages = config.pages * 4 + 4;
    let local = config.local.map(|local| LocalLayers { pages, ..local });
    let roomy = EngineConfig {
        pages,
        local,
        max_num_batched_tokens: 4096,
        max_num_seqs: 64,
        speculation: None,
        ..config.clone()
    };
    let bare = &Planned { options: RequestOptions::default(), ..planned.clone() };
    let mut world = World::new(&roomy, None);
    world.device.nan_every = nan_every;
    world
        .core
        .submit(submission(id, bare), Duration::ZERO)
        .expect("accepted in the crowd, so accepted alone");
    while !world.core.is_idle() {
        assert!(world.step(None), "a lone request always runs");
        for id in world.collect() {
            world.resume(id);
        }
    }
    replant(removed);
    world.seen.remove(&id).expect("it was seen")
}

/// What a run ended in.
pub struct Outcome {
    pub log: Vec<Event>,
    /// Steps of the crowd, without those of its requests alone.
    pub steps: usize,
    pub steps_ahead: usize,
    pub metrics: EngineMetrics,
}

/// Who must have ended early, by whose doing.
#[derive(Default)]
struct Cuts {
    cancelled: HashSet<RequestId>,
    /// Requests with a deadline.
    timed: BTreeMap<RequestId, Duration>,
}

/// Names the seed of a simulation that panics.
struct Replay(u64, bool);

impl Drop for Replay {
    #[allow(clippy::print_stdout)] // the test runner shows it with the panic
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("to replay: simulate({}, 20, {})", self.0, self.1);
        }
    }
}

fn random_world(seed: u64, dice: &mut Dice, config: &EngineConfig, faults: bool) -> World {
    let tier = dice.chance(2).then(|| FakeTier::new(seed, if faults { 7 } else { 0 }));
    let mut world = World::new(config, tier);
    world.ahead = mix(seed, 0xA4EAD).is_multiple_of(2);
    if faults {
        world.device.failing = (0..4).map(|_| 1 + dice.roll(200)).collect();
        world.device.nan_every = dice.chance(2).then_some(61);
    }
    world
}

/// Runs `requests` random requests; everything follows from `seed`.
pub fn simulate(seed: u64, requests: usize, faults: bool) -> Outcome {
    let _replay = Replay(seed, faults);
    let mut dice = Dice(mix(seed, 0xFEED));
    let config = random_config(&mut dice);
    let stems: Vec<Vec<u32>> =
        (0..3).map(|_| (0..dice.roll(40)).map(|_| dice.roll(VOCABULARY) as u32).collect()).collect();
    let mut world = random_world(seed, &mut dice, &config, faults);
    let mut planned = BTreeMap::new();
    let mut blocked = Vec::new();
    let mut cuts = Cuts::default();
    let mut next = 0;
    let mut turns = 0;
    while next < requests as u64 || !world.core.is_idle() {
        while next < requests as u64 && (dice.chance(3) || world.core.is_idle()) {
            let request = random_request(&mut dice, &config, &stems, world.now);
            if world.core.submit(submission(next, &request), world.now).is_ok() {
                cuts.timed.extend(request.options.deadline.map(|deadline| (next, deadline)));
                planned.insert(next, request);
            }
            next += 1;
            let room = config.max_waiting.unwrap_or(usize::MAX);
            assert!(world.core.unscheduled_requests() <= room, "seed {seed}: max_waiting");
        }
        let victim = |dice: &mut Dice| dice.roll(next as usize + 1) as u64;
        let at_once = dice.chance(12).then(|| victim(&mut dice));
        if let Some(id) = at_once {
            cuts.cancelled.insert(id);
            world.core.cancel(id, world.now);
        }
        let in_flight = dice.chance(12).then(|| victim(&mut dice));
        cuts.cancelled.extend(in_flight);
        let stepped = world.step(in_flight);
        blocked.extend(world.collect());
        for id in at_once.into_iter().chain(in_flight.filter(|_| stepped)) {
            let ended = world.seen.get(&id).is_some_and(|seen| seen.done.is_some());
            assert!(
                ended || !planned.contains_key(&id),
                "seed {seed}: request {id} outlived its cancellation"
            );
        }
        check_deadlines(seed, &world, &cuts);
        // The tier and the consumers of logits take their time, unless everybody waits for them.
        if !stepped || dice.chance(3) {
            world.restore();
        }
        if !stepped || dice.chance(3) {
            blocked.drain(..).for_each(|id| world.resume(id));
        }
        if dice.chance(40) {
            world.finish_all();
            blocked.extend(world.collect());
            save_and_load(&mut world, &mut dice, &stems);
        }
        turns += 1;
        assert!(turns < requests * 4000, "seed {seed}: no progress");
    }
    world.finish_all();
    check_outcome(seed, &config, &world, &planned, &cuts);
    let metrics = world.core.metrics();
    Outcome { log: world.log, steps: world.steps, steps_ahead: world.steps_ahead, metrics }
}

/// Takes a stem's pages out of the cache and puts them back, or into the cache of another salt.
fn save_and_load(world: &mut World, dice: &mut Dice, stems: &[Vec<u32>]) {
    let stem = &stems[dice.roll(stems.len())];
    let mut payloads = Vec::new();
    let saves = world.core.cached_prefix(stem, None);
    for save in &saves {
        let mut payload = Vec::new();
        world.device.export_page(save.page, &mut payload).expect("the fake device reads out");
        payloads.push(payload);
    }
    let blocks: Vec<Box<[u32]>> = saves.iter().map(|save| save.name.tokens.clone()).collect();
    let whole: usize = blocks.iter().map(|block| block.len()).sum();
    assert_eq!(blocks.concat(), stem[..whole], "a session is a beginning of what was asked for");
    let salt = dice.chance(2).then(|| "red".into());
    let adoption = world.core.adopt(blocks, salt);
    let saves = world.core.take_saves(0);
    world.save(saves);
    let mut filled = 0;
    for (place, page) in adoption.pages() {
        world.device.import_page(page, &payloads[place]).expect("its own bytes");
        filled += 1;
    }
    assert!(world.core.adopted(adoption, filled) <= whole);
}

/// Who was still there when its deadline had passed is gone with the next step.
fn check_deadlines(seed: u64, world: &World, cuts: &Cuts) {
    for (id, _) in cuts.timed.iter().filter(|(_, deadline)| **deadline <= world.began) {
        let ended = world.seen.get(id).is_some_and(|seen| seen.done.is_some());
        assert!(ended, "seed {seed}: request {id} outlived its deadline");
    }
}

fn check_outcome(
    seed: u64,
    config: &EngineConfig,
    world: &World,
    planned: &BTreeMap<RequestId, Planned>,
    cuts: &Cuts,
) {
    let metrics = world.core.metrics();
    assert_eq!(
        metrics.pages_free + metrics.pages_evictable,
        metrics.pages_total,
        "seed {seed}: pages came back"
    );
    let ended = metrics.requests_finished
        + metrics.requests_aborted
        + metrics.requests_timed_out
        + metrics.requests_failed;
    assert_eq!((ended, metrics.running, metrics.waiting), (planned.len() as u64, 0, 0), "seed {seed}");
    for (&id, request) in planned {
        let seen = &world.seen[&id];
        let done = seen.done.as_ref().unwrap_or_else(|| panic!("seed {seed}: request {id} never ended"));
        let device_failed = done.as_deref().is_some_and(|message| message.starts_with("step"));
        let timed_out = cuts.timed.contains_key(&id) && seen.ended_by(FinishReason::Timeout);
        let bare = matches!(request.kind, RequestKind::Logits) && cuts.timed.contains_key(&id);
        if cuts.cancelled.contains(&id) || device_failed || timed_out || bare {
            check_truncated(seed, config, id, request, seen, world.device.nan_every);
            continue;
        }
        let early = seen.ended_by(FinishReason::Abort) || seen.ended_by(FinishReason::Timeout);
        assert!(!early, "seed {seed}: request {id} was ended by nobody");
        let expected = alone(config, id, request, world.device.nan_every);
        if done.is_some() {
            // The first bad row ends the request; which of its completions meets it first depends on the company.
            let alone = expected.done.as_ref().unwrap();
            assert_eq!(cause(done), cause(alone), "seed {seed}: request {id}");
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

/// An error without its token, which a device that draws does not tell.
fn cause(error: &Option<String>) -> Option<&str> {
    let error = error.as_deref()?;
    Some(error.strip_prefix("the model computed a NaN or infinite logit").map_or(error, |_| "no number"))
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
