//! A session: the pages of some sequences as one file, written and read as a whole.
//!
//! | part | fields |
//! |---|---|
//! | head | `INFERSES`; version, 1 (4 bytes); number of pages (8); bytes of the file (8); namespace (32) |
//! | each page | key (32), parent's key (32), number of tokens (4), bytes of payload (8), tokens, payload, BLAKE3 of these (32) |
//! | end | BLAKE3 of the head and of all pages' checksums (32) |
//!
//! Integers are little-endian. The last checksum covers the others, so that it covers the whole file at no cost.
//!
//! Somebody asked for this file and counts on it: it is synced to the device before it takes the place of an older one,
//! which stays whole if anything fails before. (The folder is not synced: after a power cut either of the two may be
//! there.) What a killed process left beside it is deleted by the next writer of the same session, after an hour.

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::StoreError;
use crate::directory::hexadecimal;
use crate::disk::{Disk, Kind, RealDisk, Source};
use crate::page::{MAX_PAGE_BYTES, MAX_PAGE_TOKENS, Page, taken, token_bytes};

const MAGIC: [u8; 8] = *b"INFERSES";
const VERSION: u32 = 1;
const HEAD_BYTES: u64 = 60;
/// Bytes of a page's record beside its tokens and payload.
const RECORD_BYTES: u64 = 108;
const CHECKSUM_BYTES: u64 = 32;
const LEFTOVER_AGE: Duration = Duration::from_secs(3600);

/// Writes a session. A file of that name is replaced when the new one is complete, and untouched if there is an error.
pub fn write(path: &Path, namespace: [u8; 32], pages: &[Page]) -> Result<(), StoreError> {
    write_on(&RealDisk, path, namespace, pages)
}

/// Reads a session of this namespace, all of whose payloads have `page_bytes` bytes: all its pages, or an error.
pub fn read(path: &Path, namespace: [u8; 32], page_bytes: usize) -> Result<Vec<Page>, StoreError> {
    read_on(&RealDisk, path, namespace, page_bytes)
}

/// [`write()`] on any file system.
pub fn write_on(disk: &dyn Disk, path: &Path, namespace: [u8; 32], pages: &[Page]) -> Result<(), StoreError> {
    for (number, page) in pages.iter().enumerate() {
        if page.tokens.len() > MAX_PAGE_TOKENS || page.payload.len() > MAX_PAGE_BYTES {
            let value = format!("{} tokens and {} bytes", page.tokens.len(), page.payload.len());
            let expected = format!("at most {MAX_PAGE_TOKENS} tokens and {MAX_PAGE_BYTES} bytes");
            return Err(StoreError::session(path, format!("page {number}"), value, expected));
        }
    }
    let failed = |error| StoreError::io("written", path, error);
    let existing = path.canonicalize().ok();
    // Renaming would put a file in the place of a device or a pipe.
    if existing.as_ref().is_some_and(|place| disk.stat(place).is_ok_and(|found| found.kind == Kind::Other)) {
        return Err(failed(io::Error::new(ErrorKind::InvalidInput, "not a regular file")));
    }
    let place = existing.unwrap_or_else(|| path.to_owned());
    let temporary = temporary(disk, &place).map_err(failed)?;
    let written = write_to(disk, &temporary, namespace, pages).and_then(|()| disk.rename(&temporary, &place));
    if written.is_err() {
        // Where this fails too, the next writer of this session deletes it.
        let _ = disk.remove(&temporary);
    }
    written.map_err(failed)
}

/// A new name beside `place`; deletes what was left there long ago.
fn temporary(disk: &dyn Disk, place: &Path) -> io::Result<PathBuf> {
    let name = place.file_name().ok_or(ErrorKind::InvalidInput)?;
    let folder = place.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let prefix = format!(".{}.", name.to_string_lossy());
    let old = SystemTime::now().checked_sub(LEFTOVER_AGE);
    for entry in disk.list(folder).unwrap_or_default() {
        let ours = entry.kind == Kind::File
            && entry
                .name
                .strip_prefix(&prefix)
                .is_some_and(|rest| rest.len() == 23 && rest.ends_with(".saving"));
        if ours && old.is_some_and(|old| entry.modified < old) {
            let _ = disk.remove(&folder.join(&entry.name));
        }
    }
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(folder.join(format!("{prefix}{}.saving", hexadecimal(&random))))
}

fn write_to(disk: &dyn Disk, path: &Path, namespace: [u8; 32], pages: &[Page]) -> io::Result<()> {
    let mut sink = disk.create(path)?;
    let head = head(namespace, pages);
    let mut whole = blake3::Hasher::new();
    whole.update(&head);
    sink.write_all(&head)?;
    for page in pages {
        let tokens = token_bytes(&page.tokens);
        let count = u32::try_from(page.tokens.len()).map_err(|_| ErrorKind::InvalidInput)?;
        let fixed =
            [&page.key[..], &page.parent, &count.to_le_bytes(), &bytes_of(&page.payload).to_le_bytes()];
        let start = [&fixed.concat()[..], &tokens].concat();
        let checksum = *blake3::Hasher::new().update(&start).update(&page.payload).finalize().as_bytes();
        whole.update(&checksum);
        for part in [&start, &page.payload, &checksum[..]] {
            sink.write_all(part)?;
        }
    }
    sink.write_all(whole.finalize().as_bytes())?;
    sink.flush()?;
    sink.sync()
}

fn head(namespace: [u8; 32], pages: &[Page]) -> Vec<u8> {
    let records = pages.iter().fold(0_u64, |sum, page| {
        let tokens = u64::try_from(page.tokens.len()).unwrap_or(u64::MAX).saturating_mul(4);
        sum.saturating_add(RECORD_BYTES).saturating_add(tokens).saturating_add(bytes_of(&page.payload))
    });
    let bytes = HEAD_BYTES.saturating_add(records).saturating_add(CHECKSUM_BYTES);
    let count = u64::try_from(pages.len()).unwrap_or(u64::MAX);
    let (version, count, bytes) = (VERSION.to_le_bytes(), count.to_le_bytes(), bytes.to_le_bytes());
    [&MAGIC[..], &version, &count, &bytes, &namespace].concat()
}

fn bytes_of(payload: &[u8]) -> u64 {
    u64::try_from(payload.len()).unwrap_or(u64::MAX)
}

/// [`read()`] on any file system.
pub fn read_on(
    disk: &dyn Disk,
    path: &Path,
    namespace: [u8; 32],
    page_bytes: usize,
) -> Result<Vec<Page>, StoreError> {
    let failed = |error| StoreError::io("read", path, error);
    let place = path.canonicalize().map_err(failed)?;
    let mut source = disk.open(&place).map_err(failed)?;
    parse(&mut *source, path, namespace, page_bytes)
}

/// [`read()`] from an open file; `path` is for the error.
pub fn parse(
    source: &mut dyn Source,
    path: &Path,
    namespace: [u8; 32],
    page_bytes: usize,
) -> Result<Vec<Page>, StoreError> {
    let left = source.length().map_err(|error| StoreError::io("read", path, error))?;
    let mut reader = Reader { source, path, left, whole: blake3::Hasher::new() };
    let count = reader.head(namespace, page_bytes)?;
    let mut pages = Vec::new();
    let reserved = pages.try_reserve_exact(count);
    reserved.map_err(|_| StoreError::io("read", path, ErrorKind::OutOfMemory.into()))?;
    for number in 0..count {
        pages.push(reader.page(number, page_bytes)?);
    }
    let whole = *reader.whole.finalize().as_bytes();
    let stored: [u8; 32] = reader.array("the file's checksum")?;
    if stored != whole {
        return Err(reader.lie("the file's checksum", hexadecimal(&stored), hexadecimal(&whole)));
    }
    match reader.left {
        0 => Ok(pages),
        left => Err(reader.lie("the end of the file", format!("{left} bytes away"), "after the last page")),
    }
}

/// Reads fields, never more than the file has left.
struct Reader<'a> {
    source: &'a mut dyn Source,
    path: &'a Path,
    left: u64,
    whole: blake3::Hasher,
}

impl Reader<'_> {
    /// Checks the head; returns the number of pages, which the file is long enough for.
    fn head(&mut self, namespace: [u8; 32], page_bytes: usize) -> Result<usize, StoreError> {
        let file_bytes = self.left;
        let magic: [u8; 8] = self.array("the start of the file")?;
        if magic != MAGIC {
            return Err(self.lie("the start of the file", format!("{magic:02x?}"), format!("{MAGIC:02x?}")));
        }
        let version: [u8; 4] = self.array("version")?;
        if u32::from_le_bytes(version) != VERSION {
            return Err(self.lie("version", u32::from_le_bytes(version), VERSION));
        }
        let (count, bytes): ([u8; 8], [u8; 8]) = (self.array("number of pages")?, self.array("file length")?);
        if u64::from_le_bytes(bytes) != file_bytes {
            let expected = format!("{}, which its head says", u64::from_le_bytes(bytes));
            return Err(self.lie("file length", file_bytes, expected));
        }
        let stored: [u8; 32] = self.array("namespace")?;
        if stored != namespace {
            let expected = format!("{}, that of this model and its settings", hexadecimal(&namespace));
            return Err(self.lie("namespace", hexadecimal(&stored), expected));
        }
        for part in [&magic[..], &version, &count, &bytes, &stored] {
            self.whole.update(part);
        }
        let least = RECORD_BYTES.saturating_add(u64::try_from(page_bytes).unwrap_or(u64::MAX));
        let most = self.left.saturating_sub(CHECKSUM_BYTES).checked_div(least).unwrap_or(0);
        let count = u64::from_le_bytes(count);
        match usize::try_from(count) {
            Ok(pages) if count <= most => Ok(pages),
            _ => Err(self.lie("number of pages", count, format!("at most {most} in a file of this length"))),
        }
    }

    fn page(&mut self, number: usize, page_bytes: usize) -> Result<Page, StoreError> {
        let field = |part: &str| format!("page {number}'s {part}");
        let (key, parent) = (self.array(&field("key"))?, self.array(&field("parent"))?);
        let count: [u8; 4] = self.array(&field("number of tokens"))?;
        let length: [u8; 8] = self.array(&field("payload length"))?;
        let tokens = usize::try_from(u32::from_le_bytes(count)).unwrap_or(usize::MAX);
        if tokens > MAX_PAGE_TOKENS {
            let expected = format!("at most {MAX_PAGE_TOKENS}");
            return Err(self.lie(field("number of tokens"), tokens, expected));
        }
        if usize::try_from(u64::from_le_bytes(length)).ok() != Some(page_bytes) {
            let expected = format!("{page_bytes}, the size of this model's pages");
            return Err(self.lie(field("payload length"), u64::from_le_bytes(length), expected));
        }
        let tokens = self.taken(&field("tokens"), tokens.saturating_mul(4))?;
        let payload = self.taken(&field("payload"), page_bytes)?;
        let mut hasher = blake3::Hasher::new();
        for part in [&key[..], &parent, &count, &length, &tokens, &payload] {
            hasher.update(part);
        }
        let checksum = *hasher.finalize().as_bytes();
        let stored: [u8; 32] = self.array(&field("checksum"))?;
        if stored != checksum {
            return Err(self.lie(field("checksum"), hexadecimal(&stored), hexadecimal(&checksum)));
        }
        self.whole.update(&checksum);
        let (quads, _) = tokens.as_chunks::<4>();
        let tokens = quads.iter().map(|token| u32::from_le_bytes(*token)).collect();
        Ok(Page { key, parent, tokens, payload })
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], StoreError> {
        let mut bytes = [0; N];
        self.spend(field, N)?;
        self.source.read_exact(&mut bytes).map_err(|error| StoreError::io("read", self.path, error))?;
        Ok(bytes)
    }

    fn taken(&mut self, field: &str, count: usize) -> Result<Vec<u8>, StoreError> {
        self.spend(field, count)?;
        taken(self.source, count).map_err(|error| StoreError::io("read", self.path, error))
    }

    fn spend(&mut self, field: &str, count: usize) -> Result<(), StoreError> {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.left = self.left.checked_sub(count).ok_or_else(|| {
            self.lie(field, format!("cut off {} bytes after its start", self.left), format!("{count} bytes"))
        })?;
        Ok(())
    }

    fn lie(
        &self,
        field: impl std::fmt::Display,
        value: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> StoreError {
        StoreError::session(self.path, field, value, expected)
    }
}
