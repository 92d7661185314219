//! Models in several files: which part a file is, what the others are called, whether they belong together.

mod common;

use common::assert_mentions;
use infer_formats::{Gguf, GgufWriter, Split, TensorType, Value, check_splits};

/// Part `number` of `count`, with `tensors` tensors of its own, in the types that `gguf-split` writes.
fn part(number: u16, count: u16, tensors: usize, promised: i32) -> Gguf {
    let mut writer = GgufWriter::new();
    writer.metadata("split.no", Value::U16(number)).unwrap();
    writer.metadata("split.count", Value::U16(count)).unwrap();
    writer.metadata("split.tensors.count", Value::I32(promised)).unwrap();
    for index in 0..tensors {
        writer.tensor(format!("part{number}.{index}"), TensorType::F32, &[1], vec![0; 4]).unwrap();
    }
    Gguf::parse(&writer.finish()).unwrap()
}

#[test]
fn siblings_are_named_in_order() {
    let split = part(1, 3, 0, 5).split().unwrap().unwrap();
    assert_eq!(split, Split { number: 1, count: 3, tensors: Some(5) });
    let names = split.file_names("big-model-Q4_0-00002-of-00003.gguf").unwrap();
    let expected = [1, 2, 3].map(|number| format!("big-model-Q4_0-0000{number}-of-00003.gguf"));
    assert_eq!(names, expected);
}

#[test]
fn renamed_files_are_refused() {
    let split = Split { number: 1, count: 3, tensors: None };
    for name in ["model.gguf", "m-00001-of-00003.gguf", "m-00002-of-00004.gguf", "m-2-of-3.gguf", ""] {
        let error = split.file_names(name).unwrap_err();
        assert_mentions(&error, &[&format!("{name:?}"), "-00002-of-00003.gguf", "split.no"]);
    }
}

#[test]
fn impossible_parts_are_refused() {
    let with = |entries: &[(&str, Value)]| {
        let mut writer = GgufWriter::new();
        for (key, value) in entries {
            writer.metadata(*key, value.clone()).unwrap();
        }
        Gguf::parse(&writer.finish()).unwrap().split()
    };
    let absent = with(&[("split.count", Value::U16(2))]).unwrap_err();
    assert_mentions(&absent, &["split.no is absent with split.count 2"]);
    let beyond = with(&[("split.count", Value::U16(2)), ("split.no", Value::U16(2))]).unwrap_err();
    assert_mentions(&beyond, &["split.no is 2 with split.count 2", "below split.count"]);
    let many = with(&[("split.count", Value::U64(u64::MAX)), ("split.no", Value::U16(0))]).unwrap_err();
    assert_mentions(&many, &["18446744073709551615", "at most 99999"]);
    let negative = with(&[("split.count", Value::I32(-1))]).unwrap_err();
    assert_mentions(&negative, &["\"split.count\" is -1 (i32)"]);
    let text = with(&[("split.count", Value::U16(2)), ("split.no", Value::String("0".into()))]).unwrap_err();
    assert_mentions(&text, &["\"split.no\" is the string \"0\""]);
    assert_eq!(with(&[]).unwrap(), None);
    assert_eq!(with(&[("split.count", Value::U16(0)), ("split.no", Value::U16(0))]).unwrap(), None);
}

#[test]
fn parts_must_belong_together() {
    check_splits(&[part(0, 3, 0, 5), part(1, 3, 2, 5), part(2, 3, 3, 5)]).unwrap();
    let swapped = check_splits(&[part(1, 2, 1, 2), part(0, 2, 1, 2)]).unwrap_err();
    assert_mentions(&swapped, &["file 1", "split.no 1 of split.count 2", "split.no 0"]);
    let missing = check_splits(&[part(0, 3, 1, 2), part(1, 3, 1, 2)]).unwrap_err();
    assert_mentions(&missing, &["file 1", "split.count 3", "split.count 2"]);
    let fewer = check_splits(&[part(0, 2, 1, 3), part(1, 2, 1, 3)]).unwrap_err();
    assert_mentions(&fewer, &["split.tensors.count is 3", "expected 2"]);
    let whole = Gguf::parse(&GgufWriter::new().finish()).unwrap();
    let stranger = check_splits(&[part(0, 2, 1, 1), whole]).unwrap_err();
    assert_mentions(&stranger, &["file 2", "no part of a split model"]);
}
