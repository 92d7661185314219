//! Python values to Rust ones, with refusals that name the argument.

use std::any::TypeId;

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyByteArray, PyBytes, PyMapping, PyMemoryView, PyString};

use crate::error::refusal;

/// An argument as it came. Extraction never fails, so that a refusal can name the argument and be the one exception.
pub struct Arg<T>(Result<T, String>);

impl<T> Arg<T> {
    /// A default.
    pub fn of(value: T) -> Self {
        Self(Ok(value))
    }

    /// The value.
    ///
    /// # Errors
    /// "`name` must be `right`, got ..." when it has another type.
    pub fn get(self, name: &str, right: &str) -> PyResult<T> {
        self.0.map_err(|shown| refusal(format!("{name} must be {right}, got {shown}")))
    }
}

impl<'py, T: for<'a> FromPyObject<'a, 'py> + 'static> FromPyObject<'_, 'py> for Arg<T> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let is_flag = TypeId::of::<T>() == TypeId::of::<bool>();
        let value = if is_flag { object.extract().ok() } else { number(&object) };
        Ok(Self(value.ok_or_else(|| shown(&object))))
    }
}

impl Arg<f64> {
    /// A number.
    pub fn number(self, name: &str) -> PyResult<f64> {
        self.get(name, "a number")
    }
}

impl Arg<bool> {
    /// A truth value.
    pub fn flag(self, name: &str) -> PyResult<bool> {
        self.get(name, "True or False")
    }
}

/// Any Python integer; those beyond 128 bits are clamped, since no argument allows them.
#[derive(Clone, Copy)]
pub struct Int(pub i128);

impl FromPyObject<'_, '_> for Int {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        match object.extract::<i128>() {
            Ok(value) => Ok(Self(value)),
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Ok(Self(if object.lt(0)? { i128::MIN } else { i128::MAX }))
            }
            Err(error) => Err(error),
        }
    }
}

impl Arg<Int> {
    /// A default.
    pub fn int(value: i128) -> Self {
        Self::of(Int(value))
    }

    /// The value as `T`.
    ///
    /// # Errors
    /// "`name` must be `right`, got ..." when it does not fit.
    pub fn fit<T: TryFrom<i128>>(self, name: &str, right: &str) -> PyResult<T> {
        let Int(value) = self.get(name, right)?;
        let large = if value > 0 { ", which is too large" } else { "" };
        T::try_from(value).map_err(|_| refusal(format!("{name} must be {right}, got {value}{large}")))
    }

    /// A count from 1 on.
    pub fn positive(self, name: &str) -> PyResult<usize> {
        match self.fit(name, "at least 1")? {
            0 => Err(refusal(format!("{name} must be at least 1, got 0"))),
            count => Ok(count),
        }
    }
}

/// A value in a message; long ones are cut.
pub fn shown(object: &Bound<'_, PyAny>) -> String {
    let text = object.repr().map_or_else(|_| type_name(object), |repr| repr.to_string());
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Text of a Python string.
///
/// # Errors
/// Another type, or surrogates that no text encoding allows.
pub fn text(name: &str, object: &Bound<'_, PyAny>) -> PyResult<String> {
    let Ok(string) = object.cast::<PyString>() else {
        return Err(refusal(format!("{name} must be a string, got {}", type_name(object))));
    };
    let text = string
        .to_cow()
        .map_err(|_| refusal(format!("{name} holds half a surrogate pair, which is not text")))?;
    Ok(text.into_owned())
}

/// More than any context holds; an endless iterator must end somewhere.
pub const MAX_TOKEN_IDS: usize = 1 << 26;

/// Token ids of any sequence or array of integers.
///
/// # Errors
/// Names the first element that is no token id; a list of more than [`MAX_TOKEN_IDS`].
pub fn token_ids(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let wrong = |object: &Bound<'_, PyAny>| {
        refusal(format!("{name} must be a sequence of token ids, got {}", type_name(object)))
    };
    let is_text = object.is_instance_of::<PyString>() || is_bytes(object);
    if is_text || object.cast::<PyMapping>().is_ok() {
        return Err(wrong(object));
    }
    let items = object.try_iter().map_err(|_| wrong(object))?;
    // The length is what the object claims; memory is taken for what it yields.
    let mut ids = Vec::with_capacity(object.len().unwrap_or(0).min(1 << 16));
    for (position, item) in items.enumerate() {
        if position == MAX_TOKEN_IDS {
            return Err(refusal(format!("{name} must hold at most {MAX_TOKEN_IDS} token ids, got more")));
        }
        let item = item?;
        ids.push(number(&item).ok_or_else(|| {
            refusal(format!("{name}[{position}] is {}, which is not a token id", shown(&item)))
        })?);
    }
    Ok(ids)
}

/// Bytes, whose items would pass for token ids.
fn is_bytes(object: &Bound<'_, PyAny>) -> bool {
    object.is_instance_of::<PyBytes>()
        || object.is_instance_of::<PyByteArray>()
        || object.is_instance_of::<PyMemoryView>()
}

/// A number, if it is one. To Python, True is an integer, too; whoever gives it for a number has mistaken the argument.
pub fn number<'py, T: for<'a> FromPyObject<'a, 'py>>(object: &Bound<'py, PyAny>) -> Option<T> {
    if object.is_instance_of::<PyBool>() { None } else { object.extract().ok() }
}

/// What a user calls the type of `object`.
pub fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "another type".to_owned(), |name| name.to_string())
}
