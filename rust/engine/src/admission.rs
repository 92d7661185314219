//! Which waiting sequences get pages and a place in the steps.
//!
//! The next in line (`queue.rs`) is admitted only when all pages that its tokens need are there beyond what running prompts still need, so
//! that admission does not cause preemption in the next step; nobody overtakes it meanwhile. A sequence of a higher priority takes
//! the place of running ones of lower priorities, if that is enough to let it in.
//! What the prefix cache holds need not be computed: full pages are shared, a page that begins alike is copied and written further
//! (copy on write), and pages of the tier are fetched where that is sooner than computing them.

use std::time::Duration;

use crate::cache::Tail;
use crate::core::Core;
use crate::journal::TraceKind;
use crate::pages::PagePool;
use crate::planted::{Bug, planted};
use crate::scheduler::Plan;
use crate::sequence::{Rank, Sequence, SequenceId};
use crate::tables::{NO_PAGE, PageRef, PageTables};
use crate::tier::Wanted;

/// What is there of a sequence's beginning.
pub(crate) struct Beginning {
    /// Shared pages, retained.
    pub tables: PageTables,
    pub tail: Tail,
    /// Pages to fetch after those.
    pub wanted: Vec<Wanted>,
    /// Or a page to copy, retained, and how many of its tokens are alike.
    pub source: Option<(PageRef, usize)>,
}

/// Pages in the layers that see everything, and in those that see only a window.
#[derive(Debug, Clone, Copy, Default)]
struct Need {
    pages: usize,
    locals: usize,
}

impl Need {
    fn plus(self, other: Self) -> Self {
        Self { pages: self.pages + other.pages, locals: self.locals + other.locals }
    }

    fn without(self, other: Self) -> Self {
        Self {
            pages: self.pages.saturating_sub(other.pages),
            locals: self.locals.saturating_sub(other.locals),
        }
    }
}

/// Entries of a page table that are pages.
fn held(table: &[u32]) -> usize {
    table.iter().filter(|&&page| page != NO_PAGE).count()
}

impl Core {
    /// Admits the next waiting sequence if there is room, and schedules it.
    pub(crate) fn admit_next(&mut self, plan: &mut Plan, now: Duration) -> bool {
        let ready = |id: SequenceId| self.sequences[&id].is_ready();
        let next = self.waiting.next(&self.fairness, ready, self.config.patience, now);
        let Some((id, claim)) = next else { return false };
        while !self.try_admit(id, claim, now) {
            let yielding = self.idle_holder(plan).or_else(|| self.lower_holder(id));
            let Some(yielding) = yielding else { return false };
            self.preempt(yielding, plan, now);
        }
        self.record_admission(id, now);
        self.schedule(id, plan, now);
        plan.rows.contains_key(&id) || self.sequences[&id].restoring.is_some()
    }

    /// The latest running sequence of a lower priority, if taking all of those is enough to admit `id`.
    fn lower_holder(&self, id: SequenceId) -> Option<SequenceId> {
        let sequence = &self.sequences[&id];
        // By the request's own priority: what a sequence was raised to protects it and robs nobody.
        let own = self.requests[&id.request].options.priority;
        let lower = |rank: &&Rank| rank.priority > own;
        let latest = self.running.last().filter(|rank| lower(rank))?;
        let freed = (self.running.iter().filter(lower))
            .map(|rank| self.held_alone(&self.sequences[&rank.id]))
            .fold(Need::default(), Need::plus);
        let owed = self.owed(self.running.iter().filter(|rank| !lower(rank)));
        let needed = self.most(sequence);
        self.fits(needed.plus(owed).without(freed)).then_some(latest.id)
    }

    /// Pages that nobody else holds.
    fn held_alone(&self, sequence: &Sequence) -> Need {
        let alone = |pool: &PagePool, page: u32| usize::from(page != NO_PAGE && pool.references(page) == 1);
        let pages = sequence.tables.pages.iter().map(|&page| alone(&self.cache.pool, page)).sum();
        let locals = self
            .cache
            .local
            .as_ref()
            .map_or(0, |local| sequence.tables.locals.iter().map(|&page| alone(&local.pool, page)).sum());
        Need { pages, locals }
    }

    /// What a sequence holds at most for the tokens that it has.
    fn most(&self, sequence: &Sequence) -> Need {
        let tokens = sequence.tokens.len();
        Need { pages: self.config.most_pages(tokens), locals: self.config.most_local_pages(tokens) }
    }

    fn fits(&self, need: Need) -> bool {
        need.pages <= self.cache.pool.available() && need.locals <= self.cache.available_local()
    }

    fn owed<'a>(&self, ranks: impl Iterator<Item = &'a Rank>) -> Need {
        ranks.map(|rank| self.pages_owed(&self.sequences[&rank.id])).fold(Need::default(), Need::plus)
    }

    fn try_admit(&mut self, id: SequenceId, claim: i32, now: Duration) -> bool {
        if self.running.len() >= self.config.max_num_seqs && !planted(Bug::MaxNumSeqsIsIgnored) {
            return false;
        }
        let owed = self.owed(self.running.iter());
        let mut beginning = self.find_beginning(id);
        let there = Need { pages: beginning.tables.len(), locals: held(&beginning.tables.locals) };
        let needed = self.most(&self.sequences[&id]).without(there);
        if !self.fits(self.at_first(&beginning, needed).plus(owed)) {
            // Without the page to copy, or those to fetch, it may fit.
            if let Some((page, _)) = beginning.source.take() {
                self.cache.release_ref(page);
            }
            beginning.wanted.clear();
        }
        if !self.fits(needed.plus(owed)) {
            self.cache.release_after(0, &mut beginning.tables);
            return false;
        }
        let user = self.user(id.request);
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence exists");
        self.waiting.remove(sequence, &user);
        self.waiting.serve(sequence.priority, now);
        sequence.priority = sequence.priority.min(claim);
        self.running.insert(sequence.rank());
        self.begin(id, beginning, now);
        true
    }

    /// Pages to allocate at once for what a beginning copies or fetches, or `needed` for all of its tokens, whichever is more. The window
    /// before what is fetched is held until that has come.
    fn at_first(&self, beginning: &Beginning, needed: Need) -> Need {
        let copies = usize::from(beginning.source.is_some());
        let fetched = self.cache.locals_to_restore(beginning.tables.len(), beginning.wanted.len());
        Need { pages: needed.pages.max(copies), locals: needed.locals.max(copies).max(fetched) }
    }

    /// Looks for a sequence's first tokens in memory and in the tier.
    fn find_beginning(&mut self, id: SequenceId) -> Beginning {
        let limit = self.reusable_tokens(id);
        let page_tokens = self.config.page_tokens;
        let sequence = &self.sequences[&id];
        let (tables, tail) = self.cache.take_prefix(&sequence.domain, &sequence.tokens, limit);
        let first = tables.len() * page_tokens;
        let mut wanted = self.cache.in_tier(&tail, &sequence.tokens, first, limit);
        if !wanted.is_empty() && !self.costs.worth_restoring(page_tokens) {
            wanted.clear();
        }
        // A window may leave fewer pages to a sequence than its beginning has.
        wanted.truncate(self.config.most_pages(sequence.tokens.len()).saturating_sub(tables.len()));
        let mut source = None;
        if wanted.is_empty() && first < limit {
            let tokens = sequence.tokens.range(first, limit.min(first + page_tokens));
            let found =
                [self.sibling_page(id, &tail, first, &tokens), self.cache.longest_match(&tail, &tokens)];
            source = found.into_iter().flatten().max_by_key(|&(_, alike)| alike);
            source.iter().for_each(|&(page, _)| self.cache.retain(page));
            if let Some((_, alike)) = source.as_mut().filter(|_| planted(Bug::CopyReachesTooFar)) {
                *alike = (*alike + 1).min(tokens.len());
            }
        }
        Beginning { tables, tail, wanted, source }
    }

    /// The page that the request's first completion is writing after `tail`, if it holds tokens from `first` on, and how many of
    /// these. What a page holds never changes, it only grows, so it can be copied while it is written further.
    fn sibling_page(
        &self,
        id: SequenceId,
        tail: &Tail,
        first: usize,
        tokens: &[u32],
    ) -> Option<(PageRef, usize)> {
        let sibling = self.sequences.get(&SequenceId { index: 0, ..id }).filter(|_| id.index > 0)?;
        // Completions part ways: a page may begin alike and continue something else.
        let continues = sibling.tail == *tail || planted(Bug::SiblingIsTakenForTwin);
        // A copy that was not made yet holds nothing, nor do pages that are being fetched.
        let written = sibling.copy_from.is_none() && sibling.restoring.is_none();
        let place = first / self.config.page_tokens;
        if !continues || sibling.sealed != place || !written || sibling.computed <= first {
            return None;
        }
        let own = sibling.tokens.range(first, sibling.computed);
        let alike = own.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        (alike > 0).then(|| (sibling.tables.at(place), alike))
    }

    /// Leading tokens that may come from the prefix cache: not the last, whose logits choose the next token, nor prompt rows whose
    /// logits are still to be delivered.
    fn reusable_tokens(&self, id: SequenceId) -> usize {
        let sequence = &self.sequences[&id];
        let wanted = if id.index == 0 { self.requests[&id.request].prompt_rows() } else { 0 };
        let all_but_last = sequence.tokens.len() - usize::from(!planted(Bug::WholePromptIsReused));
        if sequence.delivered < wanted { sequence.delivered.min(all_but_last) } else { all_but_last }
    }

    /// Pages that a sequence needs for the tokens it has, beyond those it holds.
    fn pages_owed(&self, sequence: &Sequence) -> Need {
        let missing = self.config.pages_for(sequence.tokens.len()).saturating_sub(sequence.tables.len());
        let there = Need { pages: held(&sequence.tables.pages), locals: held(&sequence.tables.locals) };
        let most = self.most(sequence).without(there);
        Need { pages: missing.min(most.pages), locals: missing.min(most.locals) }
    }

    fn record_admission(&mut self, id: SequenceId, now: Duration) {
        let sequence = &self.sequences[&id];
        let cached_tokens = sequence.computed;
        let request = self.requests.get_mut(&id.request).expect("a sequence has a request");
        self.counters.prefix_queries += sequence.tokens.len() as u64;
        if request.metrics.first_scheduled.is_none() {
            request.metrics.first_scheduled = Some(now);
            request.metrics.cached_tokens = cached_tokens as u64;
            self.counters.cached_tokens += cached_tokens as u64;
            let waited = now.saturating_sub(request.metrics.arrival);
            self.counters.histograms.queue_time.add(waited.as_secs_f64());
            self.unscheduled -= 1;
        }
        self.trace(id.request, TraceKind::Scheduled { cached_tokens }, now);
    }
}
