//! Log-probabilities of the model's own distribution: log-softmax of the raw logits, before any sampling parameter, as in vLLM.

use crate::cut::{Candidate, by_likelihood};
use crate::vector::{exponentials, maximum, sum};

/// One token's place in a distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// 1 for the most likely; among equals the lower id comes first.
    pub rank: u32,
}

/// Working memory, reused from row to row.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    weights: Vec<f32>,
    top: Vec<Candidate>,
}

/// `chosen` first, then the `count` most likely tokens in order, each token once. `logits` are finite or -inf, not all -inf.
pub(crate) fn token_logprobs(
    logits: &[f32],
    chosen: u32,
    count: u32,
    scratch: &mut Scratch,
) -> Vec<TokenLogprob> {
    let largest = maximum(logits);
    exponentials(logits, largest, 1.0, &mut scratch.weights);
    let log_sum = f64::from(largest) + sum(&scratch.weights).ln();
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;

    let logit = logits[chosen as usize];
    let above = logits.iter().map(|&other| u32::from(other > logit)).sum::<u32>();
    let equal = logits[..chosen as usize].iter().map(|&other| u32::from(other == logit)).sum::<u32>();
    let mut result = Vec::with_capacity(1 + count as usize);
    result.push(TokenLogprob { token: chosen, logprob: logprob(logit), rank: above + equal + 1 });

    most_likely(logits, count as usize, &mut scratch.top);
    let others = scratch.top.iter().enumerate().filter(|(_, (token, _))| *token != chosen);
    result.extend(others.map(|(place, &(token, logit))| TokenLogprob {
        token,
        logprob: logprob(logit),
        rank: place as u32 + 1,
    }));
    result
}

/// The `count` largest logits with their tokens, in order of likelihood. Most entries fail against the least of those found so far.
fn most_likely(logits: &[f32], count: usize, top: &mut Vec<Candidate>) {
    top.clear();
    // Twice the room, so that a full list is cut only once for every `count` entries that passed.
    let room = count.saturating_mul(2).min(logits.len());
    let mut least = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate().filter(|_| count > 0) {
        if logit > least || top.len() < count {
            top.push((token as u32, logit));
            if top.len() == room && room > count {
                top.select_nth_unstable_by(count - 1, by_likelihood);
                top.truncate(count);
                least = top[count - 1].1;
            }
        }
    }
    top.sort_unstable_by(by_likelihood);
    top.truncate(count);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_a_distribution_in_order() {
        let logits = [1.0, 3.0, f32::NEG_INFINITY, 3.0, -2.0];
        let mut scratch = Scratch::default();
        let all = token_logprobs(&logits, 0, 5, &mut scratch);
        let order: Vec<(u32, u32)> = all.iter().map(|entry| (entry.token, entry.rank)).collect();
        assert_eq!(order, [(0, 3), (1, 1), (3, 2), (4, 4), (2, 5)]);
        let sum: f64 = all.iter().map(|entry| f64::from(entry.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(all[4].logprob, f32::NEG_INFINITY);
    }

    #[test]
    fn the_most_likely_equal_those_of_a_full_sort() {
        let logits: Vec<f32> =
            (0..3000).map(|i| (crate::random::uniform(1, i, 0) * 500.0).floor() as f32).collect();
        let mut all: Vec<Candidate> = (0..).zip(logits.iter().copied()).collect();
        all.sort_by(by_likelihood);
        let mut top = Vec::new();
        for count in [0, 1, 2, 20, 1499, 1500, 1501, 2999, 3000] {
            most_likely(&logits, count, &mut top);
            assert_eq!(top, all[..count], "{count}");
        }
    }

    #[test]
    fn the_chosen_token_comes_first_and_once() {
        let mut scratch = Scratch::default();
        let logits = [0.0, 2.0, 1.0];
        assert_eq!(token_logprobs(&logits, 0, 0, &mut scratch).len(), 1);
        let tokens: Vec<u32> =
            token_logprobs(&logits, 2, 2, &mut scratch).iter().map(|entry| entry.token).collect();
        assert_eq!(tokens, [2, 1]);
    }
}
