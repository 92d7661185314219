//! Speed of packing, GB of file per second: each format on one thread and on two, from more memory than caches hold into fresh one.

#![allow(clippy::print_stdout)]

use infer_kernels::{Context, Format, PackedMatrix};
use std::time::Instant;

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let (rows, columns) = (32_768_usize, 4096_usize);
    for &format in Format::ALL {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == format.name()) {
            continue;
        }
        let width = format.row_bytes(columns).unwrap();
        let mut state = 1_u32;
        let bytes: Vec<u8> = (0..rows * width)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8 & 0x3f
            })
            .collect();
        let slices: Vec<&[u8]> = bytes.chunks(width).collect();
        print!("{:10}", format.name());
        for threads in [1, 2] {
            let context = Context::new(threads).unwrap();
            let mut best = f64::MAX;
            for _ in 0..5 {
                let start = Instant::now();
                let matrix = PackedMatrix::pack(&context, format, columns, &slices, &()).unwrap();
                best = best.min(start.elapsed().as_secs_f64());
                drop(matrix);
            }
            print!(" {threads} threads {:6.2} GB/s", bytes.len() as f64 / 1e9 / best);
        }
        println!();
    }
}
