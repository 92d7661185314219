//! The driver's thread: waiting, waking, cancelling, failing, closing.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{FakeDevice, TagText, VOCABULARY, config, expected_logits};
use infer_engine::{
    Batch, Device, Driver, EngineConfig, EngineError, FinishReason, MonotonicClock, RequestHandle,
    RequestKind, SamplingParams, StopReason, SubmitOptions, TextFactory, Update,
};

const SOON: Option<Duration> = Some(Duration::from_secs(20));

fn start<D: Device + 'static>(config: EngineConfig, device: D) -> Driver {
    Driver::start(config, device, None, Arc::new(MonotonicClock::new())).expect("starts")
}

fn fake_driver() -> Driver {
    let config = config(64, 4);
    let device = FakeDevice::new(&config);
    start(config, device)
}

fn params(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ignore_eos: true, ..SamplingParams::default() }
}

fn submit(driver: &Driver, prompt: &[u32], params: SamplingParams) -> Result<RequestHandle, EngineError> {
    let stop = params.stop.first().cloned();
    let text: TextFactory = Box::new(move || Box::new(TagText { stop: stop.clone(), held: String::new() }));
    driver.submit(
        prompt.into(),
        RequestKind::Generate(Box::new(params)),
        Some(text),
        SubmitOptions::default(),
    )
}

/// Takes everything until the request has ended, joined per completion.
fn drain(handle: &RequestHandle) -> Vec<Update> {
    let mut joined: Vec<Update> = Vec::new();
    while !handle.is_finished() {
        assert!(handle.wait(SOON), "the request never ended");
        for update in handle.poll() {
            match joined.iter_mut().find(|known| known.index == update.index) {
                None => joined.push(update),
                Some(known) => {
                    known.text += &update.text;
                    known.token_ids.extend(update.token_ids);
                    known.finish = update.finish.or(known.finish.take());
                }
            }
        }
    }
    joined.sort_by_key(|update| update.index);
    joined
}

/// Waits at a gate in every step, and says when it has come there.
struct GatedDevice {
    inner: FakeDevice,
    arrived: Sender<()>,
    gate: Receiver<()>,
}

impl Device for GatedDevice {
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        let _ = self.arrived.send(());
        let _ = self.gate.recv();
        self.inner.compute(batch, logits)
    }
}

fn gated(config: &EngineConfig) -> (GatedDevice, Receiver<()>, Sender<()>) {
    let ((arrived, arrivals), (opener, gate)) = (channel(), channel());
    (GatedDevice { inner: FakeDevice::new(config), arrived, gate }, arrivals, opener)
}

#[test]
fn many_threads_share_one_engine_and_get_what_they_get_alone() {
    let request = |seed: u64| SamplingParams { seed: Some(seed), n: 1 + (seed % 3) as u32, ..params(12) };
    let prompt = |seed: u64| {
        (0..5 + seed % 7).map(|i| ((i * 5 + seed) % VOCABULARY as u64) as u32).collect::<Vec<_>>()
    };
    let shared = fake_driver();
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let shared = &shared;
            scope.spawn(move || {
                for seed in thread * 10..thread * 10 + 10 {
                    let crowd = drain(&submit(shared, &prompt(seed), request(seed)).unwrap());
                    let lone = fake_driver();
                    let alone = drain(&submit(&lone, &prompt(seed), request(seed)).unwrap());
                    assert_eq!(crowd, alone);
                    assert_eq!(crowd.len(), request(seed).n as usize);
                    assert!(crowd.iter().all(|update| update.token_ids.len() == 12));
                }
            });
        }
    });
    assert_eq!(shared.metrics().requests_finished, 160);
}

#[test]
fn stop_strings_and_tokens_end_a_completion_as_in_vllm() {
    let driver = fake_driver();
    let free = drain(&submit(&driver, &[3, 1], SamplingParams { temperature: 0.0, ..params(30) }).unwrap());
    let tokens = &free[0].token_ids;
    let place =
        (1..30).find(|&place| !tokens[..place].contains(&tokens[place])).expect("a token that is new");
    let greedy = SamplingParams { temperature: 0.0, ..params(30) };

    let by_id = SamplingParams { stop_token_ids: vec![tokens[place]], ..greedy.clone() };
    let ended = &drain(&submit(&driver, &[3, 1], by_id).unwrap())[0];
    assert_eq!(ended.token_ids, tokens[..=place]);
    let finish = ended.finish.as_ref().unwrap();
    assert_eq!((finish.reason, &finish.stop), (FinishReason::Stop, &Some(StopReason::Token(tokens[place]))));
    assert!(!ended.text.contains(&format!("<{}>", tokens[place])), "a stop token has no text");

    let text = format!("<{}>", tokens[place]);
    let by_text = SamplingParams { stop: vec![text.clone()], ..greedy };
    let ended = &drain(&submit(&driver, &[3, 1], by_text).unwrap())[0];
    assert_eq!(ended.token_ids, tokens[..=place]);
    assert_eq!(ended.finish.as_ref().unwrap().stop, Some(StopReason::Text(text.clone())));
    assert!(!ended.text.contains(&text) && ended.text.len() > 2);
}

#[test]
fn logits_come_chunk_by_chunk_and_wait_for_the_consumer() {
    let config = EngineConfig { max_logit_values: 3 * VOCABULARY, ..config(16, 4) };
    let device = FakeDevice::new(&config);
    let driver = start(config, device);
    let prompt: Vec<u32> = (0..40).map(|i| i % VOCABULARY as u32).collect();
    let handle =
        driver.submit(prompt.as_slice().into(), RequestKind::Logits, None, SubmitOptions::default()).unwrap();
    let mut rows = Vec::new();
    while !handle.is_finished() {
        assert!(handle.wait(SOON));
        assert!(
            driver.metrics().computed_tokens <= rows.len() as u64 / VOCABULARY as u64 + 3,
            "one chunk ahead at most"
        );
        if let Some(chunk) = handle.take_logits() {
            assert!(chunk.len() <= 3 * VOCABULARY);
            rows.extend(chunk);
        }
    }
    assert_eq!(rows, expected_logits(&prompt, false));
}

#[test]
fn the_waker_is_called_once_per_look() {
    let (device, arrivals, opener) = gated(&config(64, 4));
    let driver = start(config(64, 4), device);
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    let waker: infer_engine::Waker = Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    let options = SubmitOptions { waker: Some(waker), ..SubmitOptions::default() };
    let handle =
        driver.submit([1, 2].into(), RequestKind::Generate(Box::new(params(4))), None, options).unwrap();
    let step = || {
        arrivals.recv().unwrap();
        opener.send(()).unwrap();
    };
    step();
    step();
    arrivals.recv().unwrap(); // the third step has begun, so two tokens were delivered
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert_eq!(handle.poll()[0].token_ids.len(), 2);
    opener.send(()).unwrap();
    step();
    while !handle.is_finished() {
        assert!(handle.wait(SOON));
        let _ = handle.poll();
    }
    assert!((2..=4).contains(&calls.load(Ordering::SeqCst)));
}

#[test]
fn final_only_requests_wake_nobody_before_a_completion_ends() {
    let driver = fake_driver();
    let options = SubmitOptions { final_only: true, ..SubmitOptions::default() };
    let kind = RequestKind::Generate(Box::new(SamplingParams { n: 2, ..params(9) }));
    let handle = driver.submit([1, 2].into(), kind, None, options).unwrap();
    while !handle.is_finished() {
        assert!(handle.wait(SOON));
        for update in handle.poll() {
            assert_eq!((update.token_ids.len(), update.finish.unwrap().reason), (9, FinishReason::Length));
        }
    }
}

#[test]
fn cancelling_in_a_step_gives_everything_back_and_leaves_others_alone() {
    let (device, arrivals, opener) = gated(&config(64, 4));
    let driver = start(config(64, 4), device);
    let doomed = submit(&driver, &[1, 2, 3, 4, 5], params(100)).unwrap();
    let dropped = submit(&driver, &[4, 2, 3, 4, 5], params(100)).unwrap();
    let other = submit(&driver, &[9, 9], params(5)).unwrap();
    arrivals.recv().unwrap();
    doomed.cancel();
    drop(dropped);
    drop(opener); // lets every later step through
    let ended = drain(&doomed);
    assert_eq!(ended.last().unwrap().finish.as_ref().unwrap().reason, FinishReason::Abort);
    assert_eq!(drain(&other)[0].token_ids.len(), 5);
    let metrics = driver.metrics();
    assert_eq!((metrics.requests_aborted, metrics.requests_finished), (2, 1));
    assert_eq!(metrics.pages_free + metrics.pages_evictable, metrics.pages_total);
}

#[test]
fn a_failing_device_ends_its_requests_and_the_engine_goes_on() {
    struct Clumsy(FakeDevice, usize);
    impl Device for Clumsy {
        fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
            self.1 += 1;
            match self.1 {
                2 => Err("out of luck".to_owned()),
                4 => panic!("a planted panic"),
                _ => self.0.compute(batch, logits),
            }
        }
    }
    let config = config(64, 4);
    let driver = start(config.clone(), Clumsy(FakeDevice::new(&config), 0));
    let run = |expected: &str| {
        let handle = submit(&driver, &[1, 2], params(4)).unwrap();
        let ended = drain(&handle);
        assert_eq!(ended[0].finish.as_ref().unwrap().reason, FinishReason::Error);
        assert_eq!(handle.error().unwrap(), expected);
    };
    run("out of luck");
    run("a bug in infer: a planted panic");
    assert_eq!(drain(&submit(&driver, &[1, 2], params(4)).unwrap())[0].token_ids.len(), 4);
    assert_eq!(driver.metrics().requests_failed, 2);
}

#[test]
fn a_panic_outside_the_device_ends_every_request_and_refuses_more() {
    struct Broken;
    impl infer_engine::TokenText for Broken {
        fn push(&mut self, _: u32, _: bool) -> infer_engine::TextStep {
            panic!("a planted panic")
        }
        fn finish(&mut self) -> infer_engine::TextStep {
            infer_engine::TextStep::default()
        }
    }
    let driver = fake_driver();
    let healthy = submit(&driver, &[1, 2], params(200)).unwrap();
    let text: TextFactory = Box::new(|| Box::new(Broken));
    let kind = RequestKind::Generate(Box::new(params(4)));
    let broken = driver.submit([1].into(), kind, Some(text), SubmitOptions::default()).unwrap();
    for handle in [&healthy, &broken] {
        assert_eq!(drain(handle).last().unwrap().finish.as_ref().unwrap().reason, FinishReason::Error);
        assert!(handle.error().unwrap().contains("a planted panic"));
    }
    assert!(matches!(submit(&driver, &[1], params(1)), Err(EngineError::Closed(_))));
    driver.close();
}

#[test]
fn closing_aborts_joins_drops_the_device_and_is_harmless_twice() {
    struct Witness(FakeDevice, Arc<Mutex<bool>>);
    impl Device for Witness {
        fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
            std::thread::sleep(Duration::from_millis(5)); // a second for all 200 tokens
            self.0.compute(batch, logits)
        }
    }
    impl Drop for Witness {
        fn drop(&mut self) {
            *self.1.lock().unwrap() = true;
        }
    }
    let config = config(64, 4);
    let dropped = Arc::new(Mutex::new(false));
    let driver = start(config.clone(), Witness(FakeDevice::new(&config), Arc::clone(&dropped)));
    let handle = submit(&driver, &[1, 2], params(200)).unwrap();
    assert!(handle.wait(SOON));
    driver.close();
    assert!(*dropped.lock().unwrap());
    let ended = drain(&handle);
    assert_eq!(ended[0].finish.as_ref().unwrap().reason, FinishReason::Abort);
    assert_eq!(
        submit(&driver, &[1], params(1)).err(),
        Some(EngineError::Closed("the engine is closed".to_owned()))
    );
    driver.close();
    handle.cancel();
    drop(driver);
    handle.cancel();
}

#[test]
fn waiting_times_out_and_an_idle_engine_sleeps() {
    let config = config(64, 4);
    let (device, _arrivals, opener) = gated(&config);
    let driver = start(config, device);
    let handle = submit(&driver, &[1, 2], params(2)).unwrap();
    let begun = Instant::now();
    assert!(!handle.wait(Some(Duration::from_millis(30))));
    assert!(begun.elapsed() >= Duration::from_millis(30));
    drop(opener);
    drain(&handle);
    let steps = driver.metrics().steps;
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(driver.metrics().steps, steps);
}

#[test]
fn a_device_prepares_while_nothing_else_is_to_be_done() {
    struct Unprepared(FakeDevice, Sender<&'static str>, usize);
    impl Device for Unprepared {
        fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
            let _ = self.1.send("step");
            std::thread::sleep(Duration::from_millis(1));
            self.0.compute(batch, logits)
        }
        fn prepare(&mut self) -> bool {
            let _ = self.1.send("prepare");
            self.2 = self.2.saturating_sub(1);
            self.2 > 0
        }
    }
    let config = config(64, 4);
    let (sender, told) = channel();
    let driver = start(config.clone(), Unprepared(FakeDevice::new(&config), sender, 3));
    for _ in 0..3 {
        assert_eq!(told.recv_timeout(SOON.unwrap()), Ok("prepare"), "without being asked for anything");
    }
    drain(&submit(&driver, &[1, 2], params(4)).unwrap());
    driver.close();
    let after: Vec<_> = told.iter().collect();
    assert_eq!(&after[..4], ["step"; 4]);
    assert!(after[4..].iter().all(|what| *what == "prepare") && after.len() < 10, "it sleeps: {after:?}");
}

#[test]
fn metrics_tell_times_and_counts() {
    let config = config(64, 4);
    let device = FakeDevice::new(&config);
    let driver = start(config, device);
    let prompt: Vec<u32> = (1..22).collect();
    let first = submit(&driver, &prompt, SamplingParams { n: 2, ..params(6) }).unwrap();
    drain(&first);
    let metrics = first.metrics();
    assert_eq!((metrics.prompt_tokens, metrics.cached_tokens, metrics.generated_tokens), (21, 0, 12));
    assert!(metrics.queue_time().unwrap() <= metrics.time_to_first_token().unwrap());
    assert!(metrics.time_to_first_token().unwrap() <= metrics.total_time().unwrap());
    assert!(metrics.inter_token_latency().unwrap() <= metrics.total_time().unwrap());
    assert_eq!(metrics.intervals, 10);
    let second = submit(&driver, &prompt, params(1)).unwrap();
    drain(&second);
    assert_eq!(second.metrics().cached_tokens, 20);
    assert_eq!(second.metrics().inter_token_latency(), None);
}

#[test]
fn refusals_come_at_once() {
    let driver = fake_driver();
    let message =
        |prompt: &[u32], params| submit(&driver, prompt, params).err().expect("refused").to_string();
    assert_eq!(message(&[], params(1)), "the prompt has no tokens; give at least one");
    assert!(message(&[1, 99], params(1)).starts_with("prompt token 99 at position 1 is outside"));
    assert!(message(&[1; 256], params(1)).contains("256 tokens and max_model_len is 256"));
    assert!(message(&[1], SamplingParams { n: 0, ..params(1) }).starts_with("n must be"));
    let stop = SamplingParams { stop: vec!["x".into()], ..params(1) };
    let refused =
        driver.submit([1].into(), RequestKind::Generate(Box::new(stop)), None, SubmitOptions::default());
    assert!(refused.err().unwrap().to_string().starts_with("stop strings need a tokenizer"));
    let refused = driver.submit([1; 257].into(), RequestKind::Logits, None, SubmitOptions::default());
    assert!(refused.err().unwrap().to_string().contains("257 tokens"));
    let empty = EngineConfig { pages: 1, max_model_len: 5, ..config(1, 4) };
    assert!(
        empty.validate().unwrap_err().to_string().contains("cannot hold one sequence of max_model_len = 5")
    );
}
