//! Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A draw is a pure function of (seed, position, draw number). There is no state to advance, so neither neighbours in the batch nor
//! preemption nor rejected drafts can shift a request's numbers.

const MULTIPLIERS: (u32, u32) = (0xD251_1F53, 0xCD9E_8D57);
const WEYL: (u32, u32) = (0x9E37_79B9, 0xBB67_AE85);
const ROUNDS: usize = 10;

fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    let (mut key0, mut key1) = (key as u32, (key >> 32) as u32);
    let mut state = counter;
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS.0) * u64::from(state[0]);
        let second = u64::from(MULTIPLIERS.1) * u64::from(state[2]);
        state = [
            (second >> 32) as u32 ^ state[1] ^ key0,
            second as u32,
            (first >> 32) as u32 ^ state[3] ^ key1,
            first as u32,
        ];
        key0 = key0.wrapping_add(WEYL.0);
        key1 = key1.wrapping_add(WEYL.1);
    }
    state
}

fn words(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}

/// A number in [0, 1) with 53 random bits: draw `draw` for the token at `position` of the stream `seed`.
#[must_use]
pub fn uniform(seed: u64, position: u64, draw: u32) -> f64 {
    let (low, high) = words(position);
    let block = philox(seed, [low, high, draw, 0]);
    let bits = (u64::from(block[1]) << 32 | u64::from(block[0])) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// The seed of a stream derived from another: completion `index` of a request seeded `seed`, or request `index` of an engine.
/// Index 0 gives an independent stream too, so a request's seed and its engine's never coincide.
#[must_use]
pub fn stream_seed(seed: u64, index: u64) -> u64 {
    let (low, high) = words(index);
    // The last counter word sets derived seeds apart from draws.
    let block = philox(seed, [low, high, 0, 1]);
    u64::from(block[1]) << 32 | u64::from(block[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_equals_the_published_vectors() {
        // Known answers of the Random123 distribution.
        assert_eq!(philox(0, [0; 4]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox(u64::MAX, [u32::MAX; 4]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        let counter = [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344];
        let key = 0x299F_31D0_A409_3822;
        assert_eq!(philox(key, counter), [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]);
    }

    #[test]
    fn draws_are_uniform_and_uncorrelated() {
        let mut bins = [0u32; 64];
        let count = 64 * 1000;
        for position in 0..count {
            bins[(uniform(7, position, 0) * 64.0) as usize] += 1;
        }
        let chi_square: f64 = bins.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi_square < 120.0, "63 degrees of freedom, chi-square {chi_square}"); // p < 1e-5 beyond
        let correlation: f64 =
            (0..count).map(|i| (uniform(7, i, 0) - 0.5) * (uniform(8, i, 0) - 0.5)).sum::<f64>()
                / count as f64;
        assert!(correlation.abs() < 0.002, "{correlation}");
    }

    #[test]
    fn streams_differ() {
        let seeds: std::collections::HashSet<u64> = (0..1000).map(|index| stream_seed(42, index)).collect();
        assert_eq!(seeds.len(), 1000);
        assert!(!seeds.contains(&42));
    }
}
