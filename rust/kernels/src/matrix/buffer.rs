//! Memory for weights: zeroed, aligned to cache lines, in huge pages where the system offers them.

use crate::KernelError;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

const CACHE_LINE: usize = 64;
/// Size of a huge page, and from which size on a buffer is aligned to it.
const HUGE_PAGE: usize = 2 << 20;

/// Owned bytes.
#[derive(Debug)]
pub(crate) struct Buffer {
    data: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns plain bytes.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `bytes` zeros. The system supplies each page when it is first written.
    pub(crate) fn zeroed(bytes: usize, what: &'static str) -> Result<Buffer, KernelError> {
        let refused = KernelError::Allocation { what, bytes };
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { CACHE_LINE };
        let Ok(layout) = Layout::from_size_align(bytes.max(1), align) else { return Err(refused) };
        // SAFETY: the size is not 0.
        let Some(data) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { return Err(refused) };
        #[cfg(target_os = "linux")]
        if align == HUGE_PAGE {
            // Streaming through 4 KB pages stops the hardware prefetcher at every page end. Advice may be refused.
            // SAFETY: the range is ours and aligned to pages.
            unsafe { libc::madvise(data.as_ptr().cast(), bytes / HUGE_PAGE * HUGE_PAGE, libc::MADV_HUGEPAGE) };
        }
        Ok(Buffer { data, layout })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `data` owns that many initialised bytes.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.layout.size()) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.data.as_ptr(), self.layout) };
    }
}
