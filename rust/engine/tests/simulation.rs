//! The production core against a fake device, tier and clock, from a seed: random requests, priorities, users, tenants, deadlines,
//! arrivals, cancellations, failures, drafts, windows, pages lost on the way to the tier and back, pools from one page up. The
//! core's own invariants run at every step; in `common/simulate.rs` the outside is checked: every request gets exactly the tokens it gets
//! alone and without drafts, cache or tier, one terminal event, nothing after it, everything given back, waiting and preemptions
//! bounded, and the same seed gives the same log.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::mix;
use common::simulate::simulate;
use common::world::steps_so_far;
use infer_engine::EngineMetrics;

/// A number from the environment.
fn asked(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// Runs of the simulation; `INFER_SIMULATIONS` asks for more.
fn simulations() -> u64 {
    asked("INFER_SIMULATIONS").unwrap_or(400)
}

#[test]
fn every_request_gets_in_a_crowd_what_it_gets_alone() {
    let (mut steps, mut ahead) = (0, 0);
    let mut sum = EngineMetrics::default();
    for seed in 0..simulations() {
        let outcome = simulate(seed, 20, false);
        steps += outcome.steps;
        ahead += outcome.steps_ahead;
        sum.preemptions += outcome.metrics.preemptions;
        sum.cached_tokens += outcome.metrics.cached_tokens;
        sum.copied_pages += outcome.metrics.copied_pages;
        sum.restored_pages += outcome.metrics.restored_pages;
        sum.window_pages += outcome.metrics.window_pages;
        sum.accepted_tokens += outcome.metrics.accepted_tokens;
        sum.branch_tokens += outcome.metrics.branch_tokens;
        sum.drafted_tokens += outcome.metrics.drafted_tokens;
        sum.requests_timed_out += outcome.metrics.requests_timed_out;
    }
    // The test is worth little if pages never run out, prefixes never meet, drafts are never right or never wrong.
    let enough =
        |count: u64, least: u64| assert!(count >= least * simulations() / 400, "{count} of {least}: {sum:?}");
    enough(steps as u64, 5_000);
    enough(ahead as u64, 1_000);
    enough(sum.preemptions, 200);
    enough(sum.cached_tokens, 1_000);
    enough(sum.copied_pages, 100);
    enough(sum.restored_pages, 20);
    enough(sum.window_pages, 20);
    enough(sum.accepted_tokens, 200);
    enough(sum.branch_tokens, 20);
    enough(sum.drafted_tokens - sum.accepted_tokens, 200);
    enough(sum.requests_timed_out, 10);
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

/// `INFER_SIMULATION_STEPS` asks for so many steps on all cores, half of the runs with faults, from seeds that the other tests do not use;
/// `INFER_SIMULATION_SECONDS` ends it early on a slow machine. What was done is printed.
#[test]
#[allow(clippy::print_stdout)] // for people, with --nocapture
fn as_many_steps_as_asked_for() {
    let wanted = asked("INFER_SIMULATION_STEPS").unwrap_or(20_000);
    let deadline =
        asked("INFER_SIMULATION_SECONDS").map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (steps, crowded) = (AtomicU64::new(0), AtomicU64::new(0));
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
                while steps.load(Ordering::Relaxed) < wanted && !late() {
                    let run = next.fetch_add(1, Ordering::Relaxed);
                    let before = steps_so_far();
                    let outcome = simulate(mix(run, 0x57E9), 20, run % 2 == 1);
                    steps.fetch_add(steps_so_far() - before, Ordering::Relaxed);
                    crowded.fetch_add(outcome.steps as u64, Ordering::Relaxed);
                }
            });
        }
    });
    let (steps, crowded, runs) = (steps.into_inner(), crowded.into_inner(), next.into_inner());
    assert!(crowded > 0 && (steps >= wanted || deadline.is_some()));
    println!("{steps} steps of the core in {runs} runs, {crowded} of them with many requests");
}
