//! What the tests and the fuzz targets share: files made by hand, and the properties of every parse.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod properties;
pub mod seeds;

/// A GGUF file written field by field, so that any field can lie.
#[derive(Clone, Default)]
pub struct RawGguf(pub Vec<u8>);

impl RawGguf {
    pub fn header(version: u32, tensors: u64, entries: u64) -> Self {
        RawGguf(b"GGUF".to_vec()).u32(version).u64(tensors).u64(entries)
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn u32(self, number: u32) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    pub fn u64(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    pub fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    pub fn entry(self, key: &str, type_id: u32, value: &[u8]) -> Self {
        self.string(key).u32(type_id).bytes(value)
    }

    /// A description; `dimensions` fastest first, as the file has them.
    pub fn tensor(self, name: &str, dimensions: &[u64], type_id: u32, offset: u64) -> Self {
        let described = self.string(name).u32(dimensions.len() as u32);
        dimensions.iter().fold(described, |file, &size| file.u64(size)).u32(type_id).u64(offset)
    }

    /// Pads to 32 bytes, then appends `count` bytes of data.
    pub fn data(mut self, count: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32) + count, 0);
        self.0
    }
}

/// A safetensors file of a JSON header, whose length is right, and `data` zero bytes.
pub fn raw_safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

/// Asserts that `error` mentions all of `parts`.
pub fn assert_mentions(error: &infer_formats::FormatError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}
