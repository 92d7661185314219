//! What must hold between any two strokes of the engine; checked in debug builds at every step, and by the simulation.

use std::collections::BTreeMap;

use crate::core::{Core, Scheduled};
use crate::prefix::Parent;
use crate::sequence::Sequence;

impl Core {
    /// Panics with a sentence when an invariant is broken; does nothing in release builds.
    pub(crate) fn check_invariants(&self) {
        if cfg!(debug_assertions) {
            self.check_pages();
            self.check_names();
            self.sequences.values().for_each(|sequence| self.check_sequence(sequence));
            self.check_requests();
            if let Some(scheduled) = &self.in_flight {
                self.check_step(scheduled);
            }
        }
    }

    /// Free + evictable + referenced = total, and every reference is an entry of a page table.
    fn check_pages(&self) {
        let pool = &self.cache.pool;
        let mut holders = BTreeMap::<u32, u32>::new();
        for &page in self.sequences.values().flat_map(|sequence| &sequence.pages) {
            *holders.entry(page).or_default() += 1;
        }
        for page in 0..pool.total() as u32 {
            let held = holders.get(&page).copied().unwrap_or(0);
            assert_eq!(pool.references(page), held, "references of page {page} against page tables");
        }
        assert_eq!(
            pool.free() + pool.evictable() + holders.len(),
            pool.total(),
            "every page is in one state"
        );
    }

    /// Every name is of a cached page, and leads to the root over named pages.
    fn check_names(&self) {
        let mut named = 0;
        for page in 0..self.cache.pool.total() as u32 {
            let name = self.cache.index.name(page);
            assert_eq!(
                name.is_some(),
                self.cache.pool.is_cached(page),
                "page {page} is named exactly if cached"
            );
            let Some((parent, tokens)) = name else { continue };
            named += 1;
            assert_eq!(tokens.len(), self.config.page_tokens, "only full pages are named");
            if let Parent::Page(parent) = parent {
                assert!(self.cache.pool.is_cached(parent), "page {page} outlived its parent {parent}");
            }
        }
        assert_eq!(named, self.cache.index.len(), "one name per page");
    }

    fn check_sequence(&self, sequence: &Sequence) {
        let id = sequence.id;
        let (running, waiting) = (self.running.contains(&id), self.waiting.contains(&id));
        assert!(running != waiting, "{id:?} is in exactly one queue");
        assert!(running || sequence.pages.is_empty(), "{id:?} waits without pages");
        assert!(sequence.computed < sequence.tokens.len() || sequence.computed == 0, "{id:?} has work left");
        assert!(sequence.pages.len() >= self.config.pages_for(sequence.computed), "{id:?} holds its past");
        assert!(sequence.tokens.len() <= self.config.max_model_len, "{id:?} keeps to max_model_len");
        let mut parent = Parent::Root(sequence.domain);
        for (place, &page) in sequence.pages.iter().enumerate().take(sequence.sealed) {
            let first = place * self.config.page_tokens;
            let tokens = sequence.tokens.range(first, first + self.config.page_tokens);
            let name = self.cache.index.name(page);
            assert_eq!(name, Some((parent, &*tokens)), "page {place} of {id:?} holds its own prefix");
            parent = Parent::Page(page);
        }
    }

    /// Every completion that has not ended exists, or will when the first has computed the prompt.
    fn check_requests(&self) {
        assert_eq!(
            self.sequences.len(),
            self.running.len() + self.waiting.len(),
            "queues hold all sequences"
        );
        let mut open = 0;
        for request in self.requests.values() {
            let unended = request.ended.iter().filter(|&&ended| !ended).count();
            assert!(unended > 0, "a request with no open completion has ended");
            open += if request.spawned { unended } else { 1 };
        }
        assert_eq!(open, self.sequences.len(), "open completions are sequences");
    }

    /// The step keeps to its budgets and writes only pages that it alone holds and nobody can find.
    fn check_step(&self, scheduled: &[Scheduled]) {
        assert!(scheduled.len() <= self.config.max_num_seqs, "max_num_seqs");
        let rows: usize = scheduled.iter().map(|work| work.rows).sum();
        assert!(rows <= self.config.max_num_batched_tokens, "max_num_batched_tokens");
        let prompt_rows: usize = scheduled.iter().map(|work| work.prompt_rows).sum();
        assert!(prompt_rows <= self.config.prompt_logit_rows(), "max_logit_values");
        for work in scheduled {
            let Some(sequence) = self.sequences.get(&work.id) else { continue };
            let first = sequence.computed / self.config.page_tokens;
            let end = self.config.pages_for(sequence.computed + work.rows);
            for &page in &sequence.pages[first..end] {
                assert_eq!(
                    self.cache.pool.references(page),
                    1,
                    "written page {page} of {:?} has one owner",
                    work.id
                );
                assert!(
                    !self.cache.pool.is_cached(page),
                    "written page {page} of {:?} is not shared",
                    work.id
                );
            }
        }
    }
}
