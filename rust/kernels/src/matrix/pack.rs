//! From rows as they lie in a file to panels, in parallel, straight into the final buffer.

use super::{Layout, PackedMatrix};
use crate::quant::{BlockQ4_0, BlockQ8_0};
use crate::simd::LANES;
use crate::{Format, KernelError, Pool};
use std::sync::Mutex;

/// Bytes per row, once everything is proven to fit.
pub(super) fn check(format: Format, columns: usize, rows: &[&[u8]]) -> Result<usize, KernelError> {
    let Some(row_bytes) = format.row_bytes(columns) else {
        let expected = format!("a multiple of {} for {}", format.block_len(), format.name());
        return Err(KernelError::Size { what: "number of columns", actual: columns, expected });
    };
    match rows.iter().find(|row| row.len() != row_bytes) {
        Some(row) => {
            let expected = format!("{row_bytes} bytes for {columns} columns of {}", format.name());
            Err(KernelError::Size { what: "size of a row", actual: row.len(), expected })
        }
        None => Ok(row_bytes),
    }
}

/// Writes every panel.
pub(super) fn fill(pool: &Pool, matrix: &mut PackedMatrix, rows: &[&[u8]]) {
    let layout = matrix.layout;
    let panel_bytes = matrix.groups() * layout.group_bytes();
    let scale_bytes = if layout.is_integer() { matrix.groups() * LANES * 2 } else { 0 };
    if panel_bytes == 0 || rows.is_empty() {
        return;
    }
    let weights = matrix.weights.as_mut_slice().chunks_exact_mut(panel_bytes);
    let mut scales = matrix.scales.as_mut_slice().chunks_exact_mut(scale_bytes.max(1));
    // One lock per panel costs nothing beside packing it, and keeps this file free of `unsafe`.
    let panels: Vec<_> = (weights.zip(rows.chunks(LANES)))
        .map(|(weights, rows)| Mutex::new((weights, scales.next().unwrap_or_default(), rows)))
        .collect();
    pool.run(panels.len(), |panel| {
        let mut panel = panels[panel].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (weights, scales, rows) = &mut *panel;
        if layout.is_integer() && rows.len() < LANES {
            weights.fill(if layout == Layout::Int8 { 0x80 } else { 0x88 }); // an offset zero
        }
        for (lane, row) in rows.iter().enumerate() {
            match layout {
                Layout::F32 => interleave::<4>(row, lane, weights),
                Layout::F16 => interleave::<2>(row, lane, weights),
                Layout::Bf16 => interleave_pairs(row, lane, weights),
                Layout::Int8 => pack_int8(row, lane, weights, scales),
                Layout::Int4 => pack_int4(row, lane, weights, scales),
            }
        }
    });
}

/// Elements of `SIZE` bytes, one after the other, 16 lanes apart.
fn interleave<const SIZE: usize>(row: &[u8], lane: usize, weights: &mut [u8]) {
    for (element, step) in row.as_chunks::<SIZE>().0.iter().zip(weights.chunks_exact_mut(LANES * SIZE)) {
        step[lane * SIZE..][..SIZE].copy_from_slice(element);
    }
}

/// Elements of 2 bytes, two to a lane.
fn interleave_pairs(row: &[u8], lane: usize, weights: &mut [u8]) {
    for (pair, step) in row.chunks(4).zip(weights.chunks_exact_mut(64)) {
        step[lane * 4..][..pair.len()].copy_from_slice(pair);
    }
}

fn write_scale(scale: [u8; 2], group: usize, lane: usize, scales: &mut [u8]) {
    let native = u16::from_le_bytes(scale).to_ne_bytes();
    scales[(group * LANES + lane) * 2..][..2].copy_from_slice(&native);
}

fn pack_int8(row: &[u8], lane: usize, weights: &mut [u8], scales: &mut [u8]) {
    for (group, bytes) in row.as_chunks().0.iter().enumerate() {
        let block = BlockQ8_0::from_bytes(bytes);
        write_scale(block.scale, group, lane, scales);
        let steps = weights[group * 512..][..512].chunks_exact_mut(64);
        for (quants, step) in block.quants.as_chunks::<4>().0.iter().zip(steps) {
            step[lane * 4..][..4].copy_from_slice(&quants.map(|quant| quant ^ 0x80));
        }
    }
}

fn pack_int4(row: &[u8], lane: usize, weights: &mut [u8], scales: &mut [u8]) {
    for (group, bytes) in row.as_chunks().0.iter().enumerate() {
        let block = BlockQ4_0::from_bytes(bytes);
        write_scale(block.scale, group, lane, scales);
        let steps = weights[group * 256..][..256].chunks_exact_mut(64);
        for (nibbles, step) in block.nibbles().as_chunks::<8>().0.iter().zip(steps) {
            for i in 0..4 {
                step[lane * 4 + i] = nibbles[i] | nibbles[i + 4] << 4;
            }
        }
    }
}
