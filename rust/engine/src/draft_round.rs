//! What a draft model guesses for a step, a token for all sequences at a time.
//!
//! With `num_draft_tokens`, branches begin in place of its first and second guess: with tokens that it holds likely there (the product
//! of its own probabilities along the branch, as EAGLE-2 weighs them), most likely first, each guessed on to the depth of the chain, until
//! the tree has as many tokens as it may. They come from log-probabilities, which a device that draws tells with what it drew.

use crate::batch::{Batch, BatchSequence};
use crate::core::Core;
use crate::draft_tree::Branch;
use crate::draw::{Choice, MOST_DRAW_WORDS};
use crate::logprobs::TokenLogprob;
use crate::sequence::SequenceId;
use crate::speculative::Speculation;

/// Drafts from the first on in whose place a draft model may guess otherwise: later ones are seldom reached, and cost more rows.
const BRANCHING_DRAFTS: usize = 2;

/// Other guesses that are looked at in each place.
const MOST_OTHERS: u32 = 4;

/// How likely a draft model must hold another guess, with those before it, for a branch to be made of it.
const LEAST_LIKELY: f32 = 0.1;

/// The sequences that a draft model guesses for in this round, and how many more tokens for each.
#[derive(Debug)]
pub(crate) struct DraftRound {
    open: Vec<Guessing>,
    /// Rows of the step, and rows with logits, that are left for branches.
    rows: usize,
    logit_rows: usize,
}

/// A sequence that a draft model guesses for, or one of its branches.
#[derive(Debug, Clone, Copy)]
struct Guessing {
    id: SequenceId,
    branch: Option<usize>,
    /// More tokens that may be guessed.
    left: usize,
    /// A device may draw the next one itself.
    drawn: bool,
    /// Drafts that branches beside this chain may still have.
    others: usize,
    /// How likely the draft model holds what was guessed so far.
    likelihood: f32,
}

impl Guessing {
    /// Whether branches may begin in place of its next guess, which comes after so many.
    fn may_branch(&self, drafts: usize) -> bool {
        self.branch.is_none() && self.others > 0 && drafts < BRANCHING_DRAFTS
    }
}

impl Core {
    /// The next rows for the draft model: the last token of every sequence that guesses on, one row each, and all tokens from there on of a new
    /// branch. Logits are wanted of the last row of each. None when the round is over. Call before [`Core::next_batch`], and
    /// [`Core::commit_draft`] after each. Before the rows are computed, the pages of [`Core::take_saves`] must have been read.
    ///
    /// # Panics
    /// When a step is in flight.
    pub fn next_draft(&mut self) -> Option<Batch> {
        let Some(Speculation::DraftModel { .. }) = self.config.speculation else { return None };
        assert!(self.in_flight.is_empty(), "drafts are made between steps");
        if self.draft_round.is_none() {
            self.draft_round = Some(self.open_draft_round());
        }
        let mut round = self.draft_round.take()?;
        let most = round.open.iter().map(|guessing| guessing.left).min().unwrap_or(0);
        let mut batch = Batch { rounds: most, ..Batch::default() };
        for guessing in &mut round.open {
            let ahead = self.put_guess(guessing, &mut batch);
            let sequence = &self.sequences[&guessing.id];
            let drawn = self.draw(sequence, ahead, 1);
            let drawn = drawn.filter(|drawn| batch.draw_words() + drawn.words() <= MOST_DRAW_WORDS);
            guessing.drawn = drawn.is_some();
            // Whoever cannot be drawn, now or some tokens later, ends what a device does by itself.
            let more = 1..if guessing.drawn { batch.rounds } else { 0 };
            let can = |later: &usize| self.draw(sequence, ahead + later, 1).is_some();
            batch.rounds = 1 + more.take_while(can).count();
            let told = guessing.may_branch(ahead).then_some(MOST_OTHERS);
            match drawn {
                Some(drawn) => drawn.telling(told).put(1, None, &mut batch),
                None => batch.draws.push(None),
            }
            if told.is_some() {
                batch.rounds = 1;
            }
        }
        if batch.tokens.len() > round.open.len() {
            batch.rounds = 1; // only single rows go on by themselves
        }
        let empty = round.open.is_empty();
        self.counters.copied_pages += batch.copies.len() as u64;
        self.draft_round = Some(round);
        (!empty).then_some(batch)
    }

    /// Puts the rows that give a sequence's or a branch's next guess into a batch; how many guesses are before it.
    fn put_guess(&mut self, guessing: &Guessing, batch: &mut Batch) -> usize {
        let first_row = batch.tokens.len();
        let sequence = self.sequences.get_mut(&guessing.id).expect("a guessing sequence exists");
        let last = sequence.tokens.len() - 1;
        let mut own = BatchSequence {
            first_row,
            rows: 1,
            first_position: last,
            pages: Vec::new(),
            local_pages: Vec::new(),
            long_context: sequence.domain.long_context,
            drafted: 0,
        };
        let branch = guessing.branch.map(|branch| &sequence.branches[branch]);
        let drafts = branch.map_or(&sequence.drafts, |branch| &branch.drafts);
        let ahead = drafts.len();
        match branch {
            Some(branch) => own = BatchSequence { drafted: 0, ..branch.sequence(sequence, first_row) },
            None => {
                own.pages.clone_from(&sequence.tables.pages);
                own.local_pages.clone_from(&sequence.tables.locals);
            }
        }
        if branch.is_some_and(|branch| !branch.drafted) {
            batch.tokens.push(sequence.tokens.at(last));
            batch.tokens.extend_from_slice(drafts);
        } else {
            own.rows = 1;
            own.first_position = last + ahead;
            batch.tokens.push(drafts.last().copied().unwrap_or_else(|| sequence.tokens.at(last)));
        }
        batch.sequences.push(own);
        batch.logit_rows.push(batch.tokens.len() as u32 - 1);
        if let Some(branch) = guessing.branch {
            let inside = sequence.computed % self.config.page_tokens;
            let branch = &mut sequence.branches[branch];
            if inside > 0 && !branch.copied {
                batch.copies.push((sequence.tables.at(branch.first_page), branch.tables.at(0)));
            }
            (branch.copied, branch.drafted) = (true, true);
        }
        ahead
    }

    /// Takes the draft model's logits for the last [`Core::next_draft`]: (rows, vocabulary), or what the device chose and the logits of the
    /// other rows, as [`Core::commit_choices`], or its choices of several rounds. Rows that give no token end their sequence's guessing.
    pub fn commit_draft(&mut self, logits: &[f32], choices: &[Choice]) {
        let Some(round) = &mut self.draft_round else { return };
        let open = std::mem::take(&mut round.open);
        let mut next = Vec::with_capacity(open.len());
        let (mut rows, mut chosen) = (logits.chunks_exact(self.config.vocabulary), choices.iter());
        let (count, rounds) = (open.len(), choices.len() / open.len().max(1));
        for (place, mut guessing) in open.into_iter().enumerate() {
            let mut told = None;
            let first = match guessing.drawn && !choices.is_empty() {
                true => chosen.next().and_then(|choice| {
                    told.clone_from(&choice.logprobs);
                    choice.token().ok()
                }),
                false => rows.next().and_then(|logits| {
                    let token = self.draft_token(&guessing, logits)?;
                    let may_branch = guessing.may_branch(self.guesses(&guessing).len());
                    told = may_branch.then(|| self.sampler.logprobs(logits, token, MOST_OTHERS));
                    Some(token)
                }),
            };
            if let (Some(_), Some(told)) = (first, told) {
                self.add_guesses(&mut guessing, &told, &mut next);
            }
            let later = (1..rounds).map(|round| choices[round * count + place].token().ok());
            for token in std::iter::once(first).chain(later) {
                let stops = &self.requests[&guessing.id.request].stop_tokens;
                let ends = token.is_none_or(|token| stops.binary_search(&token).is_ok());
                guessing.left = if ends { 0 } else { guessing.left - 1 };
                self.guesses(&guessing).extend(token);
                if guessing.left == 0 {
                    break;
                }
            }
            if guessing.left > 0 {
                next.push(guessing);
            }
        }
        if let Some(round) = &mut self.draft_round {
            round.open = next;
        }
    }

    /// What was guessed for a sequence or a branch.
    fn guesses(&mut self, guessing: &Guessing) -> &mut Vec<u32> {
        let sequence = self.sequences.get_mut(&guessing.id).expect("a guessing sequence exists");
        match guessing.branch {
            Some(branch) => &mut sequence.branches[branch].drafts,
            None => &mut sequence.drafts,
        }
    }

    /// Begins branches with tokens that the draft model holds likely in place of the one that it guesses now, which `told` begins with.
    fn add_guesses(&mut self, chain: &mut Guessing, told: &[TokenLogprob], next: &mut Vec<Guessing>) {
        let Some(mut round) = self.draft_round.take() else { return };
        let before = chain.likelihood;
        chain.likelihood *= told[0].logprob.exp();
        for other in &told[1..] {
            let likelihood = before * other.logprob.exp();
            if likelihood < LEAST_LIKELY {
                break;
            }
            let length = chain.left.min(chain.others);
            let rows = 1 + self.guesses(chain).len() + length;
            let stays = length > 0 && rows <= round.rows.min(round.logit_rows);
            if !stays || !self.may_follow(chain.id, other.token) {
                continue;
            }
            let mut branch = Branch { drafts: self.guesses(chain).clone(), ..Branch::default() };
            branch.drafts.push(other.token);
            if !self.extend_branch(chain.id, &mut branch, length - 1) {
                break;
            }
            let sequence = self.sequences.get_mut(&chain.id).expect("a guessing sequence exists");
            sequence.branches.push(branch);
            (round.rows, round.logit_rows) = (round.rows - rows, round.logit_rows - rows);
            chain.others -= length;
            if length > 1 {
                let branch = Some(sequence.branches.len() - 1);
                next.push(Guessing { branch, left: length - 1, others: 0, likelihood, ..*chain });
            }
        }
        self.draft_round = Some(round);
    }

    /// Whether a token may be generated, and others after it.
    fn may_follow(&self, id: SequenceId, token: u32) -> bool {
        let request = &self.requests[&id.request];
        let is_allowed =
            |mask: &[u32]| mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1);
        request.stop_tokens.binary_search(&token).is_err()
            && request.allowed.as_deref().is_none_or(is_allowed)
    }

    /// The draft model failed: what it guessed in this round is dropped, and the step is computed without.
    pub fn drop_drafts(&mut self) {
        let ids: Vec<SequenceId> = self.sequences.keys().copied().collect();
        for id in ids {
            self.release_branches(id);
            self.sequences.get_mut(&id).expect("it was listed").drafts.clear();
        }
        self.draft_round = Some(DraftRound { open: Vec::new(), rows: 0, logit_rows: 0 });
    }

    fn draft_token(&mut self, guessing: &Guessing, logits: &[f32]) -> Option<u32> {
        let ahead = self.guesses(guessing).len();
        let id = guessing.id;
        let request = &self.requests[&id.request];
        let params = request.params()?;
        let sequence = &self.sequences[&id];
        let banned = request.banned(sequence.tokens.output.len() + ahead);
        let position = (sequence.tokens.len() + ahead) as u64;
        // Penalties do not see the drafts before: that can only make a draft wrong.
        self.sampler.sample(logits, params, &sequence.history, banned, sequence.seed, position).ok()
    }

    /// Decoding sequences in the order of their ranks, with as many drafts as rows, pages and their own ends allow.
    fn open_draft_round(&mut self) -> DraftRound {
        let decoding: Vec<SequenceId> = self
            .running
            .iter()
            .map(|rank| rank.id)
            .filter(|id| self.is_decoding(&self.sequences[id]))
            .collect();
        let mut rows = self.config.max_num_batched_tokens.saturating_sub(decoding.len());
        let mut logit_rows = self.config.logit_rows();
        let mut open = Vec::new();
        for id in decoding {
            let sequence = &self.sequences[&id];
            let reach = self.reach(sequence).saturating_sub(sequence.tokens.len());
            let wanted = self.draft_limit(sequence).min(rows).min(logit_rows).min(reach);
            if wanted > 0 {
                self.extend_pages(id, 1 + wanted);
                let is_whole = self.sequences[&id].copy_from.is_none();
                let others = if is_whole { self.branch_limit(wanted) } else { 0 };
                let guessing =
                    Guessing { id, branch: None, left: wanted, drawn: false, others, likelihood: 1.0 };
                open.push(guessing);
                (rows, logit_rows) = (rows - wanted, logit_rows - wanted);
            }
        }
        DraftRound { open, rows, logit_rows }
    }
}
