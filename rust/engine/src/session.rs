//! Named sessions: a conversation's pages taken out of the cache and put back, in this process or a later one.

use std::sync::Arc;

use crate::cache::Tail;
use crate::core::Core;
use crate::prefix::Domain;
use crate::sequence::Tokens;
use crate::tier::Save;

/// Pages that a caller brings: where they belong, and how they are to be named once they are filled.
#[derive(Debug)]
pub struct Adoption {
    tail: Tail,
    /// Held, and in the order of the chain: those before `fill` are in the cache already.
    pages: Vec<u32>,
    blocks: Vec<Box<[u32]>>,
    fill: usize,
}

impl Adoption {
    /// The pages to fill, each with the place of its block among those given.
    pub fn pages(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.pages.iter().copied().enumerate().skip(self.fill)
    }
}

impl Core {
    fn session_domain(&self, tokens: usize, salt: Option<Arc<str>>) -> Domain {
        let long_context = self.config.context_switch.is_some_and(|switch| tokens > switch);
        Domain { long_context, private_to: None, salt }
    }

    /// The pages in memory that hold the beginning of `tokens`: full ones, and one that holds the rest or some of it.
    pub fn cached_prefix(&mut self, tokens: &[u32], salt: Option<Arc<str>>) -> Vec<Save> {
        let domain = self.session_domain(tokens.len(), salt);
        let tokens = Tokens { prompt: tokens.into(), output: Vec::new() };
        let (mut pages, tail) = self.cache.take_prefix(&domain, &tokens, tokens.len());
        let first = pages.len() * self.config.page_tokens;
        let mut saves: Vec<Save> = pages.iter().filter_map(|&page| self.cache.describe(page)).collect();
        let rest = tokens.range(first, tokens.len().min(first + self.config.page_tokens));
        if let Some((page, alike)) = self.cache.index.longest_match(&tail.parent, &rest) {
            saves.push(self.cache.describe_part(page, &tail, &rest[..alike]));
        }
        self.cache.release_all(&mut pages);
        let held: usize = saves.iter().map(|save| save.name.tokens.len()).sum();
        // What is left of a long sequence would pass for a short one's, which is encoded otherwise.
        if self.session_domain(held, domain.salt.clone()) == domain { saves } else { Vec::new() }
    }

    /// Makes room for consecutive blocks of tokens, each a full page but the last, as far as memory that nobody uses goes.
    pub fn adopt(&mut self, blocks: Vec<Box<[u32]>>, salt: Option<Arc<str>>) -> Adoption {
        assert!(self.in_flight.is_none(), "pages are adopted between steps");
        let tokens = Tokens { prompt: blocks.concat().into(), output: Vec::new() };
        let domain = self.session_domain(tokens.len(), salt);
        let (mut pages, tail) = self.cache.take_prefix(&domain, &tokens, tokens.len());
        let fill = pages.len();
        while pages.len() < blocks.len()
            && let Some(page) = self.cache.allocate()
        {
            pages.push(page);
        }
        Adoption { tail, pages, blocks, fill }
    }

    /// The first `filled` pages of [`Adoption::pages`] hold what they should and can be found from now on; the others are free again.
    /// Returns how many tokens of the session are in the cache.
    pub fn adopted(&mut self, adoption: Adoption, filled: usize) -> usize {
        let Adoption { mut tail, mut pages, blocks, fill } = adoption;
        let mut tokens = fill * self.config.page_tokens;
        for place in fill..(fill + filled).min(pages.len()) {
            let block = blocks[place].clone();
            tokens += block.len();
            if block.len() == self.config.page_tokens {
                (pages[place], tail) = self.cache.seal(&tail, block, pages[place]);
            } else {
                self.cache.seal_part(&tail, block, pages[place]);
            }
        }
        self.cache.release_all(&mut pages);
        self.check_invariants();
        tokens
    }
}
