//! Speed of `linear` at the shapes of a 1B Llama, instruction set beside instruction set, one line of JSON per figure.
//! `cargo run --release -p infer-kernels --example matrix_unit_speed -- [threads,...] [rows,...] [format,...] [isa,...]`

#![allow(clippy::print_stdout)] // it is a command

use infer_kernels::{
    Context, Format, Isa, PackedMatrix, Pool, Precision, Rows, RowsMut, Scratch, linear, quantize,
};
use std::time::Instant;

/// Output rows and columns.
const SHAPES: [(usize, usize); 3] = [(2048, 2048), (8192, 2048), (2048, 8192)];

/// Together larger than the caches.
const BYTES: usize = 256 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let list = |at: usize, default: &str| -> Vec<String> {
        let text = arguments.get(at).map_or(default, String::as_str);
        text.split(',').map(str::to_owned).collect()
    };
    let numbers = |at: usize, default: &str| -> Vec<usize> {
        list(at, default).iter().map(|text| text.parse().expect("a number")).collect()
    };
    for threads in numbers(0, "2") {
        let context = Context::new(threads).expect("threads");
        for format in list(2, "BF16,Q8_0,Q4_0,Q4_K,Q6_K") {
            let format = Format::from_name(&format).expect("a format");
            for (rows, columns) in SHAPES {
                let weights = matrices(&context, format, rows, columns);
                for count in numbers(1, "1,8,16,512") {
                    for isa in list(3, "avx512bf16,amx") {
                        let isa = Isa::from_name(&isa).expect("an instruction set");
                        let context = Context { isa, pool: Pool::shared(threads).expect("threads") };
                        report(&context, &weights, count);
                    }
                }
            }
        }
    }
}

/// Copies of a matrix whose rows are all the same.
fn matrices(context: &Context, format: Format, rows: usize, columns: usize) -> Vec<PackedMatrix> {
    let values: Vec<f32> = (0..columns).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut row = Vec::new();
    if format.is_writable() {
        quantize(format, &values, &mut row);
    } else {
        // Random codes, and scales between 0 and 1.
        let bytes = format.row_bytes(columns).expect("whole blocks");
        row.extend((0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 & 0x3b));
    }
    let pack = || PackedMatrix::pack(context, format, columns, &vec![&row[..]; rows], &()).expect("memory");
    let first = pack();
    let count = BYTES / first.bytes();
    std::iter::once(first).chain((0..count).map(|_| pack())).collect()
}

fn report(context: &Context, weights: &[PackedMatrix], count: usize) {
    let (rows, columns) = (weights[0].rows(), weights[0].columns());
    let input: Vec<f32> = (0..count * columns).map(|i| (i as f32 * 0.73).cos()).collect();
    let mut output = vec![0.0; count * rows];
    let mut scratch = Scratch::default();
    let (begin, mut times) = (Instant::now(), Vec::new());
    while begin.elapsed().as_secs_f64() < 0.1 || times.len() < 5 {
        let weight = &weights[times.len() % weights.len()]; // the caches have forgotten it since its last turn
        let start = Instant::now();
        let output = RowsMut::new(&mut output, count, rows, rows);
        let input = Rows::new(&input, count, columns, columns);
        linear(context, weight, input, output, None, Precision::Auto, &mut scratch);
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 4];
    println!(
        "{{\"isa\": \"{}\", \"threads\": {}, \"format\": \"{}\", \"shape\": [{rows}, {columns}], \"rows\": {count}, \
         \"microseconds\": {:.1}, \"tera_operations\": {:.3}, \"gigabytes\": {:.1}}}",
        context.isa.name(),
        context.pool.threads(),
        weights[0].format().name(),
        seconds * 1e6,
        2.0 * (count * rows * columns) as f64 / seconds / 1e12,
        weights[0].bytes() as f64 / seconds / 1e9,
    );
}
