//! What a model folder says about text: which tokenizer files there are, and the names of special tokens.

use std::io::Read;
use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer as Backend};

use crate::error::TextError;
use crate::tokenizer::{Surround, Tokenizer, adds_special, backend_from_json};
use crate::{merges, sentencepiece, tiktoken};

/// Largest tokenizer file that is read (the largest published one has 35 MB).
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Largest configuration file that is read.
pub(crate) const MAX_CONFIG_BYTES: u64 = 32 << 20;

/// Spellings of the special tokens that a tokenizer's files name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<String>,
    /// End of sequence.
    pub eos: Option<String>,
    /// Stands for what the vocabulary cannot express.
    pub unk: Option<String>,
    /// Padding.
    pub pad: Option<String>,
}

/// `tokenizer_config.json` and the older files that held parts of it.
#[derive(Debug, Default)]
pub(crate) struct Config {
    pub(crate) values: serde_json::Map<String, Value>,
    pub(crate) special: SpecialTokens,
    pub(crate) add_bos: Option<bool>,
    pub(crate) add_eos: Option<bool>,
    /// Tokens that the configuration adds to the vocabulary file: (id, token).
    pub(crate) added: Vec<(u32, AddedToken)>,
}

pub(crate) fn load(folder: &Path) -> Result<Option<Tokenizer>, TextError> {
    let config = Config::read(folder)?;
    let read = |name: &str| read_optional(&folder.join(name), MAX_TOKENIZER_BYTES);
    if let Some(bytes) = read("tokenizer.json")? {
        return from_tokenizer_json(&bytes, config).map(Some);
    }
    if let Some(bytes) = read("tokenizer.model")? {
        // A SentencePiece file begins with field 1, a tiktoken file with a base64 digit.
        return match bytes.first() {
            Some(0x0A) => sentencepiece::load(&bytes, config).map(Some),
            _ => tiktoken::load("tokenizer.model", &bytes, config).map(Some),
        };
    }
    if let Some(name) = tiktoken_file(folder)?
        && let Some(bytes) = read(&name)?
    {
        return tiktoken::load(&name, &bytes, config).map(Some);
    }
    match (read("vocab.json")?, read("merges.txt")?) {
        (Some(vocab), Some(merges)) => merges::load(&vocab, &merges, config).map(Some),
        _ => Ok(None),
    }
}

/// The first `*.tiktoken` file by name.
fn tiktoken_file(folder: &Path) -> Result<Option<String>, TextError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => return Err(TextError::read(folder, error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(|error| TextError::read(folder, error))?.file_name();
        names.extend(name.into_string().ok().filter(|name| name.ends_with(".tiktoken")));
    }
    Ok(names.into_iter().min())
}

fn from_tokenizer_json(bytes: &[u8], config: Config) -> Result<Tokenizer, TextError> {
    let backend = backend_from_json("tokenizer.json", bytes)?;
    // As in transformers 5: the post-processor of tokenizer.json decides. Only where it adds nothing and the
    // configuration explicitly asks for a token is that token added.
    let surround =
        if adds_special(&backend) { Surround::default() } else { config.surround(&backend, false) };
    finish(backend, config, surround)
}

/// Adds what the configuration adds and builds the tokenizer.
pub(crate) fn finish(
    mut backend: Backend,
    config: Config,
    surround: Surround,
) -> Result<Tokenizer, TextError> {
    for (id, token) in &config.added {
        if backend.token_to_id(&token.content) == Some(*id) {
            continue;
        }
        // tokenizer.json is the newer of the two files where they disagree; unknown ids cannot be placed freely.
        if backend.get_vocab_size(true) == *id as usize && backend.token_to_id(&token.content).is_none() {
            add_tokens(&mut backend, [token.clone()])?;
        }
    }
    Tokenizer::new(backend, config.special, surround)
}

/// Adds tokens, special ones as special.
pub(crate) fn add_tokens(
    backend: &mut Backend,
    tokens: impl IntoIterator<Item = AddedToken>,
) -> Result<(), TextError> {
    backend
        .add_tokens(tokens)
        .map(|_| ())
        .map_err(|error| TextError::invalid("added tokens", error.to_string()))
}

impl Config {
    /// Reads `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`; all may be absent.
    pub(crate) fn read(folder: &Path) -> Result<Self, TextError> {
        let mut config =
            Config { values: read_object(folder, "tokenizer_config.json")?, ..Config::default() };
        let map = read_object(folder, "special_tokens_map.json")?;
        let named = |name: &str| token_text(config.values.get(name)).or_else(|| token_text(map.get(name)));
        config.special = SpecialTokens {
            bos: named("bos_token"),
            eos: named("eos_token"),
            unk: named("unk_token"),
            pad: named("pad_token"),
        };
        config.add_bos = config.values.get("add_bos_token").and_then(Value::as_bool);
        config.add_eos = config.values.get("add_eos_token").and_then(Value::as_bool);
        config.read_added(&read_object(folder, "added_tokens.json")?)?;
        Ok(config)
    }

    fn read_added(&mut self, older: &serde_json::Map<String, Value>) -> Result<(), TextError> {
        for (content, id) in older {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
                TextError::invalid("added_tokens.json", format!("{content:?} has no token id, but {id}"))
            })?;
            self.added.push((id, AddedToken::from(content.clone(), true)));
        }
        let decoder = self.values.get("added_tokens_decoder").and_then(Value::as_object);
        for (key, value) in decoder.into_iter().flatten() {
            let what = "tokenizer_config.json added_tokens_decoder";
            let id: u32 =
                key.parse().map_err(|_| TextError::invalid(what, format!("{key:?} is not a token id")))?;
            let content = token_text(Some(value))
                .ok_or_else(|| TextError::invalid(what, format!("token {key} has no content")))?;
            let flag = |name: &str, default| value.get(name).and_then(Value::as_bool).unwrap_or(default);
            let token = AddedToken::from(content, flag("special", false))
                .lstrip(flag("lstrip", false))
                .rstrip(flag("rstrip", false))
                .single_word(flag("single_word", false))
                .normalized(flag("normalized", false));
            self.added.retain(|(other, _)| *other != id);
            self.added.push((id, token));
        }
        self.added.sort_by_key(|(id, _)| *id);
        Ok(())
    }

    /// What `add_bos_token` and `add_eos_token` ask for; `bos_default` holds when the first is not given.
    pub(crate) fn surround(&self, backend: &Backend, bos_default: bool) -> Surround {
        let id = |wanted: bool, token: &Option<String>| {
            token.as_ref().filter(|_| wanted).and_then(|token| backend.token_to_id(token))
        };
        Surround {
            begin: id(self.add_bos.unwrap_or(bos_default), &self.special.bos),
            end: id(self.add_eos.unwrap_or(false), &self.special.eos),
        }
    }
}

/// A token in a configuration is a string, or an object with the string as `content`.
pub(crate) fn token_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Object(object) => object.get("content")?.as_str().map(str::to_owned),
        _ => None,
    }
}

pub(crate) fn read_object(folder: &Path, name: &str) -> Result<serde_json::Map<String, Value>, TextError> {
    let Some(bytes) = read_optional(&folder.join(name), MAX_CONFIG_BYTES)? else {
        return Ok(serde_json::Map::new());
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(TextError::invalid(name, "expected a JSON object")),
        Err(error) => Err(TextError::invalid(name, error)),
    }
}

/// The contents of a file of at most `limit` bytes; `None` when there is no such file.
pub(crate) fn read_optional(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    // Whoever opens a pipe waits for its other end.
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(TextError::read(path, "not a regular file"));
    }
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TextError::read(path, error)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| TextError::read(path, error))?;
    if bytes.len() as u64 > limit {
        return Err(TextError::read(path, format!("larger than the limit of {limit} bytes")));
    }
    Ok(Some(bytes))
}
