//! Which sequences are part of the next step.
//!
//! First come, first served, with one exception that keeps latency even: sequences that need a single row (decoding) are placed before
//! prompts take the rest of the row budget. When pages run out, the latest sequence gives up its own and waits to be computed again; the
//! earliest is never robbed, and fits alone by `EngineConfig::validate`, so every step brings someone forward. A sequence whose consumer
//! does not take its logits (`blocked`) gives way to anyone once nobody else can move.
//! A waiting sequence is admitted only when all pages its tokens need are there beyond what running prompts still need, so that
//! admission does not cause preemption in the next step.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::core::{Batch, BatchSequence, Core, Scheduled};
use crate::request::RequestKind;
use crate::sequence::{Sequence, SequenceId};

/// Rows given out so far in a step.
struct Plan {
    rows: BTreeMap<SequenceId, usize>,
    budget: usize,
    prompt_logit_rows: usize,
}

impl Core {
    /// The next step's work; none when no request can run. Call [`Core::commit`] or [`Core::fail`] before the next call.
    ///
    /// # Panics
    /// When the previous batch was neither committed nor failed.
    pub fn next_batch(&mut self, now: Duration) -> Option<Batch> {
        assert!(self.in_flight.is_none(), "next_batch was called with a step in flight");
        let plan = self.plan_step(now);
        if plan.rows.is_empty() {
            debug_assert!(!self.has_runnable(), "nothing was scheduled although a sequence could run");
            return None;
        }
        let (batch, scheduled) = self.build_batch(&plan);
        self.counters.steps += 1;
        self.counters.computed_tokens += batch.tokens.len() as u64;
        self.in_flight = Some(scheduled);
        self.check_invariants();
        Some(batch)
    }

    fn plan_step(&mut self, now: Duration) -> Plan {
        self.restart_long_contexts();
        let mut plan = Plan {
            rows: BTreeMap::new(),
            budget: self.config.max_num_batched_tokens,
            prompt_logit_rows: self.config.prompt_logit_rows(),
        };
        let running: Vec<SequenceId> = self.running.iter().copied().collect();
        let (decoding, prompts): (Vec<_>, Vec<_>) =
            running.into_iter().partition(|id| self.sequences[id].remaining() == 1);
        for id in decoding.into_iter().chain(prompts) {
            self.schedule(id, &mut plan);
        }
        while plan.budget > 0 && self.admit_next(&mut plan, now) {}
        plan
    }

    /// Sequences that just outgrew the short-context position encoding start over with the long one.
    fn restart_long_contexts(&mut self) {
        let Some(switch) = self.config.context_switch else { return };
        let outgrown = |sequence: &Sequence| sequence.tokens.len() > switch && !sequence.domain.long_context;
        let ids: Vec<SequenceId> =
            self.running.iter().copied().filter(|id| outgrown(&self.sequences[id])).collect();
        for &id in &ids {
            self.take_pages_back(id);
        }
        for sequence in self.sequences.values_mut().filter(|sequence| outgrown(sequence)) {
            sequence.domain.long_context = true;
        }
    }

    /// Gives a running sequence as many rows as budget and pages allow; may preempt later ones, may give it none.
    fn schedule(&mut self, id: SequenceId, plan: &mut Plan) {
        if !self.running.contains(&id) || self.sequences[&id].blocked {
            return;
        }
        let mut rows = self.sequences[&id].remaining().min(plan.budget);
        let prompt_rows = self.prompt_rows(id, rows);
        // Wanted prompt rows are consecutive, so cutting the excess off the end leaves exactly the rows that are allowed.
        if prompt_rows > plan.prompt_logit_rows {
            let sequence = &self.sequences[&id];
            rows = sequence.computed.max(sequence.delivered) + plan.prompt_logit_rows - sequence.computed;
        }
        let rows = if rows == 0 { 0 } else { self.find_pages(id, rows, plan) };
        if rows == 0 {
            return;
        }
        plan.prompt_logit_rows -= self.prompt_rows(id, rows);
        plan.budget -= rows;
        plan.rows.insert(id, rows);
    }

    /// Extends the page table for up to `rows` more rows and says for how many it is long enough now.
    fn find_pages(&mut self, id: SequenceId, rows: usize, plan: &mut Plan) -> usize {
        loop {
            let sequence = &self.sequences[&id];
            let reach = (sequence.pages.len() + self.cache.pool.available()) * self.config.page_tokens;
            let rows = rows.min(reach - sequence.computed);
            if rows > 0 || !self.preempt_for(id, plan) {
                self.extend_pages(id, rows);
                return rows;
            }
        }
    }

    fn extend_pages(&mut self, id: SequenceId, rows: usize) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        let wanted = self.config.pages_for(sequence.computed + rows);
        while sequence.pages.len() < wanted {
            sequence.pages.push(self.cache.allocate().expect("find_pages counted the available pages"));
        }
    }

    /// Takes the pages of one sequence that must yield to `id`, if there is one.
    fn preempt_for(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        let holds = |other: &&SequenceId| **other != id && !self.sequences[*other].pages.is_empty();
        let latest = self.running.range(id..).rfind(holds).copied();
        let Some(victim) = latest.or_else(|| self.idle_holder(plan)) else { return false };
        if let Some(rows) = plan.rows.remove(&victim) {
            plan.budget += rows;
            plan.prompt_logit_rows += self.prompt_rows(victim, rows);
        }
        self.preempt(victim);
        true
    }

    /// A sequence that holds a place although its consumer keeps it waiting; only when nobody else can move.
    fn idle_holder(&self, plan: &Plan) -> Option<SequenceId> {
        let mut running = self.running.iter().copied();
        if plan.rows.is_empty() { running.find(|id| self.sequences[id].blocked) } else { None }
    }

    fn preempt(&mut self, id: SequenceId) {
        self.take_pages_back(id);
        self.counters.preemptions += 1;
        self.requests.get_mut(&id.request).expect("a sequence has a request").metrics.preemptions += 1;
    }

    fn take_pages_back(&mut self, id: SequenceId) {
        debug_assert!(self.in_flight.is_none(), "a step in flight keeps its pages");
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        self.cache.release_all(&mut sequence.pages);
        (sequence.computed, sequence.sealed) = (0, 0);
        self.running.remove(&id);
        self.waiting.insert(id);
    }

    /// Admits the earliest waiting sequence if there is room, and schedules it.
    fn admit_next(&mut self, plan: &mut Plan, now: Duration) -> bool {
        let Some(id) = self.waiting.iter().copied().find(|id| !self.sequences[id].blocked) else {
            return false;
        };
        while !self.try_admit(id) {
            let Some(idle) = self.idle_holder(plan) else { return false };
            self.preempt(idle);
        }
        self.record_admission(id, now);
        self.schedule(id, plan);
        plan.rows.contains_key(&id)
    }

    fn try_admit(&mut self, id: SequenceId) -> bool {
        if self.running.len() >= self.config.max_num_seqs {
            return false;
        }
        let owed: usize = self.running.iter().map(|id| self.pages_owed(&self.sequences[id])).sum();
        let limit = self.reusable_tokens(id);
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence exists");
        sequence.pages = self.cache.take_prefix(sequence.domain, &sequence.tokens, limit);
        let needed = self.config.pages_for(sequence.tokens.len()) - sequence.pages.len();
        if needed + owed > self.cache.pool.available() {
            self.cache.release_all(&mut sequence.pages);
            return false;
        }
        sequence.sealed = sequence.pages.len();
        sequence.computed = sequence.sealed * self.config.page_tokens;
        self.waiting.remove(&id);
        self.running.insert(id);
        true
    }

    /// Leading tokens that may come from the prefix cache: not the last, whose logits choose the next token, nor prompt rows whose
    /// logits are still to be delivered.
    fn reusable_tokens(&self, id: SequenceId) -> usize {
        let sequence = &self.sequences[&id];
        let wanted = if id.index == 0 { self.requests[&id.request].prompt_rows() } else { 0 };
        let all_but_last = sequence.tokens.len() - 1;
        if sequence.delivered < wanted { sequence.delivered.min(all_but_last) } else { all_but_last }
    }

    /// Pages a sequence needs for the tokens it has, beyond those it holds.
    fn pages_owed(&self, sequence: &Sequence) -> usize {
        self.config.pages_for(sequence.tokens.len()).saturating_sub(sequence.pages.len())
    }

    fn record_admission(&mut self, id: SequenceId, now: Duration) {
        let metrics = &mut self.requests.get_mut(&id.request).expect("a sequence has a request").metrics;
        if metrics.first_scheduled.is_none() {
            metrics.first_scheduled = Some(now);
            metrics.cached_tokens = self.sequences[&id].computed as u64;
            self.counters.cached_tokens += metrics.cached_tokens;
        }
    }

    /// How many of a sequence's next `rows` rows are prompt rows whose logits are wanted.
    fn prompt_rows(&self, id: SequenceId, rows: usize) -> usize {
        if id.index > 0 {
            return 0;
        }
        let sequence = &self.sequences[&id];
        let end = self.requests[&id.request].prompt_rows().min(sequence.computed + rows);
        end.saturating_sub(sequence.computed.max(sequence.delivered))
    }

    fn build_batch(&self, plan: &Plan) -> (Batch, Vec<Scheduled>) {
        let mut batch = Batch::default();
        let mut scheduled = Vec::with_capacity(plan.rows.len());
        for (&id, &rows) in &plan.rows {
            let sequence = &self.sequences[&id];
            let (first_row, computed) = (batch.tokens.len(), sequence.computed);
            let generates = matches!(self.requests[&id.request].kind, RequestKind::Generate(_));
            let samples = generates && rows == sequence.remaining();
            let prompt_rows = self.prompt_rows(id, rows);
            let first_wanted = first_row + sequence.delivered.max(computed) - computed;
            let last = first_row + rows - 1;
            batch.logit_rows.extend((first_wanted..first_wanted + prompt_rows).map(|row| row as u32));
            batch.logit_rows.extend(samples.then_some(last as u32));
            batch.tokens.extend_from_slice(&sequence.tokens.range(computed, computed + rows));
            batch.sequences.push(BatchSequence {
                first_row,
                rows,
                first_position: computed,
                pages: sequence.pages.clone(),
                long_context: sequence.domain.long_context,
            });
            scheduled.push(Scheduled { id, rows, prompt_rows, samples });
        }
        (batch, scheduled)
    }
}
