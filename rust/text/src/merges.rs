//! GPT-2's pair of files: `vocab.json` (token to id) and `merges.txt` (one pair per line, best first).

use std::collections::HashSet;

use serde_json::Value;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::decoding::MAX_TOKEN_ID;
use crate::error::TextError;
use crate::folder::{Config, add_tokens, finish};
use crate::pre_tokenizers::QWEN2;
use crate::tokenizer::Tokenizer;
use crate::vocabulary::{Bpe, byte_level_decoder, byte_level_splits};

/// `tokenizer_class` values whose splitting is GPT-2's.
const GPT2_LIKE: [&str; 4] = ["GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "PreTrainedTokenizer"];

pub(crate) fn load(vocab: &[u8], merges: &[u8], config: Config) -> Result<Tokenizer, TextError> {
    let tokens = read_vocab(vocab)?;
    let merges = {
        let known: HashSet<&str> = tokens.iter().map(|(token, _)| token.as_str()).collect();
        read_merges(merges, &known)?
    };
    let class = config.values.get("tokenizer_class").and_then(Value::as_str).unwrap_or("GPT2Tokenizer");
    let class = class.trim_end_matches("Fast");
    let mut backend = Bpe { tokens, merges, ..Bpe::default() }.build("vocab.json")?;
    if class == "Qwen2Tokenizer" {
        backend.with_pre_tokenizer(Some(byte_level_splits(&[QWEN2])?));
        backend.with_normalizer(Some(NFC)).map_err(|error| TextError::invalid("normalizer", error))?;
    } else if GPT2_LIKE.contains(&class) {
        let prefix = config.values.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
        backend.with_pre_tokenizer(Some(ByteLevel::new(prefix, true, true)));
    } else {
        let expected =
            format!("with vocab.json and merges.txt, expected Qwen2Tokenizer, {}", GPT2_LIKE.join(", "));
        return Err(TextError::unsupported("tokenizer_class", class, expected));
    }
    backend.with_decoder(Some(byte_level_decoder()));
    let named = [&config.special.bos, &config.special.eos, &config.special.unk, &config.special.pad];
    let special = named.into_iter().flatten().filter(|token| backend.token_to_id(token).is_some());
    let special: Vec<_> =
        special.map(|token| tokenizers::AddedToken::from(token.clone(), true).normalized(false)).collect();
    add_tokens(&mut backend, special)?;
    let surround = config.surround(&backend, false);
    finish(backend, config, surround)
}

fn read_vocab(bytes: &[u8]) -> Result<Vec<(String, u32)>, TextError> {
    let vocab: serde_json::Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|error| TextError::invalid("vocab.json", error))?;
    let mut seen = HashSet::with_capacity(vocab.len());
    vocab
        .into_iter()
        .map(|(token, id)| {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| *id <= MAX_TOKEN_ID);
            let Some(id) = id else {
                let message = format!("the id of {token:?} is not a number up to {MAX_TOKEN_ID}");
                return Err(TextError::invalid("vocab.json", message));
            };
            if !seen.insert(id) {
                return Err(TextError::invalid("vocab.json", format!("id {id} is given twice")));
            }
            Ok((token, id))
        })
        .collect()
}

fn read_merges(bytes: &[u8], known: &HashSet<&str>) -> Result<Vec<(String, String)>, TextError> {
    let text = std::str::from_utf8(bytes).map_err(|error| TextError::invalid("merges.txt", error))?;
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || (number == 0 && line.starts_with("#version")) {
            continue;
        }
        let Some((left, right)) = line.split_once(' ') else {
            let message = format!("line {}: expected two tokens with a space between", number + 1);
            return Err(TextError::invalid("merges.txt", message));
        };
        let missing = [left, right, &format!("{left}{right}")]
            .into_iter()
            .find(|t| !known.contains(t))
            .map(str::to_owned);
        if let Some(token) = missing {
            let message = format!("line {}: {token:?} is not in vocab.json", number + 1);
            return Err(TextError::invalid("merges.txt", message));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}
