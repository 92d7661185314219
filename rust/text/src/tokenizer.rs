//! The tokenizer that the rest of the engine sees, whatever file it came from.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;

use tokenizers::models::ModelWrapper;
use tokenizers::{PostProcessor, Tokenizer as Backend};

use crate::decoding::{DecodeState, Decoding};
use crate::error::{TextError, shielded};
use crate::folder::{self, SpecialTokens};

/// Longest text that [`Tokenizer::encode`] takes, in bytes: the tokenizer needs some fifty times as much memory.
pub const MAX_TEXT_BYTES: usize = 1 << 28;

/// Longest run of white space that [`Tokenizer::encode`] takes, in characters, where words are found by patterns.
///
/// The pattern engine gives up after a million steps back and then leaves the rest of the text uncut, which yields
/// other ids without a word of warning. Runs of white space are what gets there: patterns try whole runs for a
/// line end.
pub const MAX_SPACE_RUN: usize = 500_000;

/// Spellings of tokens that end a turn of a conversation, over all published families.
const END_OF_TURN: [&str; 11] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_role|>",
];

/// What `add_special` puts around a text besides what the post-processor does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Surround {
    pub(crate) begin: Option<u32>,
    pub(crate) end: Option<u32>,
}

/// Text to token ids and back. Cloning is cheap (shared data), and all methods may run on many threads at once.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    backend: Backend,
    decoding: Decoding,
    special: SpecialTokens,
    surround: Surround,
    end_of_turn: Vec<u32>,
}

impl Tokenizer {
    /// Loads the tokenizer of a Hugging Face model folder; `None` when the folder holds no tokenizer file.
    ///
    /// In order of preference: `tokenizer.json`; `tokenizer.model` (SentencePiece, or tiktoken ranks as Llama 3
    /// ships them); `*.tiktoken`; `vocab.json` with `merges.txt`. `tokenizer_config.json`, `special_tokens_map.json` and
    /// `added_tokens.json` add the names of special tokens.
    ///
    /// # Errors
    /// A file that cannot be read, is malformed, or asks for something unknown.
    pub fn from_folder(path: &Path) -> Result<Option<Self>, TextError> {
        folder::load(path)
    }

    /// Loads the text of a `tokenizer.json` with no configuration beside it.
    ///
    /// # Errors
    /// Malformed or unsupported contents.
    pub fn from_json(json: &[u8]) -> Result<Self, TextError> {
        let backend = backend_from_json("tokenizer.json", json)?;
        Tokenizer::new(backend, SpecialTokens::default(), Surround::default())
    }

    /// Loads the bytes of a SentencePiece `tokenizer.model` with no configuration beside it.
    ///
    /// # Errors
    /// Malformed or unsupported contents.
    pub fn from_sentencepiece(bytes: &[u8]) -> Result<Self, TextError> {
        crate::sentencepiece::load(bytes, folder::Config::default())
    }

    pub(crate) fn new(
        mut backend: Backend,
        special: SpecialTokens,
        surround: Surround,
    ) -> Result<Self, TextError> {
        // A file may carry the truncation and padding of its last training run; a prompt must keep its length.
        backend.with_padding(None);
        backend
            .with_truncation(None)
            .map_err(|error| TextError::invalid("tokenizer truncation", error.to_string()))?;
        without_dropout(&mut backend);
        let decoding = Decoding::new(&backend)?;
        let end_of_turn = END_OF_TURN.iter().filter_map(|name| backend.token_to_id(name)).collect();
        Ok(Tokenizer { inner: Arc::new(Inner { backend, decoding, special, surround, end_of_turn }) })
    }

    /// The contents of a `tokenizer.json` that is this tokenizer, but for what is added around a text by configuration.
    pub(crate) fn json(&self) -> Result<String, TextError> {
        self.inner
            .backend
            .to_string(false)
            .map_err(|error| TextError::invalid("tokenizer", error.to_string()))
    }

    /// Token ids of `text`. Special tokens spelled out in the text are recognized, as in transformers.
    ///
    /// `add_special` adds what the model expects around a text (usually the beginning-of-sequence token).
    ///
    /// # Errors
    /// Text longer than [`MAX_TEXT_BYTES`], white space longer than [`MAX_SPACE_RUN`], or a vocabulary that cannot express the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TextError::Encode(format!(
                "the text has {} bytes; at most {MAX_TEXT_BYTES} are accepted",
                text.len()
            )));
        }
        let inner = &*self.inner;
        if inner.backend.get_pre_tokenizer().is_some() {
            check_space_runs(text)?;
        }
        let encoding = shielded(
            "tokenizer",
            AssertUnwindSafe(|| {
                inner
                    .backend
                    .encode_fast(text, add_special)
                    .map_err(|error| TextError::Encode(error.to_string()))
            }),
        )?;
        let ids = encoding.get_ids();
        if !add_special {
            return Ok(ids.to_vec());
        }
        Ok(inner.surround.begin.into_iter().chain(ids.iter().copied()).chain(inner.surround.end).collect())
    }

    /// Text of `ids`; invalid UTF-8 becomes U+FFFD, ids outside the vocabulary stand for nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut text = String::new();
        let mut state = DecodeState::new(self.decoding());
        for &id in ids {
            state.push(self.decoding(), id, skip_special, &mut text);
        }
        state.finish(self.decoding(), &mut text);
        text
    }

    /// The vocabulary's spelling of `id` (with `Ġ` or `▁` for a space, for example).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.decoding.raw(id).map(str::to_owned)
    }

    /// The id that the vocabulary's spelling `token` has.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.backend.token_to_id(token)
    }

    /// The bytes that `id` adds to a text when it is not the first token (for token masks and log-probabilities).
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.inner.decoding.token_bytes(id)
    }

    /// Whether `id` is a special token, which `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.decoding.is_special(id)
    }

    /// The beginning-of-sequence token, if the tokenizer's files name one.
    pub fn bos(&self) -> Option<u32> {
        self.special_id(self.inner.special.bos.as_deref())
    }

    /// The end-of-sequence token, if the tokenizer's files name one.
    pub fn eos(&self) -> Option<u32> {
        self.special_id(self.inner.special.eos.as_deref())
    }

    /// Spellings of the special tokens that the files name.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.inner.special
    }

    /// Tokens of this vocabulary that end a turn in some published chat format.
    pub fn end_of_turn(&self) -> &[u32] {
        &self.inner.end_of_turn
    }

    /// One more than the largest id (a model needs at least as many embedding rows for every id to be valid).
    pub fn vocabulary_size(&self) -> usize {
        self.inner.decoding.len()
    }

    /// Adds ids that the file names as ends of a turn.
    pub(crate) fn with_end_of_turn(mut self, ids: &[u32]) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            let known = inner.end_of_turn.clone();
            inner.end_of_turn.extend(ids.iter().filter(|id| !known.contains(id)));
        }
        self
    }

    pub(crate) fn decoding(&self) -> &Decoding {
        &self.inner.decoding
    }

    fn special_id(&self, token: Option<&str>) -> Option<u32> {
        token.and_then(|token| self.id(token))
    }
}

fn check_space_runs(text: &str) -> Result<(), TextError> {
    if text.len() <= MAX_SPACE_RUN {
        return Ok(());
    }
    let mut run = 0;
    for character in text.chars() {
        run = if character.is_whitespace() { run + 1 } else { 0 };
        if run > MAX_SPACE_RUN {
            let message =
                format!("the text has more than {MAX_SPACE_RUN} characters of white space in a row");
            return Err(TextError::Encode(message));
        }
    }
    Ok(())
}

/// Parses `tokenizer.json`.
pub(crate) fn backend_from_json(what: &str, json: &[u8]) -> Result<Backend, TextError> {
    crate::growth::check(what, json)?;
    let backend = shielded(
        what,
        AssertUnwindSafe(|| {
            Backend::from_bytes(json).map_err(|error| TextError::invalid(what, error.to_string()))
        }),
    )?;
    if let ModelWrapper::BPE(bpe) = backend.get_model()
        && bpe.continuing_subword_prefix.as_ref().is_some_and(|prefix| !prefix.is_empty())
    {
        return Err(TextError::unsupported(
            "BPE continuing_subword_prefix",
            bpe.continuing_subword_prefix.clone().unwrap_or_default(),
            "expected none",
        ));
    }
    Ok(backend)
}

/// Whether the post-processor adds tokens of its own when asked to add special tokens.
pub(crate) fn adds_special(backend: &Backend) -> bool {
    backend.get_post_processor().is_some_and(|processor| processor.added_tokens(false) > 0)
}

/// BPE dropout is for training; with it, the same prompt would give other ids each time.
fn without_dropout(backend: &mut Backend) {
    let ModelWrapper::BPE(bpe) = backend.get_model() else { return };
    if bpe.dropout.is_some() {
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        backend.with_model(bpe);
    }
}
