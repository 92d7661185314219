//! What a GGUF file cannot say of a model, in words.

use infer_formats::Metadata;
use infer_kernels::Activation;

use super::header::Entries;
use super::plan::{Planned, Source};
use crate::checkpoint::{Checkpoint, Tensor};
use crate::spec::{FeedForward, LayerSpec};
use crate::weights::Loader;
use crate::{ModelError, ModelSpec, gguf};

/// What our own reader makes of a header and tensors must be the model that the folder holds; else what a file cannot say.
pub(super) fn check(
    checkpoint: &Checkpoint,
    entries: &Entries,
    tensors: &[Planned],
) -> Result<Option<String>, ModelError> {
    let path = checkpoint.path();
    let metadata = Metadata::new(entries.clone())
        .map_err(|source| ModelError::Format { path: path.to_owned(), source: Box::new(source) })?;
    let find = |name: &str| {
        let planned = tensors.iter().find(|planned| planned.info.name == name)?;
        let bytes = match &planned.source {
            Source::Given(bytes) => bytes.as_slice(),
            _ => &[],
        };
        Some(Tensor::plain(&planned.info, bytes))
    };
    let (row, config) = gguf::config(&metadata, &find, path)?;
    let read = ModelSpec::read(row, &config)?;
    Ok(difference(&checkpoint.spec, &read))
}

/// Norms with a weight for each head are a tensor each in a folder, and have no name in GGUF.
pub(super) fn of_heads(loader: &Loader<'_>, error: ModelError) -> ModelError {
    match error {
        ModelError::UnknownTensor { name, architecture }
            if [loader.names.query_norm, loader.names.key_norm]
                .iter()
                .any(|norm| !norm.is_empty() && name.contains(norm))
                && loader.spec.qk_norm.is_some() =>
        {
            ModelError::Quantization(format!(
                "output: a GGUF file of {architecture} cannot hold the norms of single heads, such as `{name}`; write a folder instead"
            ))
        }
        other => other,
    }
}

/// The first thing in which a model that was read back is not the one that was written, as it goes on after "cannot say".
fn difference(own: &ModelSpec, read: &ModelSpec) -> Option<String> {
    // How many positions there are follows from how they are scaled, so that comes first.
    positions(own, read)
        .or_else(|| sizes(own, read))
        .or_else(|| structure(own, read))
        .or_else(|| numbers(own, read))
        .or_else(|| layers(own, read))
}

fn sizes(own: &ModelSpec, read: &ModelSpec) -> Option<String> {
    let sizes = |spec: &ModelSpec| {
        [
            ("the width (hidden_size)", spec.hidden),
            ("the number of tokens (vocab_size)", spec.vocabulary),
            ("the number of positions (max_position_embeddings)", spec.max_positions),
            ("the number of heads (num_attention_heads)", spec.heads),
            ("the number of heads of keys and values (num_key_value_heads)", spec.kv_heads),
            ("the width of a head (head_dim)", spec.head_dim),
        ]
    };
    let differs = sizes(own).into_iter().zip(sizes(read)).find(|(own, read)| own != read);
    differs.map(|((what, size), _)| format!("that {what} is {size}"))
}

fn structure(own: &ModelSpec, read: &ModelSpec) -> Option<String> {
    if own.qk_norm != read.qk_norm {
        return Some(match own.qk_norm {
            Some(_) => "that queries and keys have norms of this kind".to_owned(),
            None => "that queries and keys have no norms".to_owned(),
        });
    }
    let flags = |spec: &ModelSpec| [spec.parallel, spec.shared_norm, spec.tied];
    // Each as it is if the flag is set, and if it is not.
    let words = [
        [
            "that attention and feed-forward network are computed side by side",
            "that the feed-forward network comes after attention",
        ],
        [
            "that attention and feed-forward network share a norm",
            "that attention and feed-forward network have a norm each",
        ],
        [
            "that embedding and output head are one matrix (tie_word_embeddings)",
            "that embedding and output head are two matrices (tie_word_embeddings)",
        ],
    ];
    for ((own, read), words) in flags(own).into_iter().zip(flags(read)).zip(words) {
        if own != read {
            return Some(words[usize::from(!own)].to_owned());
        }
    }
    let other = own.activation != read.activation;
    other.then(|| format!("that the activation (hidden_act) is {}", activation_name(own.activation)))
}

/// The name of a configuration.
fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::GeluErf => "gelu",
        Activation::Relu => "relu",
        Activation::ReluSquared => "relu2",
    }
}

fn numbers(own: &ModelSpec, read: &ModelSpec) -> Option<String> {
    let numbers = |spec: &ModelSpec| {
        [
            ("the epsilon of norms", Some(spec.epsilon)),
            ("the soft cap of scores (attn_logit_softcapping)", spec.attention_softcap),
            ("the soft cap of logits (final_logit_softcapping)", spec.logit_softcap),
            ("the scale of scores", Some(spec.attention_scale)),
            ("the scale of the embedding", Some(spec.embedding_scale)),
            ("the scale of what layers add", Some(spec.residual_scale)),
            ("the scale of logits", Some(spec.logit_scale)),
        ]
    };
    let near = |own: Option<f32>, read: Option<f32>| match (own, read) {
        (Some(own), Some(read)) => near(own, read),
        (own, read) => own == read,
    };
    let differs =
        numbers(own).into_iter().zip(numbers(read)).find(|((_, own), (_, read))| !near(*own, *read));
    differs.map(|((what, number), _)| match number {
        Some(number) => format!("that {what} is {number}"),
        None => format!("that there is no {}", what.trim_start_matches("the ")),
    })
}

/// Equal but for a last digit: files hold `f32` of what configurations say in decimals.
fn near(left: f32, right: f32) -> bool {
    (left - right).abs() <= 1e-6 * left.abs()
}

fn layers(own: &ModelSpec, read: &ModelSpec) -> Option<String> {
    let windows = |spec: &ModelSpec| spec.layers.iter().map(|layer| layer.window).collect::<Vec<_>>();
    let is_dense = |layer: &LayerSpec| matches!(layer.feed_forward, FeedForward::Dense { .. });
    let dense = |spec: &ModelSpec| spec.layers.iter().map(is_dense).collect::<Vec<_>>();
    let ropes = |spec: &ModelSpec| spec.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>();
    let count = own.layers.len();
    let what = if count != read.layers.len() {
        return Some(format!("that there are {count} layers (num_hidden_layers)"));
    } else if windows(own) != windows(read) {
        match own.layers.iter().find_map(|layer| layer.window) {
            Some(window) => return Some(format!("which layers have sliding windows (of {window} tokens)")),
            None => "that no layer has a sliding window",
        }
    } else if dense(own) != dense(read) {
        "which layers are dense among layers with experts"
    } else if own.layers.iter().zip(&read.layers).any(|(own, read)| own.feed_forward != read.feed_forward) {
        "how wide the feed-forward networks are, or how experts are chosen"
    } else if ropes(own) != ropes(read) {
        "which layers rotate queries and keys, and how"
    } else {
        return None;
    };
    Some(what.to_owned())
}

fn positions(own: &ModelSpec, read: &ModelSpec) -> Option<String> {
    let same = own.ropes.len() == read.ropes.len()
        && own
            .ropes
            .iter()
            .zip(&read.ropes)
            .all(|(own, read)| own.rotary_dim == read.rotary_dim && own.is_near(read));
    (!same).then(|| "how positions are scaled or rotated (rope_parameters)".to_owned())
}
