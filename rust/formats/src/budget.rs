//! A memory budget for everything that a parser holds on behalf of a file.
//!
//! Comparing a count with the bytes that are left stops absurd counts, but small records still grow when
//! decoded: an empty GGUF string is 8 bytes on disk and a 24-byte `String` in memory. A failed allocation
//! aborts the whole process, so the budget bounds the sum, and single large allocations are fallible.

use std::fmt;

use crate::error::{Container, FormatError};

/// What any file may use: some 1.4 million short strings, several times the largest vocabulary in use.
const BASE_BYTES: usize = 64 << 20;
/// The most that a large file's own size may add.
const MAX_EXTRA_BYTES: usize = 1 << 30;
/// What a heap block costs beyond its length: the allocator's own words, and rounding up.
const ALLOCATION_OVERHEAD: usize = 32;

pub(crate) struct Budget {
    container: Container,
    total: usize,
    left: usize,
}

impl Budget {
    /// 64 MiB plus the file's size, of which at most 1 GiB counts.
    pub(crate) fn for_file(container: Container, file_bytes: usize) -> Self {
        let total = BASE_BYTES.saturating_add(file_bytes.min(MAX_EXTRA_BYTES));
        Budget { container, total, left: total }
    }

    /// Takes `count` items of `item_bytes` each out of the budget, before they are allocated.
    pub(crate) fn charge(
        &mut self,
        count: usize,
        item_bytes: usize,
        field: impl fmt::Display,
    ) -> Result<(), FormatError> {
        let left = count.checked_mul(item_bytes).and_then(|needed| self.left.checked_sub(needed));
        match left {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(self.exceeded(count, item_bytes, field)),
        }
    }

    /// An empty vector with room for `count` items, charged and reserved without aborting.
    pub(crate) fn reserve<T>(
        &mut self,
        count: usize,
        field: impl fmt::Display,
    ) -> Result<Vec<T>, FormatError> {
        if count > 0 {
            self.charge(1, ALLOCATION_OVERHEAD, &field)?;
        }
        self.charge(count, size_of::<T>(), &field)?;
        let mut items = Vec::new();
        match items.try_reserve_exact(count) {
            Ok(()) => Ok(items),
            Err(_) => Err(self.exceeded(count, size_of::<T>(), field)),
        }
    }

    /// An owned copy of `text`; its `String` itself is charged with whatever holds it.
    pub(crate) fn own(&mut self, text: &str, field: impl fmt::Display) -> Result<String, FormatError> {
        if !text.is_empty() {
            self.charge(1, text.len().saturating_add(ALLOCATION_OVERHEAD), field)?;
        }
        Ok(text.to_owned())
    }

    fn exceeded(&self, count: usize, item_bytes: usize, field: impl fmt::Display) -> FormatError {
        FormatError::OverBudget {
            container: self.container,
            field: field.to_string(),
            needed: u128::try_from(count)
                .unwrap_or(u128::MAX)
                .saturating_mul(u128::try_from(item_bytes).unwrap_or(u128::MAX)),
            left: self.left,
            budget: self.total,
        }
    }
}
