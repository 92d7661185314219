//! Pages offered to a tier that does not take them: again soon, later, or never, and at the end in bounded time.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{FakeDevice, TagText, config};
use infer_engine::{
    Digest, Driver, Fetched, MonotonicClock, Offer, RequestKind, SamplingParams, SubmitOptions, TextFactory,
    Tier, TierPage, Wanted,
};

/// Says the same to every page.
struct Answering(Offer, AtomicUsize);

impl Tier for Answering {
    fn contains(&self, _: &Digest) -> bool {
        false
    }

    fn put(&self, _: TierPage) -> Offer {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0
    }

    fn fetch(&self, _: u64, _: Vec<Wanted>) {}

    fn poll(&self) -> Vec<Fetched> {
        Vec::new()
    }

    fn set_waker(&self, _: Arc<dyn Fn() + Send + Sync>) {}
}

/// A short life with one prompt: offers until it ended, while nothing ran for a while, and how long closing took.
fn live(answer: Offer) -> (usize, usize, Duration) {
    let tier = Arc::new(Answering(answer, AtomicUsize::new(0)));
    let offers = || tier.1.load(Ordering::SeqCst);
    let config = config(64, 4);
    let device = FakeDevice::new(&config);
    let clock = Arc::new(MonotonicClock::new());
    let driver = Driver::start(config, device, Some(Arc::clone(&tier) as _), clock).expect("starts");
    let text: TextFactory = Box::new(|| Box::new(TagText { stop: None, held: String::new() }));
    let params = SamplingParams { max_tokens: Some(2), ignore_eos: true, ..SamplingParams::default() };
    let kind = RequestKind::Generate(Box::new(params));
    let prompt: Vec<u32> = (0..40).collect();
    let handle =
        driver.submit(prompt.into(), kind, Some(text), SubmitOptions::default()).expect("is accepted");
    while !handle.is_finished() {
        assert!(handle.wait(Some(Duration::from_secs(20))), "the request never ended");
        let _ = handle.poll();
    }
    std::thread::sleep(Duration::from_millis(100)); // the offers that follow the last step
    let running = offers();
    std::thread::sleep(Duration::from_millis(400));
    let idle = offers() - running;
    let began = Instant::now();
    driver.close();
    (running, idle, began.elapsed())
}

#[test]
fn a_tier_that_is_full_is_asked_again_soon() {
    let (_, idle, _) = live(Offer::Full);
    assert!(idle > 8, "{idle} offers in 0.4 s");
}

#[test]
fn a_tier_that_fails_is_left_alone_for_a_while_and_holds_nobody_up_at_the_end() {
    let (_, idle, closing) = live(Offer::Failing);
    assert_eq!(idle, 0);
    assert!(closing < Duration::from_secs(3), "{closing:?}");
}

#[test]
fn a_page_that_a_tier_does_not_want_is_offered_once() {
    let (running, idle, closing) = live(Offer::Unwanted);
    assert_eq!((running, idle), (10, 0), "40 tokens in pages of 4");
    assert!(closing < Duration::from_secs(3), "{closing:?}");
}
