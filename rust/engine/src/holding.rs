//! What a sequence holds, from its pages becoming full to its giving them up.

use crate::core::Core;
use crate::planted::{Bug, planted};
use crate::sequence::SequenceId;
use crate::tables::NO_PAGE;

impl Core {
    /// Names the pages that became full, so that others can share them, and gives up those that the window left behind.
    pub(crate) fn seal_pages(&mut self, id: SequenceId) {
        if self.shares(id) {
            let page_tokens = self.config.page_tokens;
            let sequence = self.sequences.get_mut(&id).expect("a committed sequence exists");
            let early = usize::from(planted(Bug::PageIsSealedEarly));
            while (sequence.sealed + 1) * page_tokens <= sequence.computed + early {
                let place = sequence.sealed;
                let tokens = sequence.tokens.range(place * page_tokens, (place + 1) * page_tokens);
                let (page, tail) = self.cache.seal(&sequence.tail, tokens, sequence.tables.at(place));
                sequence.tables.set(place, page);
                sequence.tail = tail;
                sequence.sealed += 1;
            }
        }
        self.drop_before_window(id);
    }

    /// Without a prefix cache only the completions of one request share, so a single one has nobody to share with.
    fn shares(&self, id: SequenceId) -> bool {
        self.config.enable_prefix_caching || self.requests[&id.request].ended.len() > 1
    }

    /// Gives up pages that no later position of any layer sees.
    pub(crate) fn drop_before_window(&mut self, id: SequenceId) {
        let too_far = if planted(Bug::WindowIsTooShort) { self.config.page_tokens } else { 0 };
        let sequence = &self.sequences[&id];
        // A page without a name yet is still needed to give it one.
        let most = if self.shares(id) { sequence.sealed } else { sequence.tables.len() };
        let computed = sequence.computed + too_far;
        let first_seen = |window: usize| (computed + 1).saturating_sub(window) / self.config.page_tokens;
        let behind = self.config.window.map_or(0, first_seen).min(most);
        let behind_local = self.cache.local.as_ref().map_or(0, |local| local.first_kept(computed)).min(most);
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        for page in sequence.tables.pages[..behind].iter_mut().rev().take_while(|page| **page != NO_PAGE) {
            self.cache.release(std::mem::replace(page, NO_PAGE));
            self.counters.window_pages += 1;
        }
        for page in
            sequence.tables.locals[..behind_local].iter_mut().rev().take_while(|page| **page != NO_PAGE)
        {
            self.cache.release_local(std::mem::replace(page, NO_PAGE));
            self.counters.window_pages += 1;
        }
    }

    /// Gives back pages beyond what the tokens so far need: slots of drafts that were wrong.
    pub(crate) fn trim_pages(&mut self, id: SequenceId) {
        self.release_branches(id);
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let needed = self.config.pages_for(sequence.tokens.len()).max(sequence.sealed);
        self.cache.release_after(needed, &mut sequence.tables);
    }

    /// Gives back all that a sequence holds; what its last page begins with stays findable. A step in flight may still touch the pages: it
    /// comes before any step that gets them now.
    pub(crate) fn give_up_pages(&mut self, id: SequenceId) {
        let shares = self.shares(id);
        let page_tokens = self.config.page_tokens;
        self.release_branches(id);
        let sequence = self.sequences.get_mut(&id).expect("the caller found it");
        if let Some(restoring) = sequence.restoring.take() {
            self.tickets.remove(&restoring.ticket);
        }
        let copied = sequence.copy_from.take();
        let (first, end) = (sequence.sealed * page_tokens, sequence.computed);
        // A copy that was not made yet holds nothing.
        if shares && copied.is_none() && first < end && end < first + page_tokens {
            let page = sequence.tables.at(sequence.sealed);
            self.cache.seal_part(&sequence.tail, sequence.tokens.range(first, end), page);
        }
        if let Some(source) = copied {
            self.cache.release_ref(source);
        }
        self.cache.release_after(0, &mut sequence.tables);
        (sequence.computed, sequence.sealed) = (0, 0);
        sequence.tail = self.cache.root(&sequence.domain);
        sequence.drafts.clear();
    }
}
