//! Any bytes as a GGUF file: a result, never a panic, and what is accepted is true.
#![no_main]

#[path = "../../tests/common/properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = properties::gguf(input);
});
