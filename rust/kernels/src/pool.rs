//! The thread pool: workers spin briefly, then park, and the calling thread takes part.
//!
//! A run publishes one borrowed closure, and a share of neighbouring tasks for each thread, which it claims in their order: what
//! it asked memory for ahead is then what it needs next. A thread without tasks of its own takes the last ones of the others. A worker has to
//! *join* a run before it may look at the closure, and the caller only waits for those that joined: when all tasks were
//! claimed before a sleeping worker woke up, nobody waits for it. A run allocates nothing.
//!
//! A run inside a run, and a run while another thread's run is under way, is computed by the calling thread alone. So any number of
//! engines in a process can share one pool ([`Pool::shared`]): one of them has the workers at a time, the others their own thread,
//! and never more threads compute than workers and engines together.

use crate::KernelError;
use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker looks for work before it parks: longer than the gaps between a model's operations.
const SPIN: Duration = Duration::from_micros(100);

// `Shared::state`: joined workers in the low half, then one bit "open", then the number of the run.
const OPEN: u64 = 1 << 32;
const RUN: u64 = 1 << 33;
const JOINED: u64 = OPEN - 1;

type Payload = Box<dyn Any + Send>;

#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
}

/// A thread's tasks that nobody has claimed: the first in the low half, the end in the high one. On cache lines of its own.
#[derive(Default)]
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, tasks: Range<usize>) {
        self.0.store((tasks.end as u64) << 32 | tasks.start as u64, Ordering::Relaxed);
    }

    /// Claims the first task, or the last one.
    fn claim(&self, first: bool) -> Option<usize> {
        let mut found = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = (found & u64::from(u32::MAX), found >> 32);
            if start >= end {
                return None;
            }
            let (task, rest) = if first { (start, found + 1) } else { (end - 1, found - (1 << 32)) };
            match self.0.compare_exchange_weak(found, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(task as usize),
                Err(other) => found = other,
            }
        }
    }
}

struct Shared {
    state: AtomicU64,
    shares: Vec<Share>, // the caller's first
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Payload>>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

// SAFETY: `job` is written only while no run is open and no worker is joined, and read only by joined workers; the
// closure it points to is `Sync` and outlives the run, because `Pool::run` waits for every joined worker.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Threads that compute together. See the [module](self).
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    busy: AtomicBool,
    process: u32,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

/// The pools of this process that are in use, each with the process that made it: a forked child has no workers.
static SHARED: Mutex<Vec<(u32, Weak<Pool>)>> = Mutex::new(Vec::new());

impl Pool {
    /// The process's pool of so many threads: made by whoever asks first, and gone with the last who holds it.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn shared(threads: usize) -> Result<Arc<Pool>, KernelError> {
        let process = std::process::id();
        let mut pools = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|(_, pool)| pool.strong_count() > 0);
        let mut own =
            pools.iter().filter(|(owner, _)| *owner == process).filter_map(|(_, pool)| pool.upgrade());
        if let Some(pool) = own.find(|pool| pool.threads() == threads.max(1)) {
            return Ok(pool);
        }
        let pool = Arc::new(Pool::new(threads)?);
        pools.push((process, Arc::downgrade(&pool)));
        Ok(pool)
    }

    /// A pool of `threads` threads, of which the caller of [`Pool::run`] is one; 0 counts as 1.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn new(threads: usize) -> Result<Pool, KernelError> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            shares: (0..threads.max(1)).map(|_| Share::default()).collect(),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let process = std::process::id();
        let mut pool = Pool { shared, workers: Vec::new(), busy: AtomicBool::new(false), process };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("infer-worker-{index}"))
                .spawn(move || shared.work(index))
                .map_err(|source| KernelError::Thread { index, threads, source })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Number of threads that a run may use, the calling one included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(task)` once for every task in `0..tasks`, on any thread and in any order, and returns when all
    /// are done. A panic in a task is raised here, after all tasks are done.
    pub fn run(&self, tasks: usize, body: impl Fn(usize) + Sync) {
        if tasks <= 1 {
            return (0..tasks).for_each(body);
        }
        let alone = self.workers.is_empty()
            || u32::try_from(tasks).is_err()
            || self.busy.swap(true, Ordering::Acquire);
        if alone {
            return run_alone(tasks, &body);
        }
        let job = self.shared.publish(&body, tasks);
        self.shared.compute(job, 0);
        self.shared.close();
        let payload = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.busy.store(false, Ordering::Release);
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            return; // after a fork the workers exist only in the parent
        }
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_all();
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics, so it has nothing to report.
            let _ = worker.join();
        }
    }
}

fn run_alone(tasks: usize, body: &dyn Fn(usize)) {
    let mut first = None;
    for task in 0..tasks {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| body(task))) {
            first.get_or_insert(payload);
        }
    }
    if let Some(payload) = first {
        resume_unwind(payload);
    }
}

impl Shared {
    /// Opens a run. The caller holds `busy`, so no other run is open.
    fn publish<'a>(&self, body: &'a (dyn Fn(usize) + Sync + 'a), tasks: usize) -> Job {
        let body: *const (dyn Fn(usize) + Sync + 'a) = body;
        // SAFETY: only the lifetime changes; `close` is called before the closure dies, and nothing between panics.
        let body: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(body) };
        let job = Job { body };
        // SAFETY: no run is open and no worker is joined: nobody reads.
        unsafe { *self.job.get() = Some(job) };
        let threads = self.shares.len();
        for (thread, share) in self.shares.iter().enumerate() {
            share.set(tasks * thread / threads..tasks * (thread + 1) / threads);
        }
        let run = self.state.load(Ordering::Relaxed) & !(RUN - 1);
        // SeqCst, as is the counting of sleepers: a worker that goes to sleep either sees this run or is seen here.
        self.state.store(run.wrapping_add(RUN) | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake_all();
        }
        job
    }

    fn wake_all(&self) {
        drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }

    /// Computes tasks until none is left: a thread's own from the first on, then others' from the last on.
    fn compute(&self, job: Job, thread: usize) {
        let (before, from_own) = self.shares.split_at(thread);
        for (place, share) in from_own.iter().chain(before).enumerate() {
            while let Some(task) = share.claim(place == 0) {
                // SAFETY: the run is open or this worker is joined, so the closure lives.
                let body = unsafe { &*job.body };
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| body(task))) {
                    self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
                }
            }
        }
    }

    /// Lets nobody join any more and waits for those that did.
    fn close(&self) {
        let mut state = self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut turns = 0_u32;
        while state & JOINED != 0 {
            turns += 1;
            // With more threads than free cores the worker waited for may need this core.
            if turns.is_multiple_of(1024) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
            state = self.state.load(Ordering::Acquire);
        }
    }

    /// A worker's life.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        while let Some(state) = self.await_run(seen) {
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state & !(RUN - 1);
            // SAFETY: joined, and `job` was written before the run opened.
            if let Some(job) = unsafe { *self.job.get() } {
                self.compute(job, thread);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The state with an open run other than run `seen`; none when the pool ends.
    fn await_run(&self, seen: u64) -> Option<u64> {
        let fresh = |state: u64| state & OPEN != 0 && state & !(RUN - 1) != seen;
        let mut spinning = Instant::now();
        loop {
            for _ in 0..64 {
                let state = self.state.load(Ordering::Acquire);
                if fresh(state) {
                    return Some(state);
                }
                std::hint::spin_loop();
            }
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if spinning.elapsed() < SPIN {
                continue;
            }
            let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            while !fresh(self.state.load(Ordering::SeqCst)) && !self.stop.load(Ordering::SeqCst) {
                guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            drop(guard);
            spinning = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(3).unwrap();
        for tasks in [0, 1, 2, 3, 100, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, |task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn many_short_runs_with_parking_between() {
        let pool = Pool::new(2).unwrap();
        let total = AtomicUsize::new(0);
        for turn in 0..2000 {
            pool.run(4, |task| {
                total.fetch_add(task, Ordering::Relaxed);
            });
            if turn % 500 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(total.load(Ordering::Relaxed), 2000 * 6);
    }

    #[test]
    fn a_panic_is_raised_after_all_tasks() {
        for threads in [1, 2] {
            let pool = Pool::new(threads).unwrap();
            let done = AtomicUsize::new(0);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(50, |task| {
                    assert_ne!(task, 7, "seven");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }));
            assert!(outcome.unwrap_err().downcast_ref::<String>().unwrap().contains("seven"));
            assert_eq!(done.load(Ordering::Relaxed), 49);
            pool.run(2, |_| ()); // and the pool still works
        }
    }

    #[test]
    fn contexts_of_one_process_share_their_threads() {
        let pool = Pool::shared(7).unwrap();
        assert!(Arc::ptr_eq(&pool, &Pool::shared(7).unwrap()));
        assert!(!Arc::ptr_eq(&pool, &Pool::shared(6).unwrap()));
        assert_eq!(pool.threads(), 7);
        let weak = Arc::downgrade(&pool);
        drop(pool);
        assert!(weak.upgrade().is_none(), "the last holder ends it");
        assert_eq!(Pool::shared(0).unwrap().threads(), 1);
    }

    #[test]
    fn nested_and_concurrent_runs() {
        let pool = Pool::new(2).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(3, |_| {
                            pool.run(5, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 3 * 100 * 15);
    }
}
