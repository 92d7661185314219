//! One file per operation. Every one is batch-invariant: a row's result depends on that row alone.

mod activation;
mod attention;
mod elementwise;
mod gated;
mod linear;
mod math;
mod norm;
mod rope;

pub use activation::*;
pub use attention::*;
pub use elementwise::*;
pub use gated::gated_linear;
pub use linear::*;
pub use norm::*;
pub use rope::*;
