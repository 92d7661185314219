//! One allocation for all pages, handed out by the system as it is first written.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Alignment of the storage and of every page, bytes.
const ALIGNMENT: usize = 64;

/// Zeroed memory, aligned to [`ALIGNMENT`].
pub(super) struct Storage {
    allocation: NonNull<u8>,
    layout: Layout,
    /// Bytes skipped at the front for alignment.
    skip: usize,
}

impl Storage {
    /// Large pages are asked for after the first `small` bytes. `None` if the size is beyond the address space or the system refuses.
    pub fn zeroed(bytes: usize, small: usize) -> Option<Storage> {
        // The standard allocator only asks the system for lazily zeroed memory at ordinary alignments; for larger ones it
        // writes the zeros itself, which would touch every page of the cache. So the alignment is made by hand.
        let layout = Layout::from_size_align(bytes.checked_add(ALIGNMENT)?, 16).ok()?;
        // SAFETY: the layout's size is not zero.
        let allocation = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        if small < bytes {
            // SAFETY: inside the allocation.
            advise_huge_pages(unsafe { allocation.as_ptr().add(small) }, bytes - small);
        }
        let skip = allocation.as_ptr().align_offset(ALIGNMENT);
        Some(Storage { allocation, layout, skip })
    }

    /// Bytes of address space taken.
    pub fn bytes(&self) -> usize {
        self.layout.size()
    }

    /// The first byte.
    pub fn base(&self) -> *mut u8 {
        // SAFETY: skip < ALIGNMENT, and the allocation is ALIGNMENT bytes longer than what is used.
        unsafe { self.allocation.as_ptr().add(self.skip) }
    }
}

/// Asks for 2 MiB pages where the system leaves that to the program. A head's part of a page is a few KiB, so with small pages
/// nearly every one costs a walk through the page tables: plain reading went from 18 to 31 GB/s per core.
fn advise_huge_pages(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const SMALL_PAGE: usize = 4096;
        let skip = start.align_offset(SMALL_PAGE);
        if bytes > skip {
            // SAFETY: the range lies inside an allocation of ours, and the advice changes no contents. Refusal does no harm.
            unsafe { libc::madvise(start.add(skip).cast(), bytes - skip, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

impl Drop for Storage {
    fn drop(&mut self) {
        // SAFETY: allocated with exactly this layout in `zeroed`, freed once.
        unsafe { dealloc(self.allocation.as_ptr(), self.layout) };
    }
}

// SAFETY: `Storage` owns its memory; shared access only reads, and writing takes `&mut KvCache`.
unsafe impl Send for Storage {}
// SAFETY: as above.
unsafe impl Sync for Storage {}
