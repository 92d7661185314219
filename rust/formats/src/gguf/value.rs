//! Metadata values: thirteen types, of which one is an array of any of them.

use std::fmt;

use crate::budget::Budget;
use crate::error::{Container, FormatError, quoted};
use crate::gguf::cursor::Cursor;

/// How deep arrays may nest. Known files use one level; each level is a recursive call.
pub(crate) const MAX_DEPTH: usize = 8;

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
/// An array's element type and count.
const ARRAY_HEADER_BYTES: usize = 12;

/// Makes both enums and their codecs from one row per number type, so that no two lists can disagree.
macro_rules! values {
    ($($variant:ident $type:ty = $id:literal, $name:literal;)*) => {
        /// A metadata value.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Value {
            $(#[doc = concat!("`", $name, "`, type id ", $id, ".")] $variant($type),)*
            /// A truth value, type id 7.
            Bool(bool),
            /// UTF-8 text, type id 8.
            String(String),
            /// Many values of one type, type id 9.
            Array(Array),
        }

        /// An array of metadata values, all of one type.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Array {
            $(#[doc = concat!("Elements of type `", $name, "`.")] $variant(Vec<$type>),)*
            /// Truth values.
            Bool(Vec<bool>),
            /// Texts.
            String(Vec<String>),
            /// Arrays, each with a type of its own.
            Array(Vec<Array>),
        }

        impl Value {
            /// The type's name, for messages.
            pub fn type_name(&self) -> &'static str {
                match self {
                    $(Value::$variant(_) => $name,)*
                    Value::Bool(_) => "bool",
                    Value::String(_) => "string",
                    Value::Array(_) => "array",
                }
            }

            pub(crate) fn type_id(&self) -> u32 {
                match self {
                    $(Value::$variant(_) => $id,)*
                    Value::Bool(_) => BOOL,
                    Value::String(_) => STRING,
                    Value::Array(_) => ARRAY,
                }
            }

            /// Reads a value whose type id was read before it.
            pub(crate) fn read(id: u32, cursor: &mut Cursor<'_>, budget: &mut Budget, key: &str)
                -> Result<Self, FormatError> {
                let what = format_args!("the value of metadata key {}", Key(key));
                Ok(match id {
                    $($id => Value::$variant(<$type>::from_le_bytes(cursor.array(what)?)),)*
                    BOOL => Value::Bool(truth(cursor.array::<1>(what)?[0], what)?),
                    STRING => Value::String(budget.own(cursor.string(what)?, what)?),
                    ARRAY => Value::Array(Array::read(cursor, budget, key, 1)?),
                    _ => return Err(unknown_type(id, key)),
                })
            }

            /// Appends the value, without its type id.
            pub(crate) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Value::$variant(number) => out.extend_from_slice(&number.to_le_bytes()),)*
                    Value::Bool(truth) => out.push(u8::from(*truth)),
                    Value::String(text) => write_string(text, out),
                    Value::Array(array) => array.write(out),
                }
            }
        }

        impl Array {
            /// How many elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(items) => items.len(),)*
                    Array::Bool(items) => items.len(),
                    Array::String(items) => items.len(),
                    Array::Array(items) => items.len(),
                }
            }

            /// The element type's name, for messages.
            pub fn type_name(&self) -> &'static str {
                match self {
                    $(Array::$variant(_) => $name,)*
                    Array::Bool(_) => "bool",
                    Array::String(_) => "string",
                    Array::Array(_) => "array",
                }
            }

            fn type_id(&self) -> u32 {
                match self {
                    $(Array::$variant(_) => $id,)*
                    Array::Bool(_) => BOOL,
                    Array::String(_) => STRING,
                    Array::Array(_) => ARRAY,
                }
            }

            fn read(cursor: &mut Cursor<'_>, budget: &mut Budget, key: &str, depth: usize)
                -> Result<Self, FormatError> {
                let id = cursor.u32(format_args!("the element type of metadata key {}", Key(key)))?;
                let what = format_args!("the element count of metadata key {}", Key(key));
                Ok(match id {
                    $($id => {
                        let count = cursor.count(size_of::<$type>(), what)?;
                        let mut items = budget.reserve(count, Key(key))?;
                        let bytes = cursor.take(count.saturating_mul(size_of::<$type>()), what)?;
                        let (chunks, _) = bytes.as_chunks::<{ size_of::<$type>() }>();
                        items.extend(chunks.iter().map(|chunk| <$type>::from_le_bytes(*chunk)));
                        Array::$variant(items)
                    })*
                    BOOL => Array::Bool(read_bools(cursor, budget, key, what)?),
                    STRING => Array::String(read_strings(cursor, budget, key, what)?),
                    ARRAY => Array::Array(read_arrays(cursor, budget, key, depth)?),
                    _ => return Err(unknown_type(id, key)),
                })
            }

            fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.type_id().to_le_bytes());
                write_length(self.len(), out);
                match self {
                    $(Array::$variant(items) => {
                        items.iter().for_each(|item| out.extend_from_slice(&item.to_le_bytes()));
                    })*
                    Array::Bool(items) => out.extend(items.iter().map(|&truth| u8::from(truth))),
                    Array::String(items) => items.iter().for_each(|text| write_string(text, out)),
                    Array::Array(items) => items.iter().for_each(|array| array.write(out)),
                }
            }
        }
    };
}

values! {
    U8 u8 = 0, "u8";
    I8 i8 = 1, "i8";
    U16 u16 = 2, "u16";
    I16 i16 = 3, "i16";
    U32 u32 = 4, "u32";
    I32 i32 = 5, "i32";
    F32 f32 = 6, "f32";
    U64 u64 = 10, "u64";
    I64 i64 = 11, "i64";
    F64 f64 = 12, "f64";
}

impl Array {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Levels of arrays: 1 unless elements are arrays; an empty array of arrays has 2. Stops counting past
    /// the limit, as the writer's input is not bounded by a file.
    pub(crate) fn depth(&self) -> usize {
        fn within(array: &Array, level: usize) -> usize {
            match array {
                Array::Array(items) if level <= MAX_DEPTH => items
                    .iter()
                    .map(|item| within(item, level.saturating_add(1)))
                    .max()
                    .unwrap_or(level.saturating_add(1)),
                _ => level,
            }
        }
        within(self, 1)
    }
}

fn read_bools(
    cursor: &mut Cursor<'_>,
    budget: &mut Budget,
    key: &str,
    what: fmt::Arguments<'_>,
) -> Result<Vec<bool>, FormatError> {
    let count = cursor.count(1, what)?;
    let mut items = budget.reserve(count, Key(key))?;
    for (index, &byte) in cursor.take(count, what)?.iter().enumerate() {
        items.push(truth(byte, format_args!("element {index} of metadata key {}", Key(key)))?);
    }
    Ok(items)
}

fn read_strings(
    cursor: &mut Cursor<'_>,
    budget: &mut Budget,
    key: &str,
    what: fmt::Arguments<'_>,
) -> Result<Vec<String>, FormatError> {
    let count = cursor.count(size_of::<u64>(), what)?;
    let mut items = budget.reserve(count, Key(key))?;
    for index in 0..count {
        let what = format_args!("element {index} of metadata key {}", Key(key));
        items.push(budget.own(cursor.string(what)?, what)?);
    }
    Ok(items)
}

fn read_arrays(
    cursor: &mut Cursor<'_>,
    budget: &mut Budget,
    key: &str,
    depth: usize,
) -> Result<Vec<Array>, FormatError> {
    if depth >= MAX_DEPTH {
        return Err(too_deep(key));
    }
    let what = format_args!("the element count of metadata key {}", Key(key));
    let count = cursor.count(ARRAY_HEADER_BYTES, what)?;
    let mut items = budget.reserve(count, Key(key))?;
    for _ in 0..count {
        items.push(Array::read(cursor, budget, key, depth.saturating_add(1))?);
    }
    Ok(items)
}

fn truth(byte: u8, what: fmt::Arguments<'_>) -> Result<bool, FormatError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(FormatError::invalid(Container::Gguf, what, byte, "a bool: 0 or 1")),
    }
}

fn unknown_type(id: u32, key: &str) -> FormatError {
    FormatError::invalid(
        Container::Gguf,
        format_args!("the type id of metadata key {}", Key(key)),
        id,
        "a metadata type from 0 (u8) to 12 (f64)",
    )
}

pub(crate) fn too_deep(key: &str) -> FormatError {
    FormatError::invalid(
        Container::Gguf,
        format_args!("metadata key {}", Key(key)),
        format_args!("an array nested more than {MAX_DEPTH} levels deep"),
        format_args!("at most {MAX_DEPTH} levels"),
    )
}

pub(crate) fn write_length(length: usize, out: &mut Vec<u8>) {
    // A usize has at most 64 bits on every platform that Rust knows.
    out.extend_from_slice(&u64::try_from(length).unwrap_or(u64::MAX).to_le_bytes());
}

pub(crate) fn write_string(text: &str, out: &mut Vec<u8>) {
    write_length(text.len(), out);
    out.extend_from_slice(text.as_bytes());
}

/// A key as messages show it.
pub(crate) struct Key<'a>(pub(crate) &'a str);

impl fmt::Display for Key<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&quoted(self.0))
    }
}
