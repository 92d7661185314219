//! The bytes of a checkpoint's file.
//!
//! Files are mapped for loading only: all weights are packed into memory of our own, or read (`late.rs`) until they are, so a file
//! that is replaced or cut short later cannot raise SIGBUS in the middle of a request. With `mmap: false` files are read instead.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use crate::ModelError;

/// What a file holds.
#[derive(Debug)]
pub(crate) enum FileBytes {
    Mapped { map: memmap2::Mmap, file: Arc<File> },
    Read { bytes: Vec<u8>, file: Arc<File> },
}

impl FileBytes {
    /// Maps or reads a file.
    pub fn open(path: &Path, mmap: bool) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(io)?;
        if !mmap {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(io)?;
            return Ok(Self::Read { bytes, file: Arc::new(file) });
        }
        // SAFETY: the mapping is private to the load; see the head of this file for what happens to changed files.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Ok(Self::Mapped { map, file: Arc::new(file) })
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped { map, .. } => map,
            Self::Read { bytes, .. } => bytes,
        }
    }

    /// The file, if it is mapped, and systems can read anywhere in it.
    pub fn mapped(&self) -> Option<&Arc<File>> {
        match self {
            Self::Mapped { file, .. } if cfg!(unix) => Some(file),
            Self::Mapped { .. } | Self::Read { .. } => None,
        }
    }

    /// When it was changed last, if the system says so.
    pub fn modified(&self) -> Option<SystemTime> {
        let (Self::Mapped { file, .. } | Self::Read { file, .. }) = self;
        file.metadata().ok()?.modified().ok()
    }

    /// A part, read from the file if it is mapped: for a few bytes here and there, whose pages would cost more than they hold.
    pub fn read(&self, part: Range<usize>) -> Cow<'_, [u8]> {
        #[cfg(unix)]
        if let Self::Mapped { file, .. } = self {
            use std::os::unix::fs::FileExt;
            let mut bytes = vec![0; part.len()];
            if file.read_exact_at(&mut bytes, part.start as u64).is_ok() {
                return Cow::Owned(bytes);
            }
        }
        Cow::Borrowed(&self.bytes()[part])
    }

    /// Maps the pages of a part at once: one by one, as they are touched, they cost three times as much, and nothing can be asked for
    /// ahead that is not mapped. What cannot be read is met when it is touched.
    pub fn map(&self, part: &Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Self::Mapped { map, .. } = self {
            let _ = map.advise_range(memmap2::Advice::PopulateRead, part.start, part.len());
        }
        #[cfg(not(target_os = "linux"))]
        let _ = part;
    }

    /// Lets go of the memory that a part of a mapping takes; a later look reads it from the file again.
    pub fn release(&self, part: &Range<usize>) {
        #[cfg(unix)]
        if let Self::Mapped { map, .. } = self {
            // SAFETY: the mapping is of a file and only read, so what is dropped can be read again.
            #[allow(unsafe_code)]
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, part.start, part.len())
            };
        }
        #[cfg(not(unix))]
        let _ = part;
    }
}
