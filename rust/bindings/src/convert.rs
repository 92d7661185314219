//! Python values to Rust ones, with refusals that name the argument.

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyString};

use crate::error::refusal;

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

impl Int {
    /// The value as `T`.
    ///
    /// # Errors
    /// "`name` must be `right`, got ..." when it does not fit.
    pub fn fit<T: TryFrom<i128>>(self, name: &str, right: &str) -> PyResult<T> {
        T::try_from(self.0).map_err(|_| refusal(format!("{name} must be {right}, got {}", self.0)))
    }

    /// A count from 1 on.
    pub fn positive(self, name: &str) -> PyResult<usize> {
        match self.fit(name, "at least 1")? {
            0 => Err(refusal(format!("{name} must be at least 1, got 0"))),
            count => Ok(count),
        }
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

/// Token ids of any sequence or array of integers.
///
/// # Errors
/// Names the first element that is no token id.
pub fn token_ids(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let wrong = |object: &Bound<'_, PyAny>| {
        refusal(format!("{name} must be a sequence of token ids, got {}", type_name(object)))
    };
    if object.is_instance_of::<PyString>() || object.cast::<PyMapping>().is_ok() {
        return Err(wrong(object));
    }
    let items = object.try_iter().map_err(|_| wrong(object))?;
    let mut ids = Vec::with_capacity(object.len().unwrap_or(0));
    for (position, item) in items.enumerate() {
        let item = item?;
        let Ok(id) = item.extract::<u32>() else {
            let shown = item.repr().map_or_else(|_| type_name(&item), |repr| repr.to_string());
            return Err(refusal(format!("{name}[{position}] is {shown}, which is not a token id")));
        };
        ids.push(id);
    }
    Ok(ids)
}

/// What a user calls the type of `object`.
pub fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "another type".to_owned(), |name| name.to_string())
}
