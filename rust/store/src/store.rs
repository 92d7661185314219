//! The store as its callers hold it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::StoreError;
use crate::directory::Directory;
use crate::disk::{Disk, RealDisk};
use crate::index::Index;
use crate::page::{Key, MAX_PAGE_BYTES, MAX_PAGE_TOKENS, Page, Wanted, file_bytes};
use crate::state::Shared;
use crate::worker::{self, Sweep};

/// Where pages are kept, how many, and whose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// The directory; made if it does not exist. It may be shared by any number of stores and processes.
    pub dir: PathBuf,
    /// The most that all pages in the directory together may take.
    pub max_bytes: u64,
    /// What the pages belong to: a digest of the model and all else that their contents depend on.
    pub namespace: [u8; 32],
    /// The length of every payload.
    pub page_bytes: usize,
}

/// How patient a store is. The defaults are right outside tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// Payload bytes that may wait to be written; one page may always.
    pub queue_bytes: usize,
    /// How long nothing is written after the device was full.
    pub pause_when_full: Duration,
    /// How long nothing is written after any other error of writing.
    pub pause_after_error: Duration,
    /// How long closing goes on writing what is queued; it takes as long again at most for the operation under way.
    pub close_patience: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            queue_bytes: 128 << 20,
            pause_when_full: Duration::from_secs(10),
            pause_after_error: Duration::from_secs(1),
            close_patience: Duration::from_secs(1),
        }
    }
}

/// What became of a page that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It will be written unless the disk objects.
    Queued,
    /// It is there already, or about to be.
    Known,
    /// The queue is full: it has room when earlier pages are written.
    Full,
    /// Writing pauses after an error.
    Paused,
    /// It can never be written: its payload has not `page_bytes` bytes, it is larger than the cap, or the directory is for
    /// reading only.
    Unfit,
}

/// The answer to one [`Store::fetch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The fetch's ticket.
    pub ticket: u64,
    /// For each page that was asked for, in that order, its payload if it is there, whole, and exactly what was asked for.
    pub pages: Vec<Option<Vec<u8>>>,
}

/// What a store holds and did. Counts are of this store since it was opened, but `pages` and `bytes` are of the
/// directory, whoever wrote them, as far as this store knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Pages in the directory.
    pub pages: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Pages that wait to be written.
    pub queued: u64,
    /// Pages written.
    pub writes: u64,
    /// Files read.
    pub reads: u64,
    /// Pages handed out, from files or from the queue.
    pub hits: u64,
    /// Files that were torn, cut, altered or misplaced, and were deleted.
    pub damaged: u64,
    /// Pages deleted to make room.
    pub evicted: u64,
    /// Pages that were offered and not written: the queue or the device was full, writing paused, or an error came.
    pub refused: u64,
    /// File operations that failed.
    pub io_errors: u64,
}

/// Pages of KV cache in a directory.
pub struct Store {
    shared: Arc<Shared>,
    thread: Mutex<Thread>,
    /// A forked child has our memory but not our thread.
    process: u32,
}

enum Thread {
    /// What the thread will start with.
    Waiting(Sweep),
    Running(JoinHandle<()>),
    Gone,
}

impl Store {
    /// Opens a directory and lists what is in it.
    pub fn open(options: StoreOptions) -> Result<Self, StoreError> {
        Self::open_on(options, Tuning::default(), Arc::new(RealDisk))
    }

    /// [`Store::open`] on any file system, with any patience.
    pub fn open_on(options: StoreOptions, tuning: Tuning, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        check(&options)?;
        let directory = Directory::open(disk, &options.dir, options.namespace)?;
        let shared = Arc::new(Shared::new(options, tuning, directory, Index::new()));
        let mut sweep = Sweep::new();
        sweep.all(&shared);
        Ok(Store { shared, thread: Mutex::new(Thread::Waiting(sweep)), process: std::process::id() })
    }

    /// 32 random bytes of the directory, to key the digests that are pages' keys.
    pub fn secret(&self) -> [u8; 32] {
        self.shared.directory.secret()
    }

    /// Whether the page is there or about to be, as far as memory tells.
    pub fn contains(&self, key: &Key) -> bool {
        if self.is_forked() {
            return false;
        }
        let name = self.shared.directory.name(key);
        let state = self.shared.state();
        state.pending.contains_key(&name) || state.index.contains(&name)
    }

    /// Offers a page; what is not known already and not queued counts as refused.
    pub fn put(&self, page: Page) -> Put {
        if self.is_forked() {
            return Put::Unfit;
        }
        let name = self.shared.directory.name(&page.key);
        let (options, bytes) = (&self.shared.options, page.payload.len());
        let mut state = self.shared.state();
        if state.pending.contains_key(&name) || state.index.contains(&name) {
            return Put::Known;
        }
        let fits = bytes == options.page_bytes
            && page.tokens.len() <= MAX_PAGE_TOKENS
            && u64::try_from(file_bytes(page.tokens.len(), bytes)).is_ok_and(|all| all <= options.max_bytes);
        let waiting = state.pending_bytes.saturating_add(bytes);
        let room = state.pending.is_empty() || waiting <= self.shared.tuning.queue_bytes;
        let open = self.shared.directory.is_writable() && !state.ended;
        let refusal = match (fits && open, state.is_paused(), room) {
            (false, ..) => Some(Put::Unfit),
            (_, true, _) => Some(Put::Paused),
            (.., false) => Some(Put::Full),
            _ => None,
        };
        if let Some(refusal) = refusal {
            state.stats.refused = state.stats.refused.saturating_add(1);
            return refusal;
        }
        state.pending.insert(name, Arc::new(page));
        state.pending_bytes = waiting;
        state.queue.push_back(name);
        drop(state);
        self.start();
        Put::Queued
    }

    /// Asks for pages; [`Store::poll`] will have the answer, which carries `ticket`.
    pub fn fetch(&self, ticket: u64, wanted: Vec<Wanted>) {
        if self.is_forked() {
            return;
        }
        self.shared.state().fetches.push_back((ticket, wanted));
        self.start();
    }

    /// The answers that have come since the last call, in the order of the questions.
    pub fn poll(&self) -> Vec<Fetched> {
        if self.is_forked() {
            return Vec::new();
        }
        std::mem::take(&mut self.shared.state().answers)
    }

    /// Sets what is called, by the background thread, when [`Store::poll`] has news. It must not block.
    pub fn set_waker(&self, waker: Arc<dyn Fn() + Send + Sync>) {
        if !self.is_forked() {
            self.shared.state().waker = Some(waker);
        }
    }

    /// Waits until nothing waits to be written; true if all that waited was written, false if some was refused or the
    /// time is over.
    pub fn flush(&self, timeout: Option<Duration>) -> bool {
        if self.is_forked() {
            return false;
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.shared.state();
        let lost_before = state.lost;
        while !state.pending.is_empty() {
            match self.shared.wait(state, deadline) {
                Some(changed) => state = changed,
                None => return false,
            }
        }
        state.lost == lost_before
    }

    /// What the store holds and did.
    pub fn stats(&self) -> StoreStats {
        if self.is_forked() {
            return StoreStats::default();
        }
        let state = self.shared.state();
        StoreStats {
            pages: state.index.pages(),
            bytes: state.index.bytes(),
            queued: u64::try_from(state.pending.len()).unwrap_or(u64::MAX),
            ..state.stats
        }
    }

    /// Writes what is queued for as long as [`Tuning::close_patience`] says, and ends the thread. Dropping does the same.
    pub fn close(self) {}

    fn is_forked(&self) -> bool {
        std::process::id() != self.process
    }

    /// Starts the thread at the first piece of work, and tells it of each.
    fn start(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Thread::Waiting(_) = *thread
            && let Thread::Waiting(sweep) = std::mem::replace(&mut *thread, Thread::Gone)
        {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new()
                .name("infer-store".into())
                .spawn(move || worker::run(&shared, sweep));
            match spawned {
                Ok(handle) => *thread = Thread::Running(handle),
                Err(_) => worker::give_up(&self.shared),
            }
        }
        drop(thread);
        if self.shared.state().ended {
            worker::give_up(&self.shared);
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.is_forked() {
            return;
        }
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Thread::Running(handle) = std::mem::replace(thread, Thread::Gone) else { return };
        let patience = self.shared.tuning.close_patience;
        let now = Instant::now();
        let mut state = self.shared.state();
        state.closing = now.checked_add(patience).or(Some(now));
        self.shared.changed.notify_all();
        let last = now.checked_add(patience.saturating_mul(2)).unwrap_or(now);
        while !state.ended {
            match self.shared.wait(state, Some(last)) {
                Some(changed) => state = changed,
                // It hangs in an operation that the system does not finish: it ends with that, or with the process.
                None => return,
            }
        }
        drop(state);
        // Ended but for its last instructions. A panic there was a bug of ours, and is no reason for another one.
        let _ = handle.join();
    }
}

fn check(options: &StoreOptions) -> Result<(), StoreError> {
    if options.page_bytes == 0 || options.page_bytes > MAX_PAGE_BYTES {
        let value = options.page_bytes.to_string();
        return Err(StoreError::Option {
            field: "page_bytes",
            value,
            expected: "1 to 67108864 bytes".to_owned(),
        });
    }
    let least = file_bytes(1, options.page_bytes);
    if usize::try_from(options.max_bytes).is_ok_and(|most| most < least) {
        let value = options.max_bytes.to_string();
        let expected = format!("more than the {least} bytes that a single page takes on disk");
        return Err(StoreError::Option { field: "max_bytes", value, expected });
    }
    Ok(())
}
