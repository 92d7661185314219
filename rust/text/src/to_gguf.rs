//! The vocabulary of a folder as a GGUF file holds it.
//!
//! The whole tokenizer goes in as JSON, which is exact and what our own reader takes; beside it stands what llama.cpp reads, where its
//! formats can say it: byte-level vocabularies whose way of cutting text has a name there, and SentencePiece models. Of others it gets
//! no vocabulary rather than a wrong one.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::chat::ChatTemplate;
use crate::error::TextError;
use crate::folder::{MAX_TOKENIZER_BYTES, read_optional};
use crate::gguf::GgufVocabulary;
use crate::pre_tokenizers::{self, GPT2};
use crate::sentencepiece;
use crate::tokenizer::Tokenizer;

/// Numbers of `token_type`.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// The score of tokens that SentencePiece did not train.
const ADDED_SCORE: f32 = -1000.0;

impl GgufVocabulary {
    /// The vocabulary of a folder, for a model of `size` tokens that `ends` end; `None` when the folder has no tokenizer. A text ends
    /// with each of `ends` and with what the tokenizer calls its end, as it does in a folder.
    ///
    /// # Errors
    /// Files that cannot be read or are malformed.
    pub fn of_folder(folder: &Path, size: usize, ends: &[u32]) -> Result<Option<Self>, TextError> {
        let Some(tokenizer) = Tokenizer::from_folder(folder)? else { return Ok(None) };
        let json = tokenizer.json()?;
        let parsed: Value =
            serde_json::from_str(&json).map_err(|error| TextError::invalid("tokenizer", error))?;
        let empty = tokenizer.encode("", true)?;
        let (eos, others) = split_ends(tokenizer.eos(), ends);
        let mut templates = ChatTemplate::sources(folder)?.0;
        let named = |name: &Option<String>| name.as_ref().and_then(|name| tokenizer.id(name));
        let special = tokenizer.special_tokens();
        let mut vocabulary = GgufVocabulary {
            model: "none".to_owned(),
            bos_token_id: tokenizer.bos(),
            eos_token_id: eos,
            unknown_token_id: named(&special.unk),
            padding_token_id: named(&special.pad),
            end_of_turn_ids: others,
            add_bos_token: Some(tokenizer.bos().is_some_and(|bos| empty.first() == Some(&bos))),
            add_eos_token: Some(
                tokenizer.eos().is_some_and(|eos| empty.len() > 1 && empty.last() == Some(&eos)),
            ),
            chat_template: templates.remove("default"),
            named_templates: keyed(templates),
            ..GgufVocabulary::default()
        };
        let scored = match read_optional(&folder.join("tokenizer.model"), MAX_TOKENIZER_BYTES)? {
            Some(bytes) if bytes.first() == Some(&0x0A) => vocabulary.take_pieces(&bytes)?,
            _ => false,
        };
        let known = scored || vocabulary.take_byte_pairs(&parsed);
        if !known || !vocabulary.fill(&parsed, size) {
            vocabulary.forget();
        }
        vocabulary.huggingface_json = Some(json);
        Ok(Some(vocabulary))
    }

    /// What a file says of a model without a tokenizer: that there is none, and which ids `ends` end its texts.
    #[must_use]
    pub fn without_tokenizer(ends: &[u32]) -> Self {
        let (eos_token_id, end_of_turn_ids) = split_ends(None, ends);
        GgufVocabulary {
            model: "none".to_owned(),
            eos_token_id,
            end_of_turn_ids,
            ..GgufVocabulary::default()
        }
    }

    /// The pieces of a SentencePiece model; false for those that are no byte-pair encodings.
    fn take_pieces(&mut self, bytes: &[u8]) -> Result<bool, TextError> {
        let model = sentencepiece::Model::parse(bytes)?;
        let Some(pieces) = model.byte_pairs() else { return Ok(false) };
        "llama".clone_into(&mut self.model);
        self.add_space_prefix = Some(pieces.add_dummy_prefix);
        self.remove_extra_whitespaces = Some(pieces.remove_extra_whitespaces);
        for (piece, kind) in &pieces.pieces {
            self.tokens.push(piece.text.clone());
            self.scores.push(piece.score);
            self.token_type.push(kind.number());
        }
        Ok(true)
    }

    /// The tokens and merges of a byte-level tokenizer; false where it is none, or cuts text in a way that has no name.
    fn take_byte_pairs(&mut self, json: &Value) -> bool {
        let model = &json["model"];
        let ignore_merges = model["ignore_merges"].as_bool().unwrap_or(false);
        let Some(patterns) = patterns(&json["pre_tokenizer"]) else { return false };
        let Some(pre) = pre_tokenizers::named(&patterns, ignore_merges) else { return false };
        let (Some("BPE"), Some(tokens), Some(merges)) =
            (model["type"].as_str(), model["vocab"].as_object(), model["merges"].as_array())
        else {
            return false;
        };
        for (token, id) in tokens {
            let Some(id) = id.as_u64() else { return false };
            self.set(id, token, NORMAL);
        }
        let merge = |merge: &Value| match merge {
            Value::String(text) => Some(text.clone()),
            Value::Array(parts) => Some(format!("{} {}", parts.first()?.as_str()?, parts.get(1)?.as_str()?)),
            _ => None,
        };
        let Some(merges) = merges.iter().map(merge).collect() else { return false };
        "gpt2".clone_into(&mut self.model);
        (self.pre, self.merges) = (Some(pre.to_owned()), merges);
        true
    }

    /// Added tokens, and names for ids without a token, up to as many as the model has; false if there are more.
    fn fill(&mut self, json: &Value, size: usize) -> bool {
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let (Some(id), Some(text)) = (added["id"].as_u64(), added["content"].as_str()) else {
                return false;
            };
            let kind = if added["special"].as_bool() == Some(true) { CONTROL } else { USER_DEFINED };
            let known = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
            // SentencePiece knows the kinds of its own pieces.
            if self.model != "llama" || known.is_none_or(|known| known != text) {
                self.set(id, text, kind);
            }
        }
        if self.tokens.len() > size {
            return false;
        }
        self.resize(size);
        for id in 0..size {
            if self.tokens[id].is_empty() {
                self.tokens[id] = format!("[PAD{id}]");
                self.token_type[id] = UNUSED;
            }
        }
        true
    }

    fn set(&mut self, id: u64, text: &str, kind: i32) {
        // Ids of a tokenizer that was built fit 32 bits; the list grows no longer than its highest.
        let Ok(id) = usize::try_from(id) else { return };
        if id >= self.tokens.len() {
            self.resize(id + 1);
        }
        text.clone_into(&mut self.tokens[id]);
        self.token_type[id] = kind;
    }

    fn resize(&mut self, size: usize) {
        self.tokens.resize(size, String::new());
        self.token_type.resize(size, UNUSED);
        if self.model == "llama" {
            self.scores.resize(size, ADDED_SCORE);
        }
    }

    /// Leaves llama.cpp without a vocabulary.
    fn forget(&mut self) {
        "none".clone_into(&mut self.model);
        self.pre = None;
        (self.add_space_prefix, self.remove_extra_whitespaces) = (None, None);
        self.tokens.clear();
        self.scores.clear();
        self.token_type.clear();
        self.merges.clear();
    }
}

/// The end that a file calls by that name, and all others.
fn split_ends(eos: Option<u32>, ends: &[u32]) -> (Option<u32>, Vec<u32>) {
    let eos = eos.or(ends.first().copied());
    (eos, ends.iter().copied().filter(|id| Some(*id) != eos).collect())
}

/// Templates by names that a key may end in: as llama.cpp's converter does it, `_` stands for all but letters and digits.
fn keyed(templates: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let plain = |name: &str| {
        name.chars()
            .map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '_' })
            .collect::<String>()
    };
    templates.into_iter().map(|(name, source)| (plain(&name), source)).collect()
}

/// The patterns that cut text before byte-level merging, one after the other; none where something else is done.
fn patterns(step: &Value) -> Option<Vec<String>> {
    match step["type"].as_str()? {
        "Sequence" => {
            let parts = step["pretokenizers"].as_array()?.iter().map(patterns).collect::<Option<Vec<_>>>()?;
            Some(parts.concat())
        }
        "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
            Some(vec![step["pattern"]["Regex"].as_str()?.to_owned()])
        }
        "Digits" if step["individual_digits"] == true => Some(vec![r"\p{N}".to_owned()]),
        "ByteLevel" if step["add_prefix_space"] == false => Some(match step["use_regex"] == false {
            true => Vec::new(),
            false => vec![GPT2.to_owned()],
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn folder(pre_tokenizer: Value) -> tempfile::TempDir {
        let mut vocabulary: serde_json::Map<String, Value> = (0..=255_u8)
            .map(|byte| (crate::decoding::printable_of_byte(byte).to_string(), json!(byte)))
            .collect();
        vocabulary.insert("he".to_owned(), json!(256));
        vocabulary.insert("\u{120}t".to_owned(), json!(257));
        let added = |id: u32, text: &str, special: bool| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": special})
        };
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [added(258, "<end>", true), added(259, "<tool>", false)],
            "pre_tokenizer": pre_tokenizer,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                      "vocab": vocabulary, "merges": [["h", "e"], ["\u{120}", "t"]]},
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let config = json!({"eos_token": "<end>", "bos_token": "<end>", "add_bos_token": true, "chat_template": "{{ x }}"});
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        folder
    }

    #[test]
    fn byte_level_vocabularies_read_alike_in_both_forms() {
        let plain =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let digits = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, plain.clone()]});
        for (pre_tokenizer, name) in [(plain, "gpt-2"), (digits, "starcoder")] {
            let folder = folder(pre_tokenizer);
            let vocabulary = GgufVocabulary::of_folder(folder.path(), 262, &[258]).unwrap().unwrap();
            assert_eq!((vocabulary.model.as_str(), vocabulary.pre.as_deref()), ("gpt2", Some(name)));
            assert_eq!(vocabulary.tokens.len(), 262);
            assert_eq!(
                vocabulary.tokens[256..],
                ["he", "\u{120}t", "<end>", "<tool>", "[PAD260]", "[PAD261]"]
            );
            assert_eq!(vocabulary.token_type[256..], [NORMAL, NORMAL, CONTROL, USER_DEFINED, UNUSED, UNUSED]);
            assert_eq!(vocabulary.merges, ["h e", "\u{120} t"]);
            assert_eq!((vocabulary.bos_token_id, vocabulary.eos_token_id), (Some(258), Some(258)));
            assert_eq!((vocabulary.add_bos_token, vocabulary.add_eos_token), (Some(true), Some(false)));
            assert_eq!(vocabulary.chat_template.as_deref(), Some("{{ x }}"));
            let original = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
            let whole = Tokenizer::from_gguf(&vocabulary).unwrap().unwrap();
            let parts = GgufVocabulary { huggingface_json: None, ..vocabulary };
            let parts = Tokenizer::from_gguf(&parts).unwrap().unwrap();
            for text in ["he he the 123 <end><tool>é\n\n  x", "", " the"] {
                for special in [false, true] {
                    let expected = original.encode(text, special).unwrap();
                    assert_eq!(whole.encode(text, special).unwrap(), expected, "{text:?}");
                    assert_eq!(parts.encode(text, special).unwrap(), expected, "{text:?}");
                }
            }
        }
    }

    #[test]
    fn no_end_and_no_template_is_lost() {
        let plain =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let folder = folder(plain);
        let templates = folder.path().join("additional_chat_templates");
        std::fs::create_dir(&templates).unwrap();
        std::fs::write(templates.join("tool_use.jinja"), "tools").unwrap();
        std::fs::write(templates.join("my-own.jinja"), "own").unwrap();
        // The tokenizer ends texts with 258, which the configuration does not name.
        let vocabulary = GgufVocabulary::of_folder(folder.path(), 262, &[0, 2, 5, 7, 9]).unwrap().unwrap();
        assert_eq!(vocabulary.eos_token_id, Some(258));
        assert_eq!(vocabulary.end_of_turn_ids, [0, 2, 5, 7, 9]);
        let named = |name: &str| vocabulary.named_templates.get(name).map(String::as_str);
        assert_eq!(
            (named("tool_use"), named("my_own"), named("default")),
            (Some("tools"), Some("own"), None)
        );
        let tokenizer = Tokenizer::from_gguf(&vocabulary).unwrap().unwrap();
        assert_eq!((tokenizer.eos(), tokenizer.end_of_turn()), (Some(258), &[0, 2, 5, 7, 9][..]));
        let bare = GgufVocabulary::without_tokenizer(&[3, 4]);
        assert_eq!((bare.eos_token_id, &bare.end_of_turn_ids[..]), (Some(3), &[4][..]));
        assert!(Tokenizer::from_gguf(&bare).unwrap().is_none());
    }

    #[test]
    fn what_has_no_name_is_left_to_the_json() {
        let odd = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
        let folder = folder(odd);
        let vocabulary = GgufVocabulary::of_folder(folder.path(), 262, &[258, 259]).unwrap().unwrap();
        assert_eq!((vocabulary.model.as_str(), vocabulary.tokens.len()), ("none", 0));
        assert_eq!(vocabulary.end_of_turn_ids, [259]);
        assert!(Tokenizer::from_gguf(&vocabulary).unwrap().is_some());
        let too_small = GgufVocabulary::of_folder(folder.path(), 100, &[]).unwrap().unwrap();
        assert_eq!(too_small.model, "none");
        let nothing = tempfile::tempdir().unwrap();
        assert!(GgufVocabulary::of_folder(nothing.path(), 10, &[]).unwrap().is_none());
    }
}
