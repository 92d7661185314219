//! Indices of sharded checkpoints: only plain names of safetensors files in the same folder pass.

mod common;

use common::{assert_mentions, properties};
use infer_formats::FormatError;

fn refused(text: &str, mentions: &[&str]) -> FormatError {
    let error = properties::safetensors_index(text.as_bytes()).expect_err("the index lies");
    assert_mentions(&error, mentions);
    error
}

#[test]
fn files_are_distinct_and_sorted() {
    let text = r#"{"metadata":{"total_size":12,"nested":[{"a":1e5}]},"weight_map":{
        "c":"model-00002-of-00002.safetensors","a":"model-00001-of-00002.safetensors",
        "b":"model-00002-of-00002.safetensors"}}"#;
    let index = properties::safetensors_index(text.as_bytes()).unwrap();
    assert_eq!(index.files(), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    assert_eq!(index.weight_map["a"], "model-00001-of-00002.safetensors");
    assert_eq!(index.weight_map.len(), 3);
}

#[test]
fn paths_are_refused() {
    let hostile = [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "..\\\\model.safetensors",
        "C:model.safetensors",
        "\\\\\\\\host\\\\share\\\\m.safetensors",
        "model\\u0000.safetensors",
        "model\\n.safetensors",
        ".safetensors",
        "..safetensors",
        "..",
        "",
        "pytorch_model.bin",
        "model.safetensors.pt",
        "model.SAFETENSORS",
    ];
    for name in hostile {
        let text = format!(r#"{{"weight_map":{{"lm_head":"{name}"}}}}"#);
        refused(&text, &["the file of tensor \"lm_head\"", "plain file name", ".safetensors"]);
    }
    let long = format!(r#"{{"weight_map":{{"w":"{}.safetensors"}}}}"#, "x".repeat(250));
    assert!(refused(&long, &["plain file name"]).to_string().len() < 400);
}

#[test]
fn other_json_is_refused() {
    refused("", &["the index is not the JSON"]);
    refused("[]", &["an object with a weight_map"]);
    refused("{}", &["missing field `weight_map`"]);
    refused(r#"{"weight_map":{}}"#, &["weight_map is empty", "at least one tensor"]);
    refused(r#"{"weight_map":[]}"#, &["weight_map: an object from strings to strings"]);
    refused(r#"{"weight_map":{"a":1}}"#, &["expected a string"]);
    refused(r#"{"weight_map":{"a":"x.safetensors"}}}"#, &["trailing characters"]);
    let twice = r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#;
    refused(twice, &["tensor \"a\" occurs more than once"]);
    refused(r#"{"weight_map":{},"weight_map":{}}"#, &["duplicate field `weight_map`"]);
    refused(&format!("{{\"metadata\":{}", "[".repeat(60_000)), &["not the JSON"]);
}

#[test]
fn every_truncation_is_refused() {
    let text = r#"{"weight_map":{"a":"x.safetensors","b":"y.safetensors"}}"#;
    for end in 0..text.len() {
        refused(&text[..end], &["line 1"]);
    }
}
