//! Trees of drafts: one step verifies several continuations of a sequence.
//!
//! A tree is the chain of drafts (`Sequence::drafts`) and branches beside it, each from the last token on. A branch is computed as a
//! sequence of its own in the step (a fork, as in copy on write): it shares all pages before the one of the last token, and has a copy of
//! that one and what follows for itself. So its rows have contiguous positions like any others: rope, windows, quantized
//! keys and values, learned positions, padded steps and captured graphs need no word about trees, and a row's logits are the bits of plain
//! decoding because nothing tells it from plain decoding. When the tokens are known, the pages of the branch that they follow become the
//! sequence's, and all others are given back: nothing is moved, and what is named in the prefix cache is never a guess.
//!
//! The other way, one sequence whose rows see their ancestors by a mask (SpecInfer, Medusa, EAGLE, SGLang), computes tokens that
//! branches share once. It was not taken because every kernel that reads keys would need a mask (on the CPU: keys gathered, since
//! sums over keys are grouped by position, and grouping decides bits), and a new one would have to move rows of every type of keys and
//! values. What forks cost instead: the last token's row and shared drafts once more for each branch, a page's copy, and attention over the
//! past once for each branch rather than once for all. Trees are bounded to a few branches, and most part at their first token.

use crate::batch::{Batch, BatchSequence};
use crate::core::Core;
use crate::lookup::common;
use crate::planted::{Bug, planted};
use crate::scheduler::Plan;
use crate::sequence::{Sequence, SequenceId};
use crate::speculative::Speculation;
use crate::tables::{PageRef, PageTables};

/// Branches in one step, of all its sequences: a device makes room for so many sequences more.
pub const MOST_BRANCHES: usize = 32;

/// Another continuation than the chain of drafts.
#[derive(Debug, Default)]
pub(crate) struct Branch {
    /// From the token after the last one on.
    pub drafts: Vec<u32>,
    /// Leading drafts whose rows' logits come from the chain or from a branch before it.
    pub shared: usize,
    /// The place of its first page in the sequence's table.
    pub first_page: usize,
    /// Pages from there on; none before it has a place in a step.
    pub tables: PageTables,
    /// The draft model has computed it, but for the last of its drafts.
    pub drafted: bool,
    /// Its first page is a copy already.
    pub copied: bool,
}

impl Branch {
    /// So many drafts, and the last token.
    pub fn rows(&self) -> usize {
        1 + self.drafts.len()
    }

    /// Rows, from its first on, whose logits nobody needs.
    fn unwanted(&self, all_wanted: bool) -> usize {
        if all_wanted { 0 } else { 1 + self.shared }
    }

    /// The sequence with this continuation, in a batch.
    pub fn sequence(&self, of: &Sequence, first_row: usize) -> BatchSequence {
        let join = |own: &[u32], branch: &[u32]| [&own[..own.len().min(self.first_page)], branch].concat();
        BatchSequence {
            first_row,
            rows: self.rows(),
            first_position: of.computed,
            pages: join(&of.tables.pages, &self.tables.pages),
            local_pages: join(&of.tables.locals, &self.tables.locals),
            long_context: of.domain.long_context,
            drafted: if self.drafted { self.drafts.len() } else { 0 },
        }
    }
}

/// The drafts of a step that came back, and where their rows are.
pub(crate) struct Verified {
    chain: Path,
    branches: Vec<Path>,
}

struct Path {
    drafts: Vec<u32>,
    /// Rows of it that did not come back.
    unwanted: usize,
    /// Rows that came back before its own.
    before: usize,
}

impl Verified {
    /// Takes the drafts of a sequence. `all_wanted`: also rows came back that an earlier path has.
    pub fn take(sequence: &mut Sequence, all_wanted: bool) -> Self {
        let drafts = std::mem::take(&mut sequence.drafts);
        let mut before = 1 + drafts.len();
        let mut path = |branch: &Branch| {
            let unwanted = branch.unwanted(all_wanted);
            let path = Path { drafts: branch.drafts.clone(), unwanted, before };
            before += branch.rows() - unwanted;
            path
        };
        let branches = sequence.branches.iter().map(&mut path).collect();
        Self { chain: Path { drafts, unwanted: 0, before: 0 }, branches }
    }

    fn path(&self, path: usize) -> &Path {
        path.checked_sub(1).map_or(&self.chain, |branch| &self.branches[branch])
    }

    /// Drafts of the chain.
    pub fn chain(&self) -> usize {
        self.chain.drafts.len()
    }

    /// Which of the rows that came back follows so many drafts of a path.
    pub fn row(&self, path: usize, depth: usize) -> usize {
        let path = self.path(path);
        path.before + depth - path.unwanted
    }

    /// The first path that begins with these tokens; 0 is the chain.
    pub fn follow(&self, tokens: &[u32]) -> Option<usize> {
        let mut paths = std::iter::once(&self.chain).chain(&self.branches);
        paths.position(|path| path.drafts.starts_with(tokens))
    }
}

impl Core {
    /// Drafts of a step that a sequence may have beside its chain of `chain` drafts.
    pub(crate) fn branch_limit(&self, chain: usize) -> usize {
        let all = self.config.speculation.as_ref().and_then(Speculation::num_draft_tokens);
        all.map_or(0, |all| all.saturating_sub(chain))
    }

    /// Pages for all drafts of a branch and `more`; false when there are too few.
    pub(crate) fn extend_branch(&mut self, of: SequenceId, branch: &mut Branch, more: usize) -> bool {
        let computed = self.sequences[&of].computed;
        branch.first_page = computed / self.config.page_tokens;
        let wanted = self.config.pages_for(computed + branch.rows() + more) - branch.first_page;
        if wanted > branch.tables.len() + self.cache.available() {
            return false;
        }
        self.cache.release_after(wanted, &mut branch.tables);
        while branch.tables.len() < wanted {
            self.cache.extend(&mut branch.tables).expect("available pages were counted");
        }
        true
    }

    /// Lets a sequence verify its branches with rows and pages that nobody else needs now; those that find none are dropped.
    pub(crate) fn add_branches(&mut self, id: SequenceId, plan: &mut Plan) {
        let Some(sequence) = self.sequences.get_mut(&id).filter(|sequence| !sequence.branches.is_empty())
        else {
            return;
        };
        let candidates = std::mem::take(&mut sequence.branches);
        let chain = sequence.drafts.clone();
        let planned = !chain.is_empty() && plan.rows.get(&id) == Some(&(1 + chain.len()));
        let limit = self.draft_limit(&self.sequences[&id]);
        let mut kept = Vec::<Branch>::new();
        for mut branch in candidates {
            branch.drafts.truncate(limit);
            let others = kept.iter().map(|other| &other.drafts).chain([&chain]);
            branch.shared = others.map(|other| common(other, &branch.drafts)).max().unwrap_or(0);
            let rows = branch.rows();
            let wanted = rows - branch.unwanted(self.config.device_draws).min(rows);
            let fits = planned
                && branch.shared < branch.drafts.len()
                && rows <= plan.budget
                && wanted <= plan.logit_rows
                && plan.branches < MOST_BRANCHES
                && self.extend_branch(id, &mut branch, 0);
            if !fits {
                self.cache.release_after(0, &mut branch.tables);
                continue;
            }
            plan.branches += 1;
            plan.budget -= rows;
            plan.logit_rows -= wanted;
            kept.push(branch);
        }
        self.sequences.get_mut(&id).expect("it was there").branches = kept;
    }

    /// Rows of a sequence's branches in the plan, and how many of them are wanted.
    pub(crate) fn branch_rows(&self, id: SequenceId) -> (usize, usize) {
        let branches = &self.sequences[&id].branches;
        let wanted = |branch: &Branch| branch.rows() - branch.unwanted(self.config.device_draws);
        (branches.iter().map(Branch::rows).sum(), branches.iter().map(wanted).sum())
    }

    /// Gives up the branches of all sequences, so that nobody has to be preempted for guesses; whether there were any.
    pub(crate) fn drop_branches(&mut self, plan: &mut Plan) -> bool {
        let with: Vec<SequenceId> = (self.sequences.values())
            .filter(|sequence| !sequence.branches.is_empty())
            .map(|sequence| sequence.id)
            .collect();
        for &id in &with {
            if plan.branches > 0 {
                let (rows, wanted) = self.branch_rows(id);
                plan.budget += rows;
                plan.logit_rows += wanted;
            }
            self.release_branches(id);
        }
        plan.branches = 0;
        !with.is_empty()
    }

    /// Gives back what a sequence's branches hold.
    pub(crate) fn release_branches(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        for mut branch in std::mem::take(&mut sequence.branches) {
            self.cache.release_after(usize::from(planted(Bug::BranchKeepsPages)), &mut branch.tables);
        }
    }

    /// Puts a sequence's branches behind it into a batch; how many rows, and how many of them are wanted. `copy` is what the sequence's own
    /// last page is made from in the same batch.
    pub(crate) fn put_branches(
        &mut self,
        batch: &mut Batch,
        id: SequenceId,
        copy: Option<PageRef>,
    ) -> (usize, usize) {
        let all_wanted = self.config.device_draws;
        let sequence = self.sequences.get_mut(&id).expect("a planned sequence exists");
        let (last, inside) = (sequence.computed, sequence.computed % self.config.page_tokens);
        // Where the sequence's own first draw is: those of a branch are the same.
        let own = batch.draws.len().wrapping_sub(1 + sequence.drafts.len());
        for branch in &sequence.branches {
            let first_row = batch.tokens.len();
            if inside > 0 && !branch.copied && !planted(Bug::BranchPageIsNotCopied) {
                let own = sequence.tables.at(branch.first_page);
                batch.copies.push((copy.unwrap_or(own), branch.tables.at(0)));
            }
            batch.tokens.push(sequence.tokens.at(last));
            batch.tokens.extend_from_slice(&branch.drafts);
            let wanted = first_row + branch.unwanted(all_wanted)..first_row + branch.rows();
            batch.logit_rows.extend(wanted.map(|row| row as u32));
            batch.sequences.push(branch.sequence(sequence, first_row));
            if all_wanted {
                let draw = batch.draws[own].clone();
                let first = draw.as_ref().map_or(0, |draw| draw.position);
                batch.draws.extend((0..branch.rows() as u64).map(|place| {
                    let mut draw = draw.clone();
                    draw.iter_mut().for_each(|draw| draw.position = first + place);
                    draw
                }));
            }
        }
        self.branch_rows(id)
    }

    /// The tokens follow a branch: its pages become the sequence's.
    pub(crate) fn follow_branch(&mut self, id: SequenceId, branch: usize) {
        if planted(Bug::BranchIsNotFollowed) {
            return;
        }
        let sequence = self.sequences.get_mut(&id).expect("a committed sequence exists");
        let branch = &mut sequence.branches[branch];
        // A page that has a name by now holds what both have.
        let sealed = if planted(Bug::BranchSharesPages) { 0 } else { sequence.sealed };
        let first = branch.first_page.max(sealed);
        let swap = |own: &mut Vec<u32>, other: &mut Vec<u32>| {
            let theirs = other.split_off((first - branch.first_page).min(other.len()));
            other.extend(own.split_off(first.min(own.len())));
            own.extend(theirs);
        };
        swap(&mut sequence.tables.pages, &mut branch.tables.pages);
        swap(&mut sequence.tables.locals, &mut branch.tables.locals);
    }
}
