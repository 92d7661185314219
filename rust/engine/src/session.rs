//! Named sessions: a conversation's pages taken out of the cache and put back, in this process or a later one.

use std::sync::Arc;

use crate::cache::Tail;
use crate::core::Core;
use crate::prefix::Domain;
use crate::sequence::Tokens;
use crate::tables::{PageRef, PageTables};
use crate::tier::Save;

/// Pages that a caller brings: where they belong, and how they are to be named once they are filled.
#[derive(Debug)]
pub struct Adoption {
    tail: Tail,
    /// Held, and in the order of the chain: those before `fill` are in the cache already.
    tables: PageTables,
    blocks: Vec<Box<[u32]>>,
    fill: usize,
}

impl Adoption {
    /// The pages to fill, each with the place of its block among those given.
    pub fn pages(&self) -> impl Iterator<Item = (usize, PageRef)> + '_ {
        (self.fill..self.tables.len()).map(|place| (place, self.tables.at(place)))
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
        let (mut tables, tail) = self.cache.take_prefix(&domain, &tokens, tokens.len());
        let first = tables.len() * self.config.page_tokens;
        let mut saves: Vec<Save> =
            (0..tables.len()).filter_map(|place| self.cache.describe(tables.at(place))).collect();
        let rest = tokens.range(first, tokens.len().min(first + self.config.page_tokens));
        if let Some((page, alike)) = self.cache.longest_match(&tail, &rest) {
            saves.push(self.cache.describe_part(page, &tail, &rest[..alike]));
        }
        self.cache.release_after(0, &mut tables);
        let held: usize = saves.iter().map(|save| save.name.tokens.len()).sum();
        // What is left of a long sequence would pass for a short one's, which is encoded otherwise.
        if self.session_domain(held, domain.salt.clone()) == domain { saves } else { Vec::new() }
    }

    /// Makes room for consecutive blocks of tokens, each a full page but the last, as far as memory that nobody uses goes.
    pub fn adopt(&mut self, blocks: Vec<Box<[u32]>>, salt: Option<Arc<str>>) -> Adoption {
        assert!(self.in_flight.is_empty(), "pages are adopted between steps");
        let tokens = Tokens { prompt: blocks.concat().into(), output: Vec::new() };
        let domain = self.session_domain(tokens.len(), salt);
        let (mut tables, tail) = self.cache.take_prefix(&domain, &tokens, tokens.len());
        let fill = tables.len();
        // A session has the local pages that a row after its full pages sees, and not surely any before.
        let full = blocks.iter().take_while(|block| block.len() == self.config.page_tokens).count();
        let after = full * self.config.page_tokens;
        let kept = self.cache.local.as_ref().map_or(0, |local| local.first_seen(after));
        while tables.len() < blocks.len() && self.cache.extend_from(kept, &mut tables).is_some() {}
        Adoption { tail, tables, blocks, fill }
    }

    /// The first `filled` pages of [`Adoption::pages`] hold what they should and can be found from now on; the others are free again.
    /// Returns how many tokens of the session are in the cache.
    pub fn adopted(&mut self, adoption: Adoption, filled: usize) -> usize {
        let Adoption { mut tail, mut tables, blocks, fill } = adoption;
        let mut tokens = fill * self.config.page_tokens;
        let end = (fill + filled).min(tables.len());
        for (place, block) in blocks.into_iter().enumerate().take(end).skip(fill) {
            tokens += block.len();
            if block.len() == self.config.page_tokens {
                let (page, next) = self.cache.seal(&tail, block, tables.at(place));
                tables.set(place, page);
                tail = next;
            } else {
                self.cache.seal_part(&tail, block, tables.at(place));
            }
        }
        self.cache.release_after(0, &mut tables);
        self.check_invariants();
        tokens
    }
}
