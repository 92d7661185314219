//! Steps that are begun while the one before is computed, so that a device that works by itself never waits for the engine.
//!
//! A steady step decodes: each running sequence has one row, and a device that draws tokens itself knows the next step's input before
//! anyone else does. Such a step is planned without knowing the tokens: its rows say whose choice of the step before they compute
//! ([`Batch::follows`]), positions and pages follow from counts alone. What else may happen is left to a step that is planned with
//! everything known: prompts, admissions, preemption, drafts, cancellation. The engine then lets the step in flight come home first.
//!
//! That a completion has ended (by a stop token, a stop string, an error) is learned a step late. Its row in the step behind is
//! computed for nobody: nothing of it is committed, so its slot is never named in the prefix cache, and the page may be handed out at once
//! because a device computes steps in the order in which they are begun.

use std::time::Duration;

use crate::batch::{Batch, BatchSequence, Scheduled};
use crate::core::Core;
use crate::draw::MOST_DRAW_WORDS;
use crate::params::SamplingParams;
use crate::planted::{Bug, planted};
use crate::sequence::{Sequence, SequenceId};

/// Steps in a row that are planned ahead while sequences wait: then they are looked at again, since waiting raises their claims.
const MOST_AHEAD: usize = 64;

/// A step that was handed out and is neither committed nor failed.
pub(crate) struct Flight {
    pub scheduled: Vec<Scheduled>,
    /// When it was put together.
    pub started: Duration,
    /// It was planned while another one was in flight.
    pub ahead: bool,
}

impl Core {
    /// Steps that were handed out and are neither committed nor failed: two at most.
    #[must_use]
    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The step after the one in flight, as far as it can be known now; none when only [`Core::next_batch`] can tell. For devices that draw
    /// every token of [`Batch::draws`] themselves, and compute steps in order; [`Core::commit_choices`] and [`Core::fail`] take
    /// outcomes in that order too.
    ///
    /// # Panics
    /// When not exactly one step is in flight.
    pub fn next_ahead(&mut self, now: Duration) -> Option<Batch> {
        assert_eq!(self.in_flight.len(), 1, "next_ahead follows one step in flight");
        self.expire(now);
        let follows = self.rows_ahead()?;
        self.steps_ahead += 1;
        let mut batch = Batch::default();
        let scheduled =
            follows.iter().map(|&(id, place)| self.add_row_ahead(&mut batch, id, place)).collect();
        Some(self.depart(batch, scheduled, true, now))
    }

    fn add_row_ahead(&mut self, batch: &mut Batch, id: SequenceId, place: u32) -> Scheduled {
        self.extend_pages(id, 1 + self.sequences[&id].remaining());
        let sequence = &self.sequences[&id];
        let row = batch.tokens.len();
        batch.tokens.push(0);
        batch.follows.push((row as u32, place));
        batch.logit_rows.push(row as u32);
        batch.sequences.push(BatchSequence {
            first_row: row,
            rows: 1,
            first_position: sequence.tokens.len(),
            pages: sequence.tables.pages.clone(),
            local_pages: sequence.tables.locals.clone(),
            long_context: sequence.domain.long_context,
            drafted: 0,
        });
        let counts = self.requests[&id.request].params().is_some_and(SamplingParams::has_penalties);
        let drawn = self.draw(sequence, 1, 1).expect("rows_ahead asked");
        let uncounted = counts && !planted(Bug::LatestTokenIsNotCounted);
        drawn.put(1, uncounted.then_some(place), batch);
        Scheduled {
            id,
            rows: 1,
            prompt_rows: 0,
            sampled_rows: 1,
            branch_rows: 0,
            branch_samples: 0,
            drawn: true,
            copied: false,
        }
    }

    /// The sequences of the next step with the places of their tokens among the choices of the step in flight.
    fn rows_ahead(&self) -> Option<Vec<(SequenceId, u32)>> {
        let quiet = self.cancelled.is_empty() && self.config.speculation.is_none();
        if !quiet || self.might_admit() {
            return None;
        }
        let flight = self.in_flight.front()?;
        let mut rows = Vec::with_capacity(flight.scheduled.len());
        let (mut place, mut met, mut pages, mut words) = (0, 0, 0, 0);
        for work in &flight.scheduled {
            let own = place + work.prompt_rows + usize::from(planted(Bug::AheadIsOfAnotherRow) && place > 0);
            place += work.logit_rows();
            // It ended when an earlier step was committed.
            let Some(sequence) = self.sequences.get(&work.id) else { continue };
            met += 1;
            if work.sampled_rows != 1 || !work.drawn {
                return None;
            }
            if sequence.tokens.output.len() + 1 < self.requests[&work.id.request].max_output {
                let wanted = self.config.pages_for(sequence.tokens.len() + 1);
                pages += wanted.saturating_sub(sequence.tables.len());
                words += self.draw(sequence, 1, 1)?.words();
                rows.push((work.id, own as u32));
            }
        }
        let others = self.running.iter().filter(|rank| self.sequences[&rank.id].is_ready()).count();
        let known = others == met
            && words <= MOST_DRAW_WORDS
            && pages <= self.cache.available()
            && !self.switches(&rows);
        (known && !rows.is_empty()).then_some(rows)
    }

    /// Whether one of them outgrows the short-context position encoding with the token in flight.
    fn switches(&self, rows: &[(SequenceId, u32)]) -> bool {
        let Some(switch) = self.config.context_switch else { return false };
        let outgrows =
            |sequence: &Sequence| sequence.tokens.len() + 1 > switch && !sequence.domain.long_context;
        rows.iter().any(|(id, _)| outgrows(&self.sequences[id])) && !planted(Bug::AheadPassesTheSwitch)
    }

    /// Whether a waiting sequence might be admitted now: not since the last plan found no more room, unless something happened.
    fn might_admit(&self) -> bool {
        let full = self.running.len() >= self.config.max_num_seqs;
        let settled = (full || self.admitted_all) && self.steps_ahead < MOST_AHEAD;
        self.waiting.len() > 0 && !settled
    }
}
