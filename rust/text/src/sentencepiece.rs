//! SentencePiece model files (`tokenizer.model`).
//!
//! The file is a protocol buffer, `ModelProto` of sentencepiece_model.proto. The few fields that matter are read
//! here by hand: the wire format is tags (field number and wire type) with varint, 32-bit, 64-bit or
//! length-delimited values, and every length is checked against what is left.

use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Sequence, Strip};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, Tokenizer as Backend};

use crate::error::{TextError, shielded};
use crate::folder::{Config, add_tokens, finish};
use crate::tokenizer::Tokenizer;
use crate::vocabulary::{
    Bpe, SPACE, ScoredPiece, charsmap, merges_of_scores, replace, sentencepiece_decoder,
};

const FILE: &str = "tokenizer.model";

/// The special tokens of Phi-3 that leave the white space after them alone.
const KEEPING_SPACE: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// `SentencePiece.Type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PieceType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl PieceType {
    /// From the number that SentencePiece and GGUF share.
    pub(crate) fn from_number(number: u64) -> Option<Self> {
        Some(match number {
            1 => PieceType::Normal,
            2 => PieceType::Unknown,
            3 => PieceType::Control,
            4 => PieceType::UserDefined,
            5 => PieceType::Unused,
            6 => PieceType::Byte,
            _ => return None,
        })
    }

    /// That number.
    pub(crate) fn number(self) -> i32 {
        match self {
            PieceType::Normal => 1,
            PieceType::Unknown => 2,
            PieceType::Control => 3,
            PieceType::UserDefined => 4,
            PieceType::Unused => 5,
            PieceType::Byte => 6,
        }
    }
}

/// The trainer's `ModelType`; the other two (word, char) have no use in language models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Unigram,
    Bpe,
}

/// What a scored vocabulary needs to be known as, whether it comes from a model file or from GGUF.
#[derive(Clone, Debug)]
pub(crate) struct ScoredVocabulary {
    pub(crate) pieces: Vec<(ScoredPiece, PieceType)>,
    pub(crate) algorithm: Algorithm,
    pub(crate) byte_fallback: bool,
    pub(crate) unk: usize,
    pub(crate) add_dummy_prefix: bool,
    /// The prefix goes before the whole text only, not also after each special token.
    pub(crate) prefix_first_only: bool,
    pub(crate) remove_extra_whitespaces: bool,
    pub(crate) charsmap: Vec<u8>,
    /// Phi-3: special tokens swallow the white space after them.
    pub(crate) strip_after_special: bool,
}

/// A model file.
#[derive(Debug)]
pub(crate) struct Model {
    vocabulary: ScoredVocabulary,
    names: [String; 3],
    ids: [i64; 3],
}

pub(crate) fn load(bytes: &[u8], mut config: Config) -> Result<Tokenizer, TextError> {
    let mut model = Model::parse(bytes)?;
    let legacy = config.values.get("legacy").and_then(|v| v.as_bool()).unwrap_or(true);
    model.vocabulary.prefix_first_only = !legacy;
    if config.values.get("add_prefix_space").and_then(|v| v.as_bool()) == Some(false) {
        model.vocabulary.add_dummy_prefix = false;
    }
    let [bos, eos, unk] = model.special_names();
    let special = &mut config.special;
    special.bos = special.bos.take().or(bos);
    special.eos = special.eos.take().or(eos);
    special.unk = special.unk.take().or(unk);
    let bpe = model.vocabulary.algorithm == Algorithm::Bpe;
    let mut backend = model.vocabulary.build(FILE)?;
    for (id, token) in &config.added {
        if backend.token_to_id(&token.content) == Some(*id) {
            add_tokens(&mut backend, [token.clone()])?; // the configuration knows its flags better
        }
    }
    // BPE models (Llama, Mistral, Gemma) begin every text with bos; Unigram models (T5, ALBERT) end with eos.
    config.add_eos = config.add_eos.or(Some(!bpe));
    let surround = config.surround(&backend, bpe);
    finish(backend, config, surround)
}

impl ScoredVocabulary {
    /// Builds the backend: model, normalizer, pre-tokenizer, decoder, special tokens.
    pub(crate) fn build(&self, what: &str) -> Result<Backend, TextError> {
        let mut backend = match self.algorithm {
            Algorithm::Bpe => self.bpe(what)?,
            Algorithm::Unigram => self.unigram(what)?,
        };
        self.set_normalizer(what, &mut backend)?;
        backend.with_decoder(Some(sentencepiece_decoder(self.add_dummy_prefix)?));
        let added = self.pieces.iter().filter_map(|(piece, kind)| {
            let special = matches!(kind, PieceType::Control | PieceType::Unknown);
            let strip = self.strip_after_special && !KEEPING_SPACE.contains(&piece.text.as_str());
            (special || *kind == PieceType::UserDefined)
                .then(|| AddedToken::from(piece.text.clone(), special).normalized(false).rstrip(strip))
        });
        add_tokens(&mut backend, added)?;
        Ok(backend)
    }

    fn bpe(&self, what: &str) -> Result<Backend, TextError> {
        let pieces: Vec<ScoredPiece> = self.pieces.iter().map(|(piece, _)| piece.clone()).collect();
        let unk = self.pieces.get(self.unk).map(|(piece, _)| piece.text.clone());
        let ids = 0u32..;
        Bpe {
            merges: merges_of_scores(&pieces),
            tokens: pieces.into_iter().map(|piece| piece.text).zip(ids).collect(),
            byte_fallback: self.byte_fallback,
            ignore_merges: false,
            unk,
        }
        .build(what)
    }

    fn unigram(&self, what: &str) -> Result<Backend, TextError> {
        let pieces = self.pieces.iter().map(|(p, _)| (p.text.clone(), f64::from(p.score))).collect();
        let model = shielded(what, || {
            Unigram::from(pieces, Some(self.unk), self.byte_fallback)
                .map_err(|error| TextError::invalid(what, error))
        })?;
        Ok(Backend::new(model))
    }

    fn set_normalizer(&self, what: &str, backend: &mut Backend) -> Result<(), TextError> {
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if let Some(rules) = charsmap(&format!("{what} precompiled_charsmap"), &self.charsmap)? {
            steps.push(rules.into());
        }
        if self.remove_extra_whitespaces {
            steps.push(Strip::new(true, true).into());
            let runs = tokenizers::normalizers::replace::ReplacePattern::Regex(" {2,}".to_owned());
            let runs = tokenizers::normalizers::Replace::new(runs, " ");
            steps.push(runs.map_err(|error| TextError::invalid("normalizer", error))?.into());
        }
        let space = SPACE.to_string();
        if self.algorithm == Algorithm::Unigram {
            let scheme = if self.add_dummy_prefix { PrependScheme::Always } else { PrependScheme::Never };
            backend.with_pre_tokenizer(Some(Metaspace::new(SPACE, scheme, true)));
        } else if self.add_dummy_prefix && self.prefix_first_only {
            backend.with_pre_tokenizer(Some(Metaspace::new(SPACE, PrependScheme::First, false)));
        } else {
            if self.add_dummy_prefix {
                steps.push(Prepend::new(space.clone()).into());
            }
            steps.push(replace(" ", &space)?.into());
        }
        if !steps.is_empty() {
            backend
                .with_normalizer(Some(Sequence::new(steps)))
                .map_err(|error| TextError::invalid("normalizer", error))?;
        }
        Ok(())
    }
}

impl Model {
    /// Its vocabulary, if it is a byte-pair encoding that normalizes nothing.
    pub(crate) fn byte_pairs(&self) -> Option<&ScoredVocabulary> {
        let own = &self.vocabulary;
        (own.algorithm == Algorithm::Bpe && own.charsmap.is_empty()).then_some(own)
    }

    /// Reads a model file.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, TextError> {
        let mut model = Model {
            vocabulary: ScoredVocabulary {
                pieces: Vec::new(),
                algorithm: Algorithm::Unigram,
                byte_fallback: false,
                unk: 0,
                add_dummy_prefix: true,
                prefix_first_only: false,
                remove_extra_whitespaces: true,
                charsmap: Vec::new(),
                strip_after_special: false,
            },
            names: ["<s>", "</s>", "<unk>"].map(str::to_owned),
            ids: [1, 2, 0],
        };
        for field in Fields::new(bytes) {
            match field? {
                (1, Wire::Bytes(piece)) => {
                    let piece = read_piece(piece, model.vocabulary.pieces.len())?;
                    model.vocabulary.pieces.push(piece);
                }
                (2, Wire::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Wire::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        let pieces = &model.vocabulary.pieces;
        if pieces.is_empty() {
            return Err(TextError::invalid(FILE, "it has no pieces; is it a SentencePiece model?"));
        }
        model.vocabulary.unk = usize::try_from(model.ids[2])
            .ok()
            .filter(|&unk| unk < pieces.len())
            .or_else(|| pieces.iter().position(|(_, kind)| *kind == PieceType::Unknown))
            .ok_or_else(|| TextError::invalid(FILE, "it has no unknown piece"))?;
        Ok(model)
    }

    fn read_trainer(&mut self, bytes: &[u8]) -> Result<(), TextError> {
        for field in Fields::new(bytes) {
            match field? {
                (3, Wire::Varint(1)) => self.vocabulary.algorithm = Algorithm::Unigram,
                (3, Wire::Varint(2)) => self.vocabulary.algorithm = Algorithm::Bpe,
                (3, Wire::Varint(other)) => {
                    let expected = "expected 1 (Unigram) or 2 (BPE)";
                    return Err(TextError::unsupported("model_type", other.to_string(), expected));
                }
                (35, Wire::Varint(flag)) => self.vocabulary.byte_fallback = flag != 0,
                (40, Wire::Varint(id)) => self.ids[2] = signed(id),
                (41, Wire::Varint(id)) => self.ids[0] = signed(id),
                (42, Wire::Varint(id)) => self.ids[1] = signed(id),
                (45, Wire::Bytes(name)) => self.names[2] = text(name, "unk_piece")?,
                (46, Wire::Bytes(name)) => self.names[0] = text(name, "bos_piece")?,
                (47, Wire::Bytes(name)) => self.names[1] = text(name, "eos_piece")?,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, bytes: &[u8]) -> Result<(), TextError> {
        for field in Fields::new(bytes) {
            match field? {
                (2, Wire::Bytes(rules)) => self.vocabulary.charsmap = rules.to_vec(),
                (3, Wire::Varint(flag)) => self.vocabulary.add_dummy_prefix = flag != 0,
                (4, Wire::Varint(flag)) => self.vocabulary.remove_extra_whitespaces = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }

    /// bos, eos and unk as far as the vocabulary has them (a negative id switches one off).
    fn special_names(&self) -> [Option<String>; 3] {
        [0, 1, 2].map(|i| {
            let id = usize::try_from(self.ids[i]).ok()?;
            let (piece, _) = self.vocabulary.pieces.get(id)?;
            (piece.text == self.names[i]).then(|| piece.text.clone())
        })
    }
}

fn read_piece(bytes: &[u8], id: usize) -> Result<(ScoredPiece, PieceType), TextError> {
    let mut piece = ScoredPiece { text: String::new(), score: 0.0, mergeable: true };
    let mut kind = PieceType::Normal;
    for field in Fields::new(bytes) {
        match field? {
            (1, Wire::Bytes(name)) => piece.text = text(name, "piece")?,
            (2, Wire::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Wire::Varint(number)) => {
                kind = PieceType::from_number(number).ok_or_else(|| {
                    TextError::invalid(FILE, format!("piece {id} has type {number}; expected 1 to 6"))
                })?;
            }
            _ => {}
        }
    }
    if piece.score.is_nan() {
        return Err(TextError::invalid(FILE, format!("the score of piece {id} is not a number")));
    }
    piece.mergeable = mergeable(kind);
    Ok((piece, kind))
}

/// Whether merges may produce or consume a piece. User-defined ones may: runs of spaces are of that kind.
pub(crate) fn mergeable(kind: PieceType) -> bool {
    matches!(kind, PieceType::Normal | PieceType::UserDefined | PieceType::Unused)
}

fn signed(varint: u64) -> i64 {
    varint.cast_signed() // negative int32 values are written as 64-bit two's complement
}

fn text(bytes: &[u8], field: &str) -> Result<String, TextError> {
    String::from_utf8(bytes.to_vec())
        .map_err(|_| TextError::invalid(FILE, format!("the field {field} is not valid UTF-8")))
}

/// One value of a protocol buffer.
#[derive(Debug, PartialEq, Eq)]
enum Wire<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

/// The fields of one protocol-buffer message; stops after the first error.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Fields { rest: bytes }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], TextError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or_else(|| {
            let message = format!("a field of {length} bytes, but only {} are left", self.rest.len());
            TextError::invalid(FILE, message)
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, TextError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            let bits = u64::from(byte & 0x7F);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(TextError::invalid(FILE, "a number has more than 64 bits"))
    }

    fn field(&mut self) -> Result<(u64, Wire<'a>), TextError> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Wire::Fixed64
            }
            2 => {
                let length = usize::try_from(self.varint()?)
                    .map_err(|_| TextError::invalid(FILE, "a field is longer than memory"))?;
                Wire::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Wire::Fixed32(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            other => return Err(TextError::invalid(FILE, format!("unknown wire type {other}"))),
        };
        Ok((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), TextError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}
