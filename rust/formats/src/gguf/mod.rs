//! The GGUF container, versions 2 and 3: typed metadata, then tensor descriptions, then aligned tensor data.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; the facts that it leaves open (at
//! most four dimensions, the block sizes of each type) are those of ggml's own reader. Where that reader
//! insists that tensors follow each other without a gap, this one asks only that they are aligned and do not
//! overlap. Zero-sized dimensions, which ggml has come to allow, are refused: no model computes with them,
//! and they have crashed enough readers.

mod cursor;
mod metadata;
mod split;
mod value;
mod writer;

use crate::budget::Budget;
use crate::error::{Container, FormatError, quoted};
use crate::names::NameIndex;
use crate::tensor::{TensorInfo, TensorType, element_count};
use cursor::Cursor;
pub use metadata::Metadata;
pub use split::{Split, check_splits};
use value::Key;
pub use value::{Array, Value};
pub use writer::GgufWriter;

const CONTAINER: Container = Container::Gguf;
const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
/// The specification asks for a multiple of 8; more than a large page serves nobody, and pads gigabytes.
const ALIGNMENTS: std::ops::RangeInclusive<usize> = 8..=1 << 20;
/// ggml's tensors have four dimensions.
const MAX_RANK: usize = 4;
/// The specification's limit on keys; tensor names get the same (ggml itself stops at 63 bytes, other writers
/// do not).
const MAX_NAME_BYTES: usize = 65_535;
/// The least that an entry takes: a length, one byte of name, a type id and one byte of value.
const LEAST_ENTRY_BYTES: usize = 14;
/// The least that a description takes: a length, one byte of name, rank 0, a type id and an offset.
const LEAST_TENSOR_BYTES: usize = 25;
/// What sorting a list by name and by place takes for each item.
const INDEX_BYTES: usize = 2 * size_of::<usize>();

/// A parsed GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    /// The format's version: 2 or 3.
    pub version: u32,
    /// Everything about the model but its tensors.
    pub metadata: Metadata,
    /// All tensors in the file's order; shapes are row-major, the reverse of what GGUF stores.
    pub tensors: Vec<TensorInfo>,
    names: NameIndex,
}

impl Gguf {
    /// Parses a whole file.
    ///
    /// # Errors
    /// [`FormatError`] if the file is not GGUF 2 or 3 in little-endian order, is truncated, or lies about
    /// counts, types, shapes or offsets.
    pub fn parse(file: &[u8]) -> Result<Self, FormatError> {
        let mut cursor = Cursor::new(file);
        let mut budget = Budget::for_file(CONTAINER, file.len());
        let version = read_version(&mut cursor)?;
        let tensor_count = cursor.count(LEAST_TENSOR_BYTES, format_args!("the tensor count"))?;
        let entry_count = cursor.count(LEAST_ENTRY_BYTES, format_args!("the metadata entry count"))?;
        let metadata = read_metadata(&mut cursor, &mut budget, entry_count)?;
        let alignment = alignment(&metadata)?;

        budget.charge(tensor_count, INDEX_BYTES, "the index of tensor names")?;
        let mut tensors = budget.reserve(tensor_count, "the list of tensors")?;
        for index in 0..tensor_count {
            tensors.push(read_tensor(&mut cursor, &mut budget, index, alignment)?);
        }
        if !tensors.is_empty() {
            place_tensors(&mut tensors, cursor.position(), alignment, file.len())?;
        }
        let names = NameIndex::new(tensors.len(), |at| name_at(&tensors, at)).map_err(|name| {
            FormatError::Duplicate { container: CONTAINER, field: "tensor", name: quoted(name) }
        })?;
        Ok(Gguf { version, metadata, tensors, names })
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(self.names.find(name, |at| name_at(&self.tensors, at))?)
    }
}

fn name_at(tensors: &[TensorInfo], at: usize) -> &str {
    tensors.get(at).map_or("", |tensor| &tensor.name)
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32, FormatError> {
    let magic: [u8; 4] = cursor.array(format_args!("the magic"))?;
    if magic != MAGIC {
        return Err(FormatError::invalid(
            CONTAINER,
            "the magic (first 4 bytes)",
            quoted(&String::from_utf8_lossy(&magic)),
            "\"GGUF\"; is this a GGUF file?",
        ));
    }
    let version = cursor.u32(format_args!("the version"))?;
    let expected = match version {
        2 | 3 => return Ok(version),
        1 => "2 or 3: version 1 files must be converted anew from the original model",
        _ if matches!(version.swap_bytes(), 1..=0xffff) => {
            "2 or 3 in little-endian order: this file is big-endian, convert it with gguf_convert_endian.py"
        }
        _ => "2 or 3",
    };
    Err(FormatError::invalid(CONTAINER, "the version", version, expected))
}

fn read_metadata(
    cursor: &mut Cursor<'_>,
    budget: &mut Budget,
    count: usize,
) -> Result<Metadata, FormatError> {
    budget.charge(count, INDEX_BYTES, "the index of metadata keys")?;
    let mut entries = budget.reserve::<(String, Value)>(count, "the list of metadata")?;
    for index in 0..count {
        let what = format_args!("metadata key {index}");
        let key = checked_name(cursor.string(what)?, what)?;
        let id = cursor.u32(format_args!("the type id of metadata key {}", Key(key)))?;
        let value = Value::read(id, cursor, budget, key)?;
        entries.push((budget.own(key, what)?, value));
    }
    Metadata::new(entries)
}

/// Keys and tensor names: not empty, not longer than the specification's limit.
fn checked_name<'a>(name: &'a str, what: std::fmt::Arguments<'_>) -> Result<&'a str, FormatError> {
    if (1..=MAX_NAME_BYTES).contains(&name.len()) {
        return Ok(name);
    }
    Err(FormatError::invalid(
        CONTAINER,
        what,
        format_args!("{} bytes long", name.len()),
        format_args!("a name of 1 to {MAX_NAME_BYTES} bytes"),
    ))
}

/// `general.alignment`, which positions all data; 32 if absent.
fn alignment(metadata: &Metadata) -> Result<usize, FormatError> {
    let Some(stored) = metadata.u64(ALIGNMENT_KEY)? else { return Ok(DEFAULT_ALIGNMENT) };
    let fits = usize::try_from(stored).ok();
    fits.filter(|fits| fits.is_power_of_two() && ALIGNMENTS.contains(fits)).ok_or_else(|| {
        FormatError::invalid(
            CONTAINER,
            format_args!("metadata key {}", Key(ALIGNMENT_KEY)),
            stored,
            format_args!("a power of two from {} to {}", ALIGNMENTS.start(), ALIGNMENTS.end()),
        )
    })
}

/// Reads one description. Its range is still relative to the data section, whose start is not known yet.
fn read_tensor(
    cursor: &mut Cursor<'_>,
    budget: &mut Budget,
    index: usize,
    alignment: usize,
) -> Result<TensorInfo, FormatError> {
    let what = format_args!("the name of tensor {index}");
    let name = checked_name(cursor.string(what)?, what)?;
    let shape = read_shape(cursor, budget, name)?;
    let id = cursor.u32(format_args!("the type id of tensor {}", Key(name)))?;
    let tensor_type = TensorType::from_ggml_id(id).ok_or_else(|| unknown_type(id, name))?;
    let bytes = tensor_bytes(tensor_type, &shape, name)?;
    let offset = cursor.u64(format_args!("the offset of tensor {}", Key(name)))?;
    let start = usize::try_from(offset).ok().filter(|start| start.checked_rem(alignment) == Some(0));
    let range = start.and_then(|start| Some(start..start.checked_add(bytes)?));
    let range = range.ok_or_else(|| {
        FormatError::invalid(
            CONTAINER,
            format_args!("the offset of tensor {}", Key(name)),
            offset,
            format_args!("a multiple of {ALIGNMENT_KEY} ({alignment}) within the file"),
        )
    })?;
    Ok(TensorInfo { name: budget.own(name, what)?, tensor_type, shape, range })
}

/// Dimensions are stored fastest first; they are returned slowest first.
fn read_shape(cursor: &mut Cursor<'_>, budget: &mut Budget, name: &str) -> Result<Vec<usize>, FormatError> {
    let stored = cursor.u32(format_args!("the rank of tensor {}", Key(name)))?;
    let rank = usize::try_from(stored).ok().filter(|&rank| rank <= MAX_RANK).ok_or_else(|| {
        FormatError::invalid(
            CONTAINER,
            format_args!("the rank of tensor {}", Key(name)),
            stored,
            format_args!("at most {MAX_RANK} dimensions"),
        )
    })?;
    let mut shape = budget.reserve(rank, format_args!("the shape of tensor {}", Key(name)))?;
    for axis in 0..rank {
        let size = cursor.u64(format_args!("dimension {axis} of tensor {}", Key(name)))?;
        let bounded = usize::try_from(size).ok().filter(|&size| size > 0).ok_or_else(|| {
            FormatError::invalid(
                CONTAINER,
                format_args!("dimension {axis} of tensor {}", Key(name)),
                size,
                format_args!("a size from 1 to {}", usize::MAX),
            )
        })?;
        shape.push(bounded);
    }
    shape.reverse();
    Ok(shape)
}

/// Bytes of a tensor whose rows hold whole blocks.
fn tensor_bytes(tensor_type: TensorType, shape: &[usize], name: &str) -> Result<usize, FormatError> {
    let columns = shape.last().copied().unwrap_or(1);
    if columns.checked_rem(tensor_type.block_len()) != Some(0) {
        return Err(FormatError::invalid(
            CONTAINER,
            format_args!("the shape of tensor {}", Key(name)),
            format_args!("{shape:?} (slowest dimension first)"),
            format_args!("rows of a multiple of {} elements, {tensor_type}'s block", tensor_type.block_len()),
        ));
    }
    let bytes = element_count(shape).and_then(|elements| tensor_type.byte_len(elements));
    bytes.ok_or_else(|| {
        FormatError::invalid(
            CONTAINER,
            format_args!("the shape of tensor {}", Key(name)),
            format_args!("{shape:?} (slowest dimension first)"),
            format_args!("a size below {} bytes", usize::MAX),
        )
    })
}

fn unknown_type(id: u32, name: &str) -> FormatError {
    let expected = match id {
        4 | 5 | 31..=33 | 36..=38 => {
            "a type that ggml still has: this one was removed, quantize the model anew"
        }
        _ => "a ggml type id that this version knows (0 to 42)",
    };
    FormatError::invalid(CONTAINER, format_args!("the type id of tensor {}", Key(name)), id, expected)
}

/// Moves the ranges from the data section to the file, and proves that they lie in it without overlap.
fn place_tensors(
    tensors: &mut [TensorInfo],
    header_end: usize,
    alignment: usize,
    file_bytes: usize,
) -> Result<(), FormatError> {
    let data_start = header_end.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
    for tensor in tensors.iter_mut() {
        let start = data_start.checked_add(tensor.range.start);
        let end = data_start.checked_add(tensor.range.end).filter(|&end| end <= file_bytes);
        let Some((start, end)) = start.zip(end) else {
            let offset = data_start.saturating_add(tensor.range.start);
            return Err(FormatError::Truncated {
                container: CONTAINER,
                field: format!("the data of tensor {}", Key(&tensor.name)),
                needed: u128::try_from(tensor.range.len()).unwrap_or(u128::MAX),
                offset,
                available: file_bytes.saturating_sub(offset),
            });
        };
        tensor.range = start..end;
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.range.start);
    for (first, second) in order.iter().zip(order.iter().skip(1)) {
        if second.range.start < first.range.end {
            return Err(FormatError::Overlap {
                container: CONTAINER,
                first: quoted(&first.name),
                first_range: first.range.clone(),
                second: quoted(&second.name),
                second_range: second.range.clone(),
            });
        }
    }
    Ok(())
}
