//! Weights that no file has: random ones, for trying shapes whose files are not there. A value follows from the seed, from what the weight
//! is for and from its place alone, so that the same seed gives the same weights on every backend, in any order and in parts.
//!
//! A weight has a seed of its own. Its values are multiples of 2^-13 between -2^-5 and 2^-5, which bfloat16 holds exactly: of eight
//! neighbours, the bytes of one word of SplitMix64, as numbers from -128 to 127, twice that and one more. `cuda/random.cu` makes the same.

use std::borrow::Cow;

use infer_kernels::Format;

use crate::step::{Role, WeightKey};
use crate::weights::{Loader, Table};

/// What messages call a weight.
const NAME: &str = "of load_format \"dummy\"";

/// The format of random weights.
pub(crate) const FORMAT: Format = Format::Bf16;

/// The seed of one weight.
fn seed_of(seed: u64, key: &WeightKey) -> u64 {
    let digest = blake3::hash(format!("{seed} {key:?}").as_bytes());
    digest.as_bytes().first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

/// Word `number` of a stream.
fn word(seed: u64, number: u64) -> u64 {
    let mixed = seed.wrapping_add((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// The first values of a weight, as bytes of bfloat16.
fn values(seed: u64, count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count.next_multiple_of(8) * 2);
    for number in 0..count.div_ceil(8) as u64 {
        for byte in word(seed, number).to_le_bytes() {
            let value = f32::from(2 * i16::from(byte as i8) + 1) / 8192.0;
            bytes.extend(((value.to_bits() >> 16) as u16).to_le_bytes());
        }
    }
    bytes.truncate(count * 2);
    bytes
}

impl<'a> Loader<'a> {
    /// The seed of a weight, where weights are random.
    pub fn random_seed(&self, key: &WeightKey) -> Option<u64> {
        let seed = self.checkpoint.dummy?;
        let role = if key.role == Role::Head && self.spec.tied { Role::Embedding } else { key.role };
        Some(seed_of(seed, &WeightKey { role, ..*key }))
    }

    /// A weight, where weights are random.
    pub fn random_table(&self, key: &WeightKey, rows: usize, columns: usize) -> Option<Table<'a>> {
        let bytes = Cow::Owned(values(self.random_seed(key)?, rows * columns));
        Some(Table { name: NAME, format: FORMAT, columns, bytes, scaled: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_small_different_and_do_not_depend_on_how_many_are_asked_for() {
        let (many, few) = (values(7, 4099), values(7, 13));
        assert_eq!((many.len(), &many[..26]), (8198, &few[..]));
        let numbers: Vec<f32> =
            many.as_chunks().0.iter().map(|two| half::bf16::from_le_bytes(*two).to_f32()).collect();
        assert!(numbers.iter().all(|value| value.abs() < 0.032 && *value != 0.0));
        let mean = numbers.iter().sum::<f32>() / 4099.0;
        let spread = (numbers.iter().map(|value| value * value).sum::<f32>() / 4099.0).sqrt();
        assert!(mean.abs() < 1e-3 && (0.017..0.019).contains(&spread), "{mean} {spread}");
        let key = WeightKey { role: Role::Query, layer: Some(3), expert: None };
        let other = WeightKey { role: Role::Key, ..key };
        let seeds = [seed_of(0, &key), seed_of(1, &key), seed_of(0, &other)];
        assert!(seeds[0] != seeds[1] && seeds[0] != seeds[2] && seeds[0] == seed_of(0, &key));
    }

    #[test]
    fn the_first_words_are_those_of_splitmix64() {
        // Of the reference implementation, seed 1234567.
        assert_eq!(
            [word(1_234_567, 0), word(1_234_567, 1)],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]
        );
    }
}
