//! `kv_cache_dtype`: one type, or a dictionary with types for keys and values and the layers that keep the "auto" type.

use infer_kernels::{KvElement, Precision};
use infer_model::KvTypes;
use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyString};

use crate::convert::{number, shown, text};
use crate::error::refusal;

const NAME: &str = "kv_cache_dtype";
const KNOWN: &str = "\"auto\", \"float32\", \"float16\", \"bfloat16\", \"int8\" or \"fp8\"";

/// What "auto" stands for on the CPU: exact where `dtype` is.
pub fn automatic(precision: Precision) -> KvElement {
    match precision {
        Precision::Exact => KvElement::F32,
        Precision::Auto => KvElement::F16,
    }
}

/// Reads the argument; none is "auto", which stands for `auto`.
///
/// # Errors
/// Names the part that is wrong, its value and what would be right. Whether layers exist shows when the model is known.
pub fn read_kv_types(argument: Option<&Bound<'_, PyAny>>, auto: KvElement) -> PyResult<KvTypes> {
    let Some(argument) = argument else { return Ok(KvTypes::all(auto)) };
    if argument.is_instance_of::<PyString>() {
        return Ok(KvTypes { kept: auto, ..KvTypes::all(element(NAME, argument, auto)?) });
    }
    let Ok(mapping) = argument.cast::<PyMapping>() else {
        let right = format!("{KNOWN}, or a dictionary with \"key\", \"value\" and \"skip_layers\"");
        return Err(refusal(format!("{NAME} must be {right}, got {}", shown(argument))));
    };
    let mut types = KvTypes::all(auto);
    for item in mapping.items()?.iter() {
        let (key, value) = item.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
        match key.extract::<String>().as_deref() {
            Ok("key") => types.keys = element(&format!("{NAME}[\"key\"]"), &value, auto)?,
            Ok("value") => types.values = element(&format!("{NAME}[\"value\"]"), &value, auto)?,
            Ok("skip_layers") => types.skip_layers = layers(&value)?,
            _ => {
                let known = "\"key\", \"value\" and \"skip_layers\"";
                return Err(refusal(format!("{NAME} may have the keys {known}, got {}", shown(&key))));
            }
        }
    }
    Ok(types)
}

/// A type by its name or an alias.
fn element(name: &str, value: &Bound<'_, PyAny>, auto: KvElement) -> PyResult<KvElement> {
    let wrong = || refusal(format!("{name} must be {KNOWN}, got {}", shown(value)));
    if !value.is_instance_of::<PyString>() {
        return Err(wrong());
    }
    match text(name, value)?.as_str() {
        "auto" => Ok(auto),
        "float32" | "f32" => Ok(KvElement::F32),
        "float16" | "f16" => Ok(KvElement::F16),
        "bfloat16" | "bf16" => Ok(KvElement::Bf16),
        "int8" => Ok(KvElement::Int8),
        "fp8" | "fp8_e4m3" => Ok(KvElement::E4m3),
        _ => Err(wrong()),
    }
}

/// More than any model has layers.
const MAX_SKIPPED: usize = 1 << 16;

/// Numbers of layers.
fn layers(value: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    let name = format!("{NAME}[\"skip_layers\"]");
    let right = "a list of numbers of layers, such as [0, -1]";
    let wrong = || refusal(format!("{name} must be {right}, got {}", shown(value)));
    if value.is_instance_of::<PyString>() || value.cast::<PyMapping>().is_ok() {
        return Err(wrong());
    }
    let mut layers = Vec::new();
    for (position, item) in value.try_iter().map_err(|_| wrong())?.enumerate() {
        let item = item?;
        if position == MAX_SKIPPED {
            return Err(refusal(format!("{name} must name at most {MAX_SKIPPED} layers, got more")));
        }
        layers.push(number(&item).ok_or_else(|| {
            refusal(format!("{name}[{position}] must be the number of a layer, got {}", shown(&item)))
        })?);
    }
    Ok(layers)
}

/// What a backend outside calls a type.
pub fn element_name(element: KvElement) -> &'static str {
    match element {
        KvElement::F32 => "f32",
        KvElement::F16 => "f16",
        KvElement::Bf16 => "bf16",
        KvElement::Int8 => "int8",
        KvElement::E4m3 => "e4m3",
    }
}
