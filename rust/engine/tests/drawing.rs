//! Tokens that several threads draw at once are those that one draws after the other.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{FakeDevice, config};
use infer_engine::{Core, Event, RequestKind, RequestOptions, SamplingParams, Submission};

/// Requests of all kinds: some rows want log-probabilities, some sequences know penalties, one may draw a few tokens only.
fn requests() -> Vec<SamplingParams> {
    let plain = SamplingParams { max_tokens: Some(9), ignore_eos: true, ..SamplingParams::default() };
    vec![
        SamplingParams { temperature: 0.0, ..plain.clone() },
        SamplingParams { temperature: 0.7, top_p: 0.8, logprobs: Some(3), ..plain.clone() },
        SamplingParams { top_k: 5, seed: Some(4), n: 3, ..plain.clone() },
        SamplingParams { min_p: 0.1, presence_penalty: 1.0, repetition_penalty: 1.3, ..plain.clone() },
        SamplingParams { allowed_token_ids: Some([3, 4, 5].into()), frequency_penalty: 0.5, ..plain.clone() },
        SamplingParams { temperature: 0.0, logprobs: Some(0), prompt_logprobs: Some(1), ..plain },
    ]
}

/// What becomes of them, and how many rows were drawn at once.
fn run(threads: usize) -> (Vec<Event>, usize) {
    let config = config(64, 4);
    let mut device = FakeDevice::new(&config);
    let mut core = Core::new(config).expect("is valid");
    for (id, params) in (0..).zip(requests()) {
        let prompt: Vec<u32> = (0..5 + 2 * id as u32).collect();
        let kind = RequestKind::Generate(Box::new(params));
        let options = RequestOptions::default();
        let submission = Submission { id, prompt: prompt.into(), kind, text: None, options };
        core.submit(submission, Duration::ZERO).expect("is served");
    }
    let (mut now, mut logits, at_once) = (Duration::ZERO, Vec::new(), AtomicUsize::new(0));
    while let Some(batch) = core.next_batch(now) {
        device.compute(&batch, &mut logits).expect("the fake device succeeds");
        now += Duration::from_millis(10);
        if threads > 0 {
            core.draw_rows(&logits, &|tasks, task| {
                at_once.fetch_add(tasks, Ordering::Relaxed);
                std::thread::scope(|scope| {
                    for thread in 0..threads {
                        scope.spawn(move || (thread..tasks).step_by(threads).for_each(task));
                    }
                });
            });
        }
        core.commit(&logits, now);
    }
    (core.take_events(), at_once.into_inner())
}

#[test]
fn several_threads_draw_what_one_draws() {
    let (expected, none) = run(0);
    assert_eq!(none, 0);
    for threads in [1, 3] {
        let (found, at_once) = run(threads);
        assert!(at_once > 50, "{at_once} rows");
        assert_eq!(format!("{found:?}"), format!("{expected:?}"));
    }
}
