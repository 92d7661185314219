//! Pages and their names together: what the scheduler allocates from, what it finds again, and what leaves for a tier.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::config::EngineConfig;
use crate::digest::{Digest, page_digest, root_digest};
use crate::journal::CacheEvent;
use crate::pages::PagePool;
use crate::planted::{Bug, planted};
use crate::prefix::{Domain, Node, Parent, PrefixIndex};
use crate::sequence::Tokens;
use crate::tier::{Save, Tier, Wanted};

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
            page_tokens: config.page_tokens,
            key: config.digest_key,
            tier: None,
            evicted: Vec::new(),
            unsaved: VecDeque::new(),
            journal: config.cache_events.then(Journal::default),
        }
    }

    /// Where pages go that are forgotten here.
    pub fn set_tier(&mut self, tier: Arc<dyn Tier>) {
        self.tier = Some(tier);
    }

    /// Takes a page for writing, forgetting the least recently used contents if it must.
    pub fn allocate(&mut self) -> Option<u32> {
        let (page, evicted) = self.pool.allocate()?;
        if evicted && !planted(Bug::EvictedPageKeepsName) {
            self.forget(page);
        }
        Some(page)
    }

    /// Removes a page's name; if the page is worth it, it is to be saved first.
    fn forget(&mut self, page: u32) {
        let Some(node) = self.index.remove(page) else { return };
        if let Some(journal) = self.journal.as_mut().filter(|_| node.tokens().len() == self.page_tokens) {
            journal.removed(node.digest);
        }
        if self.worth_saving(&node) {
            self.evicted.push(Save { page, name: wanted(&node) });
        }
    }

    fn worth_saving(&self, node: &Node) -> bool {
        let tier = self.tier.as_ref().filter(|_| !node.private && node.tokens().len() == self.page_tokens);
        tier.is_some_and(|tier| !tier.contains(&node.digest))
    }

    /// Where a sequence of this domain begins.
    pub fn root(&self, domain: &Domain) -> Tail {
        let digest = root_digest(&self.key, domain);
        Tail { parent: Parent::Root(domain.clone()), digest, private: domain.private_to.is_some() }
    }

    /// The longest chain of named full pages that holds the first tokens of a sequence, at most `limit` tokens; each is retained.
    pub fn take_prefix(&mut self, domain: &Domain, tokens: &Tokens, limit: usize) -> (Vec<u32>, Tail) {
        let mut tail = self.root(domain);
        if planted(Bug::SaltIsIgnored) {
            tail = self.root(&Domain { salt: None, ..domain.clone() });
        }
        let mut pages = Vec::new();
        for first in (0..limit / self.page_tokens).map(|page| page * self.page_tokens) {
            let own = tokens.range(first, first + self.page_tokens);
            let Some(page) = self.index.find(&tail.parent, &own) else { break };
            if !planted(Bug::SharedPageIsNotRetained) {
                self.pool.retain(page);
            }
            pages.push(page);
            tail = self.tail_of(page, tail.private);
        }
        (pages, tail)
    }

    fn tail_of(&self, page: u32, private: bool) -> Tail {
        let node = self.index.node(page).expect("a chain consists of named pages");
        Tail { parent: Parent::Node(node.id), digest: node.digest, private }
    }

    /// The pages after `tail` that the tier has, without a gap, for the tokens from `first` up to at most `limit`.
    pub fn in_tier(&self, tail: &Tail, tokens: &Tokens, first: usize, limit: usize) -> Vec<Wanted> {
        let Some(tier) = self.tier.as_ref().filter(|_| !tail.private) else { return Vec::new() };
        let mut parent = tail.digest;
        let mut found = Vec::new();
        let mut first = first;
        while first + self.page_tokens <= limit {
            let own = tokens.range(first, first + self.page_tokens);
            let key = page_digest(&self.key, &parent, &own);
            if !tier.contains(&key) {
                break;
            }
            found.push(Wanted { key, parent, tokens: own });
            (parent, first) = (key, first + self.page_tokens);
        }
        found
    }

    /// Names a full page that the caller holds. If another page already has the same contents the caller gets that one instead:
    /// equal tokens after equal parents give equal keys and values, so one copy is enough.
    pub fn seal(&mut self, tail: &Tail, tokens: Box<[u32]>, page: u32) -> (u32, Tail) {
        if let Some(existing) = self.index.find(&tail.parent, &tokens) {
            if !planted(Bug::DuplicateIsNotRetained) {
                self.pool.retain(existing);
            }
            self.pool.release(page);
            return (existing, self.tail_of(existing, tail.private));
        }
        self.drop_covered(&tail.parent, &tokens);
        let digest = page_digest(&self.key, &tail.digest, &tokens);
        if let Some(journal) = &mut self.journal {
            journal.stored(digest, tail.digest, &tokens);
        }
        self.name(tail, tokens, digest, page);
        let tail = self.tail_of(page, tail.private);
        if let (Parent::Node(id), true) = (&tail.parent, self.tier.is_some() && !tail.private) {
            self.unsaved.push_back((page, *id));
        }
        if planted(Bug::TailStaysBehind) {
            return (page, Tail { parent: self.index.node(page).expect("named").parent().clone(), ..tail });
        }
        (page, tail)
    }

    /// Names a page that ends early, whose holder gives it up, unless another page holds as much.
    pub fn seal_part(&mut self, tail: &Tail, tokens: Box<[u32]>, page: u32) {
        let covers =
            |other: &u32| self.index.node(*other).is_some_and(|node| node.tokens().starts_with(&tokens));
        if self.index.children(&tail.parent).iter().any(covers) {
            return;
        }
        self.drop_covered(&tail.parent, &tokens);
        let digest = page_digest(&self.key, &tail.digest, &tokens);
        self.name(tail, tokens, digest, page);
    }

    fn name(&mut self, tail: &Tail, tokens: Box<[u32]>, digest: Digest, page: u32) {
        self.index.insert(tail.parent.clone(), tokens, (digest, tail.digest), tail.private, page);
        self.pool.mark_cached(page);
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
        }
    }

    /// Gives back a sequence's pages, last first, so that eviction meets children before their parents.
    pub fn release_all(&mut self, pages: &mut Vec<u32>) {
        while let Some(page) = pages.pop() {
            self.release(page);
        }
    }

    /// Gives back one entry of a page table, which may be a hole.
    pub fn release(&mut self, page: u32) {
        if page != NO_PAGE {
            self.pool.release(page);
        }
    }

    /// Pages to save before they are overwritten, and of those that can wait at most `more`.
    pub fn take_saves(&mut self, more: usize) -> Vec<Save> {
        if planted(Bug::SavesComeLate) && more == 0 {
            return Vec::new();
        }
        let mut saves = std::mem::take(&mut self.evicted);
        let last = saves.len() + more;
        while saves.len() < last
            && let Some((page, id)) = self.unsaved.pop_front()
        {
            let node = self.index.node(page).filter(|node| node.id == id && self.worth_saving(node));
            saves.extend(node.map(|node| Save { page, name: wanted(node) }));
        }
        saves
    }

    /// Whether some named page was not offered to the tier yet.
    pub fn has_unsaved(&self) -> bool {
        !self.unsaved.is_empty() || !self.evicted.is_empty()
    }

    /// The tier did not take this page now; it is offered again if it is still named.
    pub fn offer_again(&mut self, save: &Save) {
        if let Some(node) = self.index.node(save.page).filter(|node| node.digest == save.name.key) {
            self.unsaved.push_back((save.page, node.id));
        }
    }

    /// A named full page as a tier would keep it.
    pub fn describe(&self, page: u32) -> Option<Save> {
        self.index.node(page).map(|node| Save { page, name: wanted(node) })
    }

    /// The first tokens of a page after `tail`, as if they were all that it holds.
    pub fn describe_part(&self, page: u32, tail: &Tail, tokens: &[u32]) -> Save {
        let key = page_digest(&self.key, &tail.digest, tokens);
        Save { page, name: Wanted { key, parent: tail.digest, tokens: tokens.into() } }
    }

    /// What happened to names since the last look.
    pub fn take_journal(&mut self) -> Vec<CacheEvent> {
        self.journal.as_mut().map(|journal| std::mem::take(&mut journal.events)).unwrap_or_default()
    }
}

/// A place in a page table whose page the sequence no longer needs.
pub(crate) const NO_PAGE: u32 = u32::MAX;

fn wanted(node: &Node) -> Wanted {
    Wanted { key: node.digest, parent: node.parent_digest, tokens: node.tokens().into() }
}
