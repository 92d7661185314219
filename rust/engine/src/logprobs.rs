//! Log-probabilities of the model's own distribution: log-softmax of the raw logits, before any sampling parameter, as in vLLM.

use std::cmp::Ordering;

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

/// More likely first, lower id first among equals. Logits must not be NaN.
pub(crate) fn by_likelihood(a: (u32, f32), b: (u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

/// The `count` first of `candidates` in order of likelihood, without sorting the rest.
pub(crate) fn keep_most_likely(candidates: &mut Vec<(u32, f32)>, count: usize) {
    if count == 0 {
        candidates.clear();
    } else if count < candidates.len() {
        candidates.select_nth_unstable_by(count - 1, |&a, &b| by_likelihood(a, b));
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(|&a, &b| by_likelihood(a, b));
}

/// `chosen` first, then the `count` most likely tokens in order, each token once. `logits` are finite or -inf, not all -inf.
pub(crate) fn token_logprobs(
    logits: &[f32],
    chosen: u32,
    count: u32,
    scratch: &mut Vec<(u32, f32)>,
) -> Vec<TokenLogprob> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let log_sum = f64::from(largest) + sum.ln();
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;

    let logit = logits[chosen as usize];
    let ahead = logits
        .iter()
        .enumerate()
        .filter(|&(id, &other)| other > logit || (other == logit && id < chosen as usize));
    let mut result = Vec::with_capacity(1 + count as usize);
    result.push(TokenLogprob { token: chosen, logprob: logprob(logit), rank: ahead.count() as u32 + 1 });

    scratch.clear();
    scratch.extend(logits.iter().enumerate().map(|(id, &logit)| (id as u32, logit)));
    keep_most_likely(scratch, count as usize);
    let top = scratch.iter().enumerate().filter(|(_, (token, _))| *token != chosen);
    result.extend(top.map(|(place, &(token, logit))| TokenLogprob {
        token,
        logprob: logprob(logit),
        rank: place as u32 + 1,
    }));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_a_distribution_in_order() {
        let logits = [1.0, 3.0, f32::NEG_INFINITY, 3.0, -2.0];
        let mut scratch = Vec::new();
        let all = token_logprobs(&logits, 0, 5, &mut scratch);
        let order: Vec<(u32, u32)> = all.iter().map(|entry| (entry.token, entry.rank)).collect();
        assert_eq!(order, [(0, 3), (1, 1), (3, 2), (4, 4), (2, 5)]);
        let sum: f64 = all.iter().map(|entry| f64::from(entry.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(all[4].logprob, f32::NEG_INFINITY);
    }

    #[test]
    fn the_chosen_token_comes_first_and_once() {
        let mut scratch = Vec::new();
        let logits = [0.0, 2.0, 1.0];
        assert_eq!(token_logprobs(&logits, 0, 0, &mut scratch).len(), 1);
        let tokens: Vec<u32> =
            token_logprobs(&logits, 2, 2, &mut scratch).iter().map(|entry| entry.token).collect();
        assert_eq!(tokens, [2, 1]);
    }
}
