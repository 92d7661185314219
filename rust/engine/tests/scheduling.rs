//! The scheduler's promises, one at a time: what is computed, in which order, and what is shared.

mod common;

use std::time::Duration;

use common::{FakeDevice, config};
use infer_engine::{
    Batch, Core, EngineConfig, EventKind, RequestId, RequestKind, RequestOptions, SamplingParams, Submission,
};

struct Engine {
    core: Core,
    device: FakeDevice,
    next: RequestId,
    now: Duration,
}

impl Engine {
    fn new(config: EngineConfig) -> Self {
        Self {
            device: FakeDevice::new(&config),
            core: Core::new(config).expect("valid"),
            next: 0,
            now: Duration::ZERO,
        }
    }

    fn submit(&mut self, prompt: &[u32], params: SamplingParams) -> RequestId {
        self.submit_with(prompt, params, RequestOptions::default())
    }

    fn submit_with(&mut self, prompt: &[u32], params: SamplingParams, options: RequestOptions) -> RequestId {
        let kind = RequestKind::Generate(Box::new(SamplingParams { ignore_eos: true, ..params }));
        let submission = Submission { id: self.next, prompt: prompt.into(), kind, text: None, options };
        self.core.submit(submission, self.now).expect("accepted");
        self.next += 1;
        self.next - 1
    }

    fn step(&mut self) -> Option<Batch> {
        self.step_of(Duration::ZERO)
    }

    /// A step whose rows take so long each.
    fn step_of(&mut self, row: Duration) -> Option<Batch> {
        let batch = self.core.next_batch(self.now)?;
        let mut logits = Vec::new();
        self.device.compute(&batch, &mut logits).expect("the fake device succeeds");
        self.now += row * batch.tokens.len() as u32;
        self.core.commit(&logits, self.now);
        Some(batch)
    }

    /// Runs to the end; rows computed.
    fn finish(&mut self) -> usize {
        let before = self.device.rows;
        while self.step().is_some() {}
        assert!(self.core.is_idle());
        self.device.rows - before
    }

    fn tokens(&mut self, id: RequestId) -> Vec<u32> {
        let mut tokens = Vec::new();
        for event in self.core.take_events() {
            if let EventKind::Token { token, .. } = event.kind
                && event.request == id
            {
                tokens.push(token);
            }
        }
        tokens
    }
}

fn tokens(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| 1 + i * 7 % 47).collect()
}

#[test]
fn beside_running_completions_a_prompt_gets_what_fits_into_the_target() {
    for (target, expected) in [(Some(100), 50), (Some(1), 1 + 16), (None, 200)] {
        let step_time_target = target.map(Duration::from_millis);
        let limits = EngineConfig { step_time_target, max_num_batched_tokens: 200, ..config(200, 4) };
        let mut engine = Engine::new(limits);
        let row = Duration::from_millis(2);
        let rows = |batch: Option<Batch>| batch.map(|batch| batch.tokens.len());
        engine.submit(&prompt(210), tokens(40));
        assert_eq!(rows(engine.step_of(row)), Some(200), "nobody waits for a token yet");
        assert_eq!(rows(engine.step_of(row)), Some(10));
        let other: Vec<u32> = prompt(300).into_iter().rev().collect();
        engine.submit(&other, tokens(1));
        assert_eq!(rows(engine.step_of(row)), Some(expected), "{target:?}");
    }
}

#[test]
fn completions_that_nobody_watches_wait_as_long_as_it_takes() {
    for (watched, expected) in [(false, 200), (true, 50)] {
        let mut engine = Engine::new(EngineConfig { max_num_batched_tokens: 200, ..config(200, 4) });
        let row = Duration::from_millis(2);
        let rows = |batch: Option<Batch>| batch.map(|batch| batch.tokens.len());
        let unwatched = || RequestOptions { final_only: true, ..RequestOptions::default() };
        engine.submit_with(&prompt(200), tokens(40), unwatched());
        assert_eq!(rows(engine.step_of(row)), Some(200));
        if watched {
            engine.submit(&prompt(9), tokens(40));
        }
        assert!(rows(engine.step_of(row)).is_some());
        let other: Vec<u32> = prompt(300).into_iter().rev().collect();
        engine.submit_with(&other, tokens(1), unwatched());
        assert_eq!(rows(engine.step_of(row)), Some(expected), "{watched}");
    }
}

#[test]
fn a_step_that_is_cut_has_whole_units_of_rows() {
    let row_unit = 4;
    let limits = EngineConfig { row_unit, max_num_batched_tokens: 200, ..config(200, 4) };
    let mut engine = Engine::new(limits);
    let row = Duration::from_micros(2100);
    let rows = |batch: Option<Batch>| batch.map(|batch| batch.tokens.len());
    engine.submit(&prompt(210), tokens(40));
    assert_eq!(rows(engine.step_of(row)), Some(200));
    assert_eq!(rows(engine.step_of(row)), Some(10));
    let other: Vec<u32> = prompt(300).into_iter().rev().collect();
    engine.submit(&other, tokens(1));
    assert_eq!(rows(engine.step_of(row)), Some(44), "47 would fit, and steps of that many are padded to 48");
}

#[test]
fn a_common_beginning_is_computed_once() {
    let mut engine = Engine::new(config(64, 4));
    engine.submit(&prompt(41), tokens(1));
    assert_eq!(engine.finish(), 41);
    engine.submit(&prompt(41), tokens(1));
    assert_eq!(engine.finish(), 1, "ten full pages are found, the last token gives the logits");
    engine.submit(&prompt(30), tokens(1));
    assert_eq!(
        engine.finish(),
        1,
        "seven full pages are found, and a page that begins with the next token is copied"
    );
    engine.submit(&prompt(41)[1..], tokens(1));
    assert_eq!(engine.finish(), 40, "the same tokens at other positions are another prefix");
    assert_eq!(engine.core.metrics().cached_tokens, 40 + 29);
    assert_eq!(engine.core.metrics().copied_pages, 1);
}

#[test]
fn a_conversation_finds_its_own_answer() {
    let mut engine = Engine::new(config(64, 4));
    let id = engine.submit(&prompt(10), tokens(10));
    engine.finish();
    let mut next = prompt(10);
    next.extend(engine.tokens(id));
    next.push(3);
    engine.submit(&next, tokens(1));
    // The answer's last token was never computed, so 19 tokens are in the cache: 4 full pages and one of three tokens.
    assert_eq!(engine.finish(), 21 - 19);
}

#[test]
fn without_a_prefix_cache_only_completions_of_one_request_share() {
    let mut engine = Engine::new(EngineConfig { enable_prefix_caching: false, ..config(64, 4) });
    engine.submit(&prompt(41), tokens(1));
    assert_eq!(engine.finish(), 41);
    engine.submit(&prompt(41), tokens(1));
    assert_eq!(engine.finish(), 41);
    engine.submit(&prompt(41), SamplingParams { n: 5, ..tokens(1) });
    assert_eq!(engine.finish(), 41 + 4, "four completions compute only the last token again");
    engine.submit(&prompt(41), tokens(1));
    assert_eq!(engine.finish(), 41);
}

#[test]
fn a_long_prompt_never_stalls_a_running_completion() {
    let mut engine = Engine::new(config(128, 4));
    let early = engine.submit(&[1, 2, 3], tokens(50));
    engine.step();
    engine.submit(&prompt(300), tokens(1));
    for _ in 0..9 {
        let batch = engine.step().expect("work");
        assert_eq!(batch.tokens.len(), 32, "the budget is used");
        assert_eq!(batch.sequences[0].rows, 1);
    }
    assert_eq!(engine.tokens(early).len(), 10);
}

#[test]
fn first_come_first_served_and_the_earliest_keeps_its_pages() {
    // Eight pages of four tokens: two sequences of 28 tokens cannot both end with theirs. The later one meets the shortage first.
    let mut engine = Engine::new(EngineConfig { max_model_len: 32, ..config(8, 4) });
    let ids: Vec<RequestId> = [13, 16]
        .map(|length| {
            let mut prompt = prompt(length);
            prompt[0] = 30 + length;
            engine.submit(&prompt, tokens(28 - length as usize))
        })
        .into();
    while engine.step().is_some() {}
    let ends: Vec<(RequestId, u64)> = engine
        .core
        .take_events()
        .into_iter()
        .filter(|event| matches!(event.kind, EventKind::Done { .. }))
        .map(|event| (event.request, event.metrics.preemptions))
        .collect();
    assert_eq!(ends[0], (ids[0], 0));
    assert_eq!(ends[1].0, ids[1]);
    assert!(ends[1].1 >= 1, "the later one gave way");
}

#[test]
fn keys_and_values_of_a_broken_step_are_not_shared() {
    let mut engine = Engine::new(config(64, 4));
    engine.device.nan_every = Some(1);
    engine.submit(&prompt(9), tokens(1));
    assert_eq!(engine.finish(), 9);
    assert_eq!(engine.core.metrics().requests_failed, 1);
    engine.device.nan_every = None;
    engine.submit(&prompt(9), tokens(1));
    assert_eq!(engine.finish(), 9);
}

#[test]
fn penalties_count_what_was_generated() {
    let mut engine = Engine::new(config(64, 4));
    let bias = SamplingParams { temperature: 0.0, logit_bias: [(3, 40.0)].into(), ..tokens(60) };
    let free = engine.submit(&[1], bias.clone());
    engine.finish();
    assert!(engine.tokens(free).iter().all(|&token| token == 3), "the bias outweighs all logits");
    let penalized = engine.submit(&[1], SamplingParams { frequency_penalty: 2.0, ..bias });
    engine.finish();
    let generated = engine.tokens(penalized);
    let first_other = generated.iter().position(|&token| token != 3).expect("the penalty outgrows the bias");
    assert!((16..=24).contains(&first_other), "{generated:?}");
}

#[test]
fn prompt_logprobs_read_nothing_from_the_cache_but_fill_it() {
    let mut engine = Engine::new(config(64, 4));
    engine.submit(&prompt(21), tokens(1));
    engine.finish();
    engine.submit(&prompt(21), SamplingParams { prompt_logprobs: Some(1), ..tokens(1) });
    assert_eq!(engine.finish(), 21);
}

#[test]
fn a_sequence_that_outgrows_the_short_context_starts_over_with_the_long_one() {
    let mut engine = Engine::new(EngineConfig { context_switch: Some(16), ..config(64, 4) });
    engine.submit(&prompt(12), tokens(9));
    let mut seen = Vec::new();
    while let Some(batch) = engine.step() {
        let sequence = &batch.sequences[0];
        seen.push((sequence.first_position, sequence.rows, sequence.long_context));
    }
    // Tokens 12..=15 come from the short encoding; with 17 tokens everything is computed again.
    let short = [(0, 12, false), (12, 1, false), (13, 1, false), (14, 1, false), (15, 1, false)];
    let long = [(0, 17, true), (17, 1, true), (18, 1, true), (19, 1, true)];
    assert_eq!(seen, [&short[..], &long[..]].concat());
    engine.submit(&prompt(16), tokens(1));
    assert_eq!(engine.finish(), 16 - 12, "short pages are shared with short sequences");
    engine.submit(&prompt(17), tokens(1));
    assert_eq!(engine.finish(), 17 - 12, "and long pages with long ones");
}

#[test]
fn budgets_hold_and_waiting_requests_follow() {
    let mut engine =
        Engine::new(EngineConfig { max_num_seqs: 2, max_num_batched_tokens: 5, ..config(64, 4) });
    for first in 0..4 {
        engine.submit(&[first + 1, 2, 3, 4], tokens(3));
    }
    let mut widest = 0;
    while let Some(batch) = engine.step() {
        widest = widest.max(batch.sequences.len());
        assert!(batch.tokens.len() <= 5 && batch.sequences.len() <= 2);
    }
    assert_eq!((widest, engine.core.metrics().requests_finished), (2, 4));
}

#[test]
fn seeded_completions_differ_among_themselves_and_repeat() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let mut engine = Engine::new(config(64, 4));
        engine.submit(&prompt(9), SamplingParams { n: 3, seed: Some(5), temperature: 1.5, ..tokens(12) });
        engine.finish();
        let mut completions = vec![Vec::new(); 3];
        for event in engine.core.take_events() {
            if let EventKind::Token { index, token, .. } = event.kind {
                completions[index as usize].push(token);
            }
        }
        runs.push(completions);
    }
    assert_eq!(runs[0], runs[1]);
    let [a, b, c] = &runs[0][..] else { panic!("three completions") };
    assert!(a != b && b != c && a != c);
}

#[test]
fn min_tokens_hold_off_every_stop_token() {
    let mut engine = Engine::new(config(64, 4));
    let all: Vec<u32> = (1..40).collect();
    let params = SamplingParams { min_tokens: 6, stop_token_ids: all, temperature: 2.0, ..tokens(20) };
    let id = engine.submit(&[1, 2], params);
    engine.finish();
    let generated = engine.tokens(id);
    assert!(
        generated.len() >= 6 && generated[..6].iter().all(|token| !(1..40).contains(token)),
        "{generated:?}"
    );
}
