//! The driver's thread: it owns the core and the device, moves pages between device and tier, and sleeps whenever nothing can run.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::batch::Batch;
use crate::clock::Clock;
use crate::core::Core;
use crate::device::Device;
use crate::event::{EventKind, FinishReason};
use crate::mailbox::{Command, Mailbox, Status};
use crate::outbox::Outbox;
use crate::request::RequestId;
use crate::tier::{Offer, Save, Tier, TierPage};

pub(crate) const CLOSED: &str = "the engine is closed";

/// Pages handed to the tier with every step, so that what is worth keeping outlives a process that is killed under load.
const SAVES_PER_STEP: usize = 2;
/// Pages handed to the tier at a time while nothing runs; between times letters are read.
const SAVES_WHEN_IDLE: usize = 8;
/// How often an idle engine offers pages again to a tier that could not take them.
const OFFER_AGAIN: Duration = Duration::from_millis(20);
/// The same where the tier could not keep what it was given: every offer reads pages out of the device.
const OFFER_AFTER_FAILURE: Duration = Duration::from_secs(1);
/// Offers to a tier that is full, at the end, before what is left is given up: five seconds.
const LAST_OFFERS: usize = 250;

/// What lives on the thread.
pub(crate) struct Worker<D> {
    pub core: Core,
    pub device: D,
    pub tier: Option<Arc<dyn Tier>>,
    pub clock: Arc<dyn Clock>,
    pub mailbox: Arc<Mailbox>,
    pub outboxes: HashMap<RequestId, Arc<Outbox>>,
    pub logits: Vec<f32>,
    /// Whether the tier could not keep the last page that it was offered.
    pub tier_fails: bool,
}

impl<D: Device> Worker<D> {
    pub fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let (reason, why) = match outcome {
            Ok(()) => (FinishReason::Abort, CLOSED.to_owned()),
            Err(panic) => {
                (FinishReason::Error, format!("the engine stopped by a bug in infer: {}", describe(&*panic)))
            }
        };
        let mut letters = self.mailbox.lock();
        letters.status = Status::Ended(why.clone());
        for command in letters.commands.drain(..) {
            if let Command::Submit(submission, outbox, _) = command {
                self.outboxes.insert(submission.id, outbox);
            }
        }
        self.mailbox.tell(letters, self.core.config());
        for outbox in self.outboxes.values() {
            outbox.abandon(reason, &why);
        }
    }

    /// Steps until the engine is closed.
    fn serve(&mut self) {
        let mut busy = true; // the device may have something to prepare
        while let Some(commands) = self.receive(busy) {
            for command in commands {
                self.obey(command);
            }
            self.take_restored();
            busy = self.step();
            self.deliver();
            if !busy {
                let saves = self.core.take_saves(SAVES_WHEN_IDLE);
                busy = self.save(saves) || self.device.prepare();
            }
        }
        self.finish_steps();
        let now = self.clock.now();
        for id in self.core.live_requests().collect::<Vec<_>>() {
            self.core.cancel(id, now);
        }
        self.deliver();
        self.save_the_rest();
    }

    /// New commands; waits for some unless there is work. None when the engine is closing.
    fn receive(&self, busy: bool) -> Option<VecDeque<Command>> {
        let mut letters = self.mailbox.lock();
        loop {
            let drained = letters.commands.is_empty() && self.core.is_idle();
            match letters.status {
                Status::Open => {}
                Status::Draining if !drained => {}
                _ => return None,
            }
            let due = self.core.next_deadline().map(|at| at.saturating_sub(self.clock.now()));
            let news = std::mem::take(&mut letters.tier_news) || due == Some(Duration::ZERO);
            if busy || news || !letters.commands.is_empty() {
                return Some(std::mem::take(&mut letters.commands));
            }
            let pause = if self.tier_fails { OFFER_AFTER_FAILURE } else { OFFER_AGAIN };
            let unsaved = self.core.has_unsaved().then_some(pause);
            letters = self.mailbox.wait(letters, due.into_iter().chain(unsaved).min());
            if unsaved.is_some() {
                return Some(std::mem::take(&mut letters.commands));
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission, outbox, arrival) => {
                let id = submission.id;
                match self.core.submit(submission, arrival) {
                    Ok(()) => drop(self.outboxes.insert(id, outbox)),
                    Err(error) => outbox.abandon(FinishReason::Error, &error.to_string()),
                }
            }
            Command::Cancel(id) => self.core.cancel(id, self.clock.now()),
            Command::Resume(id) => self.core.resume(id),
            Command::Export(tokens, salt, reply) => {
                let saves = self.core.cached_prefix(&tokens, salt);
                let _ = reply.send(saves.into_iter().map(|save| self.read_out(&save)).collect());
            }
            Command::Import(pages, salt, reply) => {
                self.finish_steps();
                let _ = reply.send(self.import(pages, salt));
            }
        }
    }

    /// One step; false when nothing could run. On a device that works ahead, the step after it is begun before its outcome is awaited: as
    /// long as that can be planned, the device has work while tokens become text and requests are told.
    fn step(&mut self) -> bool {
        if !self.device.works_ahead() {
            let Some(batch) = self.plan() else { return false };
            let outcome = catch_unwind(AssertUnwindSafe(|| self.device.forward(&batch, &mut self.logits)));
            self.land(outcome);
            return true;
        }
        if self.core.steps_in_flight() == 0 {
            let Some(batch) = self.plan() else { return false };
            self.device.begin(batch);
        }
        if let Some(batch) = self.core.next_ahead(self.clock.now()) {
            let saves = self.core.take_saves(SAVES_PER_STEP);
            self.save(saves);
            self.device.begin(batch);
        }
        self.finish_step();
        true
    }

    /// Waits for the oldest step in flight.
    fn finish_step(&mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.device.finish(&mut self.logits)));
        self.land(outcome);
    }

    fn finish_steps(&mut self) {
        while self.core.steps_in_flight() > 0 {
            self.finish_step();
        }
    }

    /// The next step's work, with everything done that comes before it.
    fn plan(&mut self) -> Option<Batch> {
        self.make_drafts();
        let batch = self.core.next_batch(self.clock.now());
        // Before the step writes, and before pages that come back are filled.
        let saves = self.core.take_saves(if batch.is_some() { SAVES_PER_STEP } else { 0 });
        self.save(saves);
        for fetch in self.core.take_fetches() {
            if let Some(tier) = &self.tier {
                tier.fetch(fetch.ticket, fetch.wanted);
            }
        }
        batch
    }

    /// Commits what a step came to.
    fn land(&mut self, outcome: std::thread::Result<Result<(), String>>) {
        let now = self.clock.now();
        self.core.set_watts(self.device.watts());
        match outcome {
            Ok(Ok(())) => {
                let choices = self.device.take_choices();
                if choices.is_empty() {
                    self.core.draw_rows(&self.logits, &|tasks, task| self.device.share_out(tasks, task));
                }
                self.core.commit_choices(&self.logits, choices, now);
            }
            Ok(Err(message)) => self.core.fail(&message, now),
            Err(panic) => self.core.fail(&format!("a bug in infer: {}", describe(&*panic)), now),
        }
    }

    fn make_drafts(&mut self) {
        while let Some(batch) = self.core.next_draft() {
            let saves = self.core.take_saves(0);
            self.save(saves);
            match catch_unwind(AssertUnwindSafe(|| self.device.draft(&batch, &mut self.logits))) {
                Ok(Ok(())) => {
                    let choices = self.device.take_choices();
                    self.core.commit_draft(&self.logits, &choices);
                }
                // A draft is only a guess: the step goes on without.
                Ok(Err(_)) | Err(_) => self.core.drop_drafts(),
            }
        }
    }

    fn read_out(&mut self, save: &Save) -> Result<TierPage, String> {
        let mut payload = Vec::new();
        self.device.export_page(save.page, &mut payload)?;
        Ok(TierPage { name: save.name.clone(), payload })
    }

    /// Hands pages to the tier; whether it took one.
    fn save(&mut self, saves: Vec<Save>) -> bool {
        let mut taken = false;
        for save in saves {
            // A page that cannot be read out is not kept: it will be computed again.
            let Ok(page) = self.read_out(&save) else { continue };
            let offer = self.tier.as_ref().map_or(Offer::Unwanted, |tier| tier.put(page));
            taken |= offer == Offer::Taken;
            self.tier_fails = offer == Offer::Failing;
            match offer {
                Offer::Taken => {}
                Offer::Full | Offer::Failing => self.core.offer_again(&save),
                Offer::Unwanted => self.core.not_saved(),
            }
        }
        taken
    }

    /// Hands everything that is named to the tier, in bounded time; one that fails is not waited for.
    fn save_the_rest(&mut self) {
        self.tier_fails = false;
        for _ in 0..LAST_OFFERS {
            while self.core.has_unsaved() {
                let saves = self.core.take_saves(SAVES_WHEN_IDLE);
                if !saves.is_empty() && !self.save(saves) {
                    break;
                }
            }
            if !self.core.has_unsaved() || self.tier_fails {
                return;
            }
            std::thread::sleep(OFFER_AGAIN);
        }
    }

    /// Fills pages that came back from the tier, as far as they are whole and without a gap.
    fn take_restored(&mut self) {
        let Some(tier) = self.tier.clone() else { return };
        for fetched in tier.poll() {
            let Some(places) = self.core.restore_pages(fetched.ticket) else { continue };
            let pages = places.iter().zip(fetched.pages.iter().map_while(Option::as_ref));
            let filled =
                pages.take_while(|(page, bytes)| self.device.import_page(**page, bytes).is_ok()).count();
            self.core.restored(fetched.ticket, filled, self.clock.now());
        }
    }

    fn import(&mut self, pages: Vec<TierPage>, salt: Option<Arc<str>>) -> Result<usize, String> {
        let blocks = pages.iter().map(|page| page.name.tokens.clone()).collect();
        let adoption = self.core.adopt(blocks, salt);
        // What had to be forgotten to make room is saved before it is overwritten.
        let saves = self.core.take_saves(0);
        self.save(saves);
        let mut filled = 0;
        let mut outcome = Ok(());
        for (place, page) in adoption.pages() {
            outcome = self.device.import_page(page, &pages[place].payload);
            if outcome.is_err() {
                break;
            }
            filled += 1;
        }
        let tokens = self.core.adopted(adoption, filled);
        outcome.map(|()| tokens)
    }

    /// Files what happened; the counters first, so that whoever hears of an end finds it counted.
    fn deliver(&mut self) {
        let mut letters = self.mailbox.lock();
        letters.metrics = self.core.metrics();
        letters.metrics.requests_refused = letters.refused;
        let submitted =
            letters.commands.iter().filter(|command| matches!(command, Command::Submit(..))).count();
        letters.waiting = self.core.unscheduled_requests() + submitted;
        self.mailbox.tell(letters, self.core.config());
        self.mailbox.record(self.core.take_cache_events(), self.core.take_trace());
        let mut events = self.core.take_events().into_iter().peekable();
        while let Some(id) = events.peek().map(|event| event.request) {
            let mut done = false;
            let own = std::iter::from_fn(|| events.next_if(|event| event.request == id));
            let own = own.inspect(|event| done |= matches!(event.kind, EventKind::Done { .. }));
            match self.outboxes.get(&id) {
                Some(outbox) => outbox.put(own),
                None => own.for_each(drop),
            }
            if done {
                self.outboxes.remove(&id);
            }
        }
    }
}

fn describe(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown panic")
}
