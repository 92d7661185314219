//! What every operation is given: an instruction set and a pool of threads.

use std::sync::Arc;

use crate::{Isa, KernelError, Pool};

/// The instruction set and the threads that operations compute with.
#[derive(Debug)]
pub struct Context {
    /// Instruction set of every kernel.
    pub isa: Isa,
    /// Threads shared by every operation, and with every other context of as many threads: see [`Pool::shared`].
    pub pool: Arc<Pool>,
}

impl Context {
    /// A context with `threads` threads (the calling one included) and the best instruction set, or the one
    /// that the environment variable `INFER_ISA` forces.
    ///
    /// # Errors
    /// When `INFER_ISA` names an unknown or absent instruction set, or a thread cannot be started.
    pub fn new(threads: usize) -> Result<Context, KernelError> {
        Ok(Context { isa: Isa::from_env()?, pool: Pool::shared(threads)? })
    }
}
