//! Pages of the layers that see only a window, where other layers see everything (Gemma 2 and 3, Cohere2).
//!
//! Both kinds of layers have a pool of pages and a page table of their own, so that what lies before the window is given up in the one while
//! the other keeps it. Names belong to the pages of the full layers (`prefix.rs`); a named page may have a local page with the same
//! tokens or may have lost it, and a prefix can be shared up to wherever the local pages within the window are still there.
//! One pool for both, with pages of one size as in vLLM, would need layers padded to groups of equal size and keys and values of equal types.

use crate::config::{EngineConfig, LocalLayers};
use crate::pages::PagePool;
use crate::planted::{Bug, planted};
use crate::tables::NO_PAGE;

/// The local pages and which named pages they belong to.
pub(crate) struct LocalPages {
    pub pool: PagePool,
    window: usize,
    page_tokens: usize,
    /// Of every page: its local page, or none.
    of: Vec<u32>,
    /// Of every local page: whose it is, or none.
    owner: Vec<u32>,
}

impl LocalPages {
    pub fn new(local: LocalLayers, config: &EngineConfig) -> Self {
        Self {
            pool: PagePool::new(local.pages),
            window: local.window,
            page_tokens: config.page_tokens,
            of: vec![NO_PAGE; config.pages],
            owner: vec![NO_PAGE; local.pages],
        }
    }

    /// The local page of a named page.
    pub fn at(&self, page: u32) -> Option<u32> {
        Some(self.of[page as usize]).filter(|&local| local != NO_PAGE)
    }

    /// The named page whose local page this is.
    pub fn owner(&self, local: u32) -> Option<u32> {
        Some(self.owner[local as usize]).filter(|&page| page != NO_PAGE)
    }

    /// Lets a named page have a local page, which somebody holds.
    pub fn attach(&mut self, page: u32, local: u32) {
        assert!(
            self.at(page).is_none() && self.owner(local).is_none(),
            "page {page} has a local page already"
        );
        (self.of[page as usize], self.owner[local as usize]) = (local, page);
        self.pool.mark_cached(local);
    }

    /// Takes a local page for writing; the second value is the named page that lost it.
    pub fn allocate(&mut self) -> Option<(u32, Option<u32>)> {
        let (local, _) = self.pool.allocate()?;
        let owner = self.owner(local);
        if let Some(page) = owner {
            (self.of[page as usize], self.owner[local as usize]) = (NO_PAGE, NO_PAGE);
        }
        Some((local, owner))
    }

    /// A page lost its name: so does its local page, which nobody holds then.
    pub fn detach(&mut self, page: u32) -> Option<u32> {
        let local = self.at(page)?;
        (self.of[page as usize], self.owner[local as usize]) = (NO_PAGE, NO_PAGE);
        self.pool.forget(local);
        Some(local)
    }

    /// The first page that a row at position `computed` sees.
    pub fn first_seen(&self, computed: usize) -> usize {
        (computed + 1).saturating_sub(self.window) / self.page_tokens
    }

    /// The first page that is kept once so many tokens are computed: what a prompt sees that ends with them, or in the page after. It is computed
    /// from its last token on, after full pages or, where the last page can be copied, from within it.
    pub fn first_kept(&self, computed: usize) -> usize {
        self.first_seen(computed.saturating_sub(1) / self.page_tokens * self.page_tokens)
    }

    /// The most pages of a chain that a sequence can begin with: the last whose window is there.
    pub fn reach(&self, chain: &[u32]) -> usize {
        if planted(Bug::LocalGapIsIgnored) {
            return chain.len();
        }
        let mut reach = 0;
        let mut gap_end = 0; // after the last page that has no local page
        for (place, &page) in chain.iter().enumerate() {
            if self.at(page).is_none() {
                gap_end = place + 1;
            }
            if gap_end <= self.first_seen((place + 1) * self.page_tokens) {
                reach = place + 1;
            }
        }
        reach
    }
}
