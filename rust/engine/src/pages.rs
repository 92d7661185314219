//! Who holds which page: reference counts, a free list, and the least-recently-used list of pages nobody holds but whose contents
//! may be wanted again.
//!
//! A page is exactly one of: *referenced* (count > 0), *evictable* (count 0, contents named in the prefix index) or *free*.

use crate::planted::{Bug, planted};

/// Reference counts and lists of all pages.
#[derive(Debug)]
pub(crate) struct PagePool {
    references: Vec<u32>,
    cached: Vec<bool>,
    free: Vec<u32>,
    evictable: RecencyList,
}

impl PagePool {
    /// `pages` free pages. Lower numbers are handed out first.
    pub fn new(pages: usize) -> Self {
        let count = u32::try_from(pages).expect("EngineConfig::validate bounds the page count");
        Self {
            references: vec![0; pages],
            cached: vec![false; pages],
            free: (0..count).rev().collect(),
            evictable: RecencyList::new(pages),
        }
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.references.len()
    }

    /// Pages that [`PagePool::allocate`] can still hand out.
    pub fn available(&self) -> usize {
        self.free.len() + self.evictable.len
    }

    /// Pages nobody holds and nothing names.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages nobody holds whose contents are still named.
    pub fn evictable(&self) -> usize {
        self.evictable.len
    }

    /// How many sequences hold `page`.
    pub fn references(&self, page: u32) -> u32 {
        self.references[page as usize]
    }

    /// Whether the prefix index names `page`.
    pub fn is_cached(&self, page: u32) -> bool {
        self.cached[page as usize]
    }

    /// Takes a page for writing; the second value says that it was evictable, so its name must be forgotten.
    pub fn allocate(&mut self) -> Option<(u32, bool)> {
        let (page, evicted) = match self.free.pop() {
            Some(page) => (page, false),
            None => (self.evictable.pop_oldest()?, true),
        };
        self.cached[page as usize] = false;
        self.references[page as usize] = 1;
        Some((page, evicted))
    }

    /// Adds a holder to a page that is held or evictable.
    pub fn retain(&mut self, page: u32) {
        let count = &mut self.references[page as usize];
        if *count == 0 {
            assert!(self.cached[page as usize], "page {page} was free when it was retained");
            if !planted(Bug::HeldPageIsEvictable) {
                self.evictable.remove(page);
            }
        }
        *count += 1;
    }

    /// Marks a held page as named by the prefix index.
    pub fn mark_cached(&mut self, page: u32) {
        assert!(self.references[page as usize] > 0, "page {page} was named while nobody held it");
        self.cached[page as usize] = true;
    }

    /// Frees a page that nobody holds and whose name was just removed.
    pub fn forget(&mut self, page: u32) {
        assert!(
            self.references[page as usize] == 0 && self.cached[page as usize],
            "page {page} is not evictable"
        );
        self.evictable.remove(page);
        self.cached[page as usize] = false;
        self.free.push(page);
    }

    /// Removes a holder; the last one leaves the page evictable (as the most recently used) or free.
    pub fn release(&mut self, page: u32) {
        let count = &mut self.references[page as usize];
        *count = count.checked_sub(1).expect("a page is released once per holder");
        if *count == 0 {
            if self.cached[page as usize] {
                self.evictable.push_newest(page);
            } else {
                self.free.push(page);
            }
        }
    }
}

/// Doubly linked list threaded through page numbers: every operation is constant time, nothing is allocated after `new`.
#[derive(Debug)]
struct RecencyList {
    /// Towards the newest; the extra last entry is the list's head.
    newer: Vec<u32>,
    older: Vec<u32>,
    len: usize,
}

impl RecencyList {
    fn new(pages: usize) -> Self {
        let head = u32::try_from(pages).expect("EngineConfig::validate bounds the page count");
        let links = vec![head; pages + 1];
        Self { newer: links.clone(), older: links, len: 0 }
    }

    fn head(&self) -> u32 {
        (self.newer.len() - 1) as u32
    }

    fn push_newest(&mut self, page: u32) {
        let head = self.head();
        let newest = self.older[head as usize];
        self.older[page as usize] = newest;
        self.newer[page as usize] = head;
        self.newer[newest as usize] = page;
        self.older[head as usize] = page;
        self.len += 1;
    }

    fn remove(&mut self, page: u32) {
        let (older, newer) = (self.older[page as usize], self.newer[page as usize]);
        self.newer[older as usize] = newer;
        self.older[newer as usize] = older;
        self.len -= 1;
    }

    fn pop_oldest(&mut self) -> Option<u32> {
        let oldest = self.newer[self.head() as usize];
        if oldest == self.head() {
            return None;
        }
        self.remove(oldest);
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_free_evictable_or_referenced() {
        let mut pool = PagePool::new(3);
        let (first, _) = pool.allocate().unwrap();
        let (second, _) = pool.allocate().unwrap();
        pool.retain(first);
        pool.mark_cached(first);
        pool.release(first);
        assert_eq!((pool.references(first), pool.free(), pool.evictable()), (1, 1, 0));
        pool.release(first);
        pool.release(second);
        assert_eq!((pool.free(), pool.evictable(), pool.available()), (2, 1, 3));
    }

    #[test]
    fn eviction_takes_the_least_recently_used_and_only_when_nothing_is_free() {
        let mut pool = PagePool::new(3);
        let pages: Vec<u32> = (0..3).map(|_| pool.allocate().unwrap().0).collect();
        for &page in &pages {
            pool.mark_cached(page);
        }
        for page in [pages[1], pages[0], pages[2]] {
            pool.release(page);
        }
        pool.retain(pages[1]);
        pool.release(pages[1]);
        let order: Vec<(u32, bool)> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(order, [(pages[0], true), (pages[2], true), (pages[1], true)]);
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    #[should_panic(expected = "released once per holder")]
    fn a_second_release_is_our_bug() {
        let mut pool = PagePool::new(1);
        let (page, _) = pool.allocate().unwrap();
        pool.release(page);
        pool.release(page);
    }
}
