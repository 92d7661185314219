//! Packed weights on disk: what a load packed, or rounded and packed, for the next load of the same model.
//!
//! Reading them back costs about what copying does. Packing alone is hardly slower, so this pays where weights are rounded while they
//! are loaded, and is off unless a folder is named. A model has one file there, which a changed model replaces.
//!
//! ```text
//! magic (16) | identity (32) | bytes of data (8) | checksums (8 per piece) | checksum of all before (8) | data, in pieces
//! ```
//!
//! The identity covers everything that decides a bit of the data; sizes follow from the model and are not in the file. Data is read
//! into memory of our own, never mapped: a file that somebody cuts short ends a read, not the process. Checksums find damage, not
//! malice: who may write the folder may write the model too. A file appears whole, by renaming; whatever is wrong with
//! one, weights are packed from the model again.

use std::collections::hash_map::RandomState;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use infer_kernels::Pool;

const MAGIC: &[u8; 16] = b"infer packed 001";

/// Bytes with a checksum of their own, read by one thread at a time.
const PIECE: usize = 1 << 20;

/// After which time an unfinished file belongs to nobody any more.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Ends of the names of files that are whole, and of those that are being written.
const WHOLE: &str = "infer-packed";
const UNFINISHED: &str = "infer-writing";

/// What came of a folder for packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedCacheUse {
    /// None was named.
    Off,
    /// Weights came from it.
    Read,
    /// Weights were packed, and are there for the next load.
    Written,
    /// Weights were packed, and could not be kept.
    Failed,
}

impl PackedCacheUse {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Read => "read",
            Self::Written => "written",
            Self::Failed => "failed",
        }
    }
}

/// The file of one model.
pub(crate) struct PackedCache {
    path: PathBuf,
    identity: [u8; 32],
}

/// Why a file was of no use.
#[derive(Debug)]
pub(crate) enum Unusable {
    /// There is none, or it is another model's or another version's: nothing to tell anybody.
    Absent,
    /// It is damaged, or cannot be read.
    Broken(String),
}

impl PackedCache {
    /// The file in `folder` of what `model` (a path, and how it is loaded) is packed to. Only weights of this identity are read.
    pub fn new(folder: &Path, model: &str, identity: [u8; 32]) -> Self {
        let name = blake3::hash(model.as_bytes()).to_hex();
        Self { path: folder.join(format!("{}.{WHOLE}", &name[..32])), identity }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `parts`, whose sizes the file must have.
    pub fn read(&self, pool: &Pool, parts: Vec<&mut [u8]>) -> Result<(), Unusable> {
        let file = match Reader::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Unusable::Absent),
            Err(error) => return Err(broken(error)),
        };
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let count = parts.iter().map(|part| part.len().div_ceil(PIECE)).sum();
        let mut header = vec![0; header_bytes(count)];
        file.read_at(&mut header[..MAGIC.len() + 40], 0).map_err(broken)?;
        let stated = number(&header, MAGIC.len() + 32);
        if header[..MAGIC.len()] != MAGIC[..]
            || header[MAGIC.len()..][..32] != self.identity
            || stated != total as u64
        {
            return Err(Unusable::Absent);
        }
        file.read_at(&mut header, 0).map_err(broken)?;
        let end = header.len() - 8;
        if number(&header, end) != checksum(&header[..end]) {
            return Err(Unusable::Broken("its header is damaged".to_owned()));
        }
        let checksums = header[MAGIC.len() + 40..end].as_chunks::<8>().0;
        let mut offset = header.len();
        let mut pieces = Vec::with_capacity(count);
        for piece in parts.into_iter().flat_map(|part| part.chunks_mut(PIECE)) {
            let length = piece.len();
            pieces.push(Mutex::new((offset as u64, piece)));
            offset += length;
        }
        let (failed, damaged) = (Mutex::new(None), AtomicBool::new(false));
        pool.run(pieces.len(), |index| {
            let mut piece = pieces[index].lock().unwrap_or_else(PoisonError::into_inner);
            let (offset, bytes) = &mut *piece;
            match file.read_at(bytes, *offset) {
                Ok(()) if checksum(bytes) == u64::from_le_bytes(checksums[index]) => {}
                Ok(()) => damaged.store(true, Ordering::Relaxed),
                Err(error) => *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
            }
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(broken(error)),
            None if damaged.into_inner() => Err(Unusable::Broken("its data is damaged".to_owned())),
            None => Ok(()),
        }
    }

    /// Writes `parts` for the next load, in the place of what is there.
    pub fn write(&self, pool: &Pool, parts: &[&[u8]]) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        make_folder(folder)?;
        clear_abandoned(folder)?;
        let pieces: Vec<&[u8]> = parts.iter().flat_map(|part| part.chunks(PIECE)).collect();
        let sums: Vec<AtomicU64> = pieces.iter().map(|_| AtomicU64::new(0)).collect();
        pool.run(pieces.len(), |index| sums[index].store(checksum(pieces[index]), Ordering::Relaxed));
        let mut header = MAGIC.to_vec();
        header.extend(self.identity);
        header.extend(parts.iter().map(|part| part.len() as u64).sum::<u64>().to_le_bytes());
        header.extend(sums.iter().flat_map(|sum| sum.load(Ordering::Relaxed).to_le_bytes()));
        header.extend(checksum(&header).to_le_bytes());
        let (unfinished, file) = create(&self.path)?;
        let done = fill(file, &header, &pieces).and_then(|()| fs::rename(&unfinished, &self.path));
        if done.is_err() {
            let _ = fs::remove_file(&unfinished); // it may be gone, and the error that counts is the first one
        }
        done?;
        sync_folder(folder)
    }
}

fn header_bytes(pieces: usize) -> usize {
    MAGIC.len() + 32 + 8 + 8 * pieces + 8
}

fn broken(error: io::Error) -> Unusable {
    Unusable::Broken(match error.kind() {
        io::ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
        _ => error.to_string(),
    })
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Eight chains over words of eight bytes: a word that differs changes its chain for certain, since each step is a bijection.
fn checksum(bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let step = |chain: u64, word: u64| (chain ^ word).wrapping_mul(ODD).rotate_left(29);
    let mut chains: [u64; 8] = std::array::from_fn(|i| ODD.wrapping_mul(i as u64 + 1));
    let (lines, rest) = bytes.as_chunks::<64>();
    for line in lines {
        for (chain, word) in chains.iter_mut().zip(line.as_chunks::<8>().0) {
            *chain = step(*chain, u64::from_le_bytes(*word));
        }
    }
    let last = rest.iter().fold(bytes.len() as u64, |sum, byte| step(sum, u64::from(*byte)));
    chains.into_iter().fold(last, step)
}

/// A file that several threads read: elsewhere than on Unix one after the other.
struct Reader {
    #[cfg(unix)]
    file: File,
    #[cfg(not(unix))]
    file: Mutex<File>,
}

impl Reader {
    #[cfg(unix)]
    fn open(path: &Path) -> io::Result<Self> {
        File::open(path).map(|file| Self { file })
    }

    #[cfg(unix)]
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, offset)
    }

    #[cfg(not(unix))]
    fn open(path: &Path) -> io::Result<Self> {
        File::open(path).map(|file| Self { file: Mutex::new(file) })
    }

    #[cfg(not(unix))]
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(bytes)
    }
}

fn make_folder(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)
}

/// Deletes what processes began to write that were killed.
fn clear_abandoned(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let old = || fs::symlink_metadata(&path).ok()?.modified().ok()?.elapsed().ok();
        if path.extension().is_some_and(|own| own == UNFINISHED) && old().is_some_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(&path); // another process may have been faster
        }
    }
    Ok(())
}

/// A new file beside `path`, of a name that no other thread or process takes.
fn create(path: &Path) -> io::Result<(PathBuf, File)> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    loop {
        // The standard library seeds its hashers from the system's random numbers.
        let number = RandomState::new().build_hasher().finish();
        let unfinished = path.with_extension(format!("{number:016x}.{UNFINISHED}"));
        match options.open(&unfinished) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {} // once in 2^64
            opened => return opened.map(|file| (unfinished, file)),
        }
    }
}

fn fill(mut file: File, header: &[u8], pieces: &[&[u8]]) -> io::Result<()> {
    file.write_all(header)?;
    pieces.iter().try_for_each(|piece| file.write_all(piece))?;
    file.sync_all()
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_changes_the_checksum() {
        for length in [0, 1, 63, 64, 65, 1000] {
            let mut bytes: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
            let whole = checksum(&bytes);
            for bit in 0..8 * length {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(checksum(&bytes), whole, "bit {bit} of {length} bytes");
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            bytes.push(0);
            assert_ne!(checksum(&bytes), whole, "{length} bytes and a zero");
        }
    }

    #[test]
    fn a_file_is_read_back_or_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let pool = Pool::new(2).expect("threads");
        let first: Vec<u8> = (0..2 * PIECE + 77).map(|i| (i * i) as u8).collect();
        let parts: [&[u8]; 3] = [&first, &[], &first[..5]];
        let own = PackedCache::new(folder.path(), "a model", [7; 32]);
        let read = |cache: &PackedCache, sizes: [usize; 3]| {
            let mut found = sizes.map(|size| vec![0; size]);
            cache.read(&pool, found.iter_mut().map(Vec::as_mut_slice).collect()).map(|()| found)
        };
        let sizes = parts.map(<[u8]>::len);
        assert!(matches!(read(&own, sizes), Err(Unusable::Absent)));
        own.write(&pool, &parts).expect("writes");
        assert_eq!(read(&own, sizes).expect("reads"), parts.map(<[u8]>::to_vec));
        // Another identity or other sizes.
        let other = PackedCache::new(folder.path(), "a model", [8; 32]);
        assert!(matches!(read(&other, sizes), Err(Unusable::Absent)));
        assert!(matches!(read(&own, [sizes[0], 1, 5]), Err(Unusable::Absent)));
        // Cut short anywhere, and a bit wrong in each part of the file.
        let whole = fs::read(own.path()).expect("reads");
        let header = header_bytes(4);
        for length in [0, 10, 55, header - 1, header, header + PIECE, whole.len() - 1] {
            fs::write(own.path(), &whole[..length]).expect("writes");
            assert!(read(&own, sizes).is_err(), "{length} bytes");
        }
        for at in [0, 20, 50, 60, header - 1, header, header + PIECE, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 16;
            fs::write(own.path(), &damaged).expect("writes");
            assert!(read(&own, sizes).is_err(), "byte {at}");
        }
        own.write(&pool, &parts).expect("writes over it");
        assert!(read(&own, sizes).is_ok());
        assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 1);
    }

    #[test]
    fn what_was_begun_long_ago_is_cleared() {
        let folder = tempfile::tempdir().expect("a folder");
        let pool = Pool::new(1).expect("threads");
        let old = folder.path().join(format!("a.1-0.{UNFINISHED}"));
        let new = folder.path().join(format!("b.1-0.{UNFINISHED}"));
        for path in [&old, &new] {
            fs::write(path, b"").expect("writes");
        }
        let time = std::time::SystemTime::now() - 2 * ABANDONED;
        File::options().write(true).open(&old).and_then(|file| file.set_modified(time)).expect("sets");
        PackedCache::new(folder.path(), "a model", [7; 32]).write(&pool, &[b"x"]).expect("writes");
        assert!(!old.exists() && new.exists());
    }
}
