//! What must hold between any two strokes of the engine; checked at every step of the simulation.

use std::collections::BTreeMap;

use crate::batch::Scheduled;
use crate::cache::NO_PAGE;
use crate::core::Core;
use crate::prefix::Parent;
use crate::sequence::Sequence;

impl Core {
    /// Panics with a sentence when an invariant is broken, if the configuration asks for it.
    pub(crate) fn check_invariants(&self) {
        if self.config.check_invariants {
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
        fn held(sequence: &Sequence) -> impl Iterator<Item = &u32> {
            sequence.pages.iter().filter(|&&page| page != NO_PAGE).chain(&sequence.copy_from)
        }
        for &page in self.sequences.values().flat_map(held) {
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

    /// Every name is of a cached page and finds it again.
    fn check_names(&self) {
        let mut named = 0;
        for page in 0..self.cache.pool.total() as u32 {
            let node = self.cache.index.node(page);
            let cached = self.cache.pool.is_cached(page);
            assert_eq!(node.is_some(), cached, "page {page} is named exactly if cached");
            let Some(node) = node else { continue };
            named += 1;
            assert!(
                (1..=self.config.page_tokens).contains(&node.tokens().len()),
                "page {page} holds what fits"
            );
            assert_eq!(
                self.cache.index.find(node.parent(), node.tokens()),
                Some(page),
                "page {page} is found"
            );
        }
        assert_eq!(named, self.cache.index.len(), "one name per page");
    }

    fn check_sequence(&self, sequence: &Sequence) {
        let id = sequence.id;
        let running = self.running.contains(&sequence.rank());
        let waiting = self.waiting.contains(sequence, &self.requests[&id.request].options.user);
        assert!(running != waiting, "{id:?} is in exactly one queue");
        assert!(running || sequence.pages.is_empty(), "{id:?} waits without pages");
        let waits = sequence.restoring.is_some() || sequence.copy_from.is_some();
        assert!(running || !waits, "{id:?} waits for nothing else");
        assert!(sequence.computed < sequence.tokens.len() || sequence.computed == 0, "{id:?} has work left");
        assert!(sequence.pages.len() >= self.config.pages_for(sequence.computed), "{id:?} holds its past");
        assert!(sequence.tokens.len() <= self.config.max_model_len, "{id:?} keeps to max_model_len");
        self.check_chain(sequence);
    }

    /// The pages it still sees are there, and those that are named hold its own prefix, in its own domain.
    fn check_chain(&self, sequence: &Sequence) {
        let (id, page_tokens) = (sequence.id, self.config.page_tokens);
        let visible = self.config.window.map_or(0, |window| (sequence.computed + 1).saturating_sub(window));
        let mut parent = Some(Parent::Root(sequence.domain.clone()));
        for (place, &page) in sequence.pages.iter().enumerate() {
            assert!(
                page != NO_PAGE || (place + 1) * page_tokens <= visible,
                "{id:?} holds what it still sees"
            );
            // Below a hole the parent is not known any more.
            let above = parent.take().filter(|_| page != NO_PAGE);
            if place >= sequence.sealed || page == NO_PAGE {
                continue;
            }
            let tokens = sequence.tokens.range(place * page_tokens, (place + 1) * page_tokens);
            let node = self.cache.index.node(page).expect("a sealed page that is held keeps its name");
            assert_eq!(node.tokens(), &*tokens, "page {place} of {id:?} holds its own tokens");
            assert!(
                above.is_none_or(|above| above == *node.parent()),
                "page {place} of {id:?} continues the one before"
            );
            parent = Some(Parent::Node(node.id));
        }
    }

    /// Every completion that has not ended exists, or will when the first has computed the prompt.
    fn check_requests(&self) {
        assert_eq!(
            self.sequences.len(),
            self.running.len() + self.waiting.len(),
            "queues hold all sequences"
        );
        assert!(self.running.len() <= self.config.max_num_seqs, "max_num_seqs");
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
        let rows: usize = scheduled.iter().map(|work| work.rows).sum();
        assert!(rows <= self.config.max_num_batched_tokens, "max_num_batched_tokens");
        let prompt_rows: usize = scheduled.iter().map(|work| work.prompt_rows).sum();
        let drafts: usize = scheduled.iter().map(|work| work.sampled_rows.saturating_sub(1)).sum();
        assert!(prompt_rows + drafts <= self.config.logit_rows(), "max_logit_values");
        self.check_decodes(scheduled);
        for work in scheduled {
            let Some(sequence) = self.sequences.get(&work.id) else { continue };
            let first = sequence.computed / self.config.page_tokens;
            let end = self.config.pages_for(sequence.computed + work.rows);
            for &page in &sequence.pages[first..end] {
                let copies = self.sequences.values().filter(|other| other.copy_from == Some(page)).count();
                assert_eq!(
                    self.cache.pool.references(page) as usize - copies,
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

    /// No prompt stalls a running completion: who needs one row, and has a page for it, is part of every step.
    fn check_decodes(&self, scheduled: &[Scheduled]) {
        for id in self.running.iter().map(|rank| rank.id) {
            let sequence = &self.sequences[&id];
            let has_page = sequence.pages.len() >= self.config.pages_for(sequence.tokens.len());
            assert!(
                !self.is_decoding(sequence) || !has_page || scheduled.iter().any(|work| work.id == id),
                "{id:?} decodes in every step"
            );
        }
    }
}
