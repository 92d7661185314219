//! Weights one piece at a time, for backends outside of this crate.

use std::path::{Path, PathBuf};

use infer_kernels::{Format, KvElement, dequantize};
use infer_model::{
    Blueprint, Checkpoint, CpuModel, KvTypes, LoadOptions, PlainType, Quantization, Role, RowForm,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/models/golden").join(name)
}

fn open(name: &str, element: PlainType) -> Blueprint {
    let checkpoint = Checkpoint::open(&golden(name), true).expect("a golden model");
    Blueprint::new(checkpoint, KvTypes::all(KvElement::F32), element, None, "test").expect("complete")
}

fn matrix(model: &Blueprint, matrix: usize) -> Vec<u8> {
    let (rows, columns) = model.matrix_shape(matrix);
    let mut all = vec![0; rows * columns * model.element().bytes()];
    model.read_matrix(matrix, 0, 3, RowForm::Plain(model.element()), &mut all).expect("fits");
    all
}

#[test]
fn pieces_of_a_matrix_are_those_of_the_whole() {
    // Merged from parts: queries, keys and values; in GPT-2 transposed.
    for name in ["llama", "gpt2", "llama/model.q4_0.gguf"] {
        let model = open(name, PlainType::Bf16);
        let number =
            model.program().matrices.iter().position(|key| key.parts.len() == 3).expect("q, k and v");
        let (rows, columns) = model.matrix_shape(number);
        let (all, width) = (matrix(&model, number), columns * 2);
        for count in [1, 3, rows - 1] {
            let mut pieces = Vec::new();
            for first in (0..rows).step_by(count) {
                let mut piece = vec![0; count.min(rows - first) * width];
                model
                    .read_matrix(number, first, 2, RowForm::Plain(PlainType::Bf16), &mut piece)
                    .expect("fits");
                pieces.extend(piece);
            }
            assert!(pieces == all, "{name}, {count} rows at a time");
        }
    }
}

#[test]
fn bf16_is_the_rounded_f32_and_exact_where_it_is_stored_so() {
    for name in ["llama", "qwen2_moe", "llama/model.q8_0.gguf"] {
        let (exact, rounded) = (open(name, PlainType::F32), open(name, PlainType::Bf16));
        for number in (0..exact.program().matrices.len()).filter(|number| exact.matrix_shape(*number).0 > 0) {
            let (exact, rounded) = (matrix(&exact, number), matrix(&rounded, number));
            let wide = exact.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            let narrow = rounded.as_chunks::<2>().0.iter().map(|bytes| u32::from(u16::from_le_bytes(*bytes)));
            for (wide, narrow) in wide.zip(narrow) {
                let narrow = f32::from_bits(narrow << 16);
                assert!((wide - narrow).abs() <= wide.abs() / 256.0, "{name}: {wide} became {narrow}");
                assert!(wide == narrow || name.ends_with("gguf"), "{name} is stored in bfloat16");
            }
        }
    }
}

#[test]
fn stored_rows_are_those_of_the_file_and_say_what_they_become() {
    let model = open("llama/model.q4_0.gguf", PlainType::F32);
    let (rows, columns) = model.matrix_shape(0);
    for part in model.matrix_formats(0).expect("known types") {
        assert_eq!((part.stored, part.target), (Format::Q4_0, Format::Q4_0));
    }
    let mut stored = vec![0; rows * Format::Q4_0.row_bytes(columns).expect("whole blocks")];
    model.read_matrix(0, 0, 2, RowForm::Stored, &mut stored).expect("fits");
    let mut values = vec![0.0; rows * columns];
    dequantize(Format::Q4_0, &stored, &mut values);
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert!(bytes == matrix(&model, 0), "the same weights");

    let checkpoint = Checkpoint::open(&golden("llama"), true).expect("a golden model");
    let int4 = Some(Quantization::from_name("int4").expect("known"));
    let types = KvTypes::all(KvElement::F32);
    let model = Blueprint::new(checkpoint, types, PlainType::F32, int4, "test").expect("complete");
    assert_eq!(model.quantization(), int4);
    let parts = model.matrix_formats(0).expect("whole groups");
    assert_eq!(parts.iter().map(|part| part.rows).sum::<usize>(), model.matrix_shape(0).0);
    assert!(parts.iter().all(|part| (part.stored, part.target) == (Format::Bf16, Format::Q4_0)));
    assert_eq!(model.table_formats(Role::Embedding).expect("whole groups").target, Format::Q8_0);

    let checkpoint = Checkpoint::open(&golden("llama/model.q4_0.gguf"), true).expect("a golden model");
    let types = KvTypes::all(KvElement::F32);
    assert!(Blueprint::new(checkpoint, types, PlainType::F32, int4, "test").is_err(), "rounded already");
}

#[test]
fn what_does_not_fit_is_refused() {
    let model = open("llama", PlainType::F32);
    let (rows, columns) = model.matrix_shape(0);
    let form = RowForm::Plain(PlainType::F32);
    assert!(
        model.read_matrix(0, 0, 1, form, &mut vec![0; columns * 4 + 1]).is_err(),
        "no whole number of rows"
    );
    assert!(model.read_matrix(0, rows, 1, form, &mut vec![0; columns * 4]).is_err(), "behind the last row");
    assert!(
        model.read_table(Role::Position, 0, 1, RowForm::Stored, &mut []).is_err(),
        "llama has no learned positions"
    );
    assert_eq!(model.table_shape(Role::Position), None);
    assert!(open("gpt2", PlainType::F32).table_shape(Role::Position).is_some());
}

#[test]
fn backends_do_not_share_pages() {
    let options = LoadOptions {
        threads: Some(1),
        precision: infer_kernels::Precision::Exact,
        mmap: true,
        kv_types: KvTypes::all(KvElement::F32),
        quantization: None,
        packed_cache_dir: None,
    };
    let cpu = CpuModel::load(&golden("llama"), &options).expect("a golden model");
    let model = open("llama", PlainType::F32);
    assert_eq!(model.page_bytes(), cpu.page_bytes());
    assert_ne!(model.fingerprint().get().unwrap(), cpu.fingerprint().get().unwrap());
    assert_ne!(
        model.fingerprint().get().unwrap(),
        open("llama", PlainType::Bf16).fingerprint().get().unwrap()
    );
}
