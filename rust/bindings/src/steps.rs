//! Steps of a program as Python gets them.

use infer_kernels::{Activation, NormKind, RopeStyle};
use infer_model::{Slice, Step};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// A slice as (buffer, first column, width).
pub fn columns(slice: Slice) -> (usize, usize, usize) {
    (slice.buffer, slice.offset, slice.width)
}

fn norm_kind(kind: NormKind) -> &'static str {
    match kind {
        NormKind::Rms => "rms",
        NormKind::Layer => "layer",
    }
}

fn rope_style(style: RopeStyle) -> &'static str {
    match style {
        RopeStyle::Half => "half",
        RopeStyle::Interleaved => "interleaved",
    }
}

fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_tanh",
        Activation::GeluErf => "gelu_erf",
        Activation::Relu => "relu",
        Activation::ReluSquared => "relu_squared",
    }
}

/// A step as a name, the variant's in snake case, and its fields; slices are (buffer, first column, width).
pub fn fields<'py>(py: Python<'py>, step: &Step) -> PyResult<(&'static str, Bound<'py, PyDict>)> {
    macro_rules! step {
        ($name:literal $(, $field:ident = $value:expr)*) => {{
            let dict = PyDict::new(py);
            $(dict.set_item(stringify!($field), ($value).into_py_any(py)?)?;)*
            Ok(($name, dict))
        }};
    }
    let at = |slice: &Slice| columns(*slice);
    match step {
        Step::Embed { output, scale } => step!("embed", output = at(output), scale = *scale),
        Step::AddPosition { rows } => step!("add_position", rows = at(rows)),
        Step::Norm { input, output, kind, groups, epsilon, weight } => step!(
            "norm",
            input = at(input),
            output = at(output),
            kind = norm_kind(*kind),
            groups = *groups,
            epsilon = *epsilon,
            weight = *weight
        ),
        Step::Linear { input, output, weight } => {
            step!("linear", input = at(input), output = at(output), weight = *weight)
        }
        Step::Rope { rows, heads, rope, style } => {
            step!("rope", rows = at(rows), heads = *heads, rope = *rope, style = rope_style(*style))
        }
        Step::WriteKv { keys, values, layer } => {
            step!("write_kv", keys = at(keys), values = at(values), layer = *layer)
        }
        Step::Attend { queries, output, layer, window } => {
            step!("attend", queries = at(queries), output = at(output), layer = *layer, window = *window)
        }
        Step::GatedActivation { gate, up, output, activation } => step!(
            "gated_activation",
            gate = at(gate),
            up = at(up),
            output = at(output),
            activation = activation_name(*activation)
        ),
        Step::Activation { rows, activation } => {
            step!("activation", rows = at(rows), activation = activation_name(*activation))
        }
        Step::Add { destination, source, scale } => {
            step!("add", destination = at(destination), source = at(source), scale = *scale)
        }
        Step::AddGated { destination, source, gate } => {
            step!("add_gated", destination = at(destination), source = at(source), gate = at(gate))
        }
        Step::Route { logits, used, renormalise } => {
            step!("route", logits = at(logits), used = *used, renormalise = *renormalise)
        }
        Step::Experts { input, output, gate_up, down, width, activation } => step!(
            "experts",
            input = at(input),
            output = at(output),
            gate_up = gate_up.clone(),
            down = down.clone(),
            width = *width,
            activation = activation_name(*activation)
        ),
        Step::Select { input, output } => step!("select", input = at(input), output = at(output)),
        Step::Scale { rows, scale } => step!("scale", rows = at(rows), scale = *scale),
        Step::Softcap { rows, cap } => step!("softcap", rows = at(rows), cap = *cap),
    }
}
