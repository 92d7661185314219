//! Writing GGUF version 3.

use std::borrow::Cow;
use std::collections::HashSet;
use std::io::{self, Read};

use crate::error::{Container, FormatError, quoted};
use crate::gguf::value::{Key, MAX_DEPTH, Value, too_deep, write_length, write_string};
use crate::gguf::{
    ALIGNMENT_KEY, CONTAINER, DEFAULT_ALIGNMENT, MAGIC, MAX_RANK, Metadata, alignment, checked_name,
    tensor_bytes,
};
use crate::tensor::TensorType;

const VERSION: u32 = 3;

/// Collects metadata and tensors, checks each as it comes, and writes them as a file that [`crate::Gguf`]
/// reads back. Tensor data may be borrowed, or be made one tensor after the other while the file is written
/// ([`GgufWriter::declare`]), so a converted file need not fit in memory twice.
#[derive(Debug)]
pub struct GgufWriter<'a> {
    alignment: usize,
    metadata: Vec<(String, Value)>,
    keys: HashSet<String>,
    tensors: Vec<Pending<'a>>,
    names: HashSet<String>,
}

#[derive(Debug)]
struct Pending<'a> {
    name: String,
    type_id: u32,
    shape: Vec<usize>,
    /// Bytes that its type and shape take.
    len: usize,
    /// Absent until they are written, where the tensor was only declared.
    bytes: Option<Cow<'a, [u8]>>,
}

impl Default for GgufWriter<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> GgufWriter<'a> {
    /// A writer of an empty file.
    pub fn new() -> Self {
        GgufWriter {
            alignment: DEFAULT_ALIGNMENT,
            metadata: Vec::new(),
            keys: HashSet::new(),
            tensors: Vec::new(),
            names: HashSet::new(),
        }
    }

    /// Adds an entry; `general.alignment` also sets the alignment of the tensors.
    ///
    /// # Errors
    /// [`FormatError`] if the key is empty, too long or already there, if arrays nest too deep, or if the
    /// alignment is no power of two.
    pub fn metadata(&mut self, key: impl Into<String>, value: Value) -> Result<&mut Self, FormatError> {
        let key = key.into();
        checked_name(&key, format_args!("metadata key {}", self.metadata.len()))?;
        if matches!(&value, Value::Array(array) if array.depth() > MAX_DEPTH) {
            return Err(too_deep(&key));
        }
        if key == ALIGNMENT_KEY {
            self.alignment = alignment(&Metadata::new(vec![(key.clone(), value.clone())])?)?;
        }
        if !self.keys.insert(key.clone()) {
            return Err(duplicate("metadata key", &key));
        }
        self.metadata.push((key, value));
        Ok(self)
    }

    /// Adds a tensor. `shape` is row-major, slowest dimension first; `bytes` are its rows back to back.
    ///
    /// # Errors
    /// [`FormatError`] if the name is empty, too long or already there, if GGUF has no such type, if the shape
    /// has more than four dimensions, a zero, or rows that are no whole blocks, or if `bytes` is not as long
    /// as shape and type say.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        tensor_type: TensorType,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<&mut Self, FormatError> {
        let (name, bytes) = (name.into(), bytes.into());
        self.declare(name, tensor_type, shape)?;
        let Some(tensor) = self.tensors.last_mut() else { return Ok(self) };
        if bytes.len() != tensor.len {
            let error = wrong_length(&tensor.name, tensor_type, shape, bytes.len(), tensor.len);
            if let Some(refused) = self.tensors.pop() {
                self.names.remove(&refused.name);
            }
            return Err(error);
        }
        tensor.bytes = Some(bytes);
        Ok(self)
    }

    /// Adds a tensor whose bytes [`GgufWriter::write_with`] asks for.
    ///
    /// # Errors
    /// As for [`GgufWriter::tensor`].
    pub fn declare(
        &mut self,
        name: impl Into<String>,
        tensor_type: TensorType,
        shape: &[usize],
    ) -> Result<&mut Self, FormatError> {
        let name = name.into();
        checked_name(&name, format_args!("the name of tensor {}", self.tensors.len()))?;
        let Some(type_id) = tensor_type.ggml_id() else {
            let field = format_args!("the type of tensor {}", Key(&name)).to_string();
            return Err(FormatError::invalid(CONTAINER, field, tensor_type, "a type that GGUF can hold"));
        };
        if shape.len() > MAX_RANK || shape.contains(&0) {
            return Err(FormatError::invalid(
                CONTAINER,
                format_args!("the shape of tensor {}", Key(&name)),
                format_args!("{shape:?}"),
                format_args!("at most {MAX_RANK} dimensions of at least 1"),
            ));
        }
        let len = tensor_bytes(tensor_type, shape, &name)?;
        if !self.names.insert(name.clone()) {
            return Err(duplicate("tensor", &name));
        }
        self.tensors.push(Pending { name, type_id, shape: shape.to_vec(), len, bytes: None });
        Ok(self)
    }

    /// The whole file in memory; the bytes of tensors that were only declared are zeros.
    pub fn finish(self) -> Vec<u8> {
        let mut file = self.header();
        file.resize(file.len().next_multiple_of(self.alignment), 0);
        for tensor in &self.tensors {
            let end = file.len().saturating_add(tensor.len);
            file.extend_from_slice(tensor.bytes.as_deref().unwrap_or_default());
            file.resize(end.next_multiple_of(self.alignment), 0);
        }
        file
    }

    /// Bytes of the whole file.
    pub fn file_len(&self) -> usize {
        let padded = |len: usize| len.next_multiple_of(self.alignment);
        self.tensors
            .iter()
            .fold(padded(self.header().len()), |sum, tensor| sum.saturating_add(padded(tensor.len)))
    }

    /// Writes the file to `out`, which should be buffered or a plain file: a tensor goes out in one call.
    ///
    /// # Errors
    /// Whatever `out` reports; a tensor that was only declared.
    pub fn write(&self, out: &mut impl io::Write) -> io::Result<()> {
        self.write_with(out, |name| {
            Err(io::Error::new(io::ErrorKind::InvalidInput, format!("tensor {} has no data", Key(name))))
        })
    }

    /// Writes the file to `out`, asking for the bytes of each declared tensor by its name when it is its turn.
    ///
    /// # Errors
    /// Whatever `out` or `bytes` reports; bytes that are not as long as the tensor's type and shape say.
    pub fn write_with<E: From<io::Error>>(
        &self,
        out: &mut impl io::Write,
        mut bytes: impl FnMut(&str) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        self.write_padded(out, &self.header())?;
        for tensor in &self.tensors {
            match &tensor.bytes {
                Some(bytes) => self.write_padded(out, bytes)?,
                None => {
                    let made = bytes(&tensor.name)?;
                    if made.len() != tensor.len {
                        let found = format!("{} bytes instead of {}", made.len(), tensor.len);
                        let text = format!("tensor {} was given {found}", Key(&tensor.name));
                        return Err(io::Error::new(io::ErrorKind::InvalidInput, text).into());
                    }
                    self.write_padded(out, &made)?;
                }
            }
        }
        Ok(())
    }

    fn write_padded(&self, out: &mut impl io::Write, piece: &[u8]) -> io::Result<()> {
        out.write_all(piece)?;
        let padding = piece.len().next_multiple_of(self.alignment).saturating_sub(piece.len());
        io::copy(&mut io::repeat(0).take(u64::try_from(padding).unwrap_or(u64::MAX)), out)?;
        Ok(())
    }

    /// Everything before the tensors' data, without padding.
    fn header(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        write_length(self.tensors.len(), &mut out);
        write_length(self.metadata.len(), &mut out);
        for (key, value) in &self.metadata {
            write_string(key, &mut out);
            out.extend_from_slice(&value.type_id().to_le_bytes());
            value.write(&mut out);
        }
        let mut offset = 0_usize;
        for tensor in &self.tensors {
            write_string(&tensor.name, &mut out);
            out.extend_from_slice(&u32::try_from(tensor.shape.len()).unwrap_or(u32::MAX).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&size| write_length(size, &mut out));
            out.extend_from_slice(&tensor.type_id.to_le_bytes());
            write_length(offset, &mut out);
            offset = offset.saturating_add(tensor.len.next_multiple_of(self.alignment));
        }
        out
    }
}

fn wrong_length(
    name: &str,
    tensor_type: TensorType,
    shape: &[usize],
    found: usize,
    needed: usize,
) -> FormatError {
    FormatError::invalid(
        CONTAINER,
        format_args!("the data of tensor {}", Key(name)),
        format_args!("{found} bytes"),
        format_args!("{needed} bytes, which {tensor_type} {shape:?} needs"),
    )
}

fn duplicate(field: &'static str, name: &str) -> FormatError {
    FormatError::Duplicate { container: Container::Gguf, field, name: quoted(name) }
}
