//! One completion of a request while it lives: its tokens, its pages, and how far it is computed.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use crate::cache::Tail;
use crate::draft_tree::Branch;
use crate::draw::Changes;
use crate::prefix::Domain;
use crate::request::RequestId;
use crate::sampler::TokenHistory;
use crate::tables::{PageRef, PageTables};
use crate::text::TokenText;
use crate::tier::Wanted;

/// Identity of a sequence. The order is that of arrival: earlier requests have lower numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// The request.
    pub request: RequestId,
    /// Which of its completions.
    pub index: u32,
}

/// Who may take pages from whom: only from later ranks. Lower priorities come first, then earlier arrivals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rank {
    pub priority: i32,
    pub id: SequenceId,
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.priority, self.id).cmp(&(other.priority, other.id))
    }
}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Prompt and output; completions of one request share the prompt.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    pub prompt: Arc<[u32]>,
    pub output: Vec<u32>,
}

impl Tokens {
    pub fn len(&self) -> usize {
        self.prompt.len() + self.output.len()
    }

    /// The token at `place`, which must exist.
    pub fn at(&self, place: usize) -> u32 {
        let split = self.prompt.len();
        if place < split { self.prompt[place] } else { self.output[place - split] }
    }

    /// Tokens `first..end`.
    pub fn range(&self, first: usize, end: usize) -> Box<[u32]> {
        let split = self.prompt.len();
        let prompt = &self.prompt[first.min(split)..end.min(split)];
        let output = &self.output[first.max(split) - split..end.max(split) - split];
        [prompt, output].concat().into()
    }
}

/// Pages of a tier that a sequence waits for. They are the last of its page table.
#[derive(Debug)]
pub(crate) struct Restoring {
    pub ticket: u64,
    pub wanted: Vec<Wanted>,
    pub since: Duration,
}

/// A completion that is running or waiting.
pub(crate) struct Sequence {
    pub id: SequenceId,
    /// Its priority now: the request's, unless it was raised.
    pub priority: i32,
    /// It ran before and gave up its pages.
    pub preemptions: u32,
    pub tokens: Tokens,
    /// Tokens whose keys and values are in `tables`.
    pub computed: usize,
    /// Where these lie. Empty while waiting.
    pub tables: PageTables,
    /// Leading pages that are full and were named in the prefix index.
    pub sealed: usize,
    /// Where the next page to be named hangs.
    pub tail: Tail,
    pub domain: Domain,
    /// The page that its last page begins as a copy of; it is retained until the copy is part of a step.
    pub copy_from: Option<PageRef>,
    /// Waits for pages of the tier.
    pub restoring: Option<Restoring>,
    /// Tokens guessed to follow, to be verified in the next step.
    pub drafts: Vec<u32>,
    /// Other guesses, to be verified beside those.
    pub branches: Vec<Branch>,
    /// Prompt rows whose logits were already handed out; they are not asked for again after a preemption.
    pub delivered: usize,
    /// Waits until the consumer has taken the last chunk of logits.
    pub blocked: bool,
    pub history: TokenHistory,
    /// The same for a device that draws, with biases and bans.
    pub changes: Option<Changes>,
    pub seed: u64,
    pub text: Option<Box<dyn TokenText>>,
    pub first_token: Option<Duration>,
    pub last_token: Duration,
}

impl Sequence {
    /// Tokens still to compute before the next one can be chosen.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether it could be part of the next step.
    pub fn is_ready(&self) -> bool {
        !self.blocked && self.restoring.is_none()
    }

    pub fn rank(&self) -> Rank {
        Rank { priority: self.priority, id: self.id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_span_prompt_and_output() {
        let tokens = Tokens { prompt: vec![1, 2, 3].into(), output: vec![4, 5] };
        assert_eq!(&*tokens.range(0, 2), [1, 2]);
        assert_eq!(&*tokens.range(2, 5), [3, 4, 5]);
        assert_eq!(&*tokens.range(3, 4), [4]);
        assert_eq!(tokens.range(5, 5).len(), 0);
    }
}
