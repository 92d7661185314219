//! Memory for weights: zeroed, aligned to cache lines, in huge pages where the system offers them.
//!
//! Large buffers are mapped, not allocated: an allocator may write its zeros at once, from one thread and into small pages,
//! before anybody can advise large ones.

use crate::KernelError;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

const CACHE_LINE: usize = 64;
/// Size of a huge page, and from which size on a buffer is mapped.
const HUGE_PAGE: usize = 2 << 20;

/// Owned bytes.
#[derive(Debug)]
pub(crate) struct Buffer {
    data: NonNull<u8>,
    len: usize,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    Allocated {
        start: NonNull<u8>,
        layout: Layout,
    },
    #[cfg(unix)]
    Mapped {
        start: NonNull<u8>,
        len: usize,
    },
}

// SAFETY: it owns plain bytes.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `bytes` zeros. The system supplies each page of a large buffer when it is first written.
    pub(crate) fn zeroed(bytes: usize, what: &'static str) -> Result<Buffer, KernelError> {
        #[cfg(unix)]
        let buffer = if bytes >= HUGE_PAGE { Buffer::map(bytes) } else { Buffer::allocate(bytes) };
        #[cfg(not(unix))]
        let buffer = Buffer::allocate(bytes);
        buffer.ok_or(KernelError::Allocation { what, bytes })
    }

    fn allocate(len: usize) -> Option<Buffer> {
        // Aligned by hand: asked for aligned zeros, allocators write them even into pages that are zeros already.
        let layout = Layout::array::<u8>(len.checked_add(CACHE_LINE)?).ok()?;
        // SAFETY: the size is not 0.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let skip = start.as_ptr().addr().wrapping_neg() % CACHE_LINE;
        // SAFETY: less than a cache line ahead, of which there is one more than needed.
        let data = unsafe { start.add(skip) };
        Some(Buffer { data, len, origin: Origin::Allocated { start, layout } })
    }

    #[cfg(unix)]
    fn map(len: usize) -> Option<Buffer> {
        let mapped = len.checked_add(HUGE_PAGE).filter(|&mapped| isize::try_from(mapped).is_ok())?;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping, wherever the system likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), mapped, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let start = NonNull::new(start.cast::<u8>())?;
        let skip = start.as_ptr().addr().wrapping_neg() % HUGE_PAGE;
        // SAFETY: less than a huge page ahead, of which there is one more than needed.
        let data = unsafe { start.add(skip) };
        #[cfg(target_os = "linux")]
        // Streaming through 4 KB pages stops the hardware prefetcher at every page end. Advice may be refused.
        // SAFETY: the range is ours and begins at a page.
        unsafe {
            libc::madvise(data.as_ptr().cast(), len, libc::MADV_HUGEPAGE)
        };
        Some(Buffer { data, len, origin: Origin::Mapped { start, len: mapped } })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `data` owns that many initialised bytes.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match self.origin {
            // SAFETY: allocated with this layout.
            Origin::Allocated { start, layout } => unsafe { dealloc(start.as_ptr(), layout) },
            #[cfg(unix)]
            Origin::Mapped { start, len } => {
                // SAFETY: this is the whole mapping, and nobody borrows it any more.
                unsafe { libc::munmap(start.as_ptr().cast(), len) };
            }
        }
    }
}

/// Memory that grows; its contents mean nothing from one use to the next.
#[derive(Debug, Default)]
pub(super) struct Growing(Option<Buffer>);

impl Growing {
    /// So many bytes.
    pub(super) fn at_least(&mut self, bytes: usize) -> &mut [u8] {
        if self.0.as_ref().is_none_or(|buffer| buffer.len < bytes) {
            self.0 = None; // before more is asked for
            // As for a `Vec`, there is no going on without it.
            let lacking = |_| handle_alloc_error(Layout::new::<u8>());
            self.0 = Some(Buffer::zeroed(bytes, "activations").unwrap_or_else(lacking));
        }
        self.0.as_mut().map_or(&mut [], |buffer| &mut buffer.as_mut_slice()[..bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_keeps_what_is_enough() {
        let mut memory = Growing::default();
        assert!(memory.at_least(0).is_empty());
        memory.at_least(100).fill(1);
        assert_eq!(memory.at_least(99), [1; 99]);
        assert_eq!(memory.at_least(3 << 20).len(), 3 << 20);
    }

    #[test]
    fn sizes_small_and_large() {
        for bytes in [0, 1, 100, HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE + 77] {
            let mut buffer = Buffer::zeroed(bytes, "a test").unwrap();
            assert_eq!(buffer.as_slice().len(), bytes);
            assert_eq!(buffer.as_slice().as_ptr().addr() % CACHE_LINE, 0);
            assert!(buffer.as_slice().iter().all(|&byte| byte == 0));
            buffer.as_mut_slice().fill(3);
            assert_eq!(buffer.as_slice().iter().map(|&byte| usize::from(byte)).sum::<usize>(), 3 * bytes);
        }
    }

    #[test]
    fn too_much_is_an_error() {
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            let error = Buffer::zeroed(bytes, "a test").unwrap_err();
            assert_eq!(error.to_string(), format!("could not allocate {bytes} bytes for a test"));
        }
    }
}
