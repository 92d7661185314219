//! Which page holds which tokens: a trie over pages.
//!
//! A page is named by its parent node and its own tokens, compared token by token on every hit (the map's keyed SipHash only finds the
//! candidate), so a hash collision can never hand out another prompt's keys and values; by induction a chain of hits proves the whole
//! prefix equal. What must not be shared (position-encoding variants, tenants, private requests) differs in the chain's root.
//! Every naming makes a node with a number that is never used again, so pages may be forgotten in any order: what hung below a forgotten
//! page is simply not found any more and falls out as the least recently used (a sliding window gives up a chain's beginning first).
//! A page need not be full: what a sequence leaves behind ends anywhere, and its last page is named too. Such a page, or a full one that
//! differs later on, serves as the source of a copy (`longest_match`).

use std::collections::HashMap;
use std::sync::Arc;

use crate::digest::Digest;

/// What a chain of pages belongs to; chains of different domains never meet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Domain {
    /// Keys were rotated with the long-context factors.
    pub long_context: bool,
    /// Only this request's completions may share it.
    pub private_to: Option<u64>,
    /// Only requests with the same salt may share it.
    pub salt: Option<Arc<str>>,
}

/// Where a page hangs in the trie.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Parent {
    /// First page of a sequence.
    Root(Domain),
    /// Continues the page that was given this number.
    Node(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Name {
    parent: Parent,
    tokens: Box<[u32]>,
}

/// A named page.
#[derive(Debug)]
pub(crate) struct Node {
    name: Name,
    /// Its number.
    pub id: u64,
    /// Its digest, and its parent's.
    pub digest: Digest,
    /// See `digest`.
    pub parent_digest: Digest,
    /// Only one request's completions share it.
    pub private: bool,
}

impl Node {
    /// Where it hangs.
    pub fn parent(&self) -> &Parent {
        &self.name.parent
    }

    /// What it holds.
    pub fn tokens(&self) -> &[u32] {
        &self.name.tokens
    }
}

/// Children that are looked at for a partial match, the latest named first.
const CANDIDATES: usize = 64;

/// The trie's edges, and for every page its own node.
#[derive(Debug)]
pub(crate) struct PrefixIndex {
    pages: HashMap<Name, u32>,
    children: HashMap<Parent, Vec<u32>>,
    nodes: Vec<Option<Node>>,
    next_id: u64,
}

impl PrefixIndex {
    /// An empty index over `pages` pages.
    pub fn new(pages: usize) -> Self {
        let nodes = std::iter::repeat_with(|| None).take(pages).collect();
        Self { pages: HashMap::new(), children: HashMap::new(), nodes, next_id: 0 }
    }

    /// The page with exactly these tokens after `parent`.
    pub fn find(&self, parent: &Parent, tokens: &[u32]) -> Option<u32> {
        self.pages.get(&Name { parent: parent.clone(), tokens: tokens.into() }).copied()
    }

    /// The page after `parent` that begins with the most of `tokens`, and how many: at least one.
    pub fn longest_match(&self, parent: &Parent, tokens: &[u32]) -> Option<(u32, usize)> {
        let common = |page: u32| {
            let own = self.nodes[page as usize].as_ref().map_or(&[][..], Node::tokens);
            own.iter().zip(tokens).take_while(|(a, b)| a == b).count()
        };
        let latest = self.children.get(parent)?.iter().rev().take(CANDIDATES);
        // Among equals the latest: the first found keeps its place.
        let best = latest
            .map(|&page| (page, common(page)))
            .reduce(|best, next| if next.1 > best.1 { next } else { best });
        best.filter(|&(_, count)| count > 0)
    }

    /// Names a page and returns its node; the page must be unnamed, and the name unused.
    pub fn insert(
        &mut self,
        parent: Parent,
        tokens: Box<[u32]>,
        (digest, parent_digest): (Digest, Digest),
        private: bool,
        page: u32,
    ) -> &Node {
        let name = Name { parent: parent.clone(), tokens };
        let previous = self.pages.insert(name.clone(), page);
        assert!(previous.is_none(), "page {page} took another page's name");
        self.children.entry(parent).or_default().push(page);
        let id = self.next_id;
        self.next_id += 1;
        let place = &mut self.nodes[page as usize];
        assert!(place.is_none(), "page {page} already had a name");
        place.insert(Node { name, id, digest, parent_digest, private })
    }

    /// Forgets a page; its node, if it had a name.
    pub fn remove(&mut self, page: u32) -> Option<Node> {
        let node = self.nodes[page as usize].take()?;
        self.pages.remove(&node.name);
        if let Some(siblings) = self.children.get_mut(&node.name.parent) {
            siblings.retain(|&sibling| sibling != page);
            if siblings.is_empty() {
                self.children.remove(&node.name.parent);
            }
        }
        Some(node)
    }

    /// The pages after `parent`.
    pub fn children(&self, parent: &Parent) -> &[u32] {
        self.children.get(parent).map_or(&[], Vec::as_slice)
    }

    /// A named page's node.
    pub fn node(&self, page: u32) -> Option<&Node> {
        self.nodes[page as usize].as_ref()
    }

    /// Named pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> Domain {
        Domain { long_context: false, private_to: None, salt: None }
    }

    fn shared() -> Parent {
        Parent::Root(domain())
    }

    fn name(index: &mut PrefixIndex, parent: Parent, tokens: &[u32], page: u32) -> Parent {
        Parent::Node(index.insert(parent, tokens.into(), ([0; 32], [0; 32]), false, page).id)
    }

    #[test]
    fn a_page_is_found_by_parent_and_tokens_alone() {
        let mut index = PrefixIndex::new(8);
        let first = name(&mut index, shared(), &[1, 2], 3);
        let second = name(&mut index, first.clone(), &[1, 2], 4);
        assert_eq!(index.find(&shared(), &[1, 2]), Some(3));
        assert_eq!(index.find(&first, &[1, 2]), Some(4));
        assert_eq!(index.find(&shared(), &[1, 3]), None);
        assert_eq!(index.find(&second, &[1, 2]), None);
        let node = index.node(4).unwrap();
        assert_eq!((node.parent(), node.tokens()), (&first, &[1, 2][..]));
    }

    #[test]
    fn domains_never_meet() {
        let mut index = PrefixIndex::new(8);
        name(&mut index, shared(), &[1, 2], 0);
        for other in [
            Domain { long_context: true, ..domain() },
            Domain { private_to: Some(7), ..domain() },
            Domain { salt: Some("tenant".into()), ..domain() },
            Domain { salt: Some("".into()), ..domain() },
        ] {
            assert_eq!(index.find(&Parent::Root(other.clone()), &[1, 2]), None);
            assert_eq!(index.longest_match(&Parent::Root(other), &[1, 2]), None);
        }
    }

    #[test]
    fn what_hung_below_a_forgotten_page_is_not_found_below_its_successor() {
        let mut index = PrefixIndex::new(8);
        let first = name(&mut index, shared(), &[1, 2], 5);
        name(&mut index, first.clone(), &[3, 4], 6);
        assert!(index.remove(5).is_some() && index.remove(5).is_none());
        assert_eq!(index.find(&shared(), &[1, 2]), None);
        let again = name(&mut index, shared(), &[1, 2], 5);
        assert_eq!(index.find(&again, &[3, 4]), None);
        assert_eq!(index.find(&first, &[3, 4]), Some(6), "a holder of the old chain may still extend it");
        assert_eq!(index.len(), 2);
    }

    #[test]
    fn the_longest_common_beginning_wins_and_the_latest_among_equals() {
        let mut index = PrefixIndex::new(8);
        for (page, tokens) in [(0, &[1, 2, 3, 4][..]), (1, &[1, 2]), (2, &[1, 2, 9, 9]), (3, &[8])] {
            name(&mut index, shared(), tokens, page);
        }
        assert_eq!(index.longest_match(&shared(), &[1, 2, 3, 5]), Some((0, 3)));
        assert_eq!(index.longest_match(&shared(), &[1, 2, 7]), Some((2, 2)));
        assert_eq!(index.longest_match(&shared(), &[8, 8]), Some((3, 1)));
        assert_eq!(index.longest_match(&shared(), &[7]), None);
        index.remove(2);
        assert_eq!(index.longest_match(&shared(), &[1, 2, 7]), Some((1, 2)));
    }
}
