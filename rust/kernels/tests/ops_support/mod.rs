//! What the tests of the operations share.

use infer_kernels::{Context, Isa, Pool};

/// A small generator of repeatable numbers (splitmix64).
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number in -1..1.
    pub fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `count` numbers in -1..1.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }
}

/// A context of one instruction set.
pub fn context(isa: Isa, threads: usize) -> Context {
    Context { isa, pool: Pool::shared(threads).unwrap() }
}

/// Bits, to compare exactly.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Panics unless every value is within `tolerance` of its reference, absolutely plus relatively.
pub fn assert_near(values: &[f32], reference: &[f64], tolerance: f64, what: &str) {
    assert_eq!(values.len(), reference.len(), "{what}");
    for (i, (&value, &exact)) in values.iter().zip(reference).enumerate() {
        let difference = (f64::from(value) - exact).abs();
        assert!(
            difference <= tolerance * (1.0 + exact.abs()),
            "{what}: value {i} is {value}, expected {exact}"
        );
    }
}
