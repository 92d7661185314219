//! Numbers on the CPU: slices in, slices out. No files, no models, no requests.
//!
//! * [`simd`]: instruction sets, chosen once at run time; every kernel is written once, over 16 virtual lanes.
//! * [`quant`]: one file per weight format: block layout, exact dequantization, quantizer.
//! * [`PackedMatrix`]: a weight in one of a few compute layouts, made at load.
//! * [`ops`]: one file per operation. All are batch-invariant: a row's result depends on that row alone, bit for bit,
//!   whatever the number of rows, their order and the number of threads.
//! * [`KvCache`]: keys and values in fixed-size pages.

mod context;
mod cores;
mod error;
pub mod kv;
pub mod matrix;
pub mod ops;
pub mod pool;
pub mod quant;
mod rows;
mod scratch;
pub mod simd;

pub use context::Context;
pub use cores::default_threads;
pub use error::KernelError;
pub use kv::*;
pub use matrix::{PackedMatrix, RowHolder, RowSource, Windows, round_rows};
pub use ops::*;
pub use pool::Pool;
pub use quant::{Format, PackedFormat, dequantize, quantize, quantize_with};
pub use rows::{Rows, RowsMut, SharedRows, for_each_row};
pub use scratch::Scratch;
pub use simd::Isa;
