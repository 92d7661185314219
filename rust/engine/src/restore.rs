//! Pages between memory and the tier, from the engine's side: what to save, what to fetch, and what came back.

use std::time::Duration;

use crate::admission::Beginning;
use crate::core::Core;
use crate::journal::TraceKind;
use crate::planted::{Bug, planted};
use crate::sequence::{Restoring, SequenceId};
use crate::tables::PageRef;
use crate::tier::{Fetch, Save};

impl Core {
    /// Pages to hand to the tier now, before the batch at hand is computed or anything else is written: those that were forgotten to make
    /// room, and up to `more` that are still here.
    pub fn take_saves(&mut self, more: usize) -> Vec<Save> {
        let saves = self.cache.take_saves(more);
        self.counters.saved_pages += saves.len() as u64;
        saves
    }

    /// Whether pages wait to be handed to the tier.
    #[must_use]
    pub fn has_unsaved(&self) -> bool {
        self.cache.has_unsaved()
    }

    /// The tier could not take this page; unless it was forgotten it will be offered again.
    pub fn offer_again(&mut self, save: &Save) {
        self.not_saved();
        self.cache.offer_again(save);
    }

    /// A page that was to be saved was not, and will not be.
    pub fn not_saved(&mut self) {
        self.counters.saved_pages -= 1;
    }

    /// Pages to ask the tier for.
    pub fn take_fetches(&mut self) -> Vec<Fetch> {
        std::mem::take(&mut self.fetches)
    }

    /// Where the pages of a fetch belong on the device, in order; none when nobody waits for them any more.
    #[must_use]
    pub fn restore_pages(&self, ticket: u64) -> Option<Vec<PageRef>> {
        let sequence = &self.sequences[self.tickets.get(&ticket)?];
        let count = sequence.restoring.as_ref()?.wanted.len();
        let end = sequence.tables.len();
        Some((end - count..end).map(|place| sequence.tables.at(place)).collect())
    }

    /// A fetch was answered, and its first `pages` pages are on the device where [`Core::restore_pages`] said; the others are computed.
    pub fn restored(&mut self, ticket: u64, pages: usize, now: Duration) {
        let Some(id) = self.tickets.remove(&ticket) else { return };
        self.admitted_all = false;
        let sequence = self.sequences.get_mut(&id).expect("a ticket has a sequence");
        let Restoring { wanted, since, .. } =
            sequence.restoring.take().expect("a ticket is of a waiting sequence");
        self.costs.restored(wanted.len(), now.saturating_sub(since));
        let pages = if planted(Bug::RestoreIsTakenForWhole) { wanted.len() } else { pages.min(wanted.len()) };
        let pages = self.cache.whole_beginning(&mut sequence.tables, sequence.sealed, pages);
        let tokens = pages * self.config.page_tokens;
        sequence.computed += tokens;
        self.counters.restored_pages += pages as u64;
        let request = self.requests.get_mut(&id.request).expect("a sequence has a request");
        if request.metrics.first_token.is_none() {
            request.metrics.cached_tokens += tokens as u64;
            request.metrics.restored_tokens += tokens as u64;
            self.counters.cached_tokens += tokens as u64;
        }
        self.seal_pages(id);
        self.check_invariants();
    }

    /// Gives an admitted sequence its beginning.
    pub(crate) fn begin(&mut self, id: SequenceId, beginning: Beginning, now: Duration) {
        let Beginning { tables, tail, wanted, source } = beginning;
        let sequence = self.sequences.get_mut(&id).expect("an admitted sequence exists");
        sequence.sealed = tables.len();
        sequence.computed = tables.len() * self.config.page_tokens;
        (sequence.tables, sequence.tail) = (tables, tail);
        if let Some((page, tokens)) = source {
            self.cache.extend(&mut sequence.tables).expect("try_admit counted the available pages");
            if planted(Bug::SharedPageIsWritten) {
                let own = sequence.tables.at(sequence.sealed);
                self.cache.release_ref(own);
                sequence.tables.set(sequence.sealed, page);
            } else {
                sequence.copy_from = Some(page);
            }
            sequence.computed += tokens;
        } else if !wanted.is_empty() {
            let count = wanted.len();
            self.cache
                .extend_restored(&mut sequence.tables, count)
                .expect("try_admit counted the available pages");
            let ticket = self.next_ticket;
            self.next_ticket += 1;
            self.tickets.insert(ticket, id);
            self.fetches.push(Fetch { ticket, wanted: wanted.clone() });
            self.counters.fetched_pages += count as u64;
            let sequence = self.sequences.get_mut(&id).expect("an admitted sequence exists");
            sequence.restoring = Some(Restoring { ticket, wanted, since: now });
            self.trace(id.request, TraceKind::Restoring { pages: count }, now);
        }
        self.drop_before_window(id);
    }
}
