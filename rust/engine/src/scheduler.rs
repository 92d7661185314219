//! Which running sequences are part of the next step, and with how many rows.
//!
//! Decoding sequences get their single row first, whatever waits: a long prompt never stalls a running completion. Then drafts, then
//! prompts take the rest of the row budget, by priority, least served user and arrival; beside running completions whose tokens are
//! awaited only what fits into `step_time_target`. Where nobody looks before the end (`final_only`), short steps would only cost time: each
//! reads all weights, and a large model has read them for half of the target (70B in E4M3 on an H200: 48 of 100 ms beside 256
//! completions, so that a prompt got some 450 rows a step in place of 8,000). Then waiting sequences are admitted (`admission.rs`).
//! When pages run out, the latest rank gives up its own and waits to be computed again; the first rank is never robbed, and fits alone by
//! `EngineConfig::validate`, so every step brings someone forward. Who was robbed often enough gets the highest priority, so the number of
//! preemptions is bounded. A sequence whose consumer does not take its logits (`blocked`) gives way to anyone once nobody else can move.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};
use std::time::Duration;

use crate::ahead::Flight;
use crate::batch::{Batch, Scheduled};
use crate::core::Core;
use crate::journal::TraceKind;
use crate::planted::{Bug, planted};
use crate::sequence::{Rank, Sequence, SequenceId};
use crate::tables::NO_PAGE;

/// After so many preemptions nobody robs a sequence any more but older ones of the same fate.
pub(crate) const MOST_PREEMPTIONS: u32 = 8;

/// Prompts get so many rows of a step even where these take too long: fewer would hardly be quicker, since every step reads all weights.
const LEAST_PROMPT_ROWS: usize = 16;

/// Rows given out so far in a step.
pub(crate) struct Plan {
    pub rows: BTreeMap<SequenceId, usize>,
    pub budget: usize,
    pub logit_rows: usize,
    /// Branches of drafts among the rows.
    pub branches: usize,
}

impl Core {
    /// The next step's work; none when no request can run. Call [`Core::commit`] or [`Core::fail`] before the next call. Before the batch
    /// is computed, the pages of [`Core::take_saves`] must have been read.
    ///
    /// # Panics
    /// When the previous batch was neither committed nor failed.
    pub fn next_batch(&mut self, now: Duration) -> Option<Batch> {
        assert!(self.in_flight.is_empty(), "next_batch was called with a step in flight");
        self.expire(now);
        let plan = self.plan_step(now);
        if plan.rows.is_empty() {
            // Who waits for the tier may hold the pages that others need.
            let excused = || self.sequences.values().any(|sequence| sequence.restoring.is_some());
            assert!(
                !self.config.check_invariants || !self.has_runnable() || excused(),
                "nothing was scheduled although a sequence could run"
            );
            self.draft_round = None;
            self.check_invariants();
            return None;
        }
        let (batch, scheduled) = self.build_batch(&plan);
        self.draft_round = None;
        self.steps_ahead = 0;
        Some(self.depart(batch, scheduled, false, now))
    }

    /// Counts a step that is handed out.
    pub(crate) fn depart(
        &mut self,
        batch: Batch,
        scheduled: Vec<Scheduled>,
        ahead: bool,
        now: Duration,
    ) -> Batch {
        self.counters.steps += 1;
        self.counters.computed_tokens += batch.tokens.len() as u64;
        self.counters.copied_pages += batch.copies.len() as u64;
        self.counters.histograms.step_tokens.add(batch.tokens.len() as f64);
        self.in_flight.push_back(Flight { scheduled, started: now, ahead });
        self.check_invariants();
        batch
    }

    fn plan_step(&mut self, now: Duration) -> Plan {
        self.restart_long_contexts(now);
        let mut plan = Plan {
            rows: BTreeMap::new(),
            budget: self.config.max_num_batched_tokens,
            logit_rows: self.config.logit_rows(),
            branches: 0,
        };
        let running: Vec<SequenceId> = self.running.iter().map(|rank| rank.id).collect();
        let (mut decoding, mut prompts): (Vec<_>, Vec<_>) =
            running.into_iter().partition(|id| self.sequences[id].remaining() == 1);
        if planted(Bug::PromptsStallDecodes) && !prompts.is_empty() {
            prompts.append(&mut decoding);
        }
        for &id in &decoding {
            self.schedule(id, &mut plan, now);
        }
        if self.config.speculation.is_some() {
            decoding.iter().for_each(|&id| self.add_drafts(id, &mut plan));
            decoding.iter().for_each(|&id| self.add_branches(id, &mut plan));
        }
        if let Some(target) = self.config.step_time_target.filter(|_| self.is_awaited(&plan)) {
            let planned = self.config.max_num_batched_tokens - plan.budget;
            let rows = self.costs.rows_within(target, planned).max(LEAST_PROMPT_ROWS);
            if rows < plan.budget {
                let whole = self.config.whole_rows(planned + rows).saturating_sub(planned);
                plan.budget = if whole < LEAST_PROMPT_ROWS { rows } else { whole };
            }
        }
        prompts.sort_by_key(|id| {
            let sequence = &self.sequences[id];
            (sequence.priority, self.fairness.served(&self.requests[&id.request].options.user), *id)
        });
        for id in prompts {
            self.schedule(id, &mut plan, now);
        }
        while plan.budget > 0 && self.admit_next(&mut plan, now) {}
        self.admitted_all = plan.budget > 0;
        plan
    }

    /// Whether somebody waits for the next token of a running completion.
    fn is_awaited(&self, plan: &Plan) -> bool {
        plan.rows.keys().any(|id| !self.requests[&id.request].options.final_only)
    }

    /// Sequences that just outgrew the short-context position encoding start over with the long one.
    fn restart_long_contexts(&mut self, now: Duration) {
        let Some(switch) = self.config.context_switch.filter(|_| !planted(Bug::LongContextIsMissed)) else {
            return;
        };
        let outgrown = |sequence: &Sequence| sequence.tokens.len() > switch && !sequence.domain.long_context;
        let ids: Vec<SequenceId> =
            self.running.iter().map(|rank| rank.id).filter(|id| outgrown(&self.sequences[id])).collect();
        for &id in &ids {
            self.take_pages_back(id, now);
        }
        for sequence in self.sequences.values_mut().filter(|sequence| outgrown(sequence)) {
            sequence.domain.long_context = true;
            sequence.tail = self.cache.root(&sequence.domain);
        }
    }

    /// Gives a running sequence as many rows as budget and pages allow; may preempt later ones, may give it none.
    pub(crate) fn schedule(&mut self, id: SequenceId, plan: &mut Plan, now: Duration) {
        let sequence = &self.sequences[&id];
        if !self.running.contains(&sequence.rank()) || !sequence.is_ready() {
            return;
        }
        let mut rows = sequence.remaining().min(plan.budget);
        let prompt_rows = self.prompt_rows(id, rows);
        // Wanted prompt rows are consecutive, so cutting the excess off the end leaves exactly the rows that are allowed.
        if prompt_rows > plan.logit_rows {
            rows = sequence.computed.max(sequence.delivered) + plan.logit_rows - sequence.computed;
        }
        let rows = if rows == 0 { 0 } else { self.find_pages(id, rows, plan, now) };
        if rows == 0 {
            return;
        }
        plan.logit_rows -= self.prompt_rows(id, rows);
        if !planted(Bug::BudgetIsNotCharged) {
            plan.budget -= rows;
        }
        plan.rows.insert(id, rows);
    }

    /// Lets a decoding sequence verify drafts with rows and pages that nobody else needs now.
    fn add_drafts(&mut self, id: SequenceId, plan: &mut Plan) {
        if plan.rows.get(&id) != Some(&1) || !self.is_decoding(&self.sequences[&id]) {
            return;
        }
        let limit = self.draft_limit(&self.sequences[&id]).min(plan.budget).min(plan.logit_rows);
        self.look_up(id, limit);
        let reach = self.reach(&self.sequences[&id]).saturating_sub(self.sequences[&id].tokens.len());
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        let drafts = sequence.drafts.len().min(limit).min(reach);
        sequence.drafts.truncate(drafts);
        if drafts > 0 {
            self.extend_pages(id, 1 + drafts);
            plan.budget -= drafts;
            plan.logit_rows -= drafts;
            plan.rows.insert(id, 1 + drafts);
        }
    }

    /// Extends the page table for up to `rows` more rows and says for how many it is long enough now.
    fn find_pages(&mut self, id: SequenceId, rows: usize, plan: &mut Plan, now: Duration) -> usize {
        loop {
            let sequence = &self.sequences[&id];
            let rows = rows.min(self.reach(sequence) - sequence.computed);
            if rows > 0 || !self.drop_branches(plan) && !self.preempt_for(id, plan, now) {
                self.extend_pages(id, rows);
                return rows;
            }
        }
    }

    /// Positions that a sequence's pages and all available ones could hold.
    pub(crate) fn reach(&self, sequence: &Sequence) -> usize {
        (sequence.tables.len() + self.cache.available()) * self.config.page_tokens
    }

    /// Makes the page table long enough for `rows` rows; the caller has counted the available pages.
    pub(crate) fn extend_pages(&mut self, id: SequenceId, rows: usize) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        let wanted = self.config.pages_for(sequence.computed + rows);
        while sequence.tables.len() < wanted {
            self.cache.extend(&mut sequence.tables).expect("the caller counted the available pages");
        }
    }

    /// Takes the pages of one sequence that must yield to `id`, if there is one.
    fn preempt_for(&mut self, id: SequenceId, plan: &mut Plan, now: Duration) -> bool {
        let rank = self.sequences[&id].rank();
        let holds = |other: &&Rank| self.sequences[&other.id].tables.holds_any();
        let latest = self.running.range((Excluded(rank), Unbounded)).rfind(holds).map(|rank| rank.id);
        let Some(victim) = latest.or_else(|| self.idle_holder(plan)) else { return false };
        self.preempt(victim, plan, now);
        true
    }

    /// A sequence that holds a place although its consumer keeps it waiting; only when nobody else can move.
    pub(crate) fn idle_holder(&self, plan: &Plan) -> Option<SequenceId> {
        let mut running = self.running.iter().map(|rank| rank.id);
        if plan.rows.is_empty() { running.find(|id| self.sequences[id].blocked) } else { None }
    }

    /// Takes a running sequence's pages and its rows in this step.
    pub(crate) fn preempt(&mut self, id: SequenceId, plan: &mut Plan, now: Duration) {
        self.drop_branches(plan);
        if let Some(rows) = plan.rows.remove(&id) {
            plan.budget += rows;
            let sequence = &self.sequences[&id];
            plan.logit_rows += self.prompt_rows(id, rows) + rows.saturating_sub(sequence.remaining());
        }
        self.counters.preemptions += 1;
        self.requests.get_mut(&id.request).expect("a sequence has a request").metrics.preemptions += 1;
        self.trace(id.request, TraceKind::Preempted, now);
        self.take_pages_back(id, now);
    }

    fn take_pages_back(&mut self, id: SequenceId, now: Duration) {
        let rank = self.sequences[&id].rank();
        self.running.remove(&rank);
        if planted(Bug::PreemptedPagesLeak) {
            let held = self.sequences[&id].tables.pages.iter().find(|&&page| page != NO_PAGE);
            held.into_iter().for_each(|&page| self.cache.pool.retain(page));
        }
        self.give_up_pages(id);
        let user = self.user(id.request);
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        sequence.preemptions += 1;
        if planted(Bug::PenaltiesForgetPreempted) {
            sequence.history.output.clear();
        }
        if sequence.preemptions >= MOST_PREEMPTIONS {
            sequence.priority = i32::MIN;
        }
        self.waiting.insert(sequence, user, now);
    }

    /// How many of a sequence's next `rows` rows are prompt rows whose logits are wanted.
    pub(crate) fn prompt_rows(&self, id: SequenceId, rows: usize) -> usize {
        if id.index > 0 {
            return 0;
        }
        let sequence = &self.sequences[&id];
        let end = self.requests[&id.request].prompt_rows().min(sequence.computed + rows);
        end.saturating_sub(sequence.computed.max(sequence.delivered))
    }
}
