//! What must hold between any two strokes of the engine; checked at every step of the simulation.

use std::collections::BTreeMap;

use crate::ahead::Flight;
use crate::batch::Scheduled;
use crate::core::Core;
use crate::draft_tree::Branch;
use crate::pages::PagePool;
use crate::prefix::Parent;
use crate::sequence::{Sequence, SequenceId};
use crate::tables::NO_PAGE;

impl Core {
    /// Panics with a sentence when an invariant is broken, if the configuration asks for it.
    pub(crate) fn check_invariants(&self) {
        if self.config.check_invariants {
            self.check_pages();
            self.check_names();
            self.sequences.values().for_each(|sequence| self.check_sequence(sequence));
            self.check_requests();
            let mut before = BTreeMap::new();
            for flight in &self.in_flight {
                self.check_step(flight, &before);
                before.extend(flight.scheduled.iter().map(|work| (work.id, work.rows)));
            }
        }
    }

    /// Free + evictable + referenced = total, and every reference is an entry of a page table.
    fn check_pages(&self) {
        let held = |sequence: &Sequence| {
            let copied = sequence.copy_from.map(|page| page.page);
            let branches = sequence.branches.iter().flat_map(|branch| &branch.tables.pages);
            sequence.tables.pages.iter().chain(branches).copied().chain(copied).collect::<Vec<_>>()
        };
        self.check_pool(&self.cache.pool, held);
        let held = |sequence: &Sequence| {
            let copied = sequence.copy_from.and_then(|page| page.local);
            let branches = sequence.branches.iter().flat_map(|branch| &branch.tables.locals);
            sequence.tables.locals.iter().chain(branches).copied().chain(copied).collect::<Vec<_>>()
        };
        if let Some(local) = &self.cache.local {
            self.check_pool(&local.pool, held);
        }
    }

    fn check_pool(&self, pool: &PagePool, held: impl Fn(&Sequence) -> Vec<u32>) {
        let mut holders = BTreeMap::<u32, u32>::new();
        for page in self.sequences.values().flat_map(held).filter(|&page| page != NO_PAGE) {
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
        self.check_local_names();
    }

    /// Local pages are cached exactly if they belong to a named page.
    fn check_local_names(&self) {
        let Some(local) = &self.cache.local else { return };
        for page in 0..local.pool.total() as u32 {
            let owner = local.owner(page);
            assert_eq!(
                owner.is_some(),
                local.pool.is_cached(page),
                "local page {page} has an owner if cached"
            );
            let Some(owner) = owner else { continue };
            assert_eq!(local.at(owner), Some(page), "page {owner} knows its local page");
            assert!(self.cache.pool.is_cached(owner), "page {owner} has a local page and a name");
        }
    }

    fn check_sequence(&self, sequence: &Sequence) {
        let id = sequence.id;
        let running = self.running.contains(&sequence.rank());
        let waiting = self.waiting.contains(sequence, &self.requests[&id.request].options.user);
        assert!(running != waiting, "{id:?} is in exactly one queue");
        assert!(running || sequence.tables.is_empty(), "{id:?} waits without pages");
        let waits = sequence.restoring.is_some() || sequence.copy_from.is_some();
        assert!(running || !waits, "{id:?} waits for nothing else");
        assert!(sequence.computed < sequence.tokens.len() || sequence.computed == 0, "{id:?} has work left");
        assert!(sequence.tables.len() >= self.config.pages_for(sequence.computed), "{id:?} holds its past");
        let locals = if self.config.local.is_some() { sequence.tables.len() } else { 0 };
        assert_eq!(sequence.tables.locals.len(), locals, "{id:?} has tables of one length");
        assert!(sequence.tokens.len() <= self.config.max_model_len, "{id:?} keeps to max_model_len");
        self.check_chain(sequence);
        self.check_locals(sequence);
    }

    /// The pages it still sees are there, and those that are named hold its own prefix, in its own domain.
    fn check_chain(&self, sequence: &Sequence) {
        let (id, page_tokens) = (sequence.id, self.config.page_tokens);
        let visible = self.config.window.map_or(0, |window| (sequence.computed + 1).saturating_sub(window));
        let mut parent = Some(Parent::Root(sequence.domain.clone()));
        for (place, &page) in sequence.tables.pages.iter().enumerate() {
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

    /// The local pages it still sees are there, and those of named pages are the ones that are found there.
    fn check_locals(&self, sequence: &Sequence) {
        let Some(local) = &self.cache.local else { return };
        let id = sequence.id;
        // While pages are fetched the window may lie in them; what the sequence then falls back to is checked afterwards.
        let seen =
            if sequence.restoring.is_some() { usize::MAX } else { local.first_seen(sequence.computed) };
        for (place, &page) in sequence.tables.locals.iter().enumerate() {
            assert!(page != NO_PAGE || place < seen, "{id:?} holds the local pages that it still sees");
            if page != NO_PAGE && place < sequence.sealed {
                let owner = sequence.tables.pages[place];
                assert_eq!(local.at(owner), Some(page), "local page {place} of {id:?} belongs to its page");
            }
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

    /// The step keeps to its budgets and writes only pages that it alone holds and nobody can find. `before` are rows of the step before it
    /// that is in flight too.
    fn check_step(&self, flight: &Flight, before: &BTreeMap<SequenceId, usize>) {
        let scheduled = &flight.scheduled;
        let rows: usize = scheduled.iter().map(Scheduled::all_rows).sum();
        assert!(rows <= self.config.max_num_batched_tokens, "max_num_batched_tokens");
        let prompt_rows: usize = scheduled.iter().map(|work| work.prompt_rows).sum();
        let drafts: usize = scheduled.iter().map(|work| work.samples().saturating_sub(1)).sum();
        assert!(prompt_rows + drafts <= self.config.logit_rows(), "max_logit_values");
        if !flight.ahead {
            self.check_decodes(scheduled);
        }
        for work in scheduled {
            let Some(sequence) = self.sequences.get(&work.id) else { continue };
            let computed = sequence.computed + before.get(&work.id).copied().unwrap_or(0);
            let first = computed / self.config.page_tokens;
            let end = self.config.pages_for(computed + work.rows);
            let branches = &sequence.branches;
            let of_branch = |branch: &Branch| {
                (0..branch.tables.len()).map(|place| branch.tables.at(place)).collect::<Vec<_>>()
            };
            let written = (first..end).map(|place| sequence.tables.at(place));
            for page in written.chain(branches.iter().flat_map(of_branch)) {
                let copied = self.sequences.values().filter_map(|other| other.copy_from);
                let copies = copied.clone().filter(|other| other.page == page.page).count();
                self.check_written(&self.cache.pool, page.page, copies, work);
                let Some(local) = &self.cache.local else { continue };
                let own = page.local.expect("a page that is written is there in all layers");
                let copies = copied.filter(|other| other.local == Some(own)).count();
                self.check_written(&local.pool, own, copies, work);
            }
        }
    }

    fn check_written(&self, pool: &PagePool, page: u32, copies: usize, work: &Scheduled) {
        let id = work.id;
        assert_eq!(pool.references(page) as usize - copies, 1, "written page {page} of {id:?} has one owner");
        assert!(!pool.is_cached(page), "written page {page} of {id:?} is not shared");
    }

    /// No prompt stalls a running completion: who needs one row, and has a page for it, is part of every step.
    fn check_decodes(&self, scheduled: &[Scheduled]) {
        for id in self.running.iter().map(|rank| rank.id) {
            let sequence = &self.sequences[&id];
            let has_page = sequence.tables.len() >= self.config.pages_for(sequence.tokens.len());
            assert!(
                !self.is_decoding(sequence) || !has_page || scheduled.iter().any(|work| work.id == id),
                "{id:?} decodes in every step"
            );
        }
    }
}
