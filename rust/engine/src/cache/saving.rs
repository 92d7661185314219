//! What of the cache goes to a tier, and what comes back.

use std::sync::Arc;

use crate::digest::page_digest;
use crate::planted::{Bug, planted};
use crate::prefix::{Node, Parent};
use crate::sequence::Tokens;
use crate::tables::{NO_PAGE, PageRef, PageTables};
use crate::tier::{Save, Tier, Wanted};

use super::{PageCache, Tail};

impl PageCache {
    /// Where pages go that are forgotten here.
    pub fn set_tier(&mut self, tier: Arc<dyn Tier>) {
        self.tier = Some(tier);
    }

    /// Whether the tier would want this page.
    pub(super) fn savable(&self, node: &Node) -> bool {
        let tier = self.tier.as_ref().filter(|_| !node.private && node.tokens().len() == self.page_tokens);
        tier.is_some_and(|tier| !tier.contains(&node.digest))
    }

    /// Notes a page that ends a chain for the tier.
    pub(super) fn offer(&mut self, page: u32, tail: &Tail) {
        if let (Parent::Node(id), true) = (&tail.parent, self.tier.is_some() && !tail.private) {
            self.unsaved.push_back((page, *id));
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
            let node = self.index.node(page).filter(|node| node.id == id && self.savable(node));
            let save = node.zip(self.whole(page)).map(|(node, page)| Save { page, name: wanted(node) });
            saves.extend(save);
        }
        saves
    }

    /// Whether some named page was not offered to the tier yet.
    pub fn has_unsaved(&self) -> bool {
        !self.unsaved.is_empty() || !self.evicted.is_empty()
    }

    /// The tier did not take this page now; it is offered again if it is still named.
    pub fn offer_again(&mut self, save: &Save) {
        let page = save.page.page;
        if let Some(node) = self.index.node(page).filter(|node| node.digest == save.name.key) {
            self.unsaved.push_back((page, node.id));
        }
    }

    /// A named full page as a tier would keep it.
    pub fn describe(&self, page: PageRef) -> Option<Save> {
        self.index.node(page.page).map(|node| Save { page, name: wanted(node) })
    }

    /// The first tokens of a page after `tail`, as if they were all that it holds.
    pub fn describe_part(&self, page: PageRef, tail: &Tail, tokens: &[u32]) -> Save {
        let key = page_digest(&self.key, &tail.digest, tokens);
        Save { page, name: Wanted { key, parent: tail.digest, tokens: tokens.into() } }
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

    /// Takes `count` pages for contents that come back from a tier. What lies before their window is not needed.
    pub fn extend_restored(&mut self, tables: &mut PageTables, count: usize) -> Option<()> {
        let end = tables.len() + count;
        let kept = self.local.as_ref().map_or(0, |local| local.first_kept(end * self.page_tokens));
        (tables.len()..end).try_for_each(|_| self.extend_from(kept, tables))
    }

    /// The pages that [`PageCache::extend_restored`] takes in the layers that see only a window.
    pub fn locals_to_restore(&self, there: usize, count: usize) -> usize {
        let end = there + count;
        self.local
            .as_ref()
            .map_or(0, |local| end - local.first_kept(end * self.page_tokens).clamp(there, end))
    }

    /// How many of the `count` pages after the first `there` a sequence can begin with, which came back from a tier: fewer when some did
    /// not come, and what is left lacks its window. Then only pages that can be written stay in the tables.
    pub fn whole_beginning(&mut self, tables: &mut PageTables, there: usize, count: usize) -> usize {
        let Some(local) = self.local.as_ref().filter(|_| !planted(Bug::RestoreIgnoresGaps)) else {
            return count;
        };
        let whole = |end: usize| {
            let seen = local.first_seen(end * self.page_tokens);
            tables.locals[seen.min(end)..end].iter().all(|&page| page != NO_PAGE)
        };
        let end = (there..=there + count).rev().find(|&end| whole(end)).unwrap_or(there);
        if end < tables.len() {
            self.release_after(end, tables);
        }
        end - there
    }
}

pub(super) fn wanted(node: &Node) -> Wanted {
    Wanted { key: node.digest, parent: node.parent_digest, tokens: node.tokens().into() }
}
