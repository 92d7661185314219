//! Who is admitted next.
//!
//! Waiting sequences stand in groups of one priority and one user. The lowest priority class with somebody to admit goes first, but
//! a class that nobody was admitted from for `patience` goes before it: so waiting is bounded, as the head of every class moves
//! at least that often. Within a class sequences that were preempted come first (they hold results that users are reading), then the user
//! who was served the fewest tokens (the virtual token counter of Sheng et al., "Fairness in serving large language models", 2024),
//! then the earliest arrival.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::sequence::{Sequence, SequenceId};

/// Whom a request is for.
pub(crate) type User = Option<Arc<str>>;

/// A place in a group: sequences that ran before stand first.
type Place = (bool, SequenceId);

/// A priority class that somebody waits in.
#[derive(Debug, Default)]
struct Class {
    users: BTreeMap<User, BTreeSet<Place>>,
    /// When somebody was last admitted, or when the first began to wait.
    served: Duration,
}

/// Sequences without pages.
#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    classes: BTreeMap<i32, Class>,
    len: usize,
}

fn place(sequence: &Sequence) -> Place {
    (sequence.preemptions == 0, sequence.id)
}

impl WaitingQueue {
    /// Adds a sequence of this user.
    pub fn insert(&mut self, sequence: &Sequence, user: User, now: Duration) {
        let class = self
            .classes
            .entry(sequence.priority)
            .or_insert_with(|| Class { served: now, ..Class::default() });
        self.len += usize::from(class.users.entry(user).or_default().insert(place(sequence)));
    }

    /// Removes a sequence, if it is there.
    pub fn remove(&mut self, sequence: &Sequence, user: &User) {
        let Some(class) = self.classes.get_mut(&sequence.priority) else { return };
        let Some(group) = class.users.get_mut(user) else { return };
        self.len -= usize::from(group.remove(&place(sequence)));
        if group.is_empty() {
            class.users.remove(user);
        }
        if class.users.is_empty() {
            self.classes.remove(&sequence.priority);
        }
    }

    /// Whether this sequence waits here.
    pub fn contains(&self, sequence: &Sequence, user: &User) -> bool {
        let group = self.classes.get(&sequence.priority).and_then(|class| class.users.get(user));
        group.is_some_and(|group| group.contains(&place(sequence)))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Somebody of this class was admitted.
    pub fn serve(&mut self, priority: i32, now: Duration) {
        if let Some(class) = self.classes.get_mut(&priority) {
            class.served = now;
        }
    }

    /// The sequence to admit next among those that are ready, and the priority it may claim: that of the class whose turn it takes.
    pub fn next(
        &self,
        fairness: &Fairness,
        ready: impl Fn(SequenceId) -> bool,
        patience: Duration,
        now: Duration,
    ) -> Option<(SequenceId, i32)> {
        let candidate = |class: &Class| {
            let first = |group: &BTreeSet<Place>| group.iter().copied().find(|place| ready(place.1));
            let heads =
                class.users.iter().filter_map(|(user, group)| Some((first(group)?, fairness.served(user))));
            heads.min_by_key(|&((fresh, id), served)| (fresh, served, id)).map(|((_, id), _)| id)
        };
        let mut heads = self
            .classes
            .iter()
            .filter_map(|(&priority, class)| Some((priority, class.served, candidate(class)?)));
        let (best, _, first) = heads.next()?;
        let starved = heads.filter(|&(_, served, _)| now.saturating_sub(served) >= patience);
        let starved = starved.min_by_key(|&(priority, served, _)| (served, priority));
        Some(starved.map_or((first, best), |(_, _, id)| (id, best)))
    }
}

/// Users that are remembered although none of their requests lives.
const REMEMBERED: usize = 4096;

#[derive(Debug, Default)]
struct Account {
    served: u64,
    /// Requests that have not ended.
    live: usize,
}

/// Tokens served to each user: prompt tokens computed and tokens generated.
#[derive(Debug, Default)]
pub(crate) struct Fairness {
    accounts: HashMap<User, Account>,
}

impl Fairness {
    /// A request of this user arrived. Who was away has no claim on what others got meanwhile: the counter is lifted to the
    /// least of those present.
    pub fn arrive(&mut self, user: &User) {
        let present = self.accounts.values().filter(|account| account.live > 0);
        let least = present.map(|account| account.served).min().unwrap_or(0);
        let account = self.accounts.entry(user.clone()).or_default();
        if account.live == 0 {
            account.served = account.served.max(least);
        }
        account.live += 1;
    }

    /// A request of this user ended.
    pub fn leave(&mut self, user: &User) {
        if let Some(account) = self.accounts.get_mut(user) {
            account.live -= 1;
        }
        if self.accounts.len() > REMEMBERED {
            self.accounts.retain(|_, account| account.live > 0);
        }
    }

    /// Tokens were served.
    pub fn charge(&mut self, user: &User, tokens: usize) {
        if let Some(account) = self.accounts.get_mut(user) {
            account.served += tokens as u64;
        }
    }

    /// Tokens served so far.
    pub fn served(&self, user: &User) -> u64 {
        self.accounts.get(user).map_or(0, |account| account.served)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> User {
        Some(name.into())
    }

    #[test]
    fn who_was_away_has_no_claim_on_what_others_got() {
        let mut fairness = Fairness::default();
        fairness.arrive(&user("ann"));
        fairness.charge(&user("ann"), 1000);
        fairness.arrive(&user("bob"));
        assert_eq!(fairness.served(&user("bob")), 1000);
        fairness.charge(&user("bob"), 10);
        fairness.leave(&user("bob"));
        fairness.charge(&user("ann"), 500);
        fairness.arrive(&user("bob"));
        assert_eq!(fairness.served(&user("bob")), 1500, "lifted to the least of those present");
        fairness.arrive(&None);
        assert_eq!(fairness.served(&None), 1500);
    }
}
