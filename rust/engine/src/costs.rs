//! What computing a token and bringing back a page cost lately, so that a page is only waited for where that is sooner, and a prompt
//! does not hold up running completions for longer than they should wait.

use std::collections::VecDeque;
use std::time::Duration;

/// Weight of the latest observation of a page.
const LATEST: f64 = 0.2;
/// Fewer rows of prompts say what a step costs, not a token.
const TELLING_ROWS: usize = 16;
/// Latest steps that are remembered. The middle one counts, so that one that compiled a kernel, say, does not.
const REMEMBERED: usize = 5;
/// At least this part of a step's time, by rows, is put down to its prompts: beside many completions the difference of two
/// long times tells little.
const LEAST_SHARE: f64 = 0.5;

/// What is left of a page's cost after a fetch that was not made.
const FORGIVING: f64 = 0.95;

/// What was seen lately, in seconds.
#[derive(Debug, Default)]
pub(crate) struct Costs {
    /// Of the latest steps without prompts.
    steps: Latest,
    /// Of a prompt's token in each of the latest steps with prompts.
    tokens: Latest,
    /// A running average.
    page: Option<f64>,
}

#[derive(Debug, Default)]
struct Latest(VecDeque<f64>);

impl Latest {
    fn add(&mut self, seconds: f64) {
        self.0.truncate(REMEMBERED - 1);
        self.0.push_front(seconds);
    }

    /// The middle one, the lower of two.
    fn middle(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.0.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len().saturating_sub(1) / 2).copied()
    }
}

impl Costs {
    /// A step of so many rows, `decoding` of them of running completions, took so long.
    pub fn computed(&mut self, rows: usize, decoding: usize, took: Duration) {
        let (took, prompts) = (took.as_secs_f64(), rows - decoding);
        let alone = self.steps.middle().filter(|_| decoding > 0);
        if prompts == 0 || alone.is_some_and(|step| took < step) {
            // With prompts it would take no less: what is known of steps is too much.
            self.steps.add(took);
        }
        if prompts >= TELLING_ROWS {
            let share = took * prompts as f64 / rows as f64;
            let own = alone.map_or(share, |step| (took - step).max(share * LEAST_SHARE));
            self.tokens.add(own / prompts as f64);
        }
    }

    /// How many rows of prompts take `time` beside so many rows of running completions, for all that is known.
    pub fn rows_within(&self, time: Duration, decoding: usize) -> usize {
        self.tokens.middle().map_or(usize::MAX, |token| {
            let step = self.steps.middle().unwrap_or(token * decoding as f64);
            ((time.as_secs_f64() - step) / token) as usize // 0 where that is negative
        })
    }

    /// A fetch of so many pages took so long, waiting included.
    pub fn restored(&mut self, pages: usize, took: Duration) {
        if pages > 0 {
            let latest = took.as_secs_f64() / pages as f64;
            let average = self.page.map_or(latest, |average| average + LATEST * (latest - average));
            self.page = Some(average);
        }
    }

    /// Whether a page of `page_tokens` tokens is sooner brought back than computed; yes as long as nobody knows. Every no makes
    /// the next yes likelier, since a tier that is not asked could not show that it has become faster.
    pub fn worth_restoring(&mut self, page_tokens: usize) -> bool {
        match (self.tokens.middle(), &mut self.page) {
            (Some(token), Some(page)) if *page >= token * page_tokens as f64 => {
                *page *= FORGIVING;
                false
            }
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Duration = Duration::from_millis(100);

    #[test]
    fn rows_are_those_that_fit_into_the_time() {
        let mut costs = Costs::default();
        assert_eq!(costs.rows_within(TARGET, 1), usize::MAX, "nobody knows yet");
        costs.computed(100, 0, Duration::from_millis(200));
        assert_eq!(costs.rows_within(TARGET, 0), 50);
        assert_eq!(costs.rows_within(TARGET, 10), 40);
        assert_eq!(costs.rows_within(Duration::from_millis(1), 1), 0);
    }

    #[test]
    fn completions_beside_prompts_cost_a_step_and_not_so_many_tokens() {
        let mut costs = Costs::default();
        (0..9).for_each(|_| costs.computed(64, 64, Duration::from_millis(20)));
        assert_eq!(costs.rows_within(TARGET, 64), usize::MAX);
        costs.computed(64 + 1000, 64, Duration::from_millis(70));
        assert_eq!(costs.rows_within(TARGET, 64), 1600, "80 ms for 50 microseconds each");
        (0..2).for_each(|_| costs.computed(64 + 16, 64, Duration::from_millis(20)));
        assert!(costs.rows_within(TARGET, 64) < 1600, "no row is free");
    }

    #[test]
    fn a_step_that_compiled_something_is_forgotten() {
        let mut costs = Costs::default();
        costs.computed(1000, 0, Duration::from_secs(3));
        costs.computed(1000, 0, Duration::from_millis(20));
        assert_eq!(costs.rows_within(TARGET, 0), 5000);
        costs.computed(1000, 0, Duration::from_millis(10));
        costs.computed(1000, 0, Duration::from_secs(9));
        assert_eq!(costs.rows_within(TARGET, 0), 5000);
    }

    #[test]
    fn a_step_that_seemed_to_take_all_the_time_does_not_stop_prompts() {
        let mut costs = Costs::default();
        costs.computed(1000, 0, Duration::from_millis(20));
        costs.computed(8, 8, Duration::from_secs(3));
        assert_eq!(costs.rows_within(TARGET, 8), 0);
        costs.computed(8 + 16, 8, Duration::from_millis(10));
        assert!(costs.rows_within(TARGET, 8) > 4000, "prompts beside them took less");
    }

    #[test]
    fn a_slow_tier_is_not_waited_for() {
        let mut costs = Costs::default();
        assert!(costs.worth_restoring(16));
        costs.computed(100, 0, Duration::from_millis(100));
        assert!(costs.worth_restoring(16));
        costs.restored(2, Duration::from_millis(64));
        assert!(!costs.worth_restoring(16), "32 ms a page against 16 ms to compute it");
        let refused = (0..100).take_while(|_| !costs.worth_restoring(16)).count();
        assert!((5..50).contains(&refused), "it is tried again some time: {refused}");
        costs.restored(2, Duration::from_millis(640));
        assert!(!costs.worth_restoring(16));
        for _ in 0..20 {
            costs.computed(100, 0, Duration::from_millis(3000));
        }
        assert!(costs.worth_restoring(16));
        costs.computed(1, 1, Duration::from_nanos(1));
        assert!(costs.worth_restoring(16), "one row says nothing about many");
    }
}
