//! One completion of a request while it lives: its tokens, its pages, and how far it is computed.

use std::sync::Arc;
use std::time::Duration;

use crate::prefix::{Domain, Parent};
use crate::request::RequestId;
use crate::sampler::TokenHistory;
use crate::text::TokenText;

/// Identity of a sequence. The order is first come, first served: earlier requests have lower numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// The request.
    pub request: RequestId,
    /// Which of its completions.
    pub index: u32,
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

    /// Tokens `first..end`.
    pub fn range(&self, first: usize, end: usize) -> Box<[u32]> {
        let split = self.prompt.len();
        let prompt = &self.prompt[first.min(split)..end.min(split)];
        let output = &self.output[first.max(split) - split..end.max(split) - split];
        [prompt, output].concat().into()
    }
}

/// A completion that is running or waiting.
pub(crate) struct Sequence {
    pub id: SequenceId,
    pub tokens: Tokens,
    /// Tokens whose keys and values are in `pages`.
    pub computed: usize,
    /// The page table. Empty while waiting.
    pub pages: Vec<u32>,
    /// Leading pages that are full and named in the prefix index.
    pub sealed: usize,
    pub domain: Domain,
    /// Prompt rows whose logits were already handed out; they are not asked for again after a preemption.
    pub delivered: usize,
    /// Waits until the consumer has taken the last chunk of logits.
    pub blocked: bool,
    pub history: TokenHistory,
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

    /// Where the next page to be named hangs.
    pub fn parent(&self) -> Parent {
        match self.sealed {
            0 => Parent::Root(self.domain),
            sealed => Parent::Page(self.pages[sealed - 1]),
        }
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
