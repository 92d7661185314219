//! Pages and their names together: what the scheduler allocates from, what it finds again, and what leaves for a tier.

mod saving;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::config::EngineConfig;
use crate::digest::{Digest, page_digest, root_digest};
use crate::journal::CacheEvent;
use crate::local::LocalPages;
use crate::pages::PagePool;
use crate::planted::{Bug, planted};
use crate::prefix::{Domain, Parent, PrefixIndex};
use crate::sequence::Tokens;
use crate::tables::{NO_PAGE, PageRef, PageTables};
use crate::tier::{Save, Tier};
use saving::wanted;

/// The end of a chain of named pages: where the next page hangs, and what it continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tail {
    pub parent: Parent,
    pub digest: Digest,
    /// Only one request's completions share the chain, so it never leaves memory.
    pub private: bool,
}

/// The key-value cache's bookkeeping.
pub(crate) struct PageCache {
    pub pool: PagePool,
    pub index: PrefixIndex,
    /// Pages of layers that see only a window, beside others.
    pub local: Option<LocalPages>,
    page_tokens: usize,
    key: Digest,
    tier: Option<Arc<dyn Tier>>,
    /// Evicted since the last look, and to be saved before they are overwritten.
    evicted: Vec<Save>,
    /// Named, and not yet offered to the tier: (page, node).
    unsaved: VecDeque<(u32, u64)>,
    journal: Option<Journal>,
}

/// Which full pages became findable. A page whose parent was forgotten can be there twice, once out of reach; outsiders hear of the
/// first and of the last.
#[derive(Default)]
struct Journal {
    events: Vec<CacheEvent>,
    copies: HashMap<Digest, u32>,
}

impl Journal {
    fn stored(&mut self, digest: Digest, parent: Digest, tokens: &[u32]) {
        let copies = self.copies.entry(digest).or_default();
        *copies += 1;
        if *copies == 1 {
            self.events.push(CacheEvent::Stored { digest, parent, tokens: tokens.into() });
        }
    }

    fn removed(&mut self, digest: Digest) {
        if let Some(copies) = self.copies.get_mut(&digest) {
            *copies -= 1;
            if *copies == 0 {
                self.copies.remove(&digest);
                self.events.push(CacheEvent::Removed { digest });
            }
        }
    }
}

impl PageCache {
    /// Empty pages.
    pub fn new(config: &EngineConfig) -> Self {
        Self {
            pool: PagePool::new(config.pages),
            index: PrefixIndex::new(config.pages),
            local: config.local.map(|local| LocalPages::new(local, config)),
            page_tokens: config.page_tokens,
            key: config.digest_key,
            tier: None,
            evicted: Vec::new(),
            unsaved: VecDeque::new(),
            journal: config.cache_events.then(Journal::default),
        }
    }

    /// Takes a page for writing, forgetting the least recently used contents if it must.
    pub fn allocate(&mut self) -> Option<u32> {
        let (page, evicted) = self.pool.allocate()?;
        if evicted && !planted(Bug::EvictedPageKeepsName) {
            self.forget(page);
        }
        Some(page)
    }

    /// The same for the layers that see only a window; [`NO_PAGE`] without such layers.
    pub fn allocate_local(&mut self) -> Option<u32> {
        let Some(local) = &mut self.local else { return Some(NO_PAGE) };
        let (page, loser) = local.allocate()?;
        if let Some(loser) = loser
            && let Some(node) = self.index.node(loser)
            && self.savable(node)
        {
            // What is left of the page could not be restored any more.
            self.evicted.push(Save { page: PageRef::new(loser, page), name: wanted(node) });
        }
        Some(page)
    }

    /// Takes a page at the end of the tables for writing.
    pub fn extend(&mut self, tables: &mut PageTables) -> Option<()> {
        self.extend_from(0, tables)
    }

    /// The same, without a page in the layers that see only a window if it comes before place `kept`.
    pub fn extend_from(&mut self, kept: usize, tables: &mut PageTables) -> Option<()> {
        let windowed = self.local.is_some() && tables.len() >= kept;
        if self.pool.available() == 0 || windowed && self.available_local() == 0 {
            return None;
        }
        tables.pages.push(self.allocate()?);
        if self.local.is_some() {
            tables.locals.push(if windowed { self.allocate_local()? } else { NO_PAGE });
        }
        Some(())
    }

    /// Pages that can be handed out in all layers.
    pub fn available(&self) -> usize {
        self.pool.available().min(self.available_local())
    }

    /// Pages that can be handed out in the layers that see only a window.
    pub fn available_local(&self) -> usize {
        self.local.as_ref().map_or(usize::MAX, |local| local.pool.available())
    }

    /// Removes a page's name; if the page is worth it, it is to be saved first.
    fn forget(&mut self, page: u32) {
        let Some(node) = self.index.remove(page) else { return };
        let lost = self.local.as_mut().map(|local| local.detach(page));
        if let Some(journal) = self.journal.as_mut().filter(|_| node.tokens().len() == self.page_tokens) {
            journal.removed(node.digest);
        }
        let local = lost.flatten();
        if (self.local.is_none() || local.is_some()) && self.savable(&node) {
            self.evicted.push(Save { page: PageRef { page, local }, name: wanted(&node) });
        }
    }

    /// A named page on the device, if it is whole.
    fn whole(&self, page: u32) -> Option<PageRef> {
        let local = self.local.as_ref().map(|local| local.at(page));
        (local != Some(None)).then(|| PageRef { page, local: local.flatten() })
    }

    /// Where a sequence of this domain begins.
    pub fn root(&self, domain: &Domain) -> Tail {
        let digest = root_digest(&self.key, domain);
        Tail { parent: Parent::Root(domain.clone()), digest, private: domain.private_to.is_some() }
    }

    /// The longest chain of named full pages that holds the first tokens of a sequence, at most `limit` tokens, and whose window is
    /// there; each is retained.
    pub fn take_prefix(&mut self, domain: &Domain, tokens: &Tokens, limit: usize) -> (PageTables, Tail) {
        let mut tail = self.root(domain);
        if planted(Bug::SaltIsIgnored) {
            tail = self.root(&Domain { salt: None, ..domain.clone() });
        }
        let private = tail.private;
        let mut chain = Vec::new();
        let mut parent = tail.parent.clone();
        for first in (0..limit / self.page_tokens).map(|page| page * self.page_tokens) {
            let own = tokens.range(first, first + self.page_tokens);
            let Some(page) = self.index.find(&parent, &own) else { break };
            chain.push(page);
            parent = self.tail_of(page, private).parent;
        }
        chain.truncate(self.local.as_ref().map_or(chain.len(), |local| local.reach(&chain)));
        if let Some(&last) = chain.last() {
            tail = self.tail_of(last, private);
        }
        (self.retain_chain(chain), tail)
    }

    /// Page tables of a chain of named pages, all retained.
    fn retain_chain(&mut self, chain: Vec<u32>) -> PageTables {
        if !planted(Bug::SharedPageIsNotRetained) {
            chain.iter().for_each(|&page| self.pool.retain(page));
        }
        let mut locals = Vec::new();
        if let Some(local) = &mut self.local {
            locals = vec![NO_PAGE; chain.len()];
            for place in local.first_kept(chain.len() * self.page_tokens)..chain.len() {
                if let Some(own) = local.at(chain[place]) {
                    local.pool.retain(own);
                    locals[place] = own;
                }
            }
        }
        PageTables { pages: chain, locals }
    }

    /// The page after `tail` that begins with the most of `tokens` and how many, if it is whole.
    pub fn longest_match(&self, tail: &Tail, tokens: &[u32]) -> Option<(PageRef, usize)> {
        let (page, alike) = self.index.longest_match(&tail.parent, tokens)?;
        self.whole(page).map(|page| (page, alike))
    }

    /// Adds a holder.
    pub fn retain(&mut self, page: PageRef) {
        self.pool.retain(page.page);
        if let (Some(pages), Some(local)) = (&mut self.local, page.local) {
            pages.pool.retain(local);
        }
    }

    fn tail_of(&self, page: u32, private: bool) -> Tail {
        let node = self.index.node(page).expect("a chain consists of named pages");
        Tail { parent: Parent::Node(node.id), digest: node.digest, private }
    }

    /// Names a full page that the caller holds. If another page already has the same contents the caller gets that one instead:
    /// equal tokens after equal parents give equal keys and values, so one copy is enough.
    pub fn seal(&mut self, tail: &Tail, tokens: Box<[u32]>, page: PageRef) -> (PageRef, Tail) {
        if let Some(existing) = self.index.find(&tail.parent, &tokens) {
            if !planted(Bug::DuplicateIsNotRetained) {
                self.pool.retain(existing);
            }
            self.pool.release(page.page);
            let tail = self.tail_of(existing, tail.private);
            return (PageRef { page: existing, local: self.share_local(existing, page.local, &tail) }, tail);
        }
        self.drop_covered(&tail.parent, &tokens);
        let digest = page_digest(&self.key, &tail.digest, &tokens);
        if let Some(journal) = &mut self.journal {
            journal.stored(digest, tail.digest, &tokens);
        }
        self.name(tail, tokens, digest, page);
        let tail = self.tail_of(page.page, tail.private);
        self.offer(page.page, &tail);
        if planted(Bug::TailStaysBehind) {
            let parent = self.index.node(page.page).expect("named").parent().clone();
            return (page, Tail { parent, ..tail });
        }
        (page, tail)
    }

    /// Two local pages of equal contents become one; a named page that lost its own gets another.
    fn share_local(&mut self, existing: u32, own: Option<u32>, tail: &Tail) -> Option<u32> {
        let (local, own) = (self.local.as_mut()?, own?);
        match local.at(existing) {
            Some(theirs) => {
                local.pool.retain(theirs);
                local.pool.release(own);
                Some(theirs)
            }
            None => {
                local.attach(existing, own);
                self.offer(existing, tail);
                Some(own)
            }
        }
    }

    /// Names a page that ends early, whose holder gives it up, unless another page holds as much.
    pub fn seal_part(&mut self, tail: &Tail, tokens: Box<[u32]>, page: PageRef) {
        let covers =
            |other: &u32| self.index.node(*other).is_some_and(|node| node.tokens().starts_with(&tokens));
        if self.index.children(&tail.parent).iter().any(covers) {
            return;
        }
        self.drop_covered(&tail.parent, &tokens);
        let digest = page_digest(&self.key, &tail.digest, &tokens);
        self.name(tail, tokens, digest, page);
    }

    fn name(&mut self, tail: &Tail, tokens: Box<[u32]>, digest: Digest, page: PageRef) {
        self.index.insert(tail.parent.clone(), tokens, (digest, tail.digest), tail.private, page.page);
        self.pool.mark_cached(page.page);
        if let (Some(pages), Some(local)) = (&mut self.local, page.local) {
            pages.attach(page.page, local);
        }
    }

    /// Frees pages after `parent` that hold a part of what a new one holds, unless somebody still reads them.
    fn drop_covered(&mut self, parent: &Parent, tokens: &[u32]) {
        let covered = |page: &u32| {
            let node = self.index.node(*page);
            let part = node.is_some_and(|node| {
                node.tokens().len() < self.page_tokens && tokens.starts_with(node.tokens())
            });
            part && self.pool.references(*page) == 0
        };
        let pages: Vec<u32> = self.index.children(parent).iter().copied().filter(covered).collect();
        for page in pages {
            self.index.remove(page);
            self.pool.forget(page);
            self.local.as_mut().map(|local| local.detach(page));
        }
    }

    /// Gives back a sequence's pages but for the first `kept`, last first, so that eviction meets children before their parents.
    pub fn release_after(&mut self, kept: usize, tables: &mut PageTables) {
        while tables.pages.len() > kept {
            let page = tables.pages.pop().expect("it is longer than what is kept");
            self.release(page);
        }
        while tables.locals.len() > kept {
            let local = tables.locals.pop().expect("it is longer than what is kept");
            self.release_local(local);
        }
    }

    /// Gives back one entry of a page table, which may be a hole.
    pub fn release(&mut self, page: u32) {
        if page != NO_PAGE {
            self.pool.release(page);
        }
    }

    /// The same of the table of layers that see only a window.
    pub fn release_local(&mut self, page: u32) {
        if let Some(local) = self.local.as_mut().filter(|_| page != NO_PAGE) {
            local.pool.release(page);
        }
    }

    /// Gives back a page in all layers.
    pub fn release_ref(&mut self, page: PageRef) {
        self.release(page.page);
        self.release_local(page.local_entry());
    }

    /// What happened to names since the last look.
    pub fn take_journal(&mut self) -> Vec<CacheEvent> {
        self.journal.as_mut().map(|journal| std::mem::take(&mut journal.events)).unwrap_or_default()
    }
}
