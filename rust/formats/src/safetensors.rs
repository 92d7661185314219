//! The safetensors container: 8 bytes of header length, a JSON header, the tensors' bytes back to back.
//!
//! Format: <https://github.com/huggingface/safetensors#format>. Like the reference implementation this
//! refuses headers over 100 MB, and tensors that overlap, leave gaps or do not end where the file ends.
//!
//! The `safetensors` crate parses the same header, and is the oracle of this crate's tests, but does not
//! stand between a file and us: it keeps the last of two tensors of one name, has no memory budget, and its
//! errors name neither the values nor what would be right. Stricter than it: zero-sized dimensions and
//! duplicate names are refused.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::error::{Container, FormatError, quoted};
use crate::json::{JsonState, MAX_JSON_BYTES, Text, TextMapSeed};
use crate::names::NameIndex;
use crate::tensor::{TensorInfo, TensorType, element_count};

const CONTAINER: Container = Container::Safetensors;
/// Bytes of the length that opens the file.
const LENGTH_BYTES: usize = 8;
/// Far more than any framework's tensors have; a shape of two bytes per dimension must not grow in memory.
const MAX_RANK: usize = 16;
/// What a tensor costs beside its name: the JSON entry in a vector that doubles, the checked description, the
/// longest shape.
const TENSOR_BYTES: usize =
    2 * size_of::<(String, Entry<'_>)>() + size_of::<TensorInfo>() + MAX_RANK * size_of::<usize>();

/// A parsed safetensors file.
#[derive(Debug, Clone, PartialEq)]
pub struct Safetensors {
    /// All tensors, in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// The header's `__metadata__`; empty if it has none.
    pub metadata: BTreeMap<String, String>,
    names: NameIndex,
}

impl Safetensors {
    /// Parses a whole file.
    ///
    /// # Errors
    /// [`FormatError`] if the file is not safetensors, is truncated or longer than its header says, or if its
    /// header lies about types, shapes or offsets.
    pub fn parse(file: &[u8]) -> Result<Self, FormatError> {
        let header = header_bytes(file)?;
        let data = header.end..file.len();
        let text = file.get(header).unwrap_or_default();
        let parsed = JsonState::read(CONTAINER, "the header", text, file.len(), |state, json| {
            HeaderSeed { state }.deserialize(json)
        })?;
        let mut tensors: Vec<TensorInfo> = Vec::with_capacity(parsed.entries.len());
        for (name, entry) in parsed.entries {
            tensors.push(tensor_info(name, entry, &data)?);
        }
        tensors.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
        check_cover(&tensors, &data)?;
        let names = NameIndex::new(tensors.len(), |at| name_at(&tensors, at)).map_err(|name| {
            FormatError::Duplicate { container: CONTAINER, field: "tensor", name: quoted(name) }
        })?;
        Ok(Safetensors { tensors, metadata: parsed.metadata, names })
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(self.names.find(name, |at| name_at(&self.tensors, at))?)
    }
}

fn name_at(tensors: &[TensorInfo], at: usize) -> &str {
    tensors.get(at).map_or("", |tensor| &tensor.name)
}

/// Where the JSON header lies.
fn header_bytes(file: &[u8]) -> Result<Range<usize>, FormatError> {
    let truncated = |field: &str, needed: u128, offset| FormatError::Truncated {
        container: CONTAINER,
        field: field.into(),
        needed,
        offset,
        available: file.len().saturating_sub(offset),
    };
    let Some(length) = file.first_chunk::<LENGTH_BYTES>() else {
        return Err(truncated("the header length", 8, 0));
    };
    let length = u64::from_le_bytes(*length);
    let bounded = usize::try_from(length).ok().filter(|&length| length <= MAX_JSON_BYTES);
    let Some(bounded) = bounded else {
        return Err(FormatError::invalid(
            CONTAINER,
            "the header length (first 8 bytes, little-endian)",
            format_args!("{length} bytes"),
            format_args!("at most {MAX_JSON_BYTES}; is this a safetensors file?"),
        ));
    };
    let end = LENGTH_BYTES.saturating_add(bounded);
    match file.get(LENGTH_BYTES..end) {
        Some([b'{', ..]) => Ok(LENGTH_BYTES..end),
        Some(other) => Err(FormatError::invalid(
            CONTAINER,
            "the header's first byte",
            other.first().map_or("absent".into(), |byte| format!("{byte:#04x}")),
            "'{' (0x7b), the start of a JSON object",
        )),
        None => Err(truncated("the header", length.into(), LENGTH_BYTES)),
    }
}

/// Checks one entry of the header, and moves its offsets from the data section to the file.
fn tensor_info(name: String, entry: Entry<'_>, data: &Range<usize>) -> Result<TensorInfo, FormatError> {
    let field = |part: &str| format!("{part} of tensor {}", quoted(&name));
    let Some(tensor_type) = TensorType::from_safetensors_name(&entry.dtype) else {
        let known = format!("one of {}", TensorType::safetensors_names());
        return Err(FormatError::invalid(CONTAINER, field("dtype"), quoted(&entry.dtype), known));
    };
    let shape = entry.shape.0;
    if shape.contains(&0) {
        return Err(FormatError::invalid(
            CONTAINER,
            field("shape"),
            format_args!("{shape:?}"),
            "dimensions of at least 1: a tensor without elements cannot be a weight",
        ));
    }
    let Some(needed) = element_count(&shape).and_then(|elements| tensor_type.byte_len(elements)) else {
        return Err(FormatError::invalid(
            CONTAINER,
            field("shape"),
            format_args!("{shape:?}"),
            format_args!("a shape whose {tensor_type} elements fill a whole number of bytes below 2^64"),
        ));
    };
    let (begin, end) = entry.data_offsets;
    if end.checked_sub(begin) != Some(needed) {
        return Err(FormatError::invalid(
            CONTAINER,
            field("data_offsets"),
            format_args!("[{begin}, {end}]"),
            format_args!("{needed} bytes, which {tensor_type} {shape:?} needs"),
        ));
    }
    let range = data.start.checked_add(begin).zip(data.start.checked_add(end));
    match range {
        Some((start, end)) if end <= data.end => {
            Ok(TensorInfo { name, tensor_type, shape, range: start..end })
        }
        _ => Err(FormatError::Truncated {
            container: CONTAINER,
            field: field("the data"),
            needed: u128::try_from(needed).unwrap_or(u128::MAX),
            offset: data.start.saturating_add(begin),
            available: data.end.saturating_sub(data.start.saturating_add(begin)),
        }),
    }
}

/// Tensors in the order of their bytes must cover the data section exactly, as the format asks: a gap could
/// carry a second file.
fn check_cover(tensors: &[TensorInfo], data: &Range<usize>) -> Result<(), FormatError> {
    let mut covered = data.start;
    let mut before: Option<&TensorInfo> = None;
    for tensor in tensors {
        if let Some(first) = before.filter(|_| tensor.range.start < covered) {
            return Err(FormatError::Overlap {
                container: CONTAINER,
                first: quoted(&first.name),
                first_range: first.range.clone(),
                second: quoted(&tensor.name),
                second_range: tensor.range.clone(),
            });
        }
        if tensor.range.start != covered {
            return Err(FormatError::invalid(
                CONTAINER,
                format_args!("the start of tensor {}", quoted(&tensor.name)),
                format_args!("byte {}", tensor.range.start),
                format_args!("byte {covered}, where the tensor before it (or the header) ends: no gaps"),
            ));
        }
        covered = tensor.range.end;
        before = Some(tensor);
    }
    if covered != data.end {
        return Err(FormatError::invalid(
            CONTAINER,
            "the file length",
            format_args!("{} bytes", data.end),
            format_args!("{covered}, where the last tensor ends"),
        ));
    }
    Ok(())
}

/// The header as JSON says it.
struct Header<'a> {
    entries: Vec<(String, Entry<'a>)>,
    metadata: BTreeMap<String, String>,
}

/// One tensor as JSON says it. Further fields are skipped, as in the reference implementation.
#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Shape,
    data_offsets: (usize, usize),
}

/// A shape whose length is bounded while it is read.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;
            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "a shape: an array of at most {MAX_RANK} sizes")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(size) = sizes.next_element()? {
                    if shape.len() == MAX_RANK {
                        return Err(A::Error::invalid_length(MAX_RANK.saturating_add(1), &self));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// Reads the header's map by hand: derived maps keep the last of two equal keys and know no budget.
struct HeaderSeed<'s> {
    state: &'s mut JsonState,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = Header<'de>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Header<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = Header<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object from tensor names to {dtype, shape, data_offsets}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header<'de>, A::Error> {
        let state = self.state;
        let mut metadata = None;
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<Text<'de>>()? {
            if name.0 != "__metadata__" {
                let entry: Entry<'de> = map.next_value()?;
                state.charge::<A::Error>(TENSOR_BYTES, "the list of tensors")?;
                entries.push((state.own(&name.0, "a tensor name")?, entry));
            } else if metadata.is_some() {
                return Err(A::Error::duplicate_field("__metadata__"));
            } else {
                let seed = TextMapSeed { state, key: "__metadata__ key", object: "__metadata__" };
                metadata = Some(map.next_value_seed(seed)?);
            }
        }
        Ok(Header { entries, metadata: metadata.unwrap_or_default() })
    }
}
