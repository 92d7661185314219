//! The Python face of the Rust core: conversion, GIL release, error mapping. No logic.
//!
//! Rules of this crate:
//! * every refusal is `InferError`; a panic becomes one too, and never crosses into Python or aborts the process
//! * whatever may take long runs without the GIL and looks for signals every 50 ms, so that Ctrl-C returns at once
//! * the engine's thread never touches Python; it hands news to Rust queues that Python threads wait on
//! * objects remember the process that made them: in a forked child, where their threads do not exist, use raises and drop leaks
#![deny(unsafe_code)] // but for the CUDA driver's functions in driver.rs

mod advice;
mod backend;
mod convert;
mod device;
mod driver;
mod engine;
mod error;
mod info;
mod json;
mod kv;
mod launcher;
mod load;
mod memory;
mod metrics;
mod outside;
mod owned;
mod params;
mod quantize;
mod ready;
mod request;
mod running;
mod settings;
mod sources;
mod steps;
mod tier;
mod tokenizer;
mod vocabulary;
mod wait;
mod work;

use pyo3::prelude::*;

/// The module `infer._core`; its types are described in `python/infer/_core.pyi`.
#[pymodule]
mod _core {
    use super::*;

    #[pymodule_export]
    use crate::engine::Engine;
    #[pymodule_export]
    use crate::error::{InferError, QueueFullError};
    #[pymodule_export]
    use crate::info::{ModelInfo, inspect, system_info};
    #[pymodule_export]
    use crate::launcher::StepLauncher;
    #[pymodule_export]
    use crate::outside::DeviceModel;
    #[pymodule_export]
    use crate::params::SamplingParams;
    #[pymodule_export]
    use crate::quantize::quantize;
    #[pymodule_export]
    use crate::ready::ReadyQueue;
    #[pymodule_export]
    use crate::request::{Request, RequestMetrics, Update};
    #[pymodule_export]
    use crate::sources::kernel_sources;
    #[pymodule_export]
    use crate::tokenizer::Tokenizer;
    #[pymodule_export]
    use crate::work::{Work, WorkLink};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
