//! The identity of cached keys and values: a digest of everything that changes one of their bits.
//!
//! It lets pages outlive the process that computed them (a file, another process) without ever being taken for another model's. It
//! covers the weights, how they are rounded, the configuration, the precision, the types of keys and values in every layer, the instruction set, this crate's version
//! and the layout of pages. Threads, batch sizes and the number of pages are no part of it: they change no bit.
//!
//! Hashing all of a large model at every load would cost seconds, so of each tensor everything but its contents is hashed, and of its
//! contents the first and the last 4 KiB and 8 pieces of 256 bytes spread evenly between: fine-tuning moves all of a
//! tensor, and any two pieces of unrelated weights differ. What it cannot see is a file edited by hand at a few places. (64 pieces
//! took half a second of a file of 1.3 GB that is on the disk alone.)
//!
//! Where weights are read later (`late.rs`), so are the samples: when the identity is asked for, or the last weight is packed. Read
//! first from a file that is on the disk alone, they were 1,100 small reads, and with what they left in the page cache the system read
//! the rest in requests of 0.3 to 0.6 MB instead of 1.5 to 2.5: the first token took 1.2 to 1.7 times as long.

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use infer_kernels::{BLOCK_PAGES, KvLayer, PAGE_TOKENS, Precision};

use crate::checkpoint::Checkpoint;
use crate::late::{is_changed, mapped_files, read_at};
use crate::{ModelError, ModelSpec, Quantization};

/// Bytes hashed at either end of a tensor.
const END: usize = 4096;

/// Pieces hashed between.
const PIECES: usize = 8;

/// Bytes of each.
const PIECE: usize = 256;

/// The identity of a model's cached keys and values, computed when it is asked for.
#[derive(Debug, Clone)]
pub struct Fingerprint(Arc<Digest>);

#[derive(Debug)]
struct Digest {
    /// What is hashed, until it is.
    pending: Mutex<Pending>,
    found: OnceLock<[u8; 32]>,
}

#[derive(Debug)]
struct Pending {
    parts: Vec<Part>,
    path: PathBuf,
    /// Mapped files, and when each was changed last before the model was loaded.
    files: Vec<(Arc<File>, Option<SystemTime>)>,
}

#[derive(Debug)]
enum Part {
    Bytes(Vec<u8>),
    /// Bytes that are in a file still.
    Sample(Arc<File>, Range<u64>),
}

impl Fingerprint {
    /// The digest.
    ///
    /// # Errors
    /// A file that was changed since it was opened, or cannot be read: what is in it now may be another model.
    pub fn get(&self) -> Result<[u8; 32], ModelError> {
        let Digest { pending, found } = &*self.0;
        if let Some(digest) = found.get() {
            return Ok(*digest);
        }
        let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
        let digest = match found.get() {
            Some(digest) => *digest, // by who had the lock before
            None => pending.digest()?,
        };
        (pending.parts, pending.files) = Default::default();
        Ok(*found.get_or_init(|| digest))
    }
}

impl Pending {
    fn digest(&self) -> Result<[u8; 32], ModelError> {
        let unread = |reason: String| ModelError::Unread { path: self.path.clone(), reason };
        let mut hasher = blake3::Hasher::new();
        for part in &self.parts {
            match part {
                Part::Bytes(bytes) => hasher.update(bytes),
                Part::Sample(file, place) => {
                    let mut bytes = vec![0; (place.end - place.start) as usize];
                    read_at(file, &mut bytes, place.start).map_err(|error| unread(error.to_string()))?;
                    hasher.update(&bytes)
                }
            };
        }
        match is_changed(&self.files) {
            true => Err(unread("it was changed".to_owned())),
            false => Ok(hasher.finalize().into()),
        }
    }
}

/// The fingerprint of a checkpoint rounded and computed in this way by a backend (an instruction set, or a device), with these types of keys and values in each layer.
pub(crate) fn of(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    precision: Precision,
    kv_layers: &[KvLayer],
    backend: &str,
) -> Fingerprint {
    let mut parts = Parts(Vec::new());
    // What ends a text is no part of how it is computed.
    let spec = ModelSpec { eos_token_ids: Vec::new(), bos_token_id: None, ..checkpoint.spec.clone() };
    parts.field(env!("CARGO_PKG_VERSION").as_bytes());
    parts.field(backend.as_bytes());
    parts.field(format!("{PAGE_TOKENS} {BLOCK_PAGES} {precision:?} {kv_layers:?}").as_bytes());
    parts.field(format!("{} {quantization:?} {spec:?}", checkpoint.is_gguf()).as_bytes());
    parts.field(format!("{:?}", checkpoint.dummy).as_bytes());
    let mut tensors: Vec<_> = checkpoint.tensors().collect();
    tensors.sort_unstable_by(|left, right| left.name.cmp(&right.name));
    for info in tensors {
        parts.field(info.name.as_bytes());
        parts.field(format!("{:?} {:?}", info.tensor_type, info.shape).as_bytes());
        if let Some(tensor) = checkpoint.tensor(&info.name) {
            parts.contents(checkpoint, tensor.bytes);
            tensor.packed.iter().for_each(|packed| parts.contents(checkpoint, packed.scales));
            tensor.scaled.iter().for_each(|scaled| parts.contents(checkpoint, scaled.scales));
        }
    }
    let path = checkpoint.path().to_owned();
    let pending = Pending { parts: parts.0, path, files: mapped_files(checkpoint) };
    Fingerprint(Arc::new(Digest { pending: Mutex::new(pending), found: OnceLock::new() }))
}

/// What is hashed, one after the other.
struct Parts(Vec<Part>);

impl Parts {
    fn bytes(&mut self, bytes: &[u8]) {
        match self.0.last_mut() {
            Some(Part::Bytes(before)) => before.extend_from_slice(bytes),
            _ => self.0.push(Part::Bytes(bytes.to_vec())),
        }
    }

    /// A field after its length, so that no two lists of fields read alike.
    fn field(&mut self, bytes: &[u8]) {
        self.bytes(&(bytes.len() as u64).to_le_bytes());
        self.bytes(bytes);
    }

    /// A tensor's length and samples of its bytes.
    fn contents(&mut self, checkpoint: &Checkpoint, bytes: &[u8]) {
        self.bytes(&(bytes.len() as u64).to_le_bytes());
        for sample in samples(bytes.len()) {
            let bytes = &bytes[sample];
            let place = checkpoint.place(bytes).and_then(|(file, place)| Some((file.mapped()?, place)));
            match place {
                Some((file, Range { start, end })) => {
                    self.0.push(Part::Sample(Arc::clone(file), start as u64..end as u64));
                }
                None => self.bytes(bytes),
            }
        }
    }
}

/// Which of so many bytes are hashed: all if the samples would be no fewer.
fn samples(length: usize) -> Vec<Range<usize>> {
    if length <= 2 * END + PIECES * PIECE {
        return std::iter::once(0..length).collect();
    }
    let step = (length - 2 * END) / PIECES;
    let between = (0..PIECES).map(|index| END + index * step).map(|start| start..start + PIECE);
    std::iter::once(0..END).chain(between).chain(std::iter::once(length - END..length)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(bytes: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        samples(bytes.len()).into_iter().for_each(|sample| {
            hasher.update(&bytes[sample]);
        });
        hasher.finalize()
    }

    #[test]
    fn every_byte_of_a_small_tensor_counts_and_both_ends_of_a_large_one() {
        let most = 2 * END + PIECES * PIECE;
        for (length, places) in [
            (most, vec![0, 1, END, most / 2, most - 1]),
            (most + 1, vec![0, END - 1, END, most - END + 1, most]),
            (1 << 20, vec![0, END - 1, END, END + PIECE - 1, (1 << 20) - END, (1 << 20) - 1]),
        ] {
            let mut bytes = vec![7; length];
            let before = digest(&bytes);
            for place in places {
                bytes[place] ^= 1;
                assert_ne!(digest(&bytes), before, "{length} bytes, byte {place}");
                bytes[place] ^= 1;
            }
            assert_eq!(digest(&bytes), before);
            assert_ne!(digest(&bytes[..length - 1]), before);
        }
    }
}
