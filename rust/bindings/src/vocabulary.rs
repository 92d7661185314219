//! GGUF metadata to the text room's vocabulary, and back.

use std::collections::BTreeMap;

use infer_formats::{Array, FormatError, Metadata, Value};
use infer_model::END_TOKENS_KEY;
use infer_text::GgufVocabulary;

/// Keys of ids that end a text, beside that of the end of a sequence.
const TURN_KEYS: [&str; 2] = ["eot_token_id", "eom_token_id"];
/// The usual chat template; further ones have their names after a dot.
const TEMPLATE: &str = "tokenizer.chat_template";

/// What the metadata says about text; none when it names no tokenizer.
///
/// # Errors
/// A key of the wrong type, or an id outside 32 bits.
pub fn from_metadata(metadata: &Metadata) -> Result<Option<GgufVocabulary>, String> {
    read(metadata).map_err(|error| error.to_string())
}

fn read(metadata: &Metadata) -> Result<Option<GgufVocabulary>, FormatError> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let huggingface_json = metadata.str("tokenizer.huggingface.json")?.map(str::to_owned);
    let model = match metadata.str(&key("model"))? {
        None if huggingface_json.is_none() => return Ok(None),
        model => model.unwrap_or_default(),
    };
    // Writers mark an absent token by an id outside 32 bits (-1 as unsigned), so such an id is no token rather than an error.
    let id = |name: &str| Ok(metadata.i64(&key(name))?.and_then(|id| u32::try_from(id).ok()));
    let strings = |name: &str| Ok(metadata.strings(&key(name))?.unwrap_or_default().to_vec());
    let mut end_of_turn_ids = Vec::new();
    for name in TURN_KEYS {
        end_of_turn_ids.extend(id(name)?);
    }
    let more = metadata.u64s(END_TOKENS_KEY)?.unwrap_or_default();
    end_of_turn_ids.extend(more.into_iter().filter_map(|id| u32::try_from(id).ok()));
    Ok(Some(GgufVocabulary {
        model: model.to_owned(),
        pre: metadata.str(&key("pre"))?.map(str::to_owned),
        tokens: strings("tokens")?,
        scores: metadata.f32s(&key("scores"))?.unwrap_or_default().to_vec(),
        token_type: metadata.i32s(&key("token_type"))?.unwrap_or_default(),
        merges: strings("merges")?,
        bos_token_id: id("bos_token_id")?,
        eos_token_id: id("eos_token_id")?,
        unknown_token_id: id("unknown_token_id")?,
        padding_token_id: id("padding_token_id")?,
        end_of_turn_ids,
        add_bos_token: metadata.bool(&key("add_bos_token"))?,
        add_eos_token: metadata.bool(&key("add_eos_token"))?,
        add_space_prefix: metadata.bool(&key("add_space_prefix"))?,
        remove_extra_whitespaces: metadata.bool(&key("remove_extra_whitespaces"))?,
        precompiled_charsmap: bytes(metadata.get(&key("precompiled_charsmap"))),
        chat_template: metadata.str(TEMPLATE)?.map(str::to_owned),
        named_templates: named_templates(metadata)?,
        huggingface_json,
    }))
}

/// All templates but the usual one, by name.
fn named_templates(metadata: &Metadata) -> Result<BTreeMap<String, String>, FormatError> {
    let mut templates = BTreeMap::new();
    for (key, _) in metadata.iter() {
        let name = key.strip_prefix(TEMPLATE).and_then(|rest| rest.strip_prefix('.'));
        if let Some((name, source)) = name.zip(metadata.str(key).transpose()) {
            templates.insert(name.to_owned(), source?.to_owned());
        }
    }
    Ok(templates)
}

/// A vocabulary as metadata. That of a model without a tokenizer tells llama.cpp so.
pub fn to_metadata(vocabulary: GgufVocabulary) -> Vec<(String, Value)> {
    let model = if vocabulary.model.is_empty() { "none".to_owned() } else { vocabulary.model };
    let mut metadata = vec![("tokenizer.ggml.model".to_owned(), Value::String(model))];
    let mut add = |name: &str, value: Option<Value>| {
        metadata.extend(value.map(|value| (format!("tokenizer.{name}"), value)));
    };
    let strings = |list: Vec<String>| (!list.is_empty()).then_some(Value::Array(Array::String(list)));
    add("ggml.pre", vocabulary.pre.map(Value::String));
    add("ggml.tokens", strings(vocabulary.tokens));
    let scores = vocabulary.scores;
    add("ggml.scores", (!scores.is_empty()).then_some(Value::Array(Array::F32(scores))));
    let types = vocabulary.token_type;
    add("ggml.token_type", (!types.is_empty()).then_some(Value::Array(Array::I32(types))));
    add("ggml.merges", strings(vocabulary.merges));
    let mut turns = vocabulary.end_of_turn_ids;
    let more = turns.split_off(turns.len().min(TURN_KEYS.len()));
    let turns = TURN_KEYS.into_iter().zip(turns);
    let ids = [
        ("bos_token_id", vocabulary.bos_token_id),
        ("eos_token_id", vocabulary.eos_token_id),
        ("unknown_token_id", vocabulary.unknown_token_id),
        ("padding_token_id", vocabulary.padding_token_id),
    ];
    for (name, id) in ids.into_iter().chain(turns.map(|(name, id)| (name, Some(id)))) {
        add(&format!("ggml.{name}"), id.map(Value::U32));
    }
    add("ggml.add_bos_token", vocabulary.add_bos_token.map(Value::Bool));
    add("ggml.add_eos_token", vocabulary.add_eos_token.map(Value::Bool));
    add("ggml.add_space_prefix", vocabulary.add_space_prefix.map(Value::Bool));
    add("ggml.remove_extra_whitespaces", vocabulary.remove_extra_whitespaces.map(Value::Bool));
    add("chat_template", vocabulary.chat_template.map(Value::String));
    add("chat_templates", strings(vocabulary.named_templates.keys().cloned().collect()));
    for (name, source) in vocabulary.named_templates {
        add(&format!("chat_template.{name}"), Some(Value::String(source)));
    }
    add("huggingface.json", vocabulary.huggingface_json.map(Value::String));
    if !more.is_empty() {
        metadata.push((END_TOKENS_KEY.to_owned(), Value::Array(Array::U32(more))));
    }
    metadata
}

/// Byte arrays are written signed by some and unsigned by others.
fn bytes(value: Option<&Value>) -> Vec<u8> {
    match value {
        Some(Value::Array(Array::U8(bytes))) => bytes.clone(),
        Some(Value::Array(Array::I8(bytes))) => bytes.iter().map(|byte| byte.cast_unsigned()).collect(),
        _ => Vec::new(),
    }
}
