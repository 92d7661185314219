//! What must hold for every input: no panic, and whatever is accepted is true. The fuzz targets call these
//! too.
#![allow(dead_code, reason = "a fuzz target calls one of them")]

use std::borrow::Cow;

use infer_formats::{
    FormatError, Gguf, GgufWriter, Safetensors, SafetensorsIndex, TensorInfo, Value, check_splits,
};

/// Parses; on success each tensor lies within the file, is as long as its shape says, shares no byte, is
/// found by name, and the file survives being written anew.
pub fn gguf(file: &[u8]) -> Result<Gguf, FormatError> {
    let parsed = Gguf::parse(file)?;
    tensors_are_true(&parsed.tensors, file, |name| parsed.tensor(name));
    for (key, value) in parsed.metadata.iter() {
        assert!(std::ptr::eq(parsed.metadata.get(key).expect("listed keys are found"), value));
        getters_agree(&parsed, key, value);
    }
    if let Ok(Some(split)) = parsed.split() {
        assert!(split.number < split.count);
        // Building 99,999 names for each mutant would only slow the search.
        if split.count < 100 {
            let names = split.file_names(&format!("m-{:05}-of-{:05}.gguf", split.number + 1, split.count));
            assert_eq!(names.expect("the suffix is this part's").len(), split.count);
        }
    }
    let _ = check_splits(std::slice::from_ref(&parsed));
    let written = rewritten(&parsed, file);
    match Gguf::parse(&written) {
        Ok(again) => assert_eq!(rewritten(&again, &written), written, "a second rewriting changes the file"),
        // Gaps between tensors were dropped, and with them some of the budget.
        Err(FormatError::OverBudget { .. }) => assert!(written.len() < file.len()),
        Err(error) => panic!("the rewritten file is refused: {error}"),
    }
    Ok(parsed)
}

/// The same metadata and tensors, written anew.
pub fn rewritten(parsed: &Gguf, file: &[u8]) -> Vec<u8> {
    let mut writer = GgufWriter::new();
    for (key, value) in parsed.metadata.iter() {
        writer.metadata(key, value.clone()).expect("an accepted entry can be written");
    }
    for tensor in &parsed.tensors {
        let bytes = Cow::Borrowed(tensor.bytes(file).expect("ranges lie within the file"));
        let added = writer.tensor(tensor.name.as_str(), tensor.tensor_type, &tensor.shape, bytes);
        added.expect("an accepted tensor can be written");
    }
    let mut streamed = Vec::new();
    writer.write(&mut streamed).expect("a vector takes all");
    let whole = writer.finish();
    assert_eq!(streamed, whole, "write and finish differ");
    whole
}

/// Exactly the getters of the value's kind return something.
fn getters_agree(parsed: &Gguf, key: &str, value: &Value) {
    let metadata = &parsed.metadata;
    assert_eq!(metadata.bool(key).is_ok(), matches!(value, Value::Bool(_)));
    assert_eq!(metadata.str(key).is_ok(), matches!(value, Value::String(_)));
    if let Ok(Some(unsigned)) = metadata.u64(key) {
        assert_eq!(metadata.i64(key).ok().flatten(), i64::try_from(unsigned).ok());
    }
    if let (Ok(Some(unsigned)), Ok(Some(signed))) = (metadata.u64s(key), metadata.i32s(key)) {
        assert!(unsigned.iter().zip(&signed).all(|(&left, &right)| i64::try_from(left) == Ok(right.into())));
    }
    let _ = (metadata.f32(key), metadata.f32s(key), metadata.bools(key), metadata.strings(key));
}

/// Parses; on success the tensors also cover the file's data without gap.
pub fn safetensors(file: &[u8]) -> Result<Safetensors, FormatError> {
    let parsed = Safetensors::parse(file)?;
    tensors_are_true(&parsed.tensors, file, |name| parsed.tensor(name));
    for pair in parsed.tensors.windows(2) {
        assert_eq!(pair[0].range.end, pair[1].range.start, "a gap");
    }
    if let Some(last) = parsed.tensors.last() {
        assert_eq!(last.range.end, file.len(), "bytes after the last tensor");
    }
    Ok(parsed)
}

/// Parses; on success each file name stays in its folder.
pub fn safetensors_index(text: &[u8]) -> Result<SafetensorsIndex, FormatError> {
    let parsed = SafetensorsIndex::parse(text)?;
    let files = parsed.files();
    assert!(!files.is_empty() && files.is_sorted_by(|left, right| left < right));
    for file in files {
        let mut components = std::path::Path::new(file).components();
        assert!(matches!(components.next(), Some(std::path::Component::Normal(_))), "{file:?}");
        assert_eq!(components.next(), None, "{file:?}");
        assert!(file.ends_with(".safetensors") && !file.contains(['/', '\\', '\0', ':']), "{file:?}");
    }
    Ok(parsed)
}

fn tensors_are_true<'a>(
    tensors: &'a [TensorInfo],
    file: &[u8],
    find: impl Fn(&str) -> Option<&'a TensorInfo>,
) {
    let mut ranges = Vec::new();
    for tensor in tensors {
        let bytes = tensor.bytes(file).expect("ranges lie within the file");
        let elements = tensor.shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
        assert_eq!(elements, Some(tensor.elements()));
        assert_eq!(tensor.tensor_type.byte_len(tensor.elements()), Some(bytes.len()));
        assert!(!bytes.is_empty());
        assert!(std::ptr::eq(find(&tensor.name).expect("listed tensors are found"), tensor));
        ranges.push((tensor.range.start, tensor.range.end));
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "tensors overlap");
}
