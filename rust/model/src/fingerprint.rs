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

use std::borrow::Cow;

use infer_kernels::{BLOCK_PAGES, KvLayer, PAGE_TOKENS, Precision};

use crate::checkpoint::Checkpoint;
use crate::{ModelSpec, Quantization};

/// Bytes hashed at either end of a tensor.
const END: usize = 4096;

/// Pieces hashed between.
const PIECES: usize = 8;

/// Bytes of each.
const PIECE: usize = 256;

/// The fingerprint of a checkpoint rounded and computed in this way by a backend (an instruction set, or a device), with these types of keys and values in each layer.
pub(crate) fn of(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    precision: Precision,
    kv_layers: &[KvLayer],
    backend: &str,
) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    // What ends a text is no part of how it is computed.
    let spec = ModelSpec { eos_token_ids: Vec::new(), bos_token_id: None, ..checkpoint.spec.clone() };
    field(&mut hasher, env!("CARGO_PKG_VERSION").as_bytes());
    field(&mut hasher, backend.as_bytes());
    field(&mut hasher, format!("{PAGE_TOKENS} {BLOCK_PAGES} {precision:?} {kv_layers:?}").as_bytes());
    field(&mut hasher, format!("{} {quantization:?} {spec:?}", checkpoint.is_gguf()).as_bytes());
    field(&mut hasher, format!("{:?}", checkpoint.dummy).as_bytes());
    let mut tensors: Vec<_> = checkpoint.tensors().collect();
    tensors.sort_unstable_by(|left, right| left.name.cmp(&right.name));
    for info in tensors {
        field(&mut hasher, info.name.as_bytes());
        field(&mut hasher, format!("{:?} {:?}", info.tensor_type, info.shape).as_bytes());
        if let Some(tensor) = checkpoint.tensor(&info.name) {
            let read = |bytes| checkpoint.read(bytes);
            contents(&mut hasher, tensor.bytes, read);
            tensor.packed.iter().for_each(|packed| contents(&mut hasher, packed.scales, read));
            tensor.scaled.iter().for_each(|scaled| contents(&mut hasher, scaled.scales, read));
        }
    }
    hasher.finalize().into()
}

/// Hashes a field after its length, so that no two lists of fields read alike.
fn field(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

/// Hashes a tensor's length and samples of its bytes, which `read` gives; all of them if the samples would be no fewer.
fn contents<'a>(hasher: &mut blake3::Hasher, bytes: &'a [u8], read: impl Fn(&'a [u8]) -> Cow<'a, [u8]>) {
    if bytes.len() <= 2 * END + PIECES * PIECE {
        return field(hasher, &read(bytes));
    }
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    let (first, rest) = bytes.split_at(END);
    let (between, last) = rest.split_at(rest.len() - END);
    hasher.update(&read(first));
    for piece in between.chunks(between.len() / PIECES).take(PIECES) {
        hasher.update(&read(&piece[..PIECE]));
    }
    hasher.update(&read(last));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(bytes: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        contents(&mut hasher, bytes, Cow::Borrowed);
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
