//! Pages and their names together: what the scheduler allocates from.

use crate::pages::PagePool;
use crate::prefix::{Domain, Parent, PrefixIndex};
use crate::sequence::Tokens;

/// The key-value cache's bookkeeping.
#[derive(Debug)]
pub(crate) struct PageCache {
    pub pool: PagePool,
    pub index: PrefixIndex,
    page_tokens: usize,
}

impl PageCache {
    /// `pages` empty pages of `page_tokens` tokens.
    pub fn new(pages: usize, page_tokens: usize) -> Self {
        Self { pool: PagePool::new(pages), index: PrefixIndex::new(pages), page_tokens }
    }

    /// Takes a page for writing, forgetting the least recently used contents if it must.
    pub fn allocate(&mut self) -> Option<u32> {
        let (page, evicted) = self.pool.allocate()?;
        if evicted {
            self.index.remove(page);
        }
        Some(page)
    }

    /// The longest chain of named pages that holds the first tokens of a sequence, at most `limit` tokens; each is retained.
    pub fn take_prefix(&mut self, domain: Domain, tokens: &Tokens, limit: usize) -> Vec<u32> {
        let mut parent = Parent::Root(domain);
        let mut pages = Vec::new();
        for first in (0..limit / self.page_tokens).map(|page| page * self.page_tokens) {
            let Some(page) = self.index.find(parent, tokens.range(first, first + self.page_tokens)) else {
                break;
            };
            self.pool.retain(page);
            pages.push(page);
            parent = Parent::Page(page);
        }
        pages
    }

    /// Names a full page that the caller holds. If another page already has the same contents the caller gets that one instead:
    /// equal tokens after equal parents give equal keys and values, so one copy is enough.
    pub fn seal(&mut self, parent: Parent, tokens: Box<[u32]>, page: u32) -> u32 {
        if let Some(existing) = self.index.find(parent, tokens.clone()) {
            self.pool.retain(existing);
            self.pool.release(page);
            return existing;
        }
        self.index.insert(parent, tokens, page);
        self.pool.mark_cached(page);
        page
    }

    /// Gives back a sequence's pages, last first, so that eviction meets children before their parents.
    pub fn release_all(&mut self, pages: &mut Vec<u32>) {
        while let Some(page) = pages.pop() {
            self.pool.release(page);
        }
    }
}
