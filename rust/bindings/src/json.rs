//! Python's plain data as JSON.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple};
use serde_json::{Map, Number, Value};

use crate::convert::{text, type_name};
use crate::error::refusal;

/// Deeper data is refused before it can exhaust the stack.
const MAX_DEPTH: usize = 100;
/// Values in one conversation or template argument.
const MAX_VALUES: usize = 1 << 20;

/// `object` as JSON; `name` is what refusals call it.
///
/// # Errors
/// Types that JSON lacks, numbers beyond its range, nesting deeper than 100.
pub fn to_json(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Value> {
    convert(name, object, 0, &mut { MAX_VALUES })
}

/// A mapping's entries as JSON.
///
/// # Errors
/// As [`to_json`], and when `object` is no mapping.
pub fn to_map(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Map<String, Value>> {
    match to_json(name, object)? {
        Value::Object(map) => Ok(map),
        _ => Err(refusal(format!("{name} must be a mapping, got {}", type_name(object)))),
    }
}

fn convert(name: &str, object: &Bound<'_, PyAny>, depth: usize, budget: &mut usize) -> PyResult<Value> {
    // A list that holds itself twice is small in memory and endless as a tree.
    let Some(left) = budget.checked_sub(1) else {
        return Err(refusal(format!("{name} holds more than {MAX_VALUES} values")));
    };
    *budget = left;
    if depth > MAX_DEPTH {
        return Err(refusal(format!("{name} is nested more than {MAX_DEPTH} levels deep")));
    }
    if object.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(value) = object.cast::<PyBool>() {
        return Ok(Value::Bool(value.is_true()));
    }
    if object.is_instance_of::<PyString>() {
        return Ok(Value::String(text(name, object)?));
    }
    if object.is_instance_of::<PyInt>() {
        let number =
            object.extract::<i64>().map(Number::from).or_else(|_| object.extract::<u64>().map(Number::from));
        return number
            .map(Value::Number)
            .map_err(|_| refusal(format!("{name} holds an integer beyond 64 bits")));
    }
    if let Ok(value) = object.cast::<PyFloat>() {
        let number = Number::from_f64(value.value());
        return number.map(Value::Number).ok_or_else(|| refusal(format!("{name} holds {}", value.value())));
    }
    if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
        let items = object.try_iter()?.map(|item| convert(name, &item?, depth + 1, budget));
        return Ok(Value::Array(items.collect::<PyResult<_>>()?));
    }
    if object.is_instance_of::<PyDict>() || object.cast::<PyMapping>().is_ok() {
        return convert_mapping(name, object.cast::<PyMapping>()?, depth, budget);
    }
    Err(refusal(format!("{name} holds a {}, which JSON cannot express", type_name(object))))
}

fn convert_mapping(
    name: &str,
    mapping: &Bound<'_, PyMapping>,
    depth: usize,
    budget: &mut usize,
) -> PyResult<Value> {
    let mut map = Map::new();
    for item in mapping.items()?.iter() {
        let (key, value) = item.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
        map.insert(text(&format!("a key in {name}"), &key)?, convert(name, &value, depth + 1, budget)?);
    }
    Ok(Value::Object(map))
}
