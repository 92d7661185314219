//! Every instruction set against the scalar one, bit for bit.

use super::*;

/// Every operation on the same lanes, as bits.
struct Everything {
    a: [f32; LANES],
    b: [f32; LANES],
    words: [i32; LANES],
}

impl Kernel for Everything {
    type Output = Vec<[i32; LANES]>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let (a, b, w) = (s.load(&self.a), s.load(&self.b), s.load_i32(&self.words));
        let mut out = Vec::new();
        let mut keep = |bits: S::I32| {
            let mut lanes = [0; LANES];
            s.store_i32(bits, &mut lanes);
            out.push(lanes);
        };
        let c = s.splat(0.37);
        for value in [
            s.add(a, b),
            s.sub(a, b),
            s.mul(a, b),
            s.div(a, b),
            s.mul_add(a, b, c),
            s.max(a, b),
            s.min(a, b),
            s.sqrt(s.abs(a)),
            s.round(a),
            s.select_greater(a, b, c, a),
            s.splat(s.reduce_sum(a)),
            s.splat(s.reduce_max(a)),
            s.to_f32(w),
            s.load_partial(&self.a[..7]),
        ] {
            keep(s.to_bits(value));
        }
        let nibbles = s.and_i32(w, s.splat_i32(0x0f0f_0f0f));
        let row: [u8; 32] =
            std::array::from_fn(|i| (self.words[i / 4] >> (i % 4 * 8)) as u8).map(|i| i | u8::from(i == 128));
        let total: i32 = row.iter().map(|&i| i32::from(i as i8)).sum();
        let weights: [u8; 512] = std::array::from_fn(|i| (self.words[i % 16] >> (i / 32)) as u8);
        let [bytes] = s.dot_bytes(&weights, &[row], &[-128 * total]);
        let other = weights.map(|byte| !byte);
        let [[first], [second]] = s.dot_bytes_of_two([&weights, &other], &[row], &[-128 * total]);
        let [nibble_sums, again] =
            s.dot_nibbles(weights.first_chunk().unwrap_or(&[0; 256]), &[row; 2], &[-8 * total; 2]);
        let halves = s.splat_i32(0x0101_0101_u32.wrapping_mul(u32::from(row[0])) as i32 & 0x7f00_7f00);
        let drops = s.splat_i32(i32::from_le_bytes([row[1], row[2], row[1], row[2]]));
        let [low, high] = s.scale_codes::<true>(w, halves, drops);
        let [plain_low, plain_high] = s.scale_codes::<false>(w, halves, drops);
        for value in [
            s.add_i32(w, nibbles),
            s.sub_i32(nibbles, w),
            s.mul_add_i32(w, nibbles, s.splat_i32(-5)),
            s.mul_add_i16(s.sub_i32(s.shift_right(w, 17), s.splat_i32(1 << 14)), s.shift_right(w, 16), w),
            low,
            high,
            plain_low,
            plain_high,
            s.or_i32(w, nibbles),
            s.xor_i32(w, nibbles),
            s.shift_left(w, 5),
            s.shift_right(w, 5),
            s.select_greater_i32(w, nibbles, s.splat_i32(7), w),
            s.to_i32(a),
            s.splat_i32(s.reduce_sum_i32(w)),
            s.splat_i32(s.reduce_max_i32(w)),
            s.max_i32(w, nibbles),
            s.dot_i16(nibbles, w, self.words[3]),
            nibble_sums,
            again,
            bytes,
            first,
            second,
        ] {
            keep(value);
        }
        for value in products(s, w, &row) {
            let mut lanes = [0; LANES];
            s.store_i32(value, &mut lanes);
            out.push(lanes);
        }
        out.extend(narrow(s, a, w));
        out
    }
}

/// Dot products of every width, and a lookup.
#[inline(always)]
fn products<S: Simd>(s: S, w: S::I32, row: &[u8; 32]) -> [S::I32; 6] {
    let four = s.and_i32(w, s.splat_i32(0x0f0f_0f0f));
    let five = s.and_i32(w, s.splat_i32(0x1f1f_1f1f));
    let six = s.and_i32(w, s.splat_i32(0x3f3f_3f3f));
    let table = std::array::from_fn(|i| row[i] ^ row[i + 16]);
    let found = s.lookup(&table, four);
    let [of_four] = s.dot::<_, 8, 1, 4>(&[four; 8], &[*row], 0, &[11]);
    let [of_five, again] = s.dot::<_, 8, 2, 5>(&[five; 8], &[*row; 2], 0, &[-5; 2]);
    let [of_six] = s.dot::<_, 4, 1, 6>(&[six; 4], &[*row], 4, &[0]);
    let total: i32 = row[16..].iter().map(|&i| i32::from(i as i8)).sum();
    let [of_eight] = s.dot::<_, 4, 1, 8>(&[found; 4], &[*row], 4, &[-128 * total]);
    [found, of_four, of_five, again, of_six, of_eight]
}

#[inline(always)]
fn narrow<S: Simd>(s: S, a: S::F32, w: S::I32) -> Vec<[i32; LANES]> {
    let (mut half, mut brain, mut bytes, mut part) = ([0; LANES], [0; LANES], [0; LANES], [0.0; 5]);
    s.store_f16(a, &mut half);
    s.store_bf16(a, &mut brain);
    s.store_low_bytes(w, &mut bytes);
    s.store_partial(a, &mut part);
    let mut out = vec![half.map(i32::from), brain.map(i32::from), bytes.map(i32::from)];
    for value in [
        s.load_f16(&half),
        s.load_bf16(&brain),
        s.load_partial(&part),
        s.to_f32(s.load_i8(&bytes.map(|byte| byte as i8))),
        s.load_e4m3(&bytes),
    ] {
        let mut lanes = [0.0; LANES];
        s.store(value, &mut lanes);
        out.push(lanes.map(|lane| lane.to_bits() as i32));
    }
    out
}

#[test]
fn every_instruction_set_agrees_with_the_scalar_one() {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    };
    for _ in 0..200 {
        let mut float = || (next() as i32 as f32) / 65536.0 / (1 << (next() % 20)) as f32;
        let (a, b) = (std::array::from_fn(|_| float()), std::array::from_fn(|_| float()));
        let words = std::array::from_fn(|_| next() as i32);
        let expected = Isa::Scalar.dispatch(Everything { a, b, words });
        for isa in Isa::available() {
            assert_eq!(isa.dispatch(Everything { a, b, words }), expected, "{}", isa.name());
        }
    }
}

#[test]
fn bfloat16_rounds_to_even_and_keeps_specials() {
    let cases = [
        (1.0 + 1.0 / 256.0, 0x3f80), // a tie, to even
        (1.0 + 3.0 / 256.0, 0x3f82),
        (f32::INFINITY, 0x7f80),
        (f32::MAX, 0x7f80),
        (-0.0, 0x8000),
    ];
    struct Store([f32; LANES]);
    impl Kernel for Store {
        type Output = [u16; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [u16; LANES] {
            let mut out = [0; LANES];
            s.store_bf16(s.load(&self.0), &mut out);
            out
        }
    }
    for isa in Isa::available() {
        for (value, bits) in cases {
            assert_eq!(isa.dispatch(Store([value; LANES])), [bits; LANES], "{value}");
        }
        let nan = isa.dispatch(Store([f32::NAN; LANES]))[0];
        assert!(half::bf16::from_bits(nan).is_nan());
    }
}

#[test]
fn names_are_checked() {
    assert_eq!(Isa::from_name("scalar").unwrap(), Isa::Scalar);
    assert_eq!(Isa::from_name("").unwrap(), Isa::detect());
    assert!(Isa::from_name("sse9").unwrap_err().to_string().contains("\"sse9\""));
    for isa in Isa::ALL {
        assert_eq!(Isa::from_name(isa.name()).is_ok(), isa.is_available());
    }
}

/// `tools/aarch64.py` knows what its emulated processors have.
#[test]
fn the_best_is_the_one_that_is_expected() {
    if let Ok(name) = std::env::var("INFER_TEST_BEST_ISA") {
        assert_eq!(Isa::detect().name(), name);
    }
}
