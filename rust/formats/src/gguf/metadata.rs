//! A GGUF file's metadata, and typed reads of it.

use crate::error::{Container, FormatError, quoted};
use crate::gguf::value::{Array, Key, Value};
use crate::names::NameIndex;

/// Keys and values in the file's order.
///
/// The typed getters return `Ok(None)` for an absent key, and an error for a value of another kind. Integers
/// are taken from any integer type that holds them exactly, as writers differ in the width they choose.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    names: NameIndex,
}

impl Metadata {
    /// Takes entries whose keys must be unique.
    pub fn new(entries: Vec<(String, Value)>) -> Result<Self, FormatError> {
        let names = NameIndex::new(entries.len(), |at| key_at(&entries, at)).map_err(|name| {
            FormatError::Duplicate { container: Container::Gguf, field: "metadata key", name: quoted(name) }
        })?;
        Ok(Metadata { entries, names })
    }

    /// The value of `key`, if the file has it.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let at = self.names.find(key, |at| key_at(&self.entries, at))?;
        self.entries.get(at).map(|(_, value)| value)
    }

    /// All entries in the file's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// How many entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A non-negative integer of any width.
    ///
    /// # Errors
    /// [`FormatError`] if the value is negative or no integer.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, FormatError> {
        self.typed(key, "a non-negative integer", |value| u64::try_from(integer(value)?).ok())
    }

    /// An integer of any width.
    ///
    /// # Errors
    /// [`FormatError`] if the value is no integer, or over 2^63 - 1.
    pub fn i64(&self, key: &str) -> Result<Option<i64>, FormatError> {
        self.typed(key, "a signed 64-bit integer", |value| i64::try_from(integer(value)?).ok())
    }

    /// A float; 64-bit ones are rounded.
    ///
    /// # Errors
    /// [`FormatError`] if the value is no float, or is finite but beyond 32-bit floats.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, FormatError> {
        self.typed(key, "a 32-bit float", |value| match value {
            Value::F32(number) => Some(*number),
            Value::F64(number) => narrowed(*number),
            _ => None,
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`FormatError`] if the value is of another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(truth) => Some(*truth),
            _ => None,
        })
    }

    /// A text.
    ///
    /// # Errors
    /// [`FormatError`] if the value is of another type.
    pub fn str(&self, key: &str) -> Result<Option<&str>, FormatError> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// An array of texts.
    ///
    /// # Errors
    /// [`FormatError`] if the value is of another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, FormatError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// An array of 32-bit floats.
    ///
    /// # Errors
    /// [`FormatError`] if the value is of another type.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>, FormatError> {
        self.typed(key, "an array of 32-bit floats", |value| match value {
            Value::Array(Array::F32(numbers)) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// An array of truth values.
    ///
    /// # Errors
    /// [`FormatError`] if the value is of another type.
    pub fn bools(&self, key: &str) -> Result<Option<&[bool]>, FormatError> {
        self.typed(key, "an array of bools", |value| match value {
            Value::Array(Array::Bool(truths)) => Some(truths.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any width.
    ///
    /// # Errors
    /// [`FormatError`] if the value is no array of integers, or one does not fit in 32 bits.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, FormatError> {
        self.typed(key, "an array of signed 32-bit integers", integers)
    }

    /// An array of non-negative integers of any width.
    ///
    /// # Errors
    /// [`FormatError`] if the value is no array of integers, or one is negative.
    pub fn u64s(&self, key: &str) -> Result<Option<Vec<u64>>, FormatError> {
        self.typed(key, "an array of non-negative integers", integers)
    }

    /// A value as messages show it, with its type; none for an absent key.
    pub fn described(&self, key: &str) -> Option<String> {
        self.get(key).map(described)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(FormatError::invalid(
                Container::Gguf,
                format_args!("metadata key {}", Key(key)),
                described(value),
                expected,
            )),
        }
    }
}

fn key_at(entries: &[(String, Value)], at: usize) -> &str {
    entries.get(at).map_or("", |(key, _)| key)
}

/// Any integer, widened to the type that holds all of them.
fn integer(value: &Value) -> Option<i128> {
    Some(match *value {
        Value::U8(number) => number.into(),
        Value::I8(number) => number.into(),
        Value::U16(number) => number.into(),
        Value::I16(number) => number.into(),
        Value::U32(number) => number.into(),
        Value::I32(number) => number.into(),
        Value::U64(number) => number.into(),
        Value::I64(number) => number.into(),
        _ => return None,
    })
}

/// Any array of integers as `T`, if each fits.
fn integers<T>(value: &Value) -> Option<Vec<T>>
where
    T: TryFrom<u8> + TryFrom<i8> + TryFrom<u16> + TryFrom<i16>,
    T: TryFrom<u32> + TryFrom<i32> + TryFrom<u64> + TryFrom<i64>,
{
    fn all<T: TryFrom<S>, S: Copy>(numbers: &[S]) -> Option<Vec<T>> {
        numbers.iter().map(|&number| T::try_from(number).ok()).collect()
    }
    let Value::Array(array) = value else { return None };
    match array {
        Array::U8(numbers) => all(numbers),
        Array::I8(numbers) => all(numbers),
        Array::U16(numbers) => all(numbers),
        Array::I16(numbers) => all(numbers),
        Array::U32(numbers) => all(numbers),
        Array::I32(numbers) => all(numbers),
        Array::U64(numbers) => all(numbers),
        Array::I64(numbers) => all(numbers),
        _ => None,
    }
}

/// Rounds to the nearest 32-bit float; `None` where a finite number would become infinite.
#[allow(clippy::as_conversions)] // std has no other float narrowing; this cast rounds and saturates to infinity
fn narrowed(number: f64) -> Option<f32> {
    let rounded = number as f32;
    (rounded.is_finite() || !number.is_finite()).then_some(rounded)
}

/// A value as messages show it.
fn described(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the string {}", quoted(text)),
        Value::Array(array) => format!("an array of {} elements of type {}", array.len(), array.type_name()),
        Value::Bool(truth) => format!("the bool {truth}"),
        Value::F32(number) => format!("{number:?} (f32)"),
        Value::F64(number) => format!("{number:?} (f64)"),
        _ => format!("{} ({})", integer(value).unwrap_or_default(), value.type_name()),
    }
}
