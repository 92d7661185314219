//! The directory of a store, and how processes share it.
//!
//! ```text
//! infer-store      the marker: a directory that is not empty and has none is somebody else's
//! secret           32 random bytes and their checksum
//! lock             locked while a process opens the directory
//! writing/ID.lock  locked as long as the store that writes ID's files lives
//! writing/ID-N     a file being written; renamed to its place when it is whole
//! pages/3f/a0...   a page, by 256 folders of the first byte of its name
//! ```
//!
//! A page's name is a digest of namespace and key: models share the directory and its cap, and cannot meet. Names are
//! made of hexadecimal digits by us, never of text by others, so no name leads anywhere else.
//!
//! What a killed process left in `writing` is deleted by the next one that opens the directory: its lock is free.
//! Nobody deletes what a living one writes.
//!
//! A directory that this process may not write to is opened for reading: it needs marker and secret.

use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::StoreError;
use crate::disk::{Disk, Entry, Kind, Lock, Source};
use crate::page::{self, Unusable};
use crate::page::{Key, Page, Wanted};

/// A page's name in the directory.
pub(crate) type Name = [u8; 32];

/// Folders of pages.
pub(crate) const FOLDERS: usize = 256;

const MARKER: &str = "infer-store";
const MARKER_TEXT: &str = "infer page store, version 1\n";
const SECRET: &str = "secret";
const LOCK: &str = "lock";
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// An opened directory.
pub(crate) struct Directory {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    namespace: [u8; 32],
    secret: [u8; 32],
    writer: Option<Writer>,
}

/// The right to write: an id whose lock tells others that we live.
struct Writer {
    prefix: PathBuf,
    next: AtomicU64,
    /// A forked child's copy deletes nothing.
    process: u32,
    _lock: Lock,
}

impl Directory {
    /// Makes or checks the directory, and clears what killed processes left.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, namespace: [u8; 32]) -> Result<Self, StoreError> {
        let exists = disk.stat(dir).is_ok();
        if !exists {
            disk.make_folder(dir).map_err(|error| StoreError::io("made", dir, error))?;
        }
        // A link to a directory is fine here: the user named it. Nothing below follows one.
        let root = dir.canonicalize().map_err(|error| StoreError::io("opened", dir, error))?;
        let marked = is_ours(&*disk, &root)?;
        let mut directory = Directory { disk, root, namespace, secret: [0; 32], writer: None };
        match directory.locked() {
            Ok(_lock) => directory.prepare()?,
            Err(StoreError::Io { source, .. }) if marked && is_read_only(&source) => {
                directory.check_marker()?;
                directory.read_secret()?;
            }
            Err(error) => return Err(error),
        }
        Ok(directory)
    }

    /// The directory's random bytes.
    pub fn secret(&self) -> [u8; 32] {
        self.secret
    }

    /// Whether this process may write here.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    /// A page's name.
    pub fn name(&self, key: &Key) -> Name {
        *blake3::Hasher::new().update(&self.namespace).update(key).finalize().as_bytes()
    }

    /// What one of the 256 folders holds, as (name, entry); nothing where it is missing or a link.
    pub fn list(&self, folder: usize) -> io::Result<Vec<(Name, Entry)>> {
        let path = self.folder(folder);
        if self.folder_time(folder)?.is_none() {
            return Ok(Vec::new());
        }
        let entries = self.disk.list(&path)?.into_iter().filter(|entry| entry.kind == Kind::File);
        Ok(entries.filter_map(|entry| Some((parsed(folder, &entry.name)?, entry))).collect())
    }

    /// When a folder's list last changed; `None` where it is missing or no folder.
    pub fn folder_time(&self, folder: usize) -> io::Result<Option<std::time::SystemTime>> {
        match self.disk.stat(&self.folder(folder)) {
            Ok(entry) if entry.kind == Kind::Folder => Ok(Some(entry.modified)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a page and marks it as used.
    pub fn read(&self, name: &Name, page_bytes: usize, wanted: &Wanted) -> Result<Vec<u8>, Unusable> {
        let folder = usize::from(name[0]);
        if self.folder_time(folder)?.is_none() {
            return Err(Unusable::Io(ErrorKind::NotFound.into()));
        }
        let mut source = self.disk.open(&self.path(name))?;
        let payload = page::read(&mut *source, &self.namespace, page_bytes, wanted)?;
        // Only the order of eviction hangs on the time, and a directory may be for reading only.
        let _ = source.touch();
        Ok(payload)
    }

    /// Writes a page under another name, then moves it to its place.
    pub fn write(&self, name: &Name, page: &Page) -> io::Result<()> {
        let temporary = self.temporary()?;
        let written = self.write_to(&temporary, name, page);
        if written.is_err() {
            // Where this fails too, the next process that opens the directory deletes it.
            let _ = self.disk.remove(&temporary);
        }
        written
    }

    fn write_to(&self, temporary: &Path, name: &Name, page: &Page) -> io::Result<()> {
        let mut sink = self.disk.create(temporary)?;
        page::write(&mut *sink, &self.namespace, page)?;
        drop(sink);
        let folder = usize::from(name[0]);
        if self.folder_time(folder)?.is_none() {
            self.disk.make_folder(&self.folder(folder))?;
            // Making what is there is fine, also where a link to a folder is there: that one leads outside.
            if self.folder_time(folder)?.is_none() {
                return Err(ErrorKind::NotADirectory.into());
            }
        }
        self.disk.rename(temporary, &self.path(name))
    }

    /// When a page was last used, by whichever process; `None` where it is gone.
    pub fn used(&self, name: &Name) -> io::Result<Option<Entry>> {
        match self.disk.stat(&self.path(name)) {
            Ok(entry) => Ok(Some(entry)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes a page; one that another process deleted first is fine.
    pub fn remove(&self, name: &Name) -> io::Result<()> {
        match self.disk.remove(&self.path(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn folder(&self, folder: usize) -> PathBuf {
        self.root.join("pages").join(format!("{folder:02x}"))
    }

    fn path(&self, name: &Name) -> PathBuf {
        let text = hexadecimal(name);
        let (folder, rest) = text.split_at(2);
        self.root.join("pages").join(folder).join(rest)
    }

    fn temporary(&self) -> io::Result<PathBuf> {
        let writer = self.writer.as_ref().ok_or(ErrorKind::ReadOnlyFilesystem)?;
        let mut path = writer.prefix.clone().into_os_string();
        path.push(format!("-{}", writer.next.fetch_add(1, Ordering::Relaxed)));
        Ok(path.into())
    }

    // ---- opening

    fn locked(&self) -> Result<Lock, StoreError> {
        let path = self.root.join(LOCK);
        let deadline = Instant::now().checked_add(LOCK_PATIENCE);
        loop {
            match self.disk.lock(&path) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Err(StoreError::Busy { dir: self.root.clone() });
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(StoreError::io("locked", &path, error)),
            }
        }
    }

    /// Everything that is done under the directory's lock.
    fn prepare(&mut self) -> Result<(), StoreError> {
        self.mark()?;
        self.make_secret()?;
        for folder in ["writing", "pages"] {
            let path = self.root.join(folder);
            self.disk.make_folder(&path).map_err(|error| StoreError::io("made", &path, error))?;
            let kind = self.disk.stat(&path).map_err(|error| StoreError::io("opened", &path, error))?.kind;
            if kind != Kind::Folder {
                return Err(StoreError::io("used", &path, ErrorKind::NotADirectory.into()));
            }
        }
        // Leftovers cost room only; that they stay must not keep anybody from working.
        let _ = self.clear_leftovers();
        self.writer = Some(self.register()?);
        Ok(())
    }

    /// Makes the marker of a new directory, or checks that it is ours.
    fn mark(&self) -> Result<(), StoreError> {
        match self.check_marker() {
            Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            known => return known,
        }
        // Another process may have put something there since we looked.
        is_ours(&*self.disk, &self.root)?;
        let path = self.root.join(MARKER);
        self.place(&path, MARKER_TEXT.as_bytes()).map_err(|error| StoreError::io("written", &path, error))
    }

    fn check_marker(&self) -> Result<(), StoreError> {
        let path = self.root.join(MARKER);
        let text = self.small_file(&path, 4096).map_err(|error| StoreError::io("read", &path, error))?;
        if text == MARKER_TEXT.as_bytes() {
            return Ok(());
        }
        let shown: String = String::from_utf8_lossy(&text).chars().take(80).collect();
        let (dir, expected) = (self.root.clone(), format!("{MARKER_TEXT:?}"));
        Err(StoreError::Version { dir, found: format!("{shown:?}"), expected })
    }

    fn make_secret(&mut self) -> Result<(), StoreError> {
        match self.read_secret() {
            Err(StoreError::Io { source, .. })
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => {}
            known => return known,
        }
        // None yet, or a damaged one: all pages of that are misses from now on.
        let path = self.root.join(SECRET);
        getrandom::fill(&mut self.secret)
            .map_err(|error| StoreError::io("made", &path, io::Error::other(error.to_string())))?;
        let checked = [self.secret, *blake3::hash(&self.secret).as_bytes()].concat();
        self.place(&path, &checked).map_err(|error| StoreError::io("written", &path, error))
    }

    fn read_secret(&mut self) -> Result<(), StoreError> {
        let path = self.root.join(SECRET);
        let bytes = self.small_file(&path, 64).map_err(|error| StoreError::io("read", &path, error))?;
        match bytes.split_first_chunk::<32>() {
            Some((secret, checksum)) if checksum == blake3::hash(secret).as_bytes() => {
                self.secret = *secret;
                Ok(())
            }
            _ => Err(StoreError::io("read", &path, ErrorKind::InvalidData.into())),
        }
    }

    /// The whole of a file of at most `limit` bytes, or the first of a longer one.
    fn small_file(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let source: Box<dyn Source> = self.disk.open(path)?;
        let mut bytes = Vec::new();
        source.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes a small file once and for all, under the directory's lock. These few are synced: without them all pages
    /// are lost.
    fn place(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension("new");
        let _ = self.disk.remove(&temporary);
        let mut sink = self.disk.create(&temporary)?;
        sink.write_all(bytes)?;
        sink.sync()?;
        drop(sink);
        self.disk.rename(&temporary, path)
    }

    /// Deletes what nobody writes any more: files whose lock is free or missing.
    fn clear_leftovers(&self) -> io::Result<()> {
        let folder = self.root.join("writing");
        let entries = self.disk.list(&folder)?;
        let mut alive = Vec::new();
        for entry in &entries {
            if let Some(id) = entry.name.strip_suffix(".lock") {
                let path = folder.join(&entry.name);
                match self.disk.lock(&path) {
                    Ok(Some(_free)) => self.disk.remove(&path)?,
                    _ => alive.push(format!("{id}-")),
                }
            }
        }
        for entry in entries.iter().filter(|entry| entry.kind == Kind::File && !entry.name.ends_with(".lock"))
        {
            if !alive.iter().any(|id| entry.name.starts_with(id)) {
                self.disk.remove(&folder.join(&entry.name))?;
            }
        }
        Ok(())
    }

    fn register(&self) -> Result<Writer, StoreError> {
        let mut id = [0; 16];
        let folder = self.root.join("writing");
        getrandom::fill(&mut id)
            .map_err(|error| StoreError::io("locked", &folder, io::Error::other(error.to_string())))?;
        let prefix = folder.join(hexadecimal(&id));
        let path = prefix.with_extension("lock");
        let lock = self.disk.lock(&path).map_err(|error| StoreError::io("locked", &path, error))?;
        let _lock = lock.ok_or_else(|| StoreError::Busy { dir: self.root.clone() })?;
        Ok(Writer { prefix, next: AtomicU64::new(0), process: std::process::id(), _lock })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.as_ref().filter(|writer| writer.process == std::process::id()) {
            let _ = self.disk.remove(&writer.prefix.with_extension("lock"));
        }
    }
}

/// Whether the directory has a marker; an error where it has none and is not empty.
fn is_ours(disk: &dyn Disk, root: &Path) -> Result<bool, StoreError> {
    let entries = disk.list(root).map_err(|error| StoreError::io("listed", root, error))?;
    if entries.iter().any(|entry| entry.name == MARKER) {
        return Ok(true);
    }
    let unfinished = [LOCK, "infer-store.new"];
    match entries.into_iter().find(|entry| !unfinished.contains(&&*entry.name)) {
        Some(entry) => Err(StoreError::NotOurs { dir: root.to_owned(), found: format!("{:?}", entry.name) }),
        None => Ok(false),
    }
}

fn is_read_only(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a file of a folder, if it is a page's.
fn parsed(folder: usize, file: &str) -> Option<Name> {
    let text = format!("{folder:02x}{file}");
    if text.len() != 64 || text.bytes().any(|byte| !matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut name = [0; 32];
    for (byte, at) in name.iter_mut().zip((0_usize..64).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at.saturating_add(2))?, 16).ok()?;
    }
    Some(name)
}
