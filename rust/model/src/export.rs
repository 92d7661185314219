//! A checkpoint of the Llama layout as one GGUF file, quantized: how the bundled model is made.
//!
//! The file follows llama.cpp's conventions for `general.architecture = "llama"`: its tensor names, and the rows of Q
//! and K in pairs for interleaved rotation. The tokenizer goes in whole, under the specification's
//! `tokenizer.huggingface.json`, since no `tokenizer.ggml.pre` kind stands for an arbitrary pre-tokenizer.

use infer_formats::{GgufWriter, TensorType, Value};
use infer_kernels::{Format, quantize};

use crate::checkpoint::Checkpoint;
use crate::names;
use crate::spec::FeedForward;
use crate::weights::values;
use crate::{ModelError, ModelSpec};

/// Storage types of an exported file.
#[derive(Debug, Clone, Copy)]
pub struct ExportFormats {
    /// Of the embedding, which is the head as well where the two are tied, and of a head of its own.
    pub embedding: Format,
    /// Of all other matrices. Norms stay f32.
    pub matrices: Format,
}

/// Writes the model with further metadata (tokenizer, chat template, licence).
///
/// # Errors
/// An architecture with another layout than Llama's, or tensors that cannot be read.
pub fn export_gguf(
    checkpoint: &Checkpoint,
    formats: ExportFormats,
    metadata: Vec<(String, Value)>,
) -> Result<Vec<u8>, ModelError> {
    let spec = &checkpoint.spec;
    if spec.architecture() != "LlamaForCausalLM" || checkpoint.is_gguf() {
        let expected = "LlamaForCausalLM from safetensors";
        return Err(ModelError::config("architectures", spec.architecture(), expected));
    }
    let bad = |source| ModelError::Format { path: checkpoint.path().to_owned(), source: Box::new(source) };
    let mut writer = GgufWriter::new();
    for (key, value) in header(spec).into_iter().chain(metadata) {
        writer.metadata(key, value).map_err(bad)?;
    }
    for (from, to) in tensor_names(spec) {
        let Some(tensor) = checkpoint.tensor(&from) else {
            return Err(ModelError::MissingTensor { name: from });
        };
        let shape = tensor.info.shape.clone();
        let mut data = values(tensor)?;
        if from.ends_with("q_proj.weight") || from.ends_with("k_proj.weight") {
            data = paired(&data, shape[0], spec.head_dim);
        }
        let format = match shape.len() {
            1 => Format::F32,
            _ if from.contains("embed_tokens") || from.contains("lm_head") => formats.embedding,
            _ => formats.matrices,
        };
        let Some(stored) = tensor_type(format) else {
            let expected = "a format that this project can quantize to, such as Q8_0 or Q4_0";
            return Err(ModelError::config("format", format.name(), expected));
        };
        let mut bytes = Vec::new();
        quantize(format, &data, &mut bytes);
        writer.tensor(to, stored, &shape, bytes).map_err(bad)?;
    }
    Ok(writer.finish())
}

fn header(spec: &ModelSpec) -> Vec<(String, Value)> {
    let number = |value: usize| Value::U32(value as u32);
    let width = spec.layers.first().map_or(0, |layer| match layer.feed_forward {
        FeedForward::Dense { width } | FeedForward::Experts { width, .. } => width,
    });
    let rope = spec.ropes.first();
    let mut header = vec![
        ("general.architecture".to_owned(), Value::String("llama".to_owned())),
        ("llama.block_count".to_owned(), number(spec.layers.len())),
        ("llama.embedding_length".to_owned(), number(spec.hidden)),
        ("llama.feed_forward_length".to_owned(), number(width)),
        ("llama.attention.head_count".to_owned(), number(spec.heads)),
        ("llama.attention.head_count_kv".to_owned(), number(spec.kv_heads)),
        ("llama.attention.key_length".to_owned(), number(spec.head_dim)),
        ("llama.attention.value_length".to_owned(), number(spec.head_dim)),
        ("llama.attention.layer_norm_rms_epsilon".to_owned(), Value::F32(spec.epsilon)),
        ("llama.context_length".to_owned(), number(spec.max_positions)),
        ("llama.vocab_size".to_owned(), number(spec.vocabulary)),
    ];
    if let Some(rope) = rope {
        header.push(("llama.rope.freq_base".to_owned(), Value::F32(rope.theta as f32)));
        header.push(("llama.rope.dimension_count".to_owned(), number(rope.rotary_dim)));
    }
    header
}

/// Names in the checkpoint and in the file.
fn tensor_names(spec: &ModelSpec) -> Vec<(String, String)> {
    let (own, gguf) = (spec.arch.names, &names::GGUF);
    let weight = |name: &str| format!("{name}.weight");
    let mut all = vec![
        (weight(own.embedding), weight(gguf.embedding)),
        (weight(own.final_norm), weight(gguf.final_norm)),
    ];
    if !spec.tied {
        all.push((weight(own.head), weight(gguf.head)));
    }
    for layer in 0..spec.layers.len() {
        let place = |prefix: &str, name: &str| weight(&(prefix.replace("{}", &layer.to_string()) + name));
        let roles = [
            (own.attention_norm, gguf.attention_norm),
            (own.query, gguf.query),
            (own.key, gguf.key),
            (own.value, gguf.value),
            (own.output, gguf.output),
            (own.feed_forward_norm, gguf.feed_forward_norm),
            (own.gate, gguf.gate),
            (own.up, gguf.up),
            (own.down, gguf.down),
        ];
        all.extend(roles.map(|(from, to)| (place(own.layer, from), place(gguf.layer, to))));
    }
    all
}

/// Rows of each head from halves to pairs: what the loader undoes.
fn paired(data: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let (columns, half) = (data.len() / rows.max(1), head_dim / 2);
    let source = |row: usize| {
        let (head, at) = (row / head_dim, row % head_dim);
        head * head_dim + (at % 2) * half + at / 2
    };
    (0..rows).flat_map(|row| data[source(row) * columns..][..columns].iter().copied()).collect()
}

/// The file's name of a format; none for those that can only be read.
fn tensor_type(format: Format) -> Option<TensorType> {
    let named = |stored: &TensorType| stored.name() == format.name();
    TensorType::ALL.iter().copied().find(named).filter(|_| format.is_writable())
}
