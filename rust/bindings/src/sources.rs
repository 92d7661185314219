//! The text of the CUDA kernels. They travel inside the extension module: a folder `cuda/` in `site-packages` would clash with NVIDIA's
//! namespace package.

use pyo3::prelude::*;
use pyo3::types::PyDict;

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../cuda/", $name)))),*]
    };
}

/// Every file of `cuda/`, by name; `tests/rooms.py` sees that none is missing.
const SOURCES: &[(&str, &str)] = sources![
    "activation.cu",
    "activation.cuh",
    "attention.cu",
    "attention.cuh",
    "attention_copier.cuh",
    "attention_decode.cu",
    "attention_decode.cuh",
    "attention_pages.cuh",
    "attention_plan.cu",
    "attention_prefill.cu",
    "attention_turn.cuh",
    "attention_warp_group.cu",
    "common.cuh",
    "digits.cuh",
    "draw.cuh",
    "elementwise.cu",
    "epilogue.cuh",
    "experts.cu",
    "experts_grouped.cu",
    "halves.cuh",
    "keys.cuh",
    "kv.cu",
    "kv.cuh",
    "layers.cu",
    "layers.cuh",
    "layers_attend.cuh",
    "layers_copy.cuh",
    "layers_end.cuh",
    "layers_group.cuh",
    "layers_parts.cuh",
    "layers_words.cuh",
    "linear.cu",
    "linear_many.cu",
    "linear_product.cuh",
    "linear_rope.cu",
    "linear_stream.cu",
    "linear_stream.cuh",
    "linear_warp_group.cu",
    "linear_warp_group.cuh",
    "linear_wide.cu",
    "logprobs.cu",
    "many_weights.cuh",
    "mma.cuh",
    "norm.cu",
    "normed.cuh",
    "pack.cu",
    "pages.cu",
    "random.cu",
    "rope.cu",
    "rope.cuh",
    "round.cuh",
    "rows.cu",
    "sampler.cu",
    "screen.cu",
    "screen.cuh",
    "screen_many.cu",
    "screen_many.cuh",
    "screen_many_end.cuh",
    "screen_rough.cu",
    "select.cuh",
    "stream_digits.cuh",
    "stream_halves.cuh",
    "stream_input.cuh",
    "stream_packed.cuh",
    "stream_plain.cuh",
    "stream_prepared.cuh",
    "warp_group.cuh",
    "warp_group_end.cuh",
    "warp_group_shared.cuh",
    "weights.cuh",
    "wide_product.cuh",
];

/// The sources of the GPU kernels, by file name.
#[pyfunction]
pub fn kernel_sources(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let all = PyDict::new(py);
    for (name, text) in SOURCES {
        all.set_item(name, text)?;
    }
    Ok(all)
}
