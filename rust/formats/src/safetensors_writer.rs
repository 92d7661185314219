//! Writing safetensors.

use std::io;

use serde_json::{Map, Value, json};

use crate::error::{Container, FormatError, quoted};
use crate::tensor::{TensorType, element_count};

const CONTAINER: Container = Container::Safetensors;

/// The header's length is a multiple of this, so that data begin at an aligned byte.
const ALIGNMENT: usize = 8;

/// Collects what tensors are called and how they look, and writes a file that [`crate::Safetensors`] reads back, their bytes
/// one tensor after the other as they are made.
#[derive(Debug, Default)]
pub struct SafetensorsWriter {
    header: Map<String, Value>,
    tensors: Vec<(String, usize)>,
    end: usize,
}

impl SafetensorsWriter {
    /// A writer of a file without tensors, marked as PyTorch's, which some readers ask for.
    pub fn new() -> Self {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        SafetensorsWriter { header, ..Self::default() }
    }

    /// Adds a tensor. `shape` is row-major, slowest dimension first.
    ///
    /// # Errors
    /// [`FormatError`] if the name is there already or is `__metadata__`, if safetensors has no such type, or if the shape has a
    /// zero or is too large.
    pub fn declare(
        &mut self,
        name: &str,
        tensor_type: TensorType,
        shape: &[usize],
    ) -> Result<(), FormatError> {
        let field = |part: &str| format!("the {part} of tensor {}", quoted(name));
        if TensorType::from_safetensors_name(tensor_type.name()) != Some(tensor_type) {
            let expected = format!("one of {}", TensorType::safetensors_names());
            return Err(FormatError::invalid(CONTAINER, field("type"), tensor_type, expected));
        }
        let bytes = element_count(shape).and_then(|elements| tensor_type.byte_len(elements));
        let range = bytes.filter(|_| !shape.contains(&0)).and_then(|bytes| {
            let end = self.end.checked_add(bytes)?;
            Some((self.end, end))
        });
        let Some((begin, end)) = range else {
            let expected = "dimensions of at least 1 whose elements fill a whole number of bytes below 2^64";
            return Err(FormatError::invalid(CONTAINER, field("shape"), format_args!("{shape:?}"), expected));
        };
        let entry = json!({"dtype": tensor_type.name(), "shape": shape, "data_offsets": [begin, end]});
        if self.header.insert(name.to_owned(), entry).is_some() {
            return Err(FormatError::Duplicate { container: CONTAINER, field: "tensor", name: quoted(name) });
        }
        self.tensors.push((name.to_owned(), end.saturating_sub(begin)));
        self.end = end;
        Ok(())
    }

    /// Bytes of the whole file.
    pub fn file_len(&self) -> usize {
        self.head().len().saturating_add(self.end)
    }

    /// Writes the file to `out`, asking for the bytes of each tensor by its name when it is its turn: little-endian, as long as type
    /// and shape say.
    ///
    /// # Errors
    /// Whatever `out` or `bytes` reports; bytes of another length.
    pub fn write_with<E: From<io::Error>>(
        &self,
        out: &mut impl io::Write,
        mut bytes: impl FnMut(&str) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        out.write_all(&self.head())?;
        for (name, len) in &self.tensors {
            let made = bytes(name)?;
            if made.len() != *len {
                let text = format!("tensor {} was given {} bytes instead of {len}", quoted(name), made.len());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text).into());
            }
            out.write_all(&made)?;
        }
        Ok(())
    }

    /// The length of the header and the header, padded with spaces.
    fn head(&self) -> Vec<u8> {
        let mut text = Value::Object(self.header.clone()).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
        let length = u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes();
        [&length[..], &text].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Safetensors;

    #[test]
    fn what_is_written_is_read_back() {
        let mut writer = SafetensorsWriter::new();
        writer.declare("b", TensorType::I32, &[2, 3]).unwrap();
        writer.declare("a \"quoted\"", TensorType::F16, &[5]).unwrap();
        let mut file = Vec::new();
        let bytes = |name: &str| match name {
            "b" => Ok(vec![1; 24]),
            _ => Ok::<_, io::Error>(vec![2; 10]),
        };
        writer.write_with(&mut file, bytes).unwrap();
        assert_eq!(file.len(), writer.file_len());
        let parsed = Safetensors::parse(&file).unwrap();
        assert_eq!(parsed.metadata["format"], "pt");
        let tensor = parsed.tensor("b").unwrap();
        assert_eq!((tensor.tensor_type, &tensor.shape[..]), (TensorType::I32, &[2, 3][..]));
        assert_eq!(tensor.range.start % ALIGNMENT, 0);
        assert_eq!(parsed.tensor("a \"quoted\"").unwrap().bytes(&file), Some(&[2; 10][..]));
        // The reference implementation agrees.
        let reference = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(reference.tensor("b").unwrap().data(), [1; 24]);
    }

    #[test]
    fn mistakes_are_refused() {
        let mut writer = SafetensorsWriter::new();
        writer.declare("a", TensorType::F32, &[1]).unwrap();
        for (name, tensor_type, shape, words) in [
            ("a", TensorType::F32, &[1][..], "more than once"),
            ("__metadata__", TensorType::F32, &[1], "more than once"),
            ("b", TensorType::Q4_0, &[32], "Q4_0"),
            ("b", TensorType::F32, &[0], "[0]"),
            ("b", TensorType::F32, &[usize::MAX, 2], "shape"),
        ] {
            let message = writer.declare(name, tensor_type, shape).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        let wrong = writer.write_with(&mut Vec::new(), |_| Ok::<_, io::Error>(vec![0; 3])).unwrap_err();
        assert!(wrong.to_string().contains("3 bytes instead of 4"), "{wrong}");
    }
}
