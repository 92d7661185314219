//! The one error type of this crate.

/// Why something could not be set up. Operations themselves do not fail: their shapes are proven at load.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// `INFER_ISA` has a value that names no instruction set.
    #[error(
        "INFER_ISA={value:?} names no instruction set; known are scalar, neon, neon_dotprod, neon_i8mm, avx2, avx512, avx512bf16 and amx"
    )]
    UnknownIsa {
        /// The value found.
        value: String,
    },
    /// The instruction set asked for is absent on this machine.
    #[error("the instruction set {requested} is absent on this machine, which has {available}")]
    IsaUnavailable {
        /// Name of the one asked for.
        requested: &'static str,
        /// Names of those present, comma-separated.
        available: String,
    },
    /// A worker thread could not be started.
    #[error("worker thread {index} of {threads} could not be started: {source}")]
    Thread {
        /// Which worker.
        index: usize,
        /// How many threads were asked for.
        threads: usize,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Memory could not be had.
    #[error("could not allocate {bytes} bytes for {what}")]
    Allocation {
        /// What it was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
    /// A size is wrong.
    #[error("{what} is {actual}, expected {expected}")]
    Size {
        /// Which size.
        what: &'static str,
        /// What was found.
        actual: usize,
        /// What would be right.
        expected: String,
    },
    /// A weight cannot be rounded.
    #[error("a weight is not finite, or greater than 65504 in magnitude, and cannot be rounded to {format}")]
    Weight {
        /// Name of the format.
        format: &'static str,
    },
    /// A key-value cache cannot be made as asked.
    #[error("{0}")]
    Cache(String),
}
