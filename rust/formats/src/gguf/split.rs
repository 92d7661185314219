//! Models split over several GGUF files, as `gguf-split` writes them.
//!
//! Each file says in its metadata which part it is (`split.no`, from 0) and of how many (`split.count`); file
//! names count from 1: `model-00001-of-00003.gguf`.

use crate::error::{Container, FormatError, quoted};
use crate::gguf::Gguf;

/// The most parts that five digits can name.
const MAX_PARTS: u64 = 99_999;

/// Which part of a split model a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// `split.no`: this file's place, from 0.
    pub number: usize,
    /// `split.count`: how many files there are.
    pub count: usize,
    /// `split.tensors.count`: how many tensors all files hold together, if the file says.
    pub tensors: Option<usize>,
}

impl Gguf {
    /// Which part of a split model this file is; `None` for a whole model.
    ///
    /// # Errors
    /// [`FormatError`] if only one of the keys is there, or if the number is not below the count.
    pub fn split(&self) -> Result<Option<Split>, FormatError> {
        let Some(count) = self.metadata.u64("split.count")?.filter(|&count| count != 0) else {
            return Ok(None);
        };
        let number = self.metadata.u64("split.no")?;
        let checked = number.filter(|&number| number < count && count <= MAX_PARTS);
        let part = checked.and_then(|number| usize::try_from(number).ok()).zip(usize::try_from(count).ok());
        let Some((number, count)) = part else {
            let shown = number.map_or("absent".into(), |number| number.to_string());
            return Err(FormatError::invalid(
                Container::Gguf,
                "split.no",
                format_args!("{shown} with split.count {count}"),
                format_args!("a number below split.count, and that at most {MAX_PARTS}"),
            ));
        };
        let tensors = self.metadata.u64("split.tensors.count")?;
        let tensors = tensors.map(|total| usize::try_from(total).unwrap_or(usize::MAX));
        Ok(Some(Split { number, count, tensors }))
    }
}

impl Split {
    /// The names of all files of the model, in order, from the name of this one (no folder).
    ///
    /// # Errors
    /// [`FormatError`] if `file_name` does not end in this part's `-00001-of-00003.gguf`: the others could not
    /// be found.
    pub fn file_names(&self, file_name: &str) -> Result<Vec<String>, FormatError> {
        let suffix = part_suffix(self.number, self.count);
        let Some(stem) = file_name.strip_suffix(&suffix) else {
            return Err(FormatError::invalid(
                Container::Gguf,
                "the file name of a split model",
                quoted(file_name),
                format_args!("a name that ends in {suffix}, as split.no and split.count say"),
            ));
        };
        Ok((0..self.count).map(|number| format!("{stem}{}", part_suffix(number, self.count))).collect())
    }
}

fn part_suffix(number: usize, count: usize) -> String {
    format!("-{:05}-of-{count:05}.gguf", number.saturating_add(1))
}

/// Checks that `parts`, in the order of [`Split::file_names`], are the parts of one model: numbered in order,
/// none missing, as many tensors as promised.
///
/// # Errors
/// [`FormatError`] that names the part which does not belong.
pub fn check_splits(parts: &[Gguf]) -> Result<(), FormatError> {
    let mut tensors = 0_usize;
    for (number, part) in parts.iter().enumerate() {
        let split = part.split()?;
        if split.is_none_or(|split| split.number != number || split.count != parts.len()) {
            let shown = split.map_or("no part of a split model".into(), |split| {
                format!("split.no {} of split.count {}", split.number, split.count)
            });
            return Err(FormatError::invalid(
                Container::Gguf,
                format_args!("file {} of the split model", number.saturating_add(1)),
                shown,
                format_args!("split.no {number} of split.count {}", parts.len()),
            ));
        }
        tensors = tensors.saturating_add(part.tensors.len());
    }
    let promised = parts.first().map(Gguf::split).transpose()?.flatten().and_then(|split| split.tensors);
    match promised {
        Some(promised) if promised != tensors => Err(FormatError::invalid(
            Container::Gguf,
            "split.tensors.count",
            promised,
            format_args!("{tensors}, as many as all files together hold"),
        )),
        _ => Ok(()),
    }
}
