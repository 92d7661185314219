//! A tier in memory that behaves as badly as it may: it forgets, refuses, answers late, out of order and in part.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use infer_engine::{Digest, Fetched, Offer, Tier, TierPage, Wanted};

use super::mix;

#[derive(Default)]
struct State {
    pages: HashMap<Digest, TierPage>,
    asked: VecDeque<(u64, Vec<Wanted>)>,
    dice: u64,
    /// One page of so many is refused, lost, or not given back; 0: none.
    faults_every: u64,
    puts: usize,
    served: usize,
}

impl State {
    fn faulty(&mut self) -> bool {
        self.dice = mix(self.dice, 3);
        self.faults_every > 0 && self.dice.is_multiple_of(self.faults_every)
    }

    fn answer(&mut self, ticket: u64, wanted: Vec<Wanted>) -> Fetched {
        let mut pages = Vec::new();
        for name in wanted {
            let lost = self.faulty();
            // As a real tier must: the right name with the right tokens, or nothing.
            let page = self.pages.get(&name.key).filter(|page| !lost && page.name == name);
            pages.push(page.map(|page| page.payload.clone()));
        }
        self.served += pages.iter().flatten().count();
        Fetched { ticket, pages }
    }
}

/// See the module. Clones share their contents, as engines share a folder.
#[derive(Clone, Default)]
pub struct FakeTier(Arc<Mutex<State>>);

impl FakeTier {
    pub fn new(seed: u64, faults_every: u64) -> Self {
        Self(Arc::new(Mutex::new(State { dice: seed, faults_every, ..State::default() })))
    }

    pub fn pages(&self) -> usize {
        self.0.lock().unwrap().pages.len()
    }

    /// Pages given back so far.
    pub fn served(&self) -> usize {
        self.0.lock().unwrap().served
    }

    pub fn pending(&self) -> usize {
        self.0.lock().unwrap().asked.len()
    }

    /// Answers one fetch, any of them.
    pub fn answer_one(&self) -> Option<Fetched> {
        let mut state = self.0.lock().unwrap();
        state.dice = mix(state.dice, 5);
        let place = state.dice as usize % state.asked.len().max(1);
        let (ticket, wanted) = state.asked.remove(place)?;
        Some(state.answer(ticket, wanted))
    }
}

impl Tier for FakeTier {
    fn contains(&self, key: &Digest) -> bool {
        self.0.lock().unwrap().pages.contains_key(key)
    }

    fn put(&self, page: TierPage) -> Offer {
        let mut state = self.0.lock().unwrap();
        if state.faulty() {
            return Offer::Full;
        }
        state.puts += 1;
        if state.faulty() {
            state.pages.clear(); // somebody emptied the folder
        }
        state.pages.insert(page.name.key, page);
        Offer::Taken
    }

    fn fetch(&self, ticket: u64, wanted: Vec<Wanted>) {
        self.0.lock().unwrap().asked.push_back((ticket, wanted));
    }

    fn poll(&self) -> Vec<Fetched> {
        std::iter::from_fn(|| self.answer_one()).collect()
    }

    fn set_waker(&self, waker: Arc<dyn Fn() + Send + Sync>) {
        waker(); // whatever comes is there at the next poll
    }
}
