//! Writes a folder as one GGUF file with its tokenizer and chat template inside, the embedding and head in one format and all other
//! matrices in another. `infer quantize` is the command for people; this one makes the bundled models, whose tokenizer no kind of
//! llama.cpp's stands for.
//!
//! `cargo run --release -p infer-model --example export_gguf -- [--weights-only] FOLDER OUT.gguf EMBEDDING_FORMAT MATRIX_FORMAT [NAME]
//! [LICENCE]` where formats are f32, f16, bf16, q8_0 or q4_0; with `--weights-only` tokenizer and template stay away, for a model
//! that only guesses for another. tools/tinylm/bundle.py makes the bundled models with it.

use std::error::Error;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use infer_formats::Value;
use infer_kernels::{Context, Format};
use infer_model::{Checkpoint, ExportOptions, Quantization, export};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let weights_only = arguments.first().is_some_and(|first| first == "--weights-only");
    arguments.drain(..usize::from(weights_only));
    let [folder, out, embedding, matrices, rest @ ..] = &arguments[..] else {
        return Err(
            "usage: export_gguf [--weights-only] FOLDER OUT.gguf EMBEDDING_FORMAT MATRIX_FORMAT [NAME] [LICENCE]".into()
        );
    };
    let (matrices, file_type) = format(matrices)?;
    let quantization =
        Quantization { names: &["export"], matrices, ends: format(embedding)?.0, file_type: Some(file_type) };
    let checkpoint = Checkpoint::open(Path::new(folder), true)?;
    let mut metadata = if weights_only { Vec::new() } else { text_metadata(Path::new(folder))? };
    for (key, value) in ["general.name", "general.license"].into_iter().zip(rest) {
        metadata.push((key.to_owned(), Value::String(value.clone())));
    }
    let context = Context::new(infer_kernels::default_threads())?;
    let options = ExportOptions {
        quantization: Some(&quantization),
        metadata,
        context: &context,
        stop: &AtomicBool::new(false),
    };
    if Path::new(out).is_file() {
        std::fs::remove_file(out)?; // named to be replaced
    }
    export(&checkpoint, Path::new(out), &options)?;
    Ok(())
}

/// A format, and what a file's `general.file_type` calls it.
fn format(name: &str) -> Result<(Format, u32), String> {
    match name {
        "f32" => Ok((Format::F32, 0)),
        "f16" => Ok((Format::F16, 1)),
        "bf16" => Ok((Format::Bf16, 32)),
        "q8_0" => Ok((Format::Q8_0, 7)),
        "q4_0" => Ok((Format::Q4_0, 2)),
        other => Err(format!("unknown format {other}: f32, f16, bf16, q8_0 or q4_0")),
    }
}
/// The tokenizer, the chat template and the ids that end a text.
fn text_metadata(folder: &Path) -> Result<Vec<(String, Value)>, Box<dyn Error>> {
    let read = |name: &str| -> Result<serde_json::Value, Box<dyn Error>> {
        Ok(serde_json::from_slice(&std::fs::read(folder.join(name))?)?)
    };
    // Written again without the white space of the original.
    let tokenizer = read("tokenizer.json")?.to_string();
    let config = read("tokenizer_config.json")?;
    let mut metadata = vec![("tokenizer.huggingface.json".to_owned(), Value::String(tokenizer))];
    if let Some(template) = config["chat_template"].as_str() {
        metadata.push(("tokenizer.chat_template".to_owned(), Value::String(template.to_owned())));
    }
    let model = read("config.json")?;
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        let all = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
        all.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
    };
    let mut number = |key: &str, id: Option<&u32>| {
        if let Some(id) = id {
            metadata.push((format!("tokenizer.ggml.{key}_token_id"), Value::U32(*id)));
        }
    };
    let eos = ids(&model["eos_token_id"]);
    number("bos", ids(&model["bos_token_id"]).first());
    number("eos", eos.first());
    number("eot", eos.get(1));
    metadata.push(("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(config["add_bos_token"] == true)));
    Ok(metadata)
}
