//! Who is served when: priorities, users, patience, deadlines, and what sharing, windows and drafts save.

mod common;

use std::time::Duration;

use common::{FakeDevice, config};
use infer_engine::{
    Batch, Core, Device, EngineConfig, EngineError, EventKind, FinishReason, LocalLayers, RequestId,
    RequestKind, RequestOptions, SamplingParams, Speculation, Submission,
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

    fn submit(
        &mut self,
        prompt: &[u32],
        params: SamplingParams,
        options: RequestOptions,
    ) -> Result<RequestId, EngineError> {
        let kind = RequestKind::Generate(Box::new(SamplingParams { ignore_eos: true, ..params }));
        let submission = Submission { id: self.next, prompt: prompt.into(), kind, text: None, options };
        self.core.submit(submission, self.now)?;
        self.next += 1;
        Ok(self.next - 1)
    }

    fn step(&mut self) -> Option<Batch> {
        self.now += Duration::from_millis(10);
        let mut logits = Vec::new();
        while let Some(batch) = self.core.next_draft() {
            self.device.draft(&batch, &mut logits).expect("the fake draft model succeeds");
            self.core.commit_draft(&logits, &[]);
        }
        let batch = self.core.next_batch(self.now)?;
        self.device.compute(&batch, &mut logits).expect("the fake device succeeds");
        self.core.commit(&logits, self.now);
        Some(batch)
    }

    /// Runs to the end; requests in the order in which they ended, with their reasons.
    fn finish(&mut self) -> Vec<(RequestId, FinishReason)> {
        while self.step().is_some() {}
        assert!(self.core.is_idle());
        let events = self.core.take_events().into_iter();
        let ends = events.filter_map(|event| match event.kind {
            EventKind::Finished { finish, .. } => Some((event.request, finish.reason)),
            _ => None,
        });
        ends.collect()
    }

    fn order(&mut self) -> Vec<RequestId> {
        self.finish().into_iter().map(|(id, _)| id).collect()
    }
}

fn tokens(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

fn prompt(first: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| 1 + (first * 5 + i * 7) % 47).collect()
}

fn priority(priority: i32) -> RequestOptions {
    RequestOptions { priority, ..RequestOptions::default() }
}

fn user(name: &str) -> RequestOptions {
    RequestOptions { user: Some(name.into()), ..RequestOptions::default() }
}

fn one_at_a_time() -> EngineConfig {
    EngineConfig { max_num_seqs: 1, ..config(64, 4) }
}

#[test]
fn lower_priorities_go_first_and_take_the_place_of_higher_ones() {
    let mut engine = Engine::new(one_at_a_time());
    for (first, level) in [(0, 2), (1, 0), (2, 1)] {
        engine.submit(&prompt(first, 6), tokens(4), priority(level)).unwrap();
    }
    engine.step();
    // The first to come had the worst priority, and lost its place as soon as the others were there; all that it had is found again.
    let urgent = engine.submit(&prompt(3, 6), tokens(4), priority(-1)).unwrap();
    assert_eq!(engine.order(), [urgent, 1, 2, 0]);
}

#[test]
fn a_patient_class_gets_its_turn_and_keeps_it() {
    let config = EngineConfig { patience: Duration::from_millis(200), ..one_at_a_time() };
    let mut engine = Engine::new(config);
    let patient = engine.submit(&prompt(0, 6), tokens(8), priority(5)).unwrap();
    for first in 1..40 {
        engine.submit(&prompt(first, 6), tokens(4), priority(0)).unwrap();
    }
    let order = engine.order();
    let place = order.iter().position(|&id| id == patient).unwrap();
    // 200 ms are twenty steps, and a request takes four.
    assert!((4..=7).contains(&place), "served as number {place}");
    assert_eq!(engine.core.metrics().preemptions, 0, "who got its turn out of patience is not robbed");
}

#[test]
fn users_are_served_evenly_by_tokens() {
    let mut engine = Engine::new(one_at_a_time());
    let many: Vec<_> =
        (0..8).map(|i| engine.submit(&prompt(i, 12), tokens(4), user("many")).unwrap()).collect();
    let few: Vec<_> =
        (8..10).map(|i| engine.submit(&prompt(i, 12), tokens(4), user("few")).unwrap()).collect();
    let order = engine.order();
    let place = |id: &RequestId| order.iter().position(|other| other == id).unwrap();
    assert_eq!((place(&many[0]), place(&few[0])), (0, 1), "{order:?}");
    assert!(place(&few[1]) <= 3, "the second of few does not wait for the many: {order:?}");
}

#[test]
fn a_full_queue_refuses_at_once_and_says_why() {
    let mut engine = Engine::new(EngineConfig { max_waiting: Some(2), ..one_at_a_time() });
    engine.submit(&prompt(0, 6), tokens(4), RequestOptions::default()).unwrap();
    engine.step();
    for first in 1..3 {
        engine.submit(&prompt(first, 6), tokens(4), RequestOptions::default()).unwrap();
    }
    let refused = engine.submit(&prompt(3, 6), tokens(4), RequestOptions::default()).unwrap_err();
    assert!(
        matches!(&refused, EngineError::Full(message) if message.contains("max_waiting is 2")),
        "{refused}"
    );
    assert_eq!(engine.finish().len(), 3);
    engine.submit(&prompt(3, 6), tokens(4), RequestOptions::default()).unwrap();
}

#[test]
fn deadlines_end_requests_wherever_they_are() {
    let mut engine = Engine::new(one_at_a_time());
    let by = |millis| RequestOptions {
        deadline: Some(Duration::from_millis(millis)),
        ..RequestOptions::default()
    };
    let running = engine.submit(&prompt(0, 6), tokens(100), by(55)).unwrap();
    let waiting = engine.submit(&prompt(1, 6), tokens(4), by(35)).unwrap();
    let enough = engine.submit(&prompt(2, 6), tokens(4), by(10_000)).unwrap();
    let ends = engine.finish();
    let timeout = FinishReason::Timeout;
    assert_eq!(ends, [(waiting, timeout), (running, timeout), (enough, FinishReason::Length)]);
    let metrics = engine.core.metrics();
    assert_eq!((metrics.requests_timed_out, metrics.requests_finished), (2, 1));
    assert_eq!(metrics.pages_free + metrics.pages_evictable, metrics.pages_total);
}

#[test]
fn tenants_with_other_salts_do_not_meet() {
    let mut engine = Engine::new(config(64, 4));
    let salt =
        |salt: Option<&str>| RequestOptions { cache_salt: salt.map(Into::into), ..RequestOptions::default() };
    for (options, cached) in
        [(salt(None), 0), (salt(Some("a")), 0), (salt(Some("b")), 0), (salt(Some("a")), 20), (salt(None), 20)]
    {
        let before = engine.core.metrics().cached_tokens;
        engine.submit(&prompt(1, 21), tokens(1), options.clone()).unwrap();
        engine.finish();
        assert_eq!(engine.core.metrics().cached_tokens - before, cached, "{options:?}");
    }
}

#[test]
fn completions_of_one_request_compute_the_prompt_once() {
    for enable_prefix_caching in [false, true] {
        let mut engine = Engine::new(EngineConfig { enable_prefix_caching, ..config(64, 16) });
        engine
            .submit(&prompt(1, 30), SamplingParams { n: 8, ..tokens(1) }, RequestOptions::default())
            .unwrap();
        engine.finish();
        // Seven of the eight compute the last prompt token again, for its logits; what is before it is shared or copied.
        assert_eq!(engine.device.rows, 30 + 7);
        assert_eq!(engine.core.metrics().copied_pages, 7);
    }
}

#[test]
fn a_window_lets_a_long_sequence_live_in_few_pages() {
    let config =
        EngineConfig { window: Some(8), max_num_batched_tokens: 8, max_model_len: 500, ..config(8, 4) };
    let mut engine = Engine::new(config);
    engine.submit(&prompt(1, 200), tokens(200), RequestOptions::default()).unwrap();
    assert_eq!(engine.finish(), [(0, FinishReason::Length)]);
    let metrics = engine.core.metrics();
    assert_eq!(metrics.preemptions, 0);
    assert!(metrics.window_pages >= 90, "{}", metrics.window_pages);
}

#[test]
fn layers_with_a_window_give_up_pages_that_the_others_keep() {
    let local = Some(LocalLayers { window: 8, pages: 7 });
    let config = EngineConfig { local, max_num_batched_tokens: 8, max_model_len: 400, ..config(100, 4) };
    let mut engine = Engine::new(config);
    let long = prompt(1, 200);
    // Rows that it takes to answer a prompt with one token.
    let mut rows_for = |prompt: &[u32]| {
        let before = engine.device.rows;
        engine.submit(prompt, tokens(1), RequestOptions::default()).unwrap();
        engine.finish();
        engine.device.rows - before
    };
    assert_eq!(rows_for(&long), 200);
    assert!(rows_for(&long) <= 4, "the prompt's end and the window before it are still there");
    assert_eq!(rows_for(&long[..100]), 100, "what half of the prompt sees was given up");
    assert_eq!(rows_for(&long), 100, "the window at its half has come back, that at its end is gone");
    let metrics = engine.core.metrics();
    assert_eq!((metrics.local_pages_total, metrics.pages_total, metrics.preemptions), (7, 100, 0));
    assert!(metrics.window_pages >= 90, "{}", metrics.window_pages);
    assert_eq!(metrics.pages_evictable, 50, "the other layers keep the whole prompt");
}

#[test]
fn drafts_save_steps_and_change_nothing() {
    let run = |speculation: Option<Speculation>, temperature: f64| {
        let mut engine = Engine::new(EngineConfig { speculation, ..config(64, 4) });
        let params = SamplingParams {
            temperature,
            seed: Some(3),
            logprobs: Some(2),
            repetition_penalty: 1.1,
            ..tokens(60)
        };
        engine.submit(&prompt(1, 20), params, RequestOptions::default()).unwrap();
        let mut steps = 0;
        while engine.step().is_some() {
            steps += 1;
        }
        let tokens = engine.core.take_events().into_iter().filter_map(|event| match event.kind {
            EventKind::Token { token, logprobs, .. } => Some((token, format!("{logprobs:?}"))),
            _ => None,
        });
        (tokens.collect::<Vec<_>>(), steps, engine.core.metrics())
    };
    for temperature in [0.0, 0.8] {
        let (plain, plain_steps, _) = run(None, temperature);
        let (drafted, steps, metrics) = run(
            Some(Speculation::DraftModel { num_speculative_tokens: 4, num_draft_tokens: None }),
            temperature,
        );
        assert_eq!(plain, drafted);
        assert!(steps * 2 < plain_steps, "{steps} steps instead of {plain_steps}");
        assert!(
            metrics.accepted_tokens < metrics.drafted_tokens && metrics.accepted_tokens > 30,
            "{metrics:?}"
        );
        let lookup = Speculation::Ngram {
            num_speculative_tokens: 4,
            num_draft_tokens: None,
            prompt_lookup_min: 1,
            prompt_lookup_max: 3,
        };
        let (looked_up, _, metrics) = run(Some(lookup), temperature);
        assert_eq!(plain, looked_up);
        assert!(metrics.drafted_tokens > 0);
        assert_eq!(metrics.pages_free + metrics.pages_evictable, metrics.pages_total);
    }
}

#[test]
fn a_tree_of_drafts_is_right_more_often_than_its_chain() {
    let run = |speculation: Option<Speculation>, draws: bool, temperature: f64| {
        let mut engine = Engine::new(EngineConfig { speculation, ..config(64, 4) });
        (engine.device.draws, engine.device.draft_errs_every) = (draws, 2);
        let params = SamplingParams { temperature, seed: Some(3), logprobs: Some(2), ..tokens(200) };
        engine.submit(&prompt(1, 20), params, RequestOptions::default()).unwrap();
        let (mut most_rows, mut logits) = (0, Vec::new());
        loop {
            while let Some(batch) = engine.core.next_draft() {
                engine.device.draft(&batch, &mut logits).unwrap();
                let choices = engine.device.take_choices();
                engine.core.commit_draft(&logits, &choices);
            }
            let Some(batch) = engine.core.next_batch(engine.now) else { break };
            most_rows = most_rows.max(batch.sequences.iter().map(|sequence| sequence.rows - 1).sum());
            engine.device.compute(&batch, &mut logits).unwrap();
            let choices = engine.device.take_choices();
            engine.core.commit_choices(&logits, choices, engine.now);
        }
        let tokens = engine.core.take_events().into_iter().filter_map(|event| match event.kind {
            EventKind::Token { token, logprobs, .. } => Some((token, format!("{logprobs:?}"))),
            _ => None,
        });
        let metrics = engine.core.metrics();
        assert_eq!(metrics.pages_free + metrics.pages_evictable, metrics.pages_total, "all is given back");
        (tokens.collect::<Vec<_>>(), most_rows, metrics)
    };
    let drafts =
        |num_draft_tokens| Some(Speculation::DraftModel { num_speculative_tokens: 3, num_draft_tokens });
    for (draws, temperature) in [(false, 0.0), (true, 0.0), (false, 0.8), (true, 0.8)] {
        let (plain, ..) = run(None, draws, temperature);
        let (chain, _, one) = run(drafts(None), draws, temperature);
        let (tree, most_rows, all) = run(drafts(Some(9)), draws, temperature);
        assert_eq!(plain, chain);
        assert_eq!(plain, tree);
        assert!(most_rows <= 19, "no more than the prompt's rows, which are more than those of 9 drafts");
        assert_eq!((one.branch_tokens, one.generated_tokens), (0, all.generated_tokens));
        assert!(all.branch_tokens > 0 && all.decode_steps < one.decode_steps, "{all:?}");
        assert!(all.copied_pages > 0, "what a branch's first page begins with");
    }
}

#[test]
fn energy_is_shared_out_by_rows() {
    let mut engine = Engine::new(config(64, 4));
    engine.core.set_watts(Some(200.0));
    for prompt in [&[1, 2, 3, 4, 5, 6][..], &[7, 8]] {
        engine.submit(prompt, tokens(1), RequestOptions::default()).expect("accepted");
    }
    let mut logits = Vec::new();
    let batch = engine.core.next_batch(Duration::ZERO).expect("work");
    engine.device.compute(&batch, &mut logits).expect("the fake device succeeds");
    engine.core.commit(&logits, Duration::from_millis(100));
    assert_eq!(engine.core.metrics().joules, Some(20.0));
    let events = engine.core.take_events().into_iter();
    let done = events.filter(|event| matches!(event.kind, EventKind::Done { .. }));
    let taken: Vec<_> = done.map(|event| event.metrics.microjoules).collect();
    assert_eq!(taken, [Some(15_000_000), Some(5_000_000)]);
}

#[test]
fn a_device_that_draws_is_asked_once_for_all_drafts_of_a_step() {
    let drafts = Some(Speculation::DraftModel { num_speculative_tokens: 4, num_draft_tokens: None });
    let config = EngineConfig { speculation: drafts, ..config(64, 4) };
    let run = |draws: bool| {
        let mut engine = Engine::new(config.clone());
        engine.device.draws = draws;
        for first in 0..2 {
            engine.submit(&prompt(first, 6), tokens(30), RequestOptions::default()).unwrap();
        }
        let (mut asked, mut guessed, mut logits) = (0, 0, Vec::new());
        loop {
            while let Some(batch) = engine.core.next_draft() {
                engine.device.draft(&batch, &mut logits).unwrap();
                let choices = engine.device.take_choices();
                guessed += choices.len().max(logits.len() / config.vocabulary);
                engine.core.commit_draft(&logits, &choices);
                asked += 1;
            }
            let Some(batch) = engine.core.next_batch(engine.now) else { break };
            engine.device.compute(&batch, &mut logits).unwrap();
            let choices = engine.device.take_choices();
            engine.core.commit_choices(&logits, choices, engine.now);
        }
        let events = engine.core.take_events().into_iter();
        let tokens: Vec<_> = events
            .filter_map(|event| match event.kind {
                EventKind::Token { token, .. } => Some((event.request, token)),
                _ => None,
            })
            .collect();
        (tokens, asked, guessed)
    };
    let ((expected, often, guesses), (found, seldom, others)) = (run(false), run(true));
    assert_eq!(expected.len(), 60);
    let of = |tokens: &[(RequestId, u32)], request: RequestId| -> Vec<u32> {
        tokens.iter().filter(|token| token.0 == request).map(|token| token.1).collect()
    };
    assert!((0..2).all(|request| of(&expected, request) == of(&found, request)));
    assert!(seldom * 2 < often && others >= guesses, "{seldom} {often} {guesses} {others}");
}
