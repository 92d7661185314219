//! Row operations against their oracles in f64, on every instruction set, and their independence of other rows and of threads.

mod ops_support;

use infer_kernels::{
    Activation, Context, Isa, Norm, NormKind, RopeStyle, Rows, RowsMut, activation_in_place, add_in_place,
    gated_activation, norm, norm_in_place, norm_ref, rope_in_place, rope_ref, scale_in_place,
    softcap_in_place,
};
use ops_support::{Random, assert_near, bits, context};
use proptest::prelude::*;

const ACTIVATIONS: [Activation; 5] =
    [Activation::Silu, Activation::GeluTanh, Activation::GeluErf, Activation::Relu, Activation::ReluSquared];

/// Runs `operation` on every instruction set; results must be equal bit for bit. Returns them once.
fn on_all(threads: usize, data: &[f32], operation: impl Fn(&Context, &mut [f32])) -> Vec<f32> {
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        let mut values = data.to_vec();
        operation(&context(isa, threads), &mut values);
        let expected = first.get_or_insert_with(|| values.clone());
        assert_eq!(bits(&values), bits(expected), "{} differs from scalar", isa.name());
    }
    first.unwrap()
}

/// The same rows all together, on several threads, and one by one must give the same bits.
fn assert_rows_are_independent(width: usize, data: &[f32], operation: impl Fn(&Context, RowsMut<'_>, usize)) {
    for isa in Isa::available() {
        let rows = data.len() / width;
        let mut alone = data.to_vec();
        for (row, values) in alone.chunks_exact_mut(width).enumerate() {
            operation(&context(isa, 1), RowsMut::new(values, 1, width, width), row);
        }
        for threads in [1, 2, 3, 5] {
            let mut together = data.to_vec();
            operation(&context(isa, threads), RowsMut::new(&mut together, rows, width, width), 0);
            assert_eq!(bits(&together), bits(&alone), "{} with {threads} threads", isa.name());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn norms_match_the_oracle(
        seed in any::<u64>(), group in 1usize..200, groups in 1usize..5, layer in any::<bool>(),
        weighted in 0u8..3, biased in any::<bool>(),
    ) {
        let mut random = Random(seed);
        let width = group * groups;
        let data: Vec<f32> = random.values(3 * width).iter().map(|x| x * 4.0 + 0.5).collect();
        let parameters = if weighted == 2 { width } else { group };
        let (weight, bias) = (random.values(parameters), random.values(parameters));
        let norm = Norm {
            kind: if layer { NormKind::Layer } else { NormKind::Rms },
            groups,
            weight: (weighted > 0).then_some(&weight[..]),
            bias: biased.then_some(&bias[..]),
            epsilon: 1e-5,
        };
        let output = on_all(2, &data, |context, values| norm_in_place(context, &norm, RowsMut::new(values, 3, width, width)));
        for (row, output) in data.chunks_exact(width).zip(output.chunks_exact(width)) {
            // A group whose values are almost equal loses digits in x - mean, in any order of summing.
            assert_near(output, &norm_ref(&norm, row), 2e-4, "norm");
        }
    }

    #[test]
    fn rope_matches_the_oracle(
        seed in any::<u64>(), heads in 1usize..4, pairs in 0usize..40, rest in 0usize..20, interleaved in any::<bool>(),
    ) {
        let style = if interleaved { RopeStyle::Interleaved } else { RopeStyle::Half };
        let (rotary_dim, head_dim) = (2 * pairs, 2 * pairs + rest.max(usize::from(pairs == 0)));
        let mut random = Random(seed);
        let data = random.values(2 * heads * head_dim);
        let (cos, sin) = (random.values(2 * pairs), random.values(2 * pairs));
        let width = heads * head_dim;
        let output = on_all(1, &data, |context, values| {
            let rows = RowsMut::new(values, 2, width, width);
            rope_in_place(context, rows, heads, head_dim, &cos, &sin, rotary_dim, style);
        });
        for (i, (head, output)) in data.chunks_exact(head_dim).zip(output.chunks_exact(head_dim)).enumerate() {
            let angles = i / heads * pairs..(i / heads + 1) * pairs;
            assert_near(output, &rope_ref(head, &cos[angles.clone()], &sin[angles], style), 1e-6, "rope");
        }
    }

    #[test]
    fn activations_match_the_oracle(seed in any::<u64>(), width in 1usize..100) {
        let mut random = Random(seed);
        let gate: Vec<f32> = random.values(2 * width).iter().map(|x| x * 12.0).collect();
        let up = random.values(2 * width);
        for activation in ACTIVATIONS {
            let exact: Vec<f64> = gate.iter().map(|&x| activation.reference(f64::from(x))).collect();
            let alone = on_all(1, &gate, |context, values| {
                activation_in_place(context, activation, RowsMut::new(values, 2, width, width));
            });
            assert_near(&alone, &exact, 1e-6, &format!("{activation:?}"));
            let gated = on_all(1, &gate, |context, values| {
                let (gate, up) = (Rows::new(&gate, 2, width, width), Rows::new(&up, 2, width, width));
                gated_activation(context, activation, gate, up, RowsMut::new(values, 2, width, width));
            });
            let exact: Vec<f64> = exact.iter().zip(&up).map(|(&a, &u)| a * f64::from(u)).collect();
            assert_near(&gated, &exact, 1e-6, &format!("gated {activation:?}"));
        }
    }

    #[test]
    fn elementwise_matches_plain_arithmetic(seed in any::<u64>(), width in 1usize..100, scale in -3.0f32..3.0) {
        let mut random = Random(seed);
        let (data, source) = (random.values(2 * width), random.values(2 * width));
        let added = on_all(1, &data, |context, values| {
            add_in_place(context, RowsMut::new(values, 2, width, width), Rows::new(&source, 2, width, width), scale);
        });
        let expected: Vec<f32> = data.iter().zip(&source).map(|(&d, &s)| scale.mul_add(s, d)).collect();
        prop_assert_eq!(bits(&added), bits(&expected));
        let scaled = on_all(1, &data, |context, values| scale_in_place(context, RowsMut::new(values, 2, width, width), scale));
        prop_assert_eq!(bits(&scaled), bits(&data.iter().map(|x| x * scale).collect::<Vec<_>>()));
        let large: Vec<f32> = data.iter().map(|x| x * 100.0).collect();
        let capped = on_all(1, &large, |context, values| softcap_in_place(context, RowsMut::new(values, 2, width, width), 30.0));
        let exact: Vec<f64> = large.iter().map(|&x| 30.0 * (f64::from(x) / 30.0).tanh()).collect();
        assert_near(&capped, &exact, 1e-6, "softcap");
    }
}

#[test]
fn non_finite_values_stay_visible() {
    let inputs = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -200.0, 200.0, 0.0];
    for activation in ACTIVATIONS {
        for isa in Isa::available() {
            let mut values = inputs;
            activation_in_place(&context(isa, 1), activation, RowsMut::new(&mut values, 1, 6, 6));
            assert!(values[0].is_nan(), "{activation:?} hides NaN");
            assert_eq!(values[1], f32::INFINITY, "{activation:?}");
            assert_eq!(values[3], 0.0, "{activation:?}");
            assert!(values[4] >= 200.0 && values[5] == 0.0, "{activation:?}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_others_or_on_threads() {
    let (rows, heads, head_dim) = (67, 33, 80);
    let width = heads * head_dim;
    let mut random = Random(7);
    let data = random.values(rows * width);
    let (cos, sin) = (random.values(rows * 20), random.values(rows * 20));
    let weight = random.values(width);
    for kind in [NormKind::Rms, NormKind::Layer] {
        for groups in [1, heads] {
            let norm = Norm { kind, groups, weight: Some(&weight), bias: None, epsilon: 1e-6 };
            assert_rows_are_independent(width, &data, |context, rows, _| norm_in_place(context, &norm, rows));
        }
    }
    assert_rows_are_independent(width, &data, |context, values, first| {
        let angles = first * 20..(first + values.rows()) * 20;
        rope_in_place(
            context,
            values,
            heads,
            head_dim,
            &cos[angles.clone()],
            &sin[angles],
            40,
            RopeStyle::Half,
        );
    });
    assert_rows_are_independent(width, &data, |context, values, _| softcap_in_place(context, values, 5.0));
    assert_rows_are_independent(width, &data, |context, values, first| {
        let count = values.rows();
        let source = Rows::new(&data[first * width..][..count * width], count, width, width);
        gated_activation(context, Activation::Silu, source, source, values);
    });
}

#[test]
fn norm_leaves_its_input_and_matches_in_place() {
    let data = Random(3).values(5 * 70);
    let norm_of_rows = Norm { kind: NormKind::Rms, groups: 2, weight: None, bias: None, epsilon: 1e-6 };
    let context = context(Isa::detect(), 2);
    let (mut output, mut in_place) = (vec![9.0; 5 * 80], data.clone());
    norm(&context, &norm_of_rows, Rows::new(&data, 5, 70, 70), RowsMut::new(&mut output, 5, 70, 80));
    norm_in_place(&context, &norm_of_rows, RowsMut::new(&mut in_place, 5, 70, 70));
    for (row, expected) in output.chunks_exact(80).zip(in_place.chunks_exact(70)) {
        assert_eq!(bits(&row[..70]), bits(expected));
        assert_eq!(row[70..], [9.0; 10], "values between rows were touched");
    }
}

#[test]
#[should_panic(expected = "do not divide")]
fn groups_that_do_not_divide_are_refused() {
    let norm = Norm { kind: NormKind::Rms, groups: 3, weight: None, bias: None, epsilon: 1e-6 };
    norm_in_place(&context(Isa::Scalar, 1), &norm, RowsMut::new(&mut [0.0; 16], 1, 16, 16));
}
