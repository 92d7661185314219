//! The simulation can fail: every bug of `Bug::ALL`, planted in the production core, is caught within a bounded number of steps.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::mix;
use common::simulate::simulate;
use common::world::steps_so_far;
use infer_engine::{Bug, plant};

/// Within so many steps, those of the comparison runs included, a bug must be found.
const MOST_STEPS: u64 = 400_000;

/// Steps until the first panic, and its message.
fn hunt(bug: Bug) -> Option<(u64, String)> {
    let start = steps_so_far();
    for run in 0.. {
        plant(Some(bug));
        let caught = catch_unwind(AssertUnwindSafe(|| simulate(mix(run, 0xB06), 20, run % 2 == 1)));
        plant(None);
        let steps = steps_so_far() - start;
        if let Err(panic) = caught {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            return Some((steps, text.unwrap_or_default()));
        }
        if steps > MOST_STEPS {
            return None;
        }
    }
    unreachable!("the loop ends by its bound")
}

#[test]
#[allow(clippy::print_stdout)] // for people, with --nocapture
fn every_planted_bug_is_caught() {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found: Vec<_> = Bug::ALL.iter().map(|&bug| (bug, hunt(bug))).collect();
    std::panic::set_hook(quiet);
    for (bug, outcome) in &found {
        match outcome {
            Some((steps, text)) => {
                println!("{steps:>7} steps: {bug:?}: {}", text.lines().next().unwrap_or(""))
            }
            None => println!("    not found: {bug:?}"),
        }
    }
    let missed: Vec<Bug> = found.iter().filter(|found| found.1.is_none()).map(|found| found.0).collect();
    assert_eq!(missed, [], "bugs that {MOST_STEPS} steps did not show");
}

/// What the hunt proves, it proves only if nothing is found where nothing was planted.
#[test]
fn without_a_bug_the_same_runs_pass() {
    for run in 0..100 {
        simulate(mix(run, 0xB06), 20, run % 2 == 1);
    }
}
