//! Speed of `linear`: GB/s of weights and GFLOP/s, per layout, instruction set and number of rows, beside the speed of
//! plain reading. `cargo run --release -p infer-kernels --example linear_speed -- [threads] [rows] [columns] [format ...]`

#![allow(clippy::print_stdout)] // it is a command

use infer_kernels::{
    Context, Format, Isa, PackedMatrix, Pool, Precision, Rows, RowsMut, Scratch, linear, quantize,
};
use std::hint::black_box;
use std::time::Instant;

/// What is measured when no format is named; formats of one layout are alike.
const FORMATS: [Format; 9] = [
    Format::F32,
    Format::F16,
    Format::Bf16,
    Format::Q8_0,
    Format::Q4_0,
    Format::Q4_K,
    Format::Q5_K,
    Format::Q6_K,
    Format::IQ4_XS,
];

/// Least seconds of many runs.
fn least(mut body: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut least = f64::MAX;
    while begin.elapsed().as_secs_f64() < 0.25 {
        let start = Instant::now();
        body();
        least = least.min(start.elapsed().as_secs_f64());
    }
    least
}

fn read_speed(context: &Context) -> f64 {
    let words = vec![1_u64; 32 << 20];
    let seconds = least(|| {
        context.pool.run(64, |task| {
            let part = &words[task * words.len() / 64..(task + 1) * words.len() / 64];
            black_box(part.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word)));
        });
    });
    (words.len() * 8) as f64 / seconds / 1e9
}

/// A matrix whose rows are all the same.
fn matrix(context: &Context, format: Format, rows: usize, columns: usize) -> PackedMatrix {
    let values: Vec<f32> = (0..columns).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut row = Vec::new();
    if format.is_writable() {
        quantize(format, &values, &mut row);
    } else {
        // Random codes, and scales between 0 and 1.
        let bytes = format.row_bytes(columns).expect("whole blocks");
        row.extend((0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 & 0x3b));
    }
    PackedMatrix::pack(context, format, columns, &vec![&row[..]; rows], &()).expect("memory")
}

/// Several, together far larger than the caches.
fn matrices(context: &Context, format: Format, rows: usize, columns: usize) -> Vec<PackedMatrix> {
    let first = matrix(context, format, rows, columns);
    let count = (400 << 20) / first.bytes().max(1);
    std::iter::once(first).chain((0..count.min(40)).map(|_| matrix(context, format, rows, columns))).collect()
}

fn main() {
    let arguments: Vec<usize> =
        std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let get = |index: usize, default: usize| arguments.get(index).copied().unwrap_or(default);
    let (threads, rows, columns) = (get(0, 2), get(1, 2048), get(2, 2048));
    let named: Vec<Format> = std::env::args().filter_map(|name| Format::from_name(&name)).collect();
    let formats = if named.is_empty() { FORMATS.to_vec() } else { named };
    let isas = match std::env::var_os("INFER_ISA") {
        Some(_) => vec![Isa::from_env().expect("INFER_ISA")],
        None => Isa::available().into_iter().filter(|&isa| isa != Isa::Scalar).collect(),
    };
    for isa in isas {
        let context = Context { isa, pool: Pool::shared(threads).expect("threads") };
        let empty = least(|| context.pool.run(threads, |_| ())) * 1e6;
        println!(
            "{}: plain reading {:.1} GB/s; an empty run {empty:.2} us",
            isa.name(),
            read_speed(&context)
        );
        let exact = formats.iter().filter(|format| format.block_len() > 1);
        let exact: Vec<_> = exact.map(|&format| (format, Precision::Exact)).collect();
        for (format, precision) in formats.iter().map(|&format| (format, Precision::Auto)).chain(exact) {
            let weights = matrices(&context, format, rows, columns);
            let pack = least(|| drop(black_box(matrix(&context, format, rows, columns))));
            print!(
                "{:5} {precision:?} pack {:.1} GB/s",
                format.name(),
                weights[0].bytes() as f64 / pack / 1e9
            );
            for count in [1, 4, 8, 16, 32, 128, 512] {
                speed(&context, &weights, count, precision);
            }
            println!();
        }
    }
}

fn speed(context: &Context, weights: &[PackedMatrix], count: usize, precision: Precision) {
    let (rows, columns) = (weights[0].rows(), weights[0].columns());
    let input: Vec<f32> = (0..count * columns).map(|i| (i as f32 * 0.73).cos()).collect();
    let mut output = vec![0.0; count * rows];
    let mut scratch = Scratch::default();
    let mut next = 0;
    let seconds = least(|| {
        let weight = &weights[next % weights.len()]; // the caches have forgotten it since its last turn
        next += 1;
        let output = RowsMut::new(&mut output, count, rows, rows);
        linear(
            context,
            weight,
            Rows::new(&input, count, columns, columns),
            output,
            None,
            precision,
            &mut scratch,
        );
    });
    let bytes = weights[0].bytes();
    let operations = 2.0 * (count * rows * columns) as f64;
    print!(" | {count}: {:.1} GB/s {:.0} GF", bytes as f64 / seconds / 1e9, operations / seconds / 1e9);
}
