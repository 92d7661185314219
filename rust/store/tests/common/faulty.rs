//! The real disk, whose operation number N fails, is cut short, or is the last one before the process is dead.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use infer_store::disk::{Disk, Entry, Lock, RealDisk, Sink, Source};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The device is full.
    Full,
    /// The device fails.
    Broken,
    /// A read finds the end of the file, a write takes half.
    Short,
    /// A write leaves half of its bytes, and nothing happens afterwards.
    Killed,
}

#[derive(Clone)]
pub struct FaultyDisk(Arc<Plan>);

struct Plan {
    fault: Fault,
    at: usize,
    /// Looking at folders is most of what a store does, and hardly ever matters: a test counts one or the other.
    count_stat: bool,
    done: AtomicUsize,
    dead: AtomicBool,
}

enum Step {
    Normal,
    Short,
}

impl FaultyDisk {
    pub fn new(fault: Fault, at: usize, count_stat: bool) -> Self {
        let (done, dead) = (AtomicUsize::new(0), AtomicBool::new(false));
        FaultyDisk(Arc::new(Plan { fault, at, count_stat, done, dead }))
    }

    /// Operations so far.
    pub fn done(&self) -> usize {
        self.0.done.load(Ordering::SeqCst)
    }
}

impl Plan {
    fn step(&self, is_stat: bool) -> io::Result<Step> {
        let killed = || io::Error::other("killed");
        if self.dead.load(Ordering::SeqCst) {
            return Err(killed());
        }
        if is_stat != self.count_stat || self.done.fetch_add(1, Ordering::SeqCst) != self.at {
            return Ok(Step::Normal);
        }
        match self.fault {
            Fault::Full => Err(io::ErrorKind::StorageFull.into()),
            Fault::Broken => Err(io::Error::other("broken")),
            Fault::Short => Ok(Step::Short),
            Fault::Killed => {
                self.dead.store(true, Ordering::SeqCst);
                Err(killed())
            }
        }
    }
}

impl Disk for FaultyDisk {
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        self.0.step(false)?;
        RealDisk.list(folder)
    }

    fn stat(&self, path: &Path) -> io::Result<Entry> {
        self.0.step(true)?;
        RealDisk.stat(path)
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        self.0.step(false)?;
        RealDisk.make_folder(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>> {
        self.0.step(false)?;
        Ok(Box::new(FaultyFile(RealDisk.open(path)?, self.0.clone())))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Sink>> {
        self.0.step(false)?;
        Ok(Box::new(FaultyFile(RealDisk.create(path)?, self.0.clone())))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.step(false)?;
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.step(false)?;
        RealDisk.remove(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Lock>> {
        self.0.step(false)?;
        RealDisk.lock(path)
    }
}

struct FaultyFile<F>(F, Arc<Plan>);

impl Read for FaultyFile<Box<dyn Source>> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.1.step(false)? {
            Step::Normal => self.0.read(buffer),
            Step::Short => Ok(0),
        }
    }
}

impl Source for FaultyFile<Box<dyn Source>> {
    fn length(&self) -> io::Result<u64> {
        self.1.step(false)?;
        self.0.length()
    }

    fn touch(&self) -> io::Result<()> {
        self.1.step(false)?;
        self.0.touch()
    }
}

impl Write for FaultyFile<Box<dyn Sink>> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let half = bytes.len().div_ceil(2);
        match self.1.step(false) {
            Ok(Step::Normal) => self.0.write(bytes),
            Ok(Step::Short) => self.0.write(&bytes[..half]),
            Err(error) => {
                // What a full device or a killed process leaves behind is part of what it was to write.
                self.0.write_all(&bytes[..half])?;
                Err(error)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Sink for FaultyFile<Box<dyn Sink>> {
    fn sync(&self) -> io::Result<()> {
        // Counted, and not passed on: no test cuts the power, and a busy machine takes seconds for each.
        self.1.step(false).map(|_| ())
    }
}

/// The real disk, that may not be written to, or whose files cannot be read while `unreadable` is set.
#[derive(Clone, Default)]
pub struct Refusing {
    pub read_only: bool,
    pub unreadable: Arc<AtomicBool>,
}

impl Refusing {
    fn writing(&self) -> io::Result<()> {
        if self.read_only { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }
}

impl Disk for Refusing {
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        RealDisk.list(folder)
    }

    fn stat(&self, path: &Path) -> io::Result<Entry> {
        RealDisk.stat(path)
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        self.writing()?;
        RealDisk.make_folder(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>> {
        if self.unreadable.load(Ordering::SeqCst) {
            return Err(io::Error::other("too many open files"));
        }
        RealDisk.open(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Sink>> {
        self.writing()?;
        RealDisk.create(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.writing()?;
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.writing()?;
        RealDisk.remove(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Lock>> {
        self.writing()?;
        RealDisk.lock(path)
    }
}
