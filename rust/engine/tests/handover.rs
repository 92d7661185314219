//! A device whose executor is elsewhere: the same tokens, and nobody waits for ever.

mod common;

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::{FakeDevice, config};
use infer_engine::{
    Answer, Batch, Choice, Closed, Device, Driver, EngineConfig, FinishReason, Handover, MonotonicClock,
    OutsideDevice, RequestHandle, RequestKind, SamplingParams, SubmitOptions, Ticket, Work,
};

const LONG: Duration = Duration::from_secs(20);

fn choice(token: i32) -> Choice {
    Choice { token, logprobs: None }
}

fn rows(logits: Vec<f32>) -> Answer {
    Answer::Rows { logits, choices: Vec::new() }
}

/// Does the work on a thread of its own, as often as allowed, and stops then with a reason.
fn executor(handover: Arc<Handover>, mut device: FakeDevice, steps: usize, draws: bool) -> JoinHandle<usize> {
    device.draws = draws;
    std::thread::spawn(move || {
        let mut begun = VecDeque::new();
        for done in 0..steps {
            let ticket = match handover.next(LONG) {
                Ok(Some(ticket)) => ticket,
                Ok(None) => panic!("no work came"),
                Err(Closed) => return done,
            };
            let mut logits = Vec::new();
            let mut page = Vec::new();
            let answer = match &*ticket.work {
                Work::Forward(batch) => {
                    let outcome = device.forward(batch, &mut logits);
                    let choices = device.take_choices();
                    begun.push_back(outcome.map(|()| Answer::Rows { logits, choices }));
                    assert!(begun.len() <= if draws { 2 } else { 1 }, "no more steps are begun");
                    continue;
                }
                Work::Finish => begun.pop_front().expect("a step that was begun"),
                Work::Draft(batch) => {
                    device.draft(batch, &mut logits).map(|()| rows(std::mem::take(&mut logits)))
                }
                Work::Export(number) => {
                    device.export_page(*number, &mut page).map(|()| Answer::Page(std::mem::take(&mut page)))
                }
                Work::Import(number, contents) => {
                    device.import_page(*number, contents).map(|()| Answer::Done)
                }
            };
            handover.answer(ticket.number, answer);
        }
        handover.stop("the executor went home");
        steps
    })
}

/// Takes a step, and the work that ends it.
fn finish(handover: &Handover) -> Ticket {
    loop {
        let ticket = handover.next(LONG).expect("open").expect("work");
        match *ticket.work {
            Work::Forward(_) => {}
            Work::Finish => return ticket,
            _ => panic!("other work came"),
        }
    }
}

fn start<D: Device + 'static>(config: EngineConfig, device: D) -> Driver {
    Driver::start(config, device, None, Arc::new(MonotonicClock::new())).expect("starts")
}

fn outside(steps: usize, draws: bool) -> (Driver, JoinHandle<usize>) {
    let config = config(64, 4);
    let handover = Arc::new(Handover::default());
    let thread = executor(Arc::clone(&handover), FakeDevice::new(&config), steps, draws);
    (start(config, OutsideDevice::new(handover, draws)), thread)
}

fn submit(driver: &Driver, prompt: &[u32]) -> RequestHandle {
    submit_with(driver, prompt, SamplingParams::default())
}

fn submit_with(driver: &Driver, prompt: &[u32], params: SamplingParams) -> RequestHandle {
    let params = SamplingParams { max_tokens: Some(20), ignore_eos: true, seed: Some(3), ..params };
    let kind = RequestKind::Generate(Box::new(params));
    driver.submit(prompt.into(), kind, None, SubmitOptions::default()).expect("accepted")
}

/// All tokens and how it ended.
fn drain(handle: &RequestHandle) -> (Vec<u32>, FinishReason) {
    let (mut tokens, mut reason) = (Vec::new(), None);
    while !handle.is_finished() {
        assert!(handle.wait(Some(LONG)), "the request never ended");
        for update in handle.poll() {
            tokens.extend(update.token_ids);
            reason = update.finish.map(|finish| finish.reason).or(reason);
        }
    }
    (tokens, reason.expect("it ended"))
}

#[test]
fn an_executor_outside_gives_the_same_tokens() {
    let config = config(64, 4);
    let device = FakeDevice::new(&config);
    let (own, (driver, thread)) = (start(config, device), outside(usize::MAX, false));
    let prompts: [&[u32]; 3] = [&[1, 2, 3, 4, 5, 6], &[7, 8], &[1, 2, 3, 4, 5, 9]];
    let handles = |driver: &Driver| prompts.map(|prompt| submit(driver, prompt));
    let (expected, found) = (handles(&own), handles(&driver));
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(drain(expected), drain(found));
    }
    driver.close();
    assert!(thread.join().expect("the executor ends when the engine closes") >= 20);
}

#[test]
fn an_executor_that_draws_gives_the_same_tokens() {
    let config = config(64, 4);
    let device = FakeDevice::new(&config);
    let (own, (driver, thread)) = (start(config.clone(), device), outside(usize::MAX, true));
    let params = [
        SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        SamplingParams { temperature: 0.5, min_p: 0.1, ..SamplingParams::default() },
        SamplingParams { top_k: 5, presence_penalty: 1.0, ..SamplingParams::default() },
        SamplingParams { temperature: 0.0, min_tokens: 3, ..SamplingParams::default() },
        SamplingParams { logprobs: Some(33), ..SamplingParams::default() }, // not outside
    ];
    let handles =
        |driver: &Driver| params.clone().map(|params| submit_with(driver, &[1, 2, 3, 4, 5], params));
    // An engine whose device draws nothing is told so, and says nothing of draws.
    let quiet = EngineConfig { device_draws: false, ..config };
    let untold = start(quiet.clone(), Silent(FakeDevice::new(&quiet)));
    let (expected, found, others) = (handles(&own), handles(&driver), handles(&untold));
    for ((expected, found), other) in expected.iter().zip(&found).zip(&others) {
        let expected = drain(expected);
        assert_eq!(expected, drain(found));
        assert_eq!(expected, drain(other));
    }
    driver.close();
    thread.join().expect("the executor ends when the engine closes");
}

/// A device that is never asked to draw.
struct Silent(FakeDevice);

impl Device for Silent {
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        assert!(batch.draws.is_empty() && batch.changes.is_empty());
        self.0.forward(batch, logits)
    }
}

#[test]
fn what_an_executor_cannot_draw_fails_its_request_alone() {
    let config = config(64, 4);
    let handover = Arc::new(Handover::default());
    let driver = start(config, OutsideDevice::new(Arc::clone(&handover), false));
    let handle = submit(&driver, &[1, 2, 3]);
    let ticket = finish(&handover);
    handover.answer(ticket.number, Ok(Answer::Rows { logits: Vec::new(), choices: vec![choice(-1)] }));
    assert_eq!(drain(&handle).1, FinishReason::Error);
    assert!(handle.error().is_some_and(|error| error.contains("NaN or infinite")));
    let other = submit(&driver, &[4, 5]);
    let ticket = finish(&handover);
    handover
        .answer(ticket.number, Ok(Answer::Rows { logits: Vec::new(), choices: vec![choice(1), choice(2)] }));
    assert!(drain(&other).0.is_empty(), "a choice too many");
    assert!(other.error().is_some_and(|error| error.contains("2 choices instead of")));
    driver.close();
}

#[test]
fn an_executor_that_stops_fails_requests_instead_of_keeping_them() {
    let (driver, thread) = outside(3, false);
    let handle = submit(&driver, &[1, 2, 3]);
    assert_eq!(drain(&handle).1, FinishReason::Error);
    assert_eq!(handle.error().as_deref(), Some("the executor went home"));
    let later = submit(&driver, &[4, 5]);
    assert_eq!(drain(&later).1, FinishReason::Error, "later requests hear it too");
    let pages = driver.export_session(&[1, 2, 3], None);
    assert!(pages.is_err_and(|error| error.to_string() == "the executor went home"));
    assert_eq!(thread.join().expect("it stopped"), 3);
    driver.close();
}

#[test]
fn an_engine_whose_executor_never_came_can_be_stopped_and_closed() {
    let config = config(64, 4);
    let handover = Arc::new(Handover::default());
    let driver = start(config, OutsideDevice::new(Arc::clone(&handover), false));
    let handle = submit(&driver, &[1, 2, 3]);
    handover.stop("no GPU");
    assert_eq!(drain(&handle).1, FinishReason::Error);
    driver.close();
    assert!(handover.next(LONG).is_err(), "there is no more work");
}

#[test]
fn whoever_waits_for_rows_hears_of_them() {
    let handover = Arc::new(Handover::default());
    let (tell, told) = std::sync::mpsc::channel();
    let waiter = {
        let handover = Arc::clone(&handover);
        std::thread::spawn(move || {
            tell.send(handover.wait_for_rows(LONG)).expect("somebody listens");
            handover.wait_for_rows(LONG)
        })
    };
    let mut device = OutsideDevice::new(Arc::clone(&handover), true);
    device.begin(Batch::default());
    let answering = std::thread::spawn(move || {
        let ticket = finish(&handover);
        handover.answer(ticket.number, Ok(rows(vec![1.0])));
    });
    assert_eq!(device.finish(&mut Vec::new()), Ok(()));
    answering.join().expect("it answered");
    assert_eq!(told.recv().expect("it heard"), Ok(true));
    drop(device);
    assert_eq!(waiter.join().expect("it heard"), Err(Closed));
}

#[test]
fn answers_to_other_work_are_dropped_or_named() {
    let config = config(64, 4);
    let handover = Arc::new(Handover::default());
    let driver = start(config, OutsideDevice::new(Arc::clone(&handover), false));
    assert!(handover.next(Duration::ZERO).is_ok_and(|ticket| ticket.is_none()));
    let handle = submit(&driver, &[1, 2, 3]);
    let ticket = finish(&handover);
    handover.answer(ticket.number + 1, Err("from the future".to_owned()));
    handover.answer(ticket.number - 1, Err("from the past".to_owned()));
    handover.answer(ticket.number, Ok(Answer::Done));
    handover.answer(ticket.number, Err("twice".to_owned()));
    assert_eq!(drain(&handle).1, FinishReason::Error);
    let error = handle.error().expect("why");
    assert!(error.contains("a bug in infer"), "{error}");
    drop(driver);
}
