//! The sampler's distributions, order of steps, and edges.

use std::collections::BTreeMap;

use infer_engine::{SampleError, Sampler, SamplingParams, TokenHistory};

const DRAWS: u64 = 40_000;

fn draw(logits: &[f32], params: &SamplingParams, history: &TokenHistory) -> Vec<u64> {
    let mut sampler = Sampler::default();
    let mut counts = vec![0; logits.len()];
    for position in 0..DRAWS {
        counts[sampler.sample(logits, params, history, &[], 11, position).unwrap() as usize] += 1;
    }
    counts
}

/// Chi-square against probabilities; impossible tokens must never come.
fn assert_distribution(counts: &[u64], weights: &[f64]) {
    let total: f64 = weights.iter().sum();
    let mut chi_square = 0.0;
    for (&count, weight) in counts.iter().zip(weights) {
        let expected = weight / total * DRAWS as f64;
        if *weight == 0.0 {
            assert_eq!(count, 0, "{counts:?} against {weights:?}");
        } else {
            assert!(expected >= 5.0, "the test needs likelier tokens");
            chi_square += (count as f64 - expected).powi(2) / expected;
        }
    }
    assert!(chi_square < 40.0, "chi-square {chi_square}: {counts:?} against {weights:?}"); // p < 1e-5 at 7 degrees
}

fn weights(logits: &[f32], temperature: f64) -> Vec<f64> {
    logits.iter().map(|&logit| (f64::from(logit) / temperature).exp()).collect()
}

const LOGITS: [f32; 8] = [0.0, 1.0, 2.0, 0.5, 2.0, -1.0, 1.5, 0.0];

#[test]
fn plain_and_tempered_draws_follow_the_softmax() {
    for temperature in [0.5, 1.0, 2.0] {
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        let counts = draw(&LOGITS.map(|l| l / 2.0), &params, &TokenHistory::default());
        assert_distribution(&counts, &weights(&LOGITS.map(|l| l / 2.0), temperature));
    }
}

#[test]
fn top_k_keeps_exactly_k_and_lower_ids_win_ties() {
    let params = SamplingParams { top_k: 1, ..SamplingParams::default() };
    assert_distribution(&draw(&LOGITS, &params, &TokenHistory::default()), &[0., 0., 1., 0., 0., 0., 0., 0.]);
    let params = SamplingParams { top_k: 3, ..SamplingParams::default() };
    let mut expected = weights(&LOGITS, 1.0);
    [0, 1, 3, 5, 7].iter().for_each(|&token| expected[token] = 0.0);
    assert_distribution(&draw(&LOGITS, &params, &TokenHistory::default()), &expected);
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it() {
    // exp sums: 2.0 twice (7.389 each), 1.5 (4.482), 1.0 (2.718), 0.5 (1.649), 0 twice (1 each), -1 (0.368): 25.99
    for (top_p, kept) in [(0.28, vec![2]), (0.29, vec![2, 4]), (0.6, vec![2, 4, 6]), (0.8, vec![2, 4, 6, 1])]
    {
        let params = SamplingParams { top_p, ..SamplingParams::default() };
        let mut expected = weights(&LOGITS, 1.0);
        (0..8).filter(|token| !kept.contains(token)).for_each(|token| expected[token] = 0.0);
        assert_distribution(&draw(&LOGITS, &params, &TokenHistory::default()), &expected);
    }
}

#[test]
fn min_p_comes_first_and_top_p_renormalizes() {
    // min_p 0.5 leaves 2.0, 2.0 and 1.5 (0.607); of those top_p 0.7 of 19.26 needs the two largest.
    let params = SamplingParams { min_p: 0.5, top_p: 0.7, ..SamplingParams::default() };
    let mut expected = weights(&LOGITS, 1.0);
    [0, 1, 3, 5, 6, 7].iter().for_each(|&token| expected[token] = 0.0);
    assert_distribution(&draw(&LOGITS, &params, &TokenHistory::default()), &expected);
}

#[test]
fn top_p_over_a_large_flat_vocabulary_keeps_the_right_number() {
    let logits = vec![0.25f32; 5000];
    let params = SamplingParams { top_p: 0.9, ..SamplingParams::default() };
    let mut sampler = Sampler::default();
    let history = TokenHistory::default();
    let highest =
        (0..5000).map(|i| sampler.sample(&logits, &params, &history, &[], 3, i).unwrap()).max().unwrap();
    assert!((4400..4501).contains(&highest), "{highest}");
}

#[test]
fn penalties_work_on_prompt_and_output_as_in_vllm() {
    let history = TokenHistory { prompt: [2, 5].into(), output: [(4, 2), (5, 1)].into() };
    let repetition = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    let mut logits = LOGITS;
    (logits[2], logits[4], logits[5]) = (1.0, 1.0, -2.0);
    assert_distribution(&draw(&LOGITS, &repetition, &history), &weights(&logits, 1.0));

    let both = SamplingParams { presence_penalty: 0.25, frequency_penalty: 0.5, ..SamplingParams::default() };
    let mut logits = LOGITS;
    logits[4] -= 0.25 + 2.0 * 0.5;
    logits[5] -= 0.25 + 0.5;
    assert_distribution(&draw(&LOGITS, &both, &history), &weights(&logits, 1.0));
}

#[test]
fn greedy_takes_the_lowest_id_of_equals_after_bias_and_masks() {
    let mut sampler = Sampler::default();
    let mut greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let history = TokenHistory::default();
    let mut choose =
        |params: &SamplingParams, banned: &[u32]| sampler.sample(&LOGITS, params, &history, banned, 0, 0);
    assert_eq!(choose(&greedy, &[]), Ok(2));
    assert_eq!(choose(&greedy, &[2]), Ok(4));
    greedy.logit_bias = BTreeMap::from([(7, 3.0), (2, -1.0)]);
    assert_eq!(choose(&greedy, &[]), Ok(7));
    greedy.allowed_token_ids = Some(vec![5, 0]);
    assert_eq!(choose(&greedy, &[]), Ok(0));
    assert_eq!(choose(&greedy, &[0, 5]), Err(SampleError::NothingLeft));
}

#[test]
fn broken_logits_fail_and_masked_ones_do_not() {
    let mut sampler = Sampler::default();
    let history = TokenHistory::default();
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        let mut choose = |logits: &[f32]| sampler.sample(logits, &params, &history, &[], 0, 0);
        assert_eq!(choose(&[0.0, f32::NAN, 0.0]), Err(SampleError::NotFinite { token: 1 }));
        assert_eq!(choose(&[0.0, 0.0, f32::INFINITY]), Err(SampleError::NotFinite { token: 2 }));
        assert_eq!(choose(&[f32::NEG_INFINITY, 1.0]), Ok(1));
        assert_eq!(choose(&[f32::NEG_INFINITY; 2]), Err(SampleError::NothingLeft));
    }
}

#[test]
fn tiny_temperatures_do_not_overflow() {
    let mut sampler = Sampler::default();
    let params = SamplingParams { temperature: 1e-300, top_p: 0.9, ..SamplingParams::default() };
    let chosen = sampler.sample(&[1e30, 3e38, -3e38], &params, &TokenHistory::default(), &[], 5, 9);
    assert_eq!(chosen, Ok(1));
}

#[test]
fn a_draw_depends_on_seed_and_position_only() {
    let (mut fresh, mut used) = (Sampler::default(), Sampler::default());
    let params = SamplingParams { top_k: 5, top_p: 0.95, ..SamplingParams::default() };
    let history = TokenHistory::default();
    let mut tokens = [Vec::new(), Vec::new()];
    for position in 0..200 {
        tokens[0].push(fresh.sample(&LOGITS, &params, &history, &[], 1, position).unwrap());
        used.sample(&[3.0; 100], &SamplingParams::default(), &history, &[], 99, position).unwrap();
        tokens[1].push(used.sample(&LOGITS, &params, &history, &[], 1, position).unwrap());
    }
    assert_eq!(tokens[0], tokens[1]);
    let other: Vec<u32> = (0..200)
        .map(|position| fresh.sample(&LOGITS, &params, &history, &[], 2, position).unwrap())
        .collect();
    assert_ne!(tokens[0], other);
}
