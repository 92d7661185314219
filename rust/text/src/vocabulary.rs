//! Vocabularies in files other than `tokenizer.json`, assembled into a `tokenizers` backend.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip as StripDecoder;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Precompiled, Replace};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer as Backend};

use crate::error::{TextError, shielded};

/// What SentencePiece writes for a space.
pub(crate) const SPACE: char = '\u{2581}';

/// The parts of a byte-pair encoding.
#[derive(Debug, Default)]
pub(crate) struct Bpe {
    /// Token and id.
    pub(crate) tokens: Vec<(String, u32)>,
    /// Pairs to merge, best first. Every part and every result must be a token.
    pub(crate) merges: Vec<(String, String)>,
    /// A piece of text that is a token as a whole is not merged step by step.
    pub(crate) ignore_merges: bool,
    /// Characters outside the vocabulary become `<0xNN>` tokens.
    pub(crate) byte_fallback: bool,
    pub(crate) unk: Option<String>,
}

impl Bpe {
    pub(crate) fn build(self, what: &str) -> Result<Backend, TextError> {
        self.check_distinct(what)?;
        shielded(
            what,
            AssertUnwindSafe(|| {
                let mut bpe = BPE::builder()
                    .vocab_and_merges(
                        self.tokens.into_iter().collect::<tokenizers::models::bpe::Vocab>(),
                        self.merges,
                    )
                    .build()
                    .map_err(|error| TextError::invalid(what, error))?;
                bpe.ignore_merges = self.ignore_merges;
                bpe.byte_fallback = self.byte_fallback;
                bpe.fuse_unk = self.unk.is_some();
                bpe.unk_token = self.unk;
                Ok(Backend::new(bpe))
            }),
        )
    }

    fn check_distinct(&self, what: &str) -> Result<(), TextError> {
        let mut seen = HashMap::with_capacity(self.tokens.len());
        for (token, id) in &self.tokens {
            if let Some(other) = seen.insert(token.as_str(), *id) {
                return Err(TextError::invalid(what, format!("tokens {other} and {id} are both {token:?}")));
            }
        }
        Ok(())
    }
}

/// Longer pieces are no results of merges: trying every cut of every piece would take too long in a hostile file.
const MAX_MERGED_BYTES: usize = 512;

/// A piece of a vocabulary with scores, as SentencePiece keeps it.
#[derive(Clone, Debug)]
pub(crate) struct ScoredPiece {
    pub(crate) text: String,
    pub(crate) score: f32,
    /// Whether the piece may take part in merges (control, unknown and byte pieces may not).
    pub(crate) mergeable: bool,
}

/// The merges that a scored BPE vocabulary implies: every way to cut a piece into two pieces, ordered by the
/// piece's score, longer parts first among equals, as transformers' converter orders them.
pub(crate) fn merges_of_scores(pieces: &[ScoredPiece]) -> Vec<(String, String)> {
    struct Merge<'a> {
        score: f32,
        characters: (usize, usize),
        parts: (&'a str, &'a str),
    }
    let mergeable = pieces
        .iter()
        .enumerate()
        .filter(|(_, piece)| piece.mergeable && piece.text.len() <= MAX_MERGED_BYTES);
    let ids: HashMap<&str, usize> = mergeable.clone().map(|(id, piece)| (piece.text.as_str(), id)).collect();
    let mut merges: Vec<Merge<'_>> = Vec::new();
    for (_, piece) in mergeable {
        let length = piece.text.chars().count();
        let mut cuts: Vec<(usize, usize, Merge<'_>)> = Vec::new();
        for (left, (at, _)) in piece.text.char_indices().enumerate().skip(1) {
            let parts = piece.text.split_at(at);
            if let (Some(&first), Some(&second)) = (ids.get(parts.0), ids.get(parts.1)) {
                let characters = (left, length - left);
                cuts.push((first, second, Merge { score: piece.score, characters, parts }));
            }
        }
        cuts.sort_by_key(|(first, second, _)| (*first, *second));
        merges.extend(cuts.into_iter().map(|(_, _, merge)| merge));
    }
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.characters.cmp(&a.characters)));
    merges.into_iter().map(|m| (m.parts.0.to_owned(), m.parts.1.to_owned())).collect()
}

/// Cuts text by each pattern in turn, then spells the bytes of each piece in GPT-2's alphabet.
pub(crate) fn byte_level_splits(patterns: &[&str]) -> Result<PreTokenizerWrapper, TextError> {
    let mut steps = splits(patterns)?;
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(steps).into())
}

/// Cuts text by each pattern in turn.
pub(crate) fn splits(patterns: &[&str]) -> Result<Vec<PreTokenizerWrapper>, TextError> {
    patterns
        .iter()
        .map(|pattern| {
            Split::new(SplitPattern::Regex((*pattern).to_owned()), SplitDelimiterBehavior::Isolated, false)
                .map(PreTokenizerWrapper::from)
                .map_err(|error| TextError::invalid("pre-tokenizer pattern", error))
        })
        .collect()
}

/// The decoder of GPT-2's byte alphabet.
pub(crate) fn byte_level_decoder() -> DecoderWrapper {
    DecoderWrapper::ByteLevel(ByteLevel::new(false, true, false))
}

/// The decoder of SentencePiece vocabularies; `strip` drops the space that encoding put in front.
pub(crate) fn sentencepiece_decoder(strip: bool) -> Result<DecoderWrapper, TextError> {
    let mut steps = vec![
        DecoderWrapper::Replace(replace(&SPACE.to_string(), " ")?),
        DecoderWrapper::ByteFallback(ByteFallback::new()),
        DecoderWrapper::Fuse(Fuse::new()),
    ];
    if strip {
        steps.push(DecoderWrapper::Strip(StripDecoder::new(' ', 1, 0)));
    }
    Ok(DecoderWrapper::Sequence(DecoderSequence::new(steps)))
}

/// A normalizer or decoder step that replaces one text by another.
pub(crate) fn replace(from: &str, to: &str) -> Result<Replace, TextError> {
    Replace::new(from, to).map_err(|error| TextError::invalid("normalizer", error))
}

/// SentencePiece's compiled normalization rules; `None` when there are none.
///
/// The format is the byte length of a trie, the trie, and the replacement texts. The length is checked here
/// because the library allocates what it announces.
pub(crate) fn charsmap(what: &str, bytes: &[u8]) -> Result<Option<Precompiled>, TextError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let Some((header, rest)) = bytes.split_first_chunk::<4>() else {
        return Err(TextError::invalid(what, format!("{} bytes are too few for a header", bytes.len())));
    };
    let trie = u32::from_le_bytes(*header) as usize;
    if trie > rest.len() || trie < 4 || !trie.is_multiple_of(4) {
        return Err(TextError::invalid(
            what,
            format!(
                "announces a trie of {trie} bytes, but {} bytes follow; expected a multiple of 4",
                rest.len()
            ),
        ));
    }
    shielded(what, || Precompiled::from(bytes).map(Some).map_err(|error| TextError::invalid(what, error)))
}
