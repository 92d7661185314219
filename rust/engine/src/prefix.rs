//! Which page holds which tokens: a trie over full pages.
//!
//! A page is named by its parent page and its own tokens, compared token by token on every hit (the map's keyed SipHash only finds the
//! candidate), so a hash collision can never hand out another prompt's keys and values; by induction a chain of hits proves the
//! whole prefix equal. What must not be shared (position-encoding variants, private requests) differs in the chain's root.
//! A page's parent is always named as long as the page is: holders of a page hold its ancestors, and pages are released last first, so
//! parents leave the least-recently-used list after their children.

use std::collections::HashMap;

/// What a chain of pages belongs to; chains of different domains never meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Domain {
    /// Keys were rotated with the long-context factors.
    pub long_context: bool,
    /// Only this request's completions may share it.
    pub private_to: Option<u64>,
}

/// Where a page hangs in the trie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Parent {
    /// First page of a sequence.
    Root(Domain),
    /// Continues this page.
    Page(u32),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Name {
    parent: Parent,
    tokens: Box<[u32]>,
}

/// The trie's edges, and for every page its own name.
#[derive(Debug)]
pub(crate) struct PrefixIndex {
    pages: HashMap<Name, u32>,
    names: Vec<Option<Name>>,
}

impl PrefixIndex {
    /// An empty index over `pages` pages.
    pub fn new(pages: usize) -> Self {
        Self { pages: HashMap::new(), names: vec![None; pages] }
    }

    /// The page with these tokens after `parent`.
    pub fn find(&self, parent: Parent, tokens: Box<[u32]>) -> Option<u32> {
        self.pages.get(&Name { parent, tokens }).copied()
    }

    /// Names a page; it must be unnamed, and the name unused.
    pub fn insert(&mut self, parent: Parent, tokens: Box<[u32]>, page: u32) {
        let name = Name { parent, tokens };
        let previous = self.names[page as usize].replace(name.clone());
        debug_assert!(previous.is_none(), "page {page} already had a name");
        let previous = self.pages.insert(name, page);
        debug_assert!(previous.is_none(), "page {page} took another page's name");
    }

    /// Forgets an evicted page.
    pub fn remove(&mut self, page: u32) {
        if let Some(name) = self.names[page as usize].take() {
            self.pages.remove(&name);
        }
    }

    /// The parent and tokens of a named page.
    pub fn name(&self, page: u32) -> Option<(Parent, &[u32])> {
        self.names[page as usize].as_ref().map(|name| (name.parent, &*name.tokens))
    }

    /// Named pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: Parent = Parent::Root(Domain { long_context: false, private_to: None });

    fn block(tokens: &[u32]) -> Box<[u32]> {
        tokens.into()
    }

    #[test]
    fn a_page_is_found_by_parent_and_tokens_alone() {
        let mut index = PrefixIndex::new(8);
        index.insert(SHARED, block(&[1, 2]), 3);
        index.insert(Parent::Page(3), block(&[1, 2]), 4);
        assert_eq!(index.find(SHARED, block(&[1, 2])), Some(3));
        assert_eq!(index.find(Parent::Page(3), block(&[1, 2])), Some(4));
        assert_eq!(index.find(SHARED, block(&[1, 3])), None);
        assert_eq!(index.find(Parent::Page(4), block(&[1, 2])), None);
        assert_eq!(index.name(4), Some((Parent::Page(3), &[1, 2][..])));
    }

    #[test]
    fn domains_never_meet() {
        let mut index = PrefixIndex::new(8);
        index.insert(SHARED, block(&[1, 2]), 0);
        for domain in [
            Domain { long_context: true, private_to: None },
            Domain { long_context: false, private_to: Some(7) },
            Domain { long_context: true, private_to: Some(7) },
        ] {
            assert_eq!(index.find(Parent::Root(domain), block(&[1, 2])), None);
        }
    }

    #[test]
    fn a_removed_page_is_forgotten() {
        let mut index = PrefixIndex::new(8);
        index.insert(SHARED, block(&[1, 2]), 5);
        index.remove(5);
        index.remove(5);
        assert_eq!(index.find(SHARED, block(&[1, 2])), None);
        assert_eq!((index.len(), index.name(5)), (0, None));
    }
}
