//! Any bytes as a SentencePiece model: a result, never a panic, and what is accepted can be used.
#![no_main]

#[path = "../../tests/common/properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = properties::sentencepiece(input);
});
