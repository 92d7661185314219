//! A thread with room for what a template nests, whatever thread asks.

use crate::error::TextError;

/// Bytes of stack: some ten times what the deepest template within the limits of [`super::tags`] and [`super::values`] takes.
const STACK: usize = 1 << 26;

/// Runs `body` on a thread of its own, and waits for it.
pub(super) fn run<T: Send>(body: impl FnOnce() -> Result<T, TextError> + Send) -> Result<T, TextError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("infer-template".to_owned()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, body).map_err(|error| {
            TextError::Template(format!("cannot start a thread with {STACK} bytes of stack: {error}"))
        })?;
        thread
            .join()
            .unwrap_or_else(|_| Err(TextError::Template("a bug in infer: its thread panicked".to_owned())))
    })
}
