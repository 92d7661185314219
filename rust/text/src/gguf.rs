//! The vocabulary inside a GGUF file (`tokenizer.ggml.*`).

use std::collections::BTreeMap;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer as Backend};

use crate::error::TextError;
use crate::folder::{SpecialTokens, add_tokens};
use crate::pre_tokenizers::{self, PreTokenizer};
use crate::sentencepiece::{Algorithm, PieceType, ScoredVocabulary, mergeable};
use crate::tokenizer::{Surround, Tokenizer, adds_special, backend_from_json};
use crate::vocabulary::{
    Bpe, SPACE, ScoredPiece, byte_level_decoder, byte_level_splits, replace, sentencepiece_decoder, splits,
};

/// What the metadata of a GGUF file says about text. Field names are those of the keys after
/// `tokenizer.ggml.`; empty lists and `None` stand for absent keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocabulary {
    /// `llama` (SentencePiece BPE), `gpt2` (byte-level BPE), `t5` (Unigram), `none` or `no_vocab`.
    pub model: String,
    /// How text is cut before merging (`gpt2` only).
    pub pre: Option<String>,
    /// Token spellings; the index is the id.
    pub tokens: Vec<String>,
    /// One score per token (`llama` and `t5`).
    pub scores: Vec<f32>,
    /// One type per token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_type: Vec<i32>,
    /// Pairs with a space between, best first (`gpt2` only).
    pub merges: Vec<String>,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// End of sequence.
    pub eos_token_id: Option<u32>,
    /// Unknown token.
    pub unknown_token_id: Option<u32>,
    /// Padding.
    pub padding_token_id: Option<u32>,
    /// Further tokens that end a text (`eot_token_id`, `eom_token_id`, and `tokenizer.infer.end_token_ids` for all that these cannot
    /// hold).
    pub end_of_turn_ids: Vec<u32>,
    /// Whether a text begins with bos.
    pub add_bos_token: Option<bool>,
    /// Whether a text ends with eos.
    pub add_eos_token: Option<bool>,
    /// Whether SentencePiece puts a space before a text.
    pub add_space_prefix: Option<bool>,
    /// Whether SentencePiece collapses runs of spaces.
    pub remove_extra_whitespaces: Option<bool>,
    /// SentencePiece's compiled normalization rules.
    pub precompiled_charsmap: Vec<u8>,
    /// The chat template (`tokenizer.chat_template`).
    pub chat_template: Option<String>,
    /// Further chat templates by name (`tokenizer.chat_template.NAME`), such as `tool_use`.
    pub named_templates: BTreeMap<String, String>,
    /// A whole `tokenizer.json` (`tokenizer.huggingface.json`), which is exact where no `pre` kind fits; it
    /// stands for all of the above but the ids and `add_*`.
    pub huggingface_json: Option<String>,
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file; `None` when the file has none (`none`, `no_vocab`), which leaves token
    /// ids as the only way in and out.
    ///
    /// # Errors
    /// Lists of unequal length, ids outside the vocabulary, duplicate tokens, or an unknown `model` or `pre`.
    pub fn from_gguf(vocabulary: &GgufVocabulary) -> Result<Option<Self>, TextError> {
        vocabulary.build()
    }
}

/// The ids of special tokens.
struct Ids {
    bos: Option<u32>,
    eos: Option<u32>,
    unk: Option<u32>,
    pad: Option<u32>,
    end_of_turn: Vec<u32>,
}

impl Ids {
    fn special(&self, name: impl Fn(u32) -> Option<String>) -> SpecialTokens {
        SpecialTokens {
            bos: self.bos.and_then(&name),
            eos: self.eos.and_then(&name),
            unk: self.unk.and_then(&name),
            pad: self.pad.and_then(&name),
        }
    }
}

impl GgufVocabulary {
    fn ids(&self) -> Ids {
        let known = |id: Option<u32>| id.filter(|&id| id != u32::MAX); // some writers say "none" as -1
        Ids {
            bos: known(self.bos_token_id),
            eos: known(self.eos_token_id),
            unk: known(self.unknown_token_id),
            pad: known(self.padding_token_id),
            end_of_turn: self.end_of_turn_ids.iter().copied().filter(|&id| id != u32::MAX).collect(),
        }
    }

    fn build(&self) -> Result<Option<Tokenizer>, TextError> {
        let mut ids = self.ids();
        if let Some(json) = &self.huggingface_json {
            return self.huggingface(json, &ids).map(Some);
        }
        if matches!(self.model.as_str(), "none" | "no_vocab") {
            return Ok(None);
        }
        self.check(&ids)?;
        let (backend, add_bos, add_eos) = match self.model.as_str() {
            "llama" => {
                ids.bos = ids.bos.or(self.default_id(1));
                ids.eos = ids.eos.or(self.default_id(2));
                (self.scored(Algorithm::Bpe, &ids)?, true, false)
            }
            "t5" => {
                ids.eos = ids.eos.or(self.default_id(1));
                (self.scored(Algorithm::Unigram, &ids)?, false, true)
            }
            "gpt2" => {
                let kind = self.kind(self.pre.as_deref().unwrap_or(""))?;
                (self.byte_pairs(kind, &ids)?, kind.add_bos, false)
            }
            "gemma4" => (self.byte_pairs(self.kind("gemma4")?, &ids)?, true, false),
            other => {
                let expected = "expected llama, gpt2, gemma4, t5, none or no_vocab";
                return Err(TextError::unsupported("tokenizer.ggml.model", other, expected));
            }
        };
        let surround = Surround {
            begin: ids.bos.filter(|_| self.add_bos_token.unwrap_or(add_bos)),
            end: ids.eos.filter(|_| self.add_eos_token.unwrap_or(add_eos)),
        };
        let special = ids.special(|id| Some(self.spelling(id as usize)));
        Ok(Some(Tokenizer::new(backend, special, surround)?.with_end_of_turn(&ids.end_of_turn)))
    }

    fn huggingface(&self, json: &str, ids: &Ids) -> Result<Tokenizer, TextError> {
        let backend = backend_from_json("tokenizer.huggingface.json", json.as_bytes())?;
        let special = ids.special(|id| backend.id_to_token(id));
        let wanted = |add: Option<bool>, id: Option<u32>| id.filter(|_| add == Some(true));
        let surround = match adds_special(&backend) {
            true => Surround::default(), // its own post-processor decides, as for a file
            false => Surround {
                begin: wanted(self.add_bos_token, ids.bos),
                end: wanted(self.add_eos_token, ids.eos),
            },
        };
        Ok(Tokenizer::new(backend, special, surround)?.with_end_of_turn(&ids.end_of_turn))
    }

    fn check(&self, ids: &Ids) -> Result<(), TextError> {
        let count = self.tokens.len();
        let wrong = |key: &str, message: String| TextError::invalid(format!("tokenizer.ggml.{key}"), message);
        if count == 0 {
            return Err(wrong("tokens", "the vocabulary is empty".to_owned()));
        }
        for (key, length) in [("scores", self.scores.len()), ("token_type", self.token_type.len())] {
            if length != 0 && length < count {
                return Err(wrong(key, format!("{length} entries for {count} tokens")));
            }
        }
        if let Some(index) = self.scores.iter().position(|score| score.is_nan()) {
            return Err(wrong("scores", format!("entry {index} is not a number")));
        }
        let named = [
            ("bos_token_id", ids.bos),
            ("eos_token_id", ids.eos),
            ("unknown_token_id", ids.unk),
            ("padding_token_id", ids.pad),
        ];
        let turns = ids.end_of_turn.iter().map(|&id| ("eot_token_id", Some(id)));
        for (key, id) in named.into_iter().chain(turns) {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return Err(wrong(key, format!("{id} is outside the vocabulary of {count} tokens")));
            }
        }
        Ok(())
    }

    fn kind(&self, name: &str) -> Result<&'static PreTokenizer, TextError> {
        pre_tokenizers::kind(name).ok_or_else(|| {
            let expected = format!("expected one of {}", pre_tokenizers::names());
            TextError::unsupported("tokenizer.ggml.pre", name, expected)
        })
    }

    fn default_id(&self, id: u32) -> Option<u32> {
        (self.tokens.len() > id as usize).then_some(id)
    }

    /// Empty spellings occur as padding; as in llama.cpp they get a name that no text contains by chance.
    fn spelling(&self, index: usize) -> String {
        match self.tokens[index].as_str() {
            "" => format!("[EMPTY_{index}]"),
            token => token.to_owned(),
        }
    }

    fn piece_type(&self, index: usize, ids: &Ids) -> PieceType {
        let number = self.token_type.get(index).copied().unwrap_or(1);
        let kind = u64::try_from(number).ok().and_then(PieceType::from_number).unwrap_or(PieceType::Normal);
        let named = [ids.bos, ids.eos].into_iter().flatten();
        let control = named.chain(ids.end_of_turn.iter().copied()).any(|id| id as usize == index);
        if control && kind == PieceType::Normal { PieceType::Control } else { kind }
    }

    fn scored(&self, algorithm: Algorithm, ids: &Ids) -> Result<Backend, TextError> {
        if self.scores.is_empty() {
            return Err(TextError::invalid("tokenizer.ggml.scores", "missing, but this model needs scores"));
        }
        let types: Vec<PieceType> = (0..self.tokens.len()).map(|index| self.piece_type(index, ids)).collect();
        let piece = |(index, &kind): (usize, &PieceType)| {
            let piece = ScoredPiece {
                text: self.spelling(index),
                score: self.scores[index],
                mergeable: mergeable(kind),
            };
            (piece, kind)
        };
        let unk = ids.unk.map(|id| id as usize);
        let unk = unk.or_else(|| types.iter().position(|kind| *kind == PieceType::Unknown)).unwrap_or(0);
        ScoredVocabulary {
            pieces: types.iter().enumerate().map(piece).collect(),
            algorithm,
            byte_fallback: types.contains(&PieceType::Byte),
            unk,
            add_dummy_prefix: self.add_space_prefix.unwrap_or(true),
            prefix_first_only: false,
            remove_extra_whitespaces: self.remove_extra_whitespaces.unwrap_or(false),
            charsmap: self.precompiled_charsmap.clone(),
            // GGUF does not say; this token is Phi-3's alone. llama.cpp goes by the name of the model.
            strip_after_special: self.tokens.iter().any(|token| token == "<|placeholder1|>"),
        }
        .build("tokenizer.ggml.tokens")
    }

    fn byte_pairs(&self, kind: &PreTokenizer, ids: &Ids) -> Result<Backend, TextError> {
        let tokens: Vec<(String, u32)> =
            (0..self.tokens.len()).map(|index| self.spelling(index)).zip(0u32..).collect();
        let bpe = Bpe {
            merges: self.merges(&tokens)?,
            tokens,
            ignore_merges: kind.ignore_merges,
            byte_fallback: kind.raw,
            unk: None,
        };
        let mut backend = bpe.build("tokenizer.ggml.tokens")?;
        if kind.raw {
            let spaces = replace(" ", &SPACE.to_string())?;
            backend
                .with_normalizer(Some(NormalizerWrapper::from(spaces)))
                .map_err(|error| TextError::invalid("normalizer", error))?;
            backend.with_pre_tokenizer(Some(Sequence::new(splits(kind.patterns)?)));
            backend.with_decoder(Some(sentencepiece_decoder(false)?));
        } else {
            backend.with_pre_tokenizer(Some(byte_level_splits(kind.patterns)?));
            backend.with_decoder(Some(byte_level_decoder()));
        }
        let added = (0..self.tokens.len()).filter_map(|index| {
            let special = match self.piece_type(index, ids) {
                PieceType::Control | PieceType::Unknown => true,
                PieceType::UserDefined => false,
                _ => return None,
            };
            Some(AddedToken::from(self.spelling(index), special).normalized(false))
        });
        add_tokens(&mut backend, added)?;
        Ok(backend)
    }

    /// Merges whose parts or result are not tokens can never lead to a token and are left out.
    fn merges(&self, tokens: &[(String, u32)]) -> Result<Vec<(String, String)>, TextError> {
        if self.merges.is_empty() {
            return Err(TextError::invalid("tokenizer.ggml.merges", "missing, but this model needs merges"));
        }
        let known: std::collections::HashSet<&str> = tokens.iter().map(|(token, _)| token.as_str()).collect();
        let mut merges = Vec::with_capacity(self.merges.len());
        for (index, merge) in self.merges.iter().enumerate() {
            // The first part may itself begin with a space in vocabularies that spell text.
            let cut = merge.char_indices().skip(1).find(|(_, character)| *character == ' ');
            let Some((at, _)) = cut else {
                let message = format!("entry {index} ({merge:?}) is not two tokens with a space between");
                return Err(TextError::invalid("tokenizer.ggml.merges", message));
            };
            let (left, right) = (&merge[..at], &merge[at + 1..]);
            if [left, right, &format!("{left}{right}")].into_iter().all(|part| known.contains(part)) {
                merges.push((left.to_owned(), right.to_owned()));
            }
        }
        Ok(merges)
    }
}
