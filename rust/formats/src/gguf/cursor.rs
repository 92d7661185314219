//! Reading little-endian fields off a byte slice, each checked against what is left.

use std::fmt;

use crate::error::{Container, FormatError, quoted};

/// A position in a GGUF file. `what` names the field for errors; as [`fmt::Arguments`] it costs nothing
/// until an error is made.
pub(crate) struct Cursor<'a> {
    file: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(file: &'a [u8]) -> Self {
        Cursor { file, position: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.position
    }

    pub(crate) fn remaining(&self) -> usize {
        self.file.len().saturating_sub(self.position)
    }

    pub(crate) fn take(&mut self, count: usize, what: fmt::Arguments<'_>) -> Result<&'a [u8], FormatError> {
        let end = self.position.checked_add(count);
        match end.and_then(|end| self.file.get(self.position..end).zip(Some(end))) {
            Some((bytes, end)) => {
                self.position = end;
                Ok(bytes)
            }
            None => Err(self.truncated(u128::try_from(count).unwrap_or(u128::MAX), what)),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self, what: fmt::Arguments<'_>) -> Result<[u8; N], FormatError> {
        let bytes = self.take(N, what)?;
        bytes.first_chunk().copied().ok_or_else(|| self.truncated(u128::MAX, what))
    }

    pub(crate) fn u32(&mut self, what: fmt::Arguments<'_>) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u64(&mut self, what: fmt::Arguments<'_>) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of records that take at least `least_bytes` each; refused if so many cannot be left.
    pub(crate) fn count(
        &mut self,
        least_bytes: usize,
        what: fmt::Arguments<'_>,
    ) -> Result<usize, FormatError> {
        let count = self.u64(what)?;
        let fits = usize::try_from(count)
            .ok()
            .filter(|count| count.checked_mul(least_bytes).is_some_and(|bytes| bytes <= self.remaining()));
        fits.ok_or_else(|| {
            let least = u128::try_from(least_bytes).unwrap_or(u128::MAX);
            self.truncated(u128::from(count).saturating_mul(least), format_args!("{what} = {count}"))
        })
    }

    /// A string: a 64-bit length, then so many bytes of UTF-8.
    pub(crate) fn string(&mut self, what: fmt::Arguments<'_>) -> Result<&'a str, FormatError> {
        let length = self.count(1, format_args!("the length of {what}"))?;
        let bytes = self.take(length, what)?;
        str::from_utf8(bytes).map_err(|error| {
            FormatError::invalid(
                Container::Gguf,
                what,
                quoted(&String::from_utf8_lossy(bytes.get(..length.min(400)).unwrap_or(bytes))),
                format_args!("UTF-8 text ({error})"),
            )
        })
    }

    fn truncated(&self, needed: u128, what: fmt::Arguments<'_>) -> FormatError {
        FormatError::Truncated {
            container: Container::Gguf,
            field: what.to_string(),
            needed,
            offset: self.position,
            available: self.remaining(),
        }
    }
}
