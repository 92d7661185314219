//! Every quantized format against the `gguf` package, bit for bit. `tests/kernels/generate_quant.py` tells what the file
//! holds and how it was made.

use infer_kernels::{Format, dequantize};

const BLOCKS: &[u8] = include_bytes!("../../../tests/kernels/blocks.bin");

/// Random blocks per format, of which the file holds a hash of the values.
const RANDOM: usize = 300;

/// One format's part of the file.
struct Record<'a> {
    format: Format,
    blocks: &'a [u8],
    values: &'a [u8],
    cleared: Vec<usize>,
    hash: u64,
}

/// The next `count` bytes.
fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    bytes.split_off(..count).expect("the file goes on")
}

fn number(bytes: &mut &[u8]) -> usize {
    let low = take(bytes, 2);
    usize::from(u16::from_le_bytes([low[0], low[1]]))
}

fn records() -> Vec<Record<'static>> {
    let mut bytes = BLOCKS;
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let length = usize::from(take(&mut bytes, 1)[0]);
        let name = std::str::from_utf8(take(&mut bytes, length)).expect("a name");
        let format = Format::from_name(name).unwrap_or_else(|| panic!("{name} is unknown"));
        let (block_len, block_bytes, count) = (number(&mut bytes), number(&mut bytes), number(&mut bytes));
        assert_eq!((format.block_len(), format.block_bytes()), (block_len, block_bytes), "{name}");
        let blocks = take(&mut bytes, count * block_bytes);
        let values = take(&mut bytes, count * block_len * 4);
        let positions = number(&mut bytes);
        let cleared = (0..positions).map(|_| number(&mut bytes)).collect();
        let hash = u64::from_le_bytes(take(&mut bytes, 8).try_into().expect("8 bytes"));
        all.push(Record { format, blocks, values, cleared, hash });
    }
    all
}

#[test]
fn telling_blocks_have_the_reference_values() {
    for record in records() {
        let expected: Vec<u32> =
            record.values.as_chunks::<4>().0.iter().map(|bits| u32::from_le_bytes(*bits)).collect();
        let mut values = vec![0.0; expected.len()];
        dequantize(record.format, record.blocks, &mut values);
        for (index, (value, expected)) in values.iter().zip(&expected).enumerate() {
            let (block, at) = (index / record.format.block_len(), index % record.format.block_len());
            let name = record.format.name();
            assert_eq!(value.to_bits(), *expected, "{name}, block {block}, weight {at}: {value}");
        }
    }
}

#[test]
fn random_blocks_have_the_reference_values() {
    for record in records() {
        let (block_len, block_bytes) = (record.format.block_len(), record.format.block_bytes());
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let mut blocks: Vec<u8> = (0..RANDOM * block_bytes).map(|_| next()).collect();
        for block in blocks.chunks_mut(block_bytes) {
            record.cleared.iter().for_each(|&at| block[at] &= 0xbf);
        }
        let mut values = vec![0.0; RANDOM * block_len];
        dequantize(record.format, &blocks, &mut values);
        let hash = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        assert_eq!(hash, record.hash, "{}", record.format.name());
    }
}

#[test]
fn no_quantized_format_is_left_out() {
    let found: Vec<Format> = records().iter().map(|record| record.format).collect();
    let missing = Format::ALL.iter().filter(|format| format.block_len() > 1 && !found.contains(format));
    assert_eq!(missing.collect::<Vec<_>>(), [&Format::INT4_G128], "which GGUF has not");
}
