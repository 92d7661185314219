//! The background thread: all file operations of an open store, one after the other, reads before writes.
//!
//! One thread is enough: a device that is slower than memory is the bottleneck, and one that is not keeps up.
//!
//! An error of writing costs that page, empties the queue and pauses writing: for ten seconds if the device is full or
//! the quota used up, for one otherwise. Reading goes on. Nothing is retried; the engine offers the page again when it
//! next leaves memory.
//!
//! The cap holds for the directory, whoever fills it. We learn what other processes wrote, used or deleted by listing
//! one of the 256 folders again now and then, if its time says that it changed: all of them once for each eighth of the
//! cap that we write ourselves, and some for each tenth of a second in which there is work. Two processes that write at
//! the same speed therefore exceed the cap by an eighth at most. Before a page is deleted its own time is read, so that
//! a page which another process used stays.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::directory::{FOLDERS, Name};
use crate::index::File;
use crate::page::{Page, Unusable, Wanted, file_bytes};
use crate::state::Shared;

/// All folders are listed again for each this part of the cap that we write.
const LISTINGS_PER_CAP: u64 = 8;
/// Folders that are looked at for each `SLICE` of time.
const FOLDERS_PER_SLICE: u64 = 16;
const SLICE: Duration = Duration::from_millis(100);
/// A folder that changed this shortly before it was listed may change again within the same tick of its clock.
const CLOCK_TICK: Duration = Duration::from_secs(1);
/// The part of the cap that is free after room was made.
const FREED_PART: u64 = 16;

/// Works until the store closes.
pub(crate) fn run(shared: &Shared, mut sweep: Sweep) {
    let _end = End(shared);
    while let Some(work) = next(shared) {
        let written = match work {
            Work::Fetch(ticket, wanted) => {
                fetch(shared, ticket, &wanted);
                0
            }
            Work::Write(name, page) => write(shared, &name, &page),
        };
        sweep.turn(shared, written);
    }
}

enum Work {
    Fetch(u64, Vec<Wanted>),
    Write(Name, Arc<Page>),
}

/// Waits for work; `None` when the store closes and the queue is written or its time is over.
fn next(shared: &Shared) -> Option<Work> {
    let mut state = shared.state();
    loop {
        if let Some(deadline) = state.closing {
            state.fetches.clear();
            if Instant::now() >= deadline {
                state.abandon_queue();
            }
        }
        if let Some((ticket, wanted)) = state.fetches.pop_front() {
            return Some(Work::Fetch(ticket, wanted));
        }
        while let Some(name) = state.queue.pop_front() {
            if let Some(page) = state.pending.get(&name) {
                return Some(Work::Write(name, Arc::clone(page)));
            }
        }
        if state.closing.is_some() {
            return None;
        }
        state = shared.wait(state, None)?;
    }
}

/// Gives up at the thread's end, however it comes.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        give_up(self.0);
    }
}

/// Says that nothing more will happen: no page is written, every question is answered with nothing.
pub(crate) fn give_up(shared: &Shared) {
    let mut state = shared.state();
    state.ended = true;
    state.abandon_queue();
    state.pending.clear();
    state.pending_bytes = 0;
    let mut waker = None;
    while let Some((ticket, wanted)) = state.fetches.pop_front() {
        waker = state.answer(ticket, vec![None; wanted.len()]);
    }
    drop(state);
    shared.changed.notify_all();
    if let Some(waker) = waker {
        waker();
    }
}

// ---- reading

fn fetch(shared: &Shared, ticket: u64, wanted: &[Wanted]) {
    let pages = wanted.iter().map(|wanted| read(shared, wanted)).collect();
    let waker = shared.state().answer(ticket, pages);
    shared.changed.notify_all();
    if let Some(waker) = waker {
        waker();
    }
}

fn read(shared: &Shared, wanted: &Wanted) -> Option<Vec<u8>> {
    let name = shared.directory.name(&wanted.key);
    let mut state = shared.state();
    if state.closing.is_some() {
        return None;
    }
    if let Some(page) = state.pending.get(&name).map(Arc::clone) {
        let same = page.parent == wanted.parent && page.tokens == wanted.tokens;
        state.stats.hits = state.stats.hits.saturating_add(u64::from(same));
        drop(state);
        return same.then(|| page.payload.clone());
    }
    drop(state);
    // Not in the index is no reason not to look: another process may have written it since.
    let found = shared.directory.read(&name, shared.options.page_bytes, wanted);
    let mut state = shared.state();
    match found {
        Ok(payload) => {
            let bytes = length(wanted.tokens.len(), payload.len());
            state.index.insert(name, File { bytes, used: SystemTime::now() });
            state.stats.reads = state.stats.reads.saturating_add(1);
            state.stats.hits = state.stats.hits.saturating_add(1);
            return Some(payload);
        }
        Err(Unusable::Different) => state.stats.reads = state.stats.reads.saturating_add(1),
        Err(Unusable::Damaged) => {
            state.stats.reads = state.stats.reads.saturating_add(1);
            state.stats.damaged = state.stats.damaged.saturating_add(1);
            state.index.remove(&name);
            drop(state);
            let removed = shared.directory.remove(&name);
            state = shared.state();
            if removed.is_ok() {
                return None;
            }
            count_error(&mut state.stats.io_errors, removed);
        }
        Err(Unusable::Io(error)) if error.kind() == ErrorKind::NotFound => {
            state.index.remove(&name);
            return None;
        }
        Err(Unusable::Io(_)) => state.stats.io_errors = state.stats.io_errors.saturating_add(1),
    }
    // Forgotten, so that it may be written anew; if it is not, it counts for the cap again once it is listed.
    state.index.remove(&name);
    state.unsure.push(usize::from(name[0]));
    None
}

// ---- writing

/// Writes one page of the queue; returns the bytes that it took on disk.
fn write(shared: &Shared, name: &Name, page: &Page) -> u64 {
    let bytes = length(page.tokens.len(), page.payload.len());
    let room = make_room(shared, bytes);
    let written = if room { Some(shared.directory.write(name, page)) } else { None };
    let mut state = shared.state();
    let wrote = match written {
        Some(Ok(())) => {
            state.settle(name);
            state.index.insert(*name, File { bytes, used: SystemTime::now() });
            state.stats.writes = state.stats.writes.saturating_add(1);
            bytes
        }
        Some(Err(error)) => {
            state.stats.io_errors = state.stats.io_errors.saturating_add(1);
            state.lose(name);
            state.paused_until = Instant::now().checked_add(match is_full(&error) {
                true => shared.tuning.pause_when_full,
                false => shared.tuning.pause_after_error,
            });
            state.abandon_queue();
            0
        }
        None => {
            state.lose(name);
            0
        }
    };
    drop(state);
    shared.changed.notify_all();
    wrote
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::FileTooLarge
    )
}

/// Deletes least recently used pages until `incoming` bytes fit under the cap; false where they cannot.
fn make_room(shared: &Shared, incoming: u64) -> bool {
    let cap = shared.options.max_bytes;
    // The second round is for pages that turned out to have been used by others.
    for _ in 0..2 {
        let state = shared.state();
        let total = state.index.bytes().saturating_add(incoming);
        if total <= cap {
            return true;
        }
        let freed_to = cap.saturating_sub(cap.checked_div(FREED_PART).unwrap_or(0));
        let victims = state.index.oldest(total.saturating_sub(freed_to));
        drop(state);
        for (name, file) in victims {
            evict(shared, &name, &file);
        }
    }
    shared.state().index.bytes().saturating_add(incoming) <= cap
}

/// Deletes one page, unless another process used it since we last looked.
fn evict(shared: &Shared, name: &Name, known: &File) {
    let found = shared.directory.used(name);
    let newer = found.as_ref().ok().and_then(Option::as_ref).filter(|entry| entry.modified > known.used);
    if let Some(entry) = newer {
        shared.state().index.insert(*name, File { bytes: entry.bytes, used: entry.modified });
        return;
    }
    let removed = shared.directory.remove(name);
    let mut state = shared.state();
    if removed.is_ok() {
        state.index.remove(name);
        state.stats.evicted = state.stats.evicted.saturating_add(u64::from(matches!(found, Ok(Some(_)))));
    }
    count_error(&mut state.stats.io_errors, removed);
}

fn count_error(errors: &mut u64, result: io::Result<()>) {
    *errors = errors.saturating_add(u64::from(result.is_err()));
}

fn length(tokens: usize, payload: usize) -> u64 {
    u64::try_from(file_bytes(tokens, payload)).unwrap_or(u64::MAX)
}

// ---- what other processes do

/// Looks at the folders in turn.
pub(crate) struct Sweep {
    next: usize,
    /// The time that each folder had when it was last listed; `None` if it must be listed again whatever its time.
    listed: Vec<Option<SystemTime>>,
    /// Bytes written for which no folder was looked at yet, times folders per cap.
    owed: u128,
    slice_started: Instant,
}

impl Sweep {
    pub fn new() -> Self {
        Sweep { next: 0, listed: vec![None; FOLDERS], owed: 0, slice_started: Instant::now() }
    }

    /// Lists every folder.
    pub fn all(&mut self, shared: &Shared) {
        for _ in 0..FOLDERS {
            self.look(shared);
        }
    }

    /// Looks at as many folders as are due after `written` bytes.
    fn turn(&mut self, shared: &Shared, written: u64) {
        for folder in std::mem::take(&mut shared.state().unsure) {
            if let Some(listed) = self.listed.get_mut(folder) {
                *listed = None;
            }
        }
        let folders = u64::try_from(FOLDERS).unwrap_or(u64::MAX);
        let weight = u128::from(folders.saturating_mul(LISTINGS_PER_CAP));
        let cap = u128::from(shared.options.max_bytes);
        self.owed = self.owed.saturating_add(u128::from(written).saturating_mul(weight));
        let mut due = u64::try_from(self.owed.checked_div(cap).unwrap_or(0)).unwrap_or(u64::MAX);
        self.owed = self.owed.checked_rem(cap).unwrap_or(0);
        if self.slice_started.elapsed() >= SLICE {
            self.slice_started = Instant::now();
            due = due.saturating_add(FOLDERS_PER_SLICE);
        }
        for _ in 0..due.min(folders) {
            self.look(shared);
        }
    }

    /// Lists the next folder if it changed since it was last listed.
    fn look(&mut self, shared: &Shared) {
        let folder = self.next;
        self.next = folder.saturating_add(1).checked_rem(FOLDERS).unwrap_or(0);
        let Some(listed) = self.listed.get_mut(folder) else { return };
        let before = SystemTime::now().checked_sub(CLOCK_TICK);
        let result = shared.directory.folder_time(folder).and_then(|time| {
            if time.is_none() || time != *listed {
                let files = shared.directory.list(folder)?.into_iter();
                let files = files.map(|(name, e)| (name, File { bytes: e.bytes, used: e.modified }));
                shared.state().index.replace(folder, files);
            }
            Ok(time.filter(|time| before.is_some_and(|before| *time < before)))
        });
        *listed = result.as_ref().ok().copied().flatten();
        let mut state = shared.state();
        count_error(&mut state.stats.io_errors, result.map(|_| ()));
    }
}
