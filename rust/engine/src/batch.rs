//! One step's work, as a backend gets it: plain integers.

use crate::core::Core;
use crate::draw::{CHANGE_WORDS, Change, Draw, MOST_DRAW_WORDS};
use crate::planted::{Bug, planted};
use crate::request::RequestKind;
use crate::scheduler::Plan;
use crate::sequence::SequenceId;
use crate::tables::PageRef;

/// One step's work.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Pages to copy, (from, to), before anything is computed and in any order: none is copied from that is copied to.
    pub copies: Vec<(PageRef, PageRef)>,
    /// The rows' tokens: (rows).
    pub tokens: Vec<u32>,
    /// Rows, ascending, whose token is what the step before chose, and which of that step's `logit_rows` chose it. Their entry in `tokens` is 0.
    pub follows: Vec<(u32, u32)>,
    /// The rows' sequences, one after the other.
    pub sequences: Vec<BatchSequence>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// For each of them, how its token is drawn, where that is simple enough for a device to do itself; or empty, when none may be drawn
    /// so. See [`crate::Device::take_choices`].
    pub draws: Vec<Option<Draw>>,
    /// What changes single logits of rows that are drawn.
    pub changes: Vec<Change>,
    /// Which tokens rows may choose: masks, one after the other.
    pub allowed: Vec<u32>,
    /// In [`crate::Device::draft`]: how many tokens a device that draws may draw for each row, one after the other, feeding itself what it
    /// drew ([`Batch::advanced`]). It gives the choices of all rows for the first, then for the second, ...; or those of the first alone.
    pub rounds: usize,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSequence {
    /// Its first row in the batch.
    pub first_row: usize,
    /// How many rows.
    pub rows: usize,
    /// Position of its first row in the sequence.
    pub first_position: usize,
    /// Its page table, enough for all its positions. Pages wholly before every layer's window may be `u32::MAX`: none.
    pub pages: Vec<u32>,
    /// The same for the layers that see only a window, where others see everything: as long, with `u32::MAX` for pages wholly before the
    /// window. Empty where there are no such layers.
    pub local_pages: Vec<u32>,
    /// Use the long-context variant of the position encoding.
    pub long_context: bool,
    /// Leading rows that a draft model has computed already, in [`crate::Device::draft`].
    pub drafted: usize,
}

impl Batch {
    /// Words that changes and masks take.
    #[must_use]
    pub fn draw_words(&self) -> usize {
        self.changes.len() * CHANGE_WORDS + self.allowed.len()
    }

    /// The same rows so many positions later, of tokens that the rows before chose themselves.
    #[must_use]
    pub fn advanced(&self, positions: usize) -> Self {
        let mut next = Self { rounds: 0, copies: Vec::new(), ..self.clone() };
        next.tokens.fill(0);
        next.follows = (0..self.tokens.len() as u32).map(|row| (row, row)).collect();
        next.sequences.iter_mut().for_each(|sequence| sequence.first_position += positions);
        next.draws.iter_mut().flatten().for_each(|draw| draw.position += positions as u64);
        next
    }

    /// The rows that the draft model has not computed yet; none of their logits are wanted, and no page is copied.
    #[must_use]
    pub fn not_drafted(&self) -> Self {
        let mut rest = Self::default();
        for sequence in self.sequences.iter().filter(|sequence| sequence.drafted < sequence.rows) {
            let rows = sequence.rows - sequence.drafted;
            let first = sequence.first_row + sequence.drafted;
            rest.sequences.push(BatchSequence {
                first_row: rest.tokens.len(),
                rows,
                first_position: sequence.first_position + sequence.drafted,
                drafted: 0,
                ..sequence.clone()
            });
            rest.tokens.extend_from_slice(&self.tokens[first..first + rows]);
        }
        rest
    }
}

/// What a sequence contributes to the step in flight.
#[derive(Debug, Clone)]
pub(crate) struct Scheduled {
    pub id: SequenceId,
    pub rows: usize,
    /// Prompt rows whose logits come back, ahead of the sampled ones.
    pub prompt_rows: usize,
    /// Last rows whose logits choose tokens: none, one, or one more than there are drafts.
    pub sampled_rows: usize,
    /// Rows of its branches, which are behind those.
    pub branch_rows: usize,
    /// How many of them come back.
    pub branch_samples: usize,
    /// A device may draw these tokens itself.
    pub drawn: bool,
    /// Its last page began as a copy that this step makes.
    pub copied: bool,
}

impl Scheduled {
    /// Rows whose logits come back.
    pub fn logit_rows(&self) -> usize {
        self.prompt_rows + self.samples()
    }

    /// Rows whose logits choose tokens, or would.
    pub fn samples(&self) -> usize {
        self.sampled_rows + self.branch_samples
    }

    /// Rows that are computed.
    pub fn all_rows(&self) -> usize {
        self.rows + self.branch_rows
    }
}

impl Core {
    /// Puts the planned rows together. Copies become part of the batch here, so their sources need not be held any longer.
    pub(crate) fn build_batch(&mut self, plan: &Plan) -> (Batch, Vec<Scheduled>) {
        let mut batch = Batch::default();
        let mut scheduled = Vec::with_capacity(plan.rows.len());
        for (&id, &rows) in &plan.rows {
            let work = self.add_rows(&mut batch, id, rows);
            scheduled.push(work);
        }
        (batch, scheduled)
    }

    fn add_rows(&mut self, batch: &mut Batch, id: SequenceId, rows: usize) -> Scheduled {
        let prompt_rows = self.prompt_rows(id, rows);
        let generates = matches!(self.requests[&id.request].kind, RequestKind::Generate(_));
        let model_drafts = self.draft_round.is_some();
        let sequence = self.sequences.get_mut(&id).expect("a planned sequence exists");
        let (first_row, computed) = (batch.tokens.len(), sequence.computed);
        let real = rows.min(sequence.remaining());
        sequence.drafts.truncate(rows - real);
        let sampled_rows =
            if generates && real == sequence.remaining() { 1 + sequence.drafts.len() } else { 0 };
        let copy = sequence.copy_from.take();
        if let Some(from) = copy {
            let mut to = sequence.tables.at(computed / self.config.page_tokens);
            to.local = to.local.filter(|_| !planted(Bug::LocalPageIsNotCopied));
            batch.copies.extend((!planted(Bug::CopyIsForgotten)).then_some((from, to)));
            self.cache.release_ref(from);
        }
        let first_wanted = first_row + sequence.delivered.max(computed) - computed;
        let end = first_row + rows;
        batch.logit_rows.extend((first_wanted..first_wanted + prompt_rows).map(|row| row as u32));
        batch.logit_rows.extend((end - sampled_rows..end).map(|row| row as u32));
        if self.config.device_draws {
            batch.draws.extend(std::iter::repeat_n(None, prompt_rows));
        }
        batch.tokens.extend_from_slice(&sequence.tokens.range(computed, computed + real));
        batch.tokens.extend_from_slice(&sequence.drafts);
        batch.sequences.push(BatchSequence {
            first_row,
            rows,
            first_position: computed + usize::from(planted(Bug::PositionIsOffByOne) && rows > 1),
            pages: sequence.tables.pages.clone(),
            local_pages: sequence.tables.locals.clone(),
            long_context: sequence.domain.long_context,
            // The draft model was fed the last token and all of its guesses but the last one.
            drafted: if model_drafts { sequence.drafts.len() } else { 0 },
        });
        let drawn = self.config.device_draws && sampled_rows > 0 && self.add_draws(batch, id, sampled_rows);
        let (branch_rows, branch_samples) = self.put_branches(batch, id, copy);
        let copied = copy.is_some();
        Scheduled { id, rows, prompt_rows, sampled_rows, branch_rows, branch_samples, drawn, copied }
    }

    /// Says how a sequence's next tokens are drawn; false where the sampler must draw them.
    fn add_draws(&self, batch: &mut Batch, id: SequenceId, count: usize) -> bool {
        let drawn = self.draw(&self.sequences[&id], 0, count);
        match drawn.filter(|drawn| batch.draw_words() + drawn.words() <= MOST_DRAW_WORDS) {
            Some(drawn) => drawn.put(count, None, batch),
            None => batch.draws.extend(std::iter::repeat_n(None, count)),
        }
        batch.draws.last().is_some_and(Option::is_some)
    }
}
