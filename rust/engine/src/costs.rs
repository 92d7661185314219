//! What computing a token and bringing back a page cost lately, so that a page is only waited for where that is sooner, and a prompt
//! does not hold up running completions for longer than they should wait.

use std::time::Duration;

/// Weight of the latest observation.
const LATEST: f64 = 0.2;
/// Steps of fewer rows say what a step costs, not a token.
const TELLING_ROWS: usize = 16;

/// What is left of a page's cost after a fetch that was not made.
const FORGIVING: f64 = 0.95;

/// Running averages, in seconds.
#[derive(Debug, Default)]
pub(crate) struct Costs {
    token: Option<f64>,
    page: Option<f64>,
}

fn blend(average: &mut Option<f64>, latest: f64) {
    *average = Some(average.map_or(latest, |average| average + LATEST * (latest - average)));
}

impl Costs {
    /// A step of so many rows took so long.
    pub fn computed(&mut self, rows: usize, took: Duration) {
        if rows >= TELLING_ROWS {
            blend(&mut self.token, took.as_secs_f64() / rows as f64);
        }
    }

    /// How many rows take `time`, for all that is known.
    pub fn rows_within(&self, time: Duration) -> usize {
        self.token.map_or(usize::MAX, |token| (time.as_secs_f64() / token) as usize)
    }

    /// A fetch of so many pages took so long, waiting included.
    pub fn restored(&mut self, pages: usize, took: Duration) {
        if pages > 0 {
            blend(&mut self.page, took.as_secs_f64() / pages as f64);
        }
    }

    /// Whether a page of `page_tokens` tokens is sooner brought back than computed; yes as long as nobody knows. Every no makes
    /// the next yes likelier, since a tier that is not asked could not show that it has become faster.
    pub fn worth_restoring(&mut self, page_tokens: usize) -> bool {
        match (self.token, &mut self.page) {
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

    #[test]
    fn rows_are_those_that_fit_into_the_time() {
        let mut costs = Costs::default();
        assert_eq!(costs.rows_within(Duration::from_millis(1)), usize::MAX, "nobody knows yet");
        costs.computed(100, Duration::from_millis(200));
        assert_eq!(costs.rows_within(Duration::from_millis(100)), 50);
        assert_eq!(costs.rows_within(Duration::from_millis(1)), 0);
    }

    #[test]
    fn a_slow_tier_is_not_waited_for() {
        let mut costs = Costs::default();
        assert!(costs.worth_restoring(16));
        costs.computed(100, Duration::from_millis(100));
        assert!(costs.worth_restoring(16));
        costs.restored(2, Duration::from_millis(64));
        assert!(!costs.worth_restoring(16), "32 ms a page against 16 ms to compute it");
        let refused = (0..100).take_while(|_| !costs.worth_restoring(16)).count();
        assert!((5..50).contains(&refused), "it is tried again some time: {refused}");
        costs.restored(2, Duration::from_millis(640));
        assert!(!costs.worth_restoring(16));
        for _ in 0..20 {
            costs.computed(100, Duration::from_millis(3000));
        }
        assert!(costs.worth_restoring(16));
        costs.computed(1, Duration::from_nanos(1));
        assert!(costs.worth_restoring(16), "one row says nothing about many");
    }
}
