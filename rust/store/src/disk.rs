//! The file operations of this crate, behind a trait so that tests can make each of them fail.
//!
//! Nothing here follows a symbolic link or opens anything but a regular file, so what another user planted in the
//! directory can neither lead outside nor make an open wait. Files and folders are the owner's alone (0600, 0700):
//! pages hold what users wrote.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::SystemTime;

/// What a folder holds under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name within its folder; names that are not Unicode are made so with loss, and are never ours.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Length in bytes.
    pub bytes: u64,
    /// When it was last written or, for our pages, used.
    pub modified: SystemTime,
}

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link, a pipe, a device: never ours.
    Other,
}

/// An open file to read from.
pub trait Source: Read + Send {
    /// Its length in bytes.
    fn length(&self) -> io::Result<u64>;
    /// Sets its time to now.
    fn touch(&self) -> io::Result<()>;
}

/// A new file to write to.
pub trait Sink: Write + Send {
    /// Waits until the file is on the device.
    fn sync(&self) -> io::Result<()>;
}

/// A file that is locked as long as this lives.
pub type Lock = Box<dyn Send + Sync>;

/// The operations that a store needs of a file system.
pub trait Disk: Send + Sync {
    /// All that a folder holds.
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>>;
    /// What is at `path`, without following a link.
    fn stat(&self, path: &Path) -> io::Result<Entry>;
    /// Makes a folder and those above it; one that exists is fine.
    fn make_folder(&self, path: &Path) -> io::Result<()>;
    /// Opens a regular file.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>>;
    /// Creates a file; one that exists is an error.
    fn create(&self, path: &Path) -> io::Result<Box<dyn Sink>>;
    /// Moves a file over another, at once.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Deletes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Creates a file if need be and locks it; `None` while another holder has it.
    fn lock(&self, path: &Path) -> io::Result<Option<Lock>>;
}

/// The operating system's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            // A file that another process deleted since is no longer there: that is no error.
            match entry.metadata() {
                Ok(found) => entries.push(described(entry.file_name().to_string_lossy().into(), &found)?),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    fn stat(&self, path: &Path) -> io::Result<Entry> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into();
        described(name, &fs::symlink_metadata(path)?)
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>> {
        Ok(Box::new(opened(OpenOptions::new().read(true), path)?))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Sink>> {
        Ok(Box::new(opened(OpenOptions::new().write(true).create_new(true), path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Lock>> {
        let file = opened(OpenOptions::new().read(true).write(true).create(true).truncate(false), path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            // Some network file systems have no locks. Then two processes that open a new directory in the same
            // millisecond may each make a secret, and one of them misses pages: no more than that.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                Ok(Some(Box::new(file)))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Opens a regular file and nothing else: no link, and no pipe that nobody writes to.
fn opened(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    }
    #[cfg(not(unix))]
    if fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(not_a_file());
    }
    let file = options.open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(not_a_file()) }
}

fn not_a_file() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")
}

fn described(name: String, found: &fs::Metadata) -> io::Result<Entry> {
    let kind = match found.file_type() {
        kind if kind.is_file() => Kind::File,
        kind if kind.is_dir() => Kind::Folder,
        _ => Kind::Other,
    };
    Ok(Entry { name, kind, bytes: found.len(), modified: found.modified()? })
}

impl Source for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn touch(&self) -> io::Result<()> {
        self.set_modified(SystemTime::now())
    }
}

impl Sink for File {
    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Bytes in memory, as the parsers' tests have them.
impl Source for &[u8] {
    fn length(&self) -> io::Result<u64> {
        Ok(u64::try_from(self.len()).unwrap_or(u64::MAX))
    }

    fn touch(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Vec<u8> {
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
