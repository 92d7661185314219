//! Which of many weighted tokens are the most likely ones, without sorting them: a histogram over the leading bits of the weights finds
//! the range in which the cut falls, and only that range is sorted.

use std::cmp::Ordering;

/// A token and a non-negative number that grows with its likelihood.
pub(crate) type Candidate = (u32, f32);

/// More likely first, lower id first among equals.
pub(crate) fn by_likelihood(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Sign, exponent and three bits of fraction: a range spans an eighth of its power of two.
const RANGE_SHIFT: u32 = 20;
const RANGES: usize = 1 << (32 - RANGE_SHIFT);

/// Bits of non-negative floats order like the floats.
fn range_of(weight: f32) -> usize {
    (weight.to_bits() >> RANGE_SHIFT) as usize
}

/// Working memory of a cut.
#[derive(Debug, Default)]
pub(crate) struct Cutter {
    counts: Vec<u32>,
    masses: Vec<f64>,
    edge: Vec<Candidate>,
}

impl Cutter {
    /// Leaves the `count` most likely candidates, in their present order.
    pub fn keep_top_k(&mut self, candidates: &mut Vec<Candidate>, count: usize) {
        if count >= candidates.len() {
            return;
        }
        self.counts.clear();
        self.counts.resize(RANGES, 0);
        for &(_, weight) in candidates.iter() {
            self.counts[range_of(weight)] += 1;
        }
        let mut left = count;
        let range = (0..RANGES).rev().find(|&range| {
            let here = self.counts[range] as usize;
            let found = here >= left;
            left -= if found { 0 } else { here };
            found
        });
        self.cut_in(candidates, range.unwrap_or(0), |edge| left.min(edge.len()));
    }

    /// Leaves the fewest most likely candidates whose weights sum to `share` of all, in their present order.
    pub fn keep_top_p(&mut self, candidates: &mut Vec<Candidate>, share: f64) {
        self.masses.clear();
        self.masses.resize(RANGES, 0.0);
        for &(_, weight) in candidates.iter() {
            self.masses[range_of(weight)] += f64::from(weight);
        }
        let mut left = share * self.masses.iter().sum::<f64>();
        let range = (0..RANGES).rev().find(|&range| {
            let found = self.masses[range] >= left && self.masses[range] > 0.0;
            left -= if found { 0.0 } else { self.masses[range] };
            found
        });
        // Rounding can leave a little that no range covers; then all are needed.
        let Some(range) = range else { return };
        self.cut_in(candidates, range, |edge| {
            let reached = edge.iter().position(|&(_, weight)| {
                left -= f64::from(weight);
                left <= 0.0
            });
            reached.map_or(edge.len(), |last| last + 1)
        });
    }

    /// Leaves all candidates above `range`, and of those in it the first `kept` in order of likelihood.
    fn cut_in(
        &mut self,
        candidates: &mut Vec<Candidate>,
        range: usize,
        kept: impl FnOnce(&[Candidate]) -> usize,
    ) {
        self.edge.clear();
        self.edge.extend(candidates.iter().filter(|candidate| range_of(candidate.1) == range));
        self.edge.sort_unstable_by(by_likelihood);
        let kept = kept(&self.edge);
        let Some(last) = kept.checked_sub(1).map(|last| self.edge[last]) else {
            return candidates.retain(|candidate| range_of(candidate.1) > range);
        };
        candidates.retain(|candidate| by_likelihood(candidate, &last) != Ordering::Greater);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    /// Weights with many ties, ids ascending.
    fn candidates(seed: u64, count: u64) -> Vec<Candidate> {
        let coarse = |i| ((uniform(seed, i, 0) * 20.0).floor() / 20.0) as f32;
        let weight = |i| if i % 3 == 0 { coarse(i) } else { uniform(seed, i, 1).powi(6) as f32 };
        (0..count).map(|i| (i as u32, weight(i))).collect()
    }

    fn sorted(candidates: &[Candidate]) -> Vec<Candidate> {
        let mut all = candidates.to_vec();
        all.sort_by(by_likelihood);
        all
    }

    #[test]
    fn cuts_equal_those_of_a_full_sort() {
        let mut cutter = Cutter::default();
        for seed in 0..40 {
            let all = candidates(seed, 1 + seed * 37);
            for count in [0, 1, 2, 7, all.len() / 2, all.len() - 1, all.len(), all.len() + 5] {
                let mut kept = all.clone();
                cutter.keep_top_k(&mut kept, count);
                assert!(kept.is_sorted_by_key(|candidate| candidate.0), "the order stays");
                assert_eq!(sorted(&kept), sorted(&all)[..count.min(all.len())], "seed {seed}, {count} kept");
            }
            for share in [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0 - 1e-12] {
                let mut kept = all.clone();
                cutter.keep_top_p(&mut kept, share);
                let all = sorted(&all);
                let total: f64 = all.iter().map(|candidate| f64::from(candidate.1)).sum();
                let mass =
                    |kept: &[Candidate]| kept.iter().map(|candidate| f64::from(candidate.1)).sum::<f64>();
                let kept = sorted(&kept);
                assert_eq!(kept, all[..kept.len()]);
                assert!(mass(&kept) >= share * total * (1.0 - 1e-12), "seed {seed}: {share} is reached");
                let fewer = &kept[..kept.len().saturating_sub(1)];
                assert!(
                    total == 0.0 || mass(fewer) < share * total * (1.0 + 1e-12),
                    "seed {seed}: by no more"
                );
            }
        }
    }
}
