//! tiktoken rank files: one `base64(token) rank` per line, as Llama 3 (`tokenizer.model`) and Qwen
//! (`qwen.tiktoken`) ship them.
//!
//! The file holds neither the splitting pattern nor the special tokens; both follow from which vocabulary it is,
//! told by its size, and from `tokenizer_config.json` where there is one.

use std::collections::HashMap;

use tokenizers::{AddedToken, Tokenizer as Backend};

use crate::decoding::{MAX_TOKEN_ID, printable_of_byte};
use crate::error::TextError;
use crate::folder::{Config, add_tokens, finish};
use crate::pre_tokenizers::{CL100K, O200K, QWEN2};
use crate::tokenizer::Tokenizer;
use crate::vocabulary::{Bpe, byte_level_decoder, byte_level_splits};

/// Longest token, in bytes (published ones have at most 128). Every way to cut a token in two is considered, so
/// this bounds the work.
const MAX_TOKEN_BYTES: usize = 512;

pub(crate) fn load(what: &str, bytes: &[u8], mut config: Config) -> Result<Tokenizer, TextError> {
    let ranks = parse(what, bytes)?;
    let size = ranks.len();
    let bpe = Bpe {
        merges: merges_of_ranks(&ranks),
        tokens: ranks.iter().map(|(token, rank)| (printable(token), *rank)).collect(),
        ignore_merges: true, // tiktoken looks a piece up as a whole first
        ..Bpe::default()
    };
    let mut backend = bpe.build(what)?;
    let pattern = match size {
        151_643 => QWEN2,
        199_998 | 200_000 => O200K,
        _ => CL100K,
    };
    backend.with_pre_tokenizer(Some(byte_level_splits(&[pattern])?));
    backend.with_decoder(Some(byte_level_decoder()));
    add_special(&mut backend, size, &mut config)?;
    let surround = config.surround(&backend, size == 128_000);
    finish(backend, config, surround)
}

/// Adds the special tokens, which take the ids after the ranks.
fn add_special(backend: &mut Backend, size: usize, config: &mut Config) -> Result<(), TextError> {
    let special = &mut config.special;
    let (names, bos, eos) = match size {
        128_000 => (llama3_special(), Some("<|begin_of_text|>"), Some("<|end_of_text|>")),
        151_643 => (qwen_special(), None, Some("<|endoftext|>")),
        _ => (Vec::new(), None, None),
    };
    special.bos = special.bos.take().or(bos.map(str::to_owned));
    special.eos = special.eos.take().or(eos.map(str::to_owned));
    let mut tokens: Vec<AddedToken> =
        names.into_iter().map(|name| AddedToken::from(name, true).normalized(false)).collect();
    for (id, token) in &config.added {
        let Some(index) = (*id as usize).checked_sub(size) else { continue };
        if index < tokens.len() {
            tokens[index] = token.clone();
        } else if index == tokens.len() {
            tokens.push(token.clone());
        } else {
            return Err(TextError::invalid(
                "tokenizer_config.json added_tokens_decoder",
                format!("token {id} leaves a gap after token {}", size + tokens.len() - 1),
            ));
        }
    }
    add_tokens(backend, tokens)
}

fn llama3_special() -> Vec<String> {
    let named = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ];
    let reserved = (3..=247).map(|i| format!("<|reserved_special_token_{i}|>"));
    named.into_iter().map(str::to_owned).chain(reserved).collect()
}

fn qwen_special() -> Vec<String> {
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned).to_vec()
}

/// Reads a rank file; ranks must be distinct and tokens not empty.
pub(crate) fn parse(what: &str, bytes: &[u8]) -> Result<Vec<(Vec<u8>, u32)>, TextError> {
    let mut ranks = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (number, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let wrong = |message: &str| TextError::invalid(what, format!("line {}: {message}", number + 1));
        let space = line.iter().position(|&byte| byte == b' ');
        let (token, rank) = line.split_at(space.ok_or_else(|| wrong("expected base64, a space, a rank"))?);
        let token = base64(token).ok_or_else(|| wrong("the token is not valid base64"))?;
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            return Err(wrong(&format!("a token of {} bytes; expected 1 to {MAX_TOKEN_BYTES}", token.len())));
        }
        let rank: u32 = std::str::from_utf8(rank.trim_ascii())
            .ok()
            .and_then(|rank| rank.parse().ok())
            .filter(|rank| *rank <= MAX_TOKEN_ID)
            .ok_or_else(|| wrong(&format!("the rank is not a number up to {MAX_TOKEN_ID}")))?;
        if !seen.insert(rank) {
            return Err(wrong(&format!("rank {rank} is given twice")));
        }
        ranks.push((token, rank));
    }
    if ranks.is_empty() {
        return Err(TextError::invalid(what, "it holds no ranks"));
    }
    ranks.sort_by_key(|(_, rank)| *rank);
    Ok(ranks)
}

/// Every cut of a token into two tokens, in the order of the token's rank, then of its parts' ranks.
fn merges_of_ranks(ranks: &[(Vec<u8>, u32)]) -> Vec<(String, String)> {
    let ids: HashMap<&[u8], u32> = ranks.iter().map(|(token, rank)| (token.as_slice(), *rank)).collect();
    let mut merges = Vec::new();
    for (token, _) in ranks {
        let mut cuts: Vec<(u32, u32, usize)> = (1..token.len())
            .filter_map(|at| Some((*ids.get(&token[..at])?, *ids.get(&token[at..])?, at)))
            .collect();
        cuts.sort_unstable();
        merges.extend(cuts.into_iter().map(|(_, _, at)| (printable(&token[..at]), printable(&token[at..]))));
    }
    merges
}

fn printable(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| printable_of_byte(byte)).collect()
}

/// Standard base64 with padding.
pub(crate) fn base64(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let padding = text.iter().rev().take_while(|&&byte| byte == b'=').count();
    if padding > 2 {
        return None;
    }
    let digits = &text[..text.len() - padding];
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in digits.chunks(4) {
        let mut bits = 0u32;
        for &digit in group {
            bits = bits << 6
                | u32::from(match digit {
                    b'A'..=b'Z' => digit - b'A',
                    b'a'..=b'z' => digit - b'a' + 26,
                    b'0'..=b'9' => digit - b'0' + 52,
                    b'+' => 62,
                    b'/' => 63,
                    _ => return None,
                });
        }
        bits <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_rfc_4648() {
        let vectors = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ];
        for (plain, coded) in vectors {
            assert_eq!(base64(coded.as_bytes()).as_deref(), Some(plain.as_bytes()), "{coded}");
        }
        for wrong in ["Zg=", "Zg", "Z===", "Zm9*", "====", "Zm=v"] {
            assert_eq!(base64(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn malformed_files_are_refused() {
        for wrong in ["", "\n", "Zg==", "Zg== x", "Zg== -1", "Zg== 0\nZm8= 0", "Zg== 99999999", " 1"] {
            let error = parse("ranks", wrong.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("ranks: "), "{error}");
        }
        assert_eq!(parse("ranks", b"Zm8= 1\r\nZg== 0\n\n").unwrap().len(), 2);
    }
}
