//! From token ids back to text, one token at a time.
//!
//! `tokenizers` decodes a whole sequence at once; its own stream re-decodes a window and differs from the
//! full decode when byte tokens form invalid UTF-8. Here the decoder of the file is taken apart once, at load,
//! into per-token text (a table) and an assembly rule, so that full and incremental decoding are one code path
//! and a token costs the copy of its own bytes.

use std::borrow::Cow;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder, Tokenizer as Backend};

use crate::error::TextError;

/// Ids at or above this are refused: tables are dense, and no published vocabulary comes near.
pub(crate) const MAX_TOKEN_ID: u32 = (1 << 22) - 1;

const PRESENT: u8 = 1;
const SPECIAL: u8 = 2;
const BYTE: u8 = 4;

/// How the pieces of consecutive tokens become one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Assembly {
    /// Pieces are text and are joined as they are.
    Plain,
    /// No decoder in the file: pieces are joined with one space.
    Spaced,
    /// Pieces spell bytes in GPT-2's printable alphabet.
    ByteLevel,
    /// Pieces are text, except `<0x00>`..`<0xFF>`, which are bytes.
    ByteFallback,
}

/// One per-token transformation that comes before assembly.
#[derive(Debug)]
enum Step {
    Replace { from: String, to: String },
    Library(DecoderWrapper),
}

/// The decoder of one tokenizer, ready to run token by token.
#[derive(Debug)]
pub(crate) struct Decoding {
    steps: Vec<Step>,
    assembly: Assembly,
    /// How many leading `strip_char`s of the whole text are dropped.
    strip: usize,
    strip_char: char,
    raw: Vec<Option<Box<str>>>,
    ends: Vec<u32>,
    bytes: Vec<u8>,
    flags: Vec<u8>,
}

impl Decoding {
    /// Takes the decoder of `backend` apart and computes the text of every token.
    pub(crate) fn new(backend: &Backend) -> Result<Self, TextError> {
        let mut decoding = Decoding {
            steps: Vec::new(),
            assembly: Assembly::Spaced,
            strip: 0,
            strip_char: ' ',
            raw: Vec::new(),
            ends: Vec::new(),
            bytes: Vec::new(),
            flags: Vec::new(),
        };
        if let Some(decoder) = backend.get_decoder() {
            decoding.assembly = Assembly::Plain;
            decoding.take_apart(decoder)?;
        }
        decoding.fill(backend)?;
        Ok(decoding)
    }

    fn take_apart(&mut self, decoder: &DecoderWrapper) -> Result<(), TextError> {
        let list = match decoder {
            DecoderWrapper::Sequence(sequence) => sequence.get_decoders(),
            single => std::slice::from_ref(single),
        };
        let mut fused = false;
        for step in list {
            let assembled = fused || self.assembly != Assembly::Plain;
            match step {
                DecoderWrapper::Fuse(_) => fused = true,
                DecoderWrapper::ByteLevel(_) if !assembled => self.assembly = Assembly::ByteLevel,
                DecoderWrapper::ByteFallback(_) if !assembled => self.assembly = Assembly::ByteFallback,
                DecoderWrapper::Strip(strip) if fused && strip.stop == 0 && self.strip == 0 => {
                    self.strip = strip.start;
                    self.strip_char = strip.content;
                }
                DecoderWrapper::Replace(_) if !assembled => self.steps.push(replace_step(step)),
                DecoderWrapper::Metaspace(_) | DecoderWrapper::WordPiece(_) | DecoderWrapper::Strip(_)
                    if !assembled =>
                {
                    self.steps.push(Step::Library(step.clone()));
                }
                other => return Err(unsupported_step(other)),
            }
        }
        Ok(())
    }

    fn fill(&mut self, backend: &Backend) -> Result<(), TextError> {
        let added = backend.get_added_tokens_decoder();
        let vocabulary = backend.get_vocab(true);
        let Some(last) = vocabulary.values().chain(added.keys()).max().copied() else { return Ok(()) };
        if last > MAX_TOKEN_ID {
            return Err(TextError::invalid(
                "vocabulary",
                format!("token id {last} is larger than {MAX_TOKEN_ID}"),
            ));
        }
        for id in 0..=last {
            let raw = backend.id_to_token(id);
            let mut flags = 0;
            if let Some(token) = &raw {
                flags |= PRESENT;
                if backend.get_added_vocabulary().is_special_token(token) {
                    flags |= SPECIAL;
                }
                let piece = self.piece(token, false)?;
                match self.byte_of(&piece) {
                    Some(byte) => {
                        flags |= BYTE;
                        self.bytes.push(byte);
                    }
                    None => self.bytes.extend_from_slice(&self.assembled(&piece)),
                }
            }
            self.ends.push(u32::try_from(self.bytes.len()).map_err(|_| {
                TextError::invalid("vocabulary", "its token texts together exceed 4 GiB".to_owned())
            })?);
            self.flags.push(flags);
            self.raw.push(raw.map(String::into_boxed_str));
        }
        Ok(())
    }

    /// The text of one token after the per-token steps. Some decoders treat the first token otherwise.
    fn piece<'a>(&self, token: &'a str, first: bool) -> Result<Cow<'a, str>, TextError> {
        let mut piece = Cow::Borrowed(token);
        for step in &self.steps {
            match step {
                Step::Replace { from, to } => {
                    if piece.contains(from.as_str()) {
                        piece = Cow::Owned(piece.replace(from.as_str(), to));
                    }
                }
                Step::Library(decoder) => {
                    let mut chain = vec![piece.into_owned()];
                    if !first {
                        chain.insert(0, "x".to_owned());
                    }
                    let decoded = decoder
                        .decode_chain(chain)
                        .map_err(|error| TextError::invalid("decoder", error.to_string()))?;
                    piece = Cow::Owned(decoded.into_iter().next_back().unwrap_or_default());
                }
            }
        }
        Ok(piece)
    }

    fn byte_of(&self, piece: &str) -> Option<u8> {
        (self.assembly == Assembly::ByteFallback).then(|| byte_token(piece)).flatten()
    }

    fn assembled<'a>(&self, piece: &'a str) -> Cow<'a, [u8]> {
        if self.assembly == Assembly::ByteLevel
            && let Some(bytes) = piece.chars().map(byte_of_printable).collect::<Option<Vec<u8>>>()
        {
            return Cow::Owned(bytes);
        }
        Cow::Borrowed(piece.as_bytes())
    }

    /// One more than the largest id.
    pub(crate) fn len(&self) -> usize {
        self.flags.len()
    }

    /// The vocabulary's own spelling of a token.
    pub(crate) fn raw(&self, id: u32) -> Option<&str> {
        self.raw.get(usize::try_from(id).ok()?)?.as_deref()
    }

    /// Whether a token is special (skipped by `skip_special`).
    pub(crate) fn is_special(&self, id: u32) -> bool {
        usize::try_from(id).ok().and_then(|i| self.flags.get(i)).is_some_and(|f| f & SPECIAL != 0)
    }

    /// The bytes that a token stands for when it is not the first one.
    pub(crate) fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        let index = usize::try_from(id).ok()?;
        if self.flags.get(index)? & PRESENT == 0 {
            return None;
        }
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.bytes[start as usize..self.ends[index] as usize])
    }
}

fn replace_step(step: &DecoderWrapper) -> Step {
    // The fields of `Replace` are private; its JSON form is the documented file format.
    let plain = serde_json::to_value(step).ok().and_then(|value| {
        let from = value.get("pattern")?.get("String")?.as_str()?.to_owned();
        let to = value.get("content")?.as_str()?.to_owned();
        (!from.is_empty()).then_some(Step::Replace { from, to })
    });
    plain.unwrap_or_else(|| Step::Library(step.clone()))
}

fn unsupported_step(step: &DecoderWrapper) -> TextError {
    let value = serde_json::to_value(step).ok();
    let name = value.as_ref().and_then(|v| v.get("type")).and_then(|v| v.as_str()).unwrap_or("unknown");
    TextError::unsupported(
        "tokenizer decoder",
        name,
        "expected per-token steps (Replace, Strip, Metaspace, WordPiece), then ByteLevel or ByteFallback, \
         then Fuse and Strip at the start",
    )
}

/// The byte that a SentencePiece byte token `<0xNN>` stands for.
pub(crate) fn byte_token(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if piece.len() == 6 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards in order.
pub(crate) fn byte_of_printable(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The inverse of [`byte_of_printable`].
pub(crate) fn printable_of_byte(byte: u8) -> char {
    match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap_or(char::REPLACEMENT_CHARACTER),
        0x7F..=0xA0 => char::from_u32(0x121 + u32::from(byte) - 0x7F).unwrap_or(char::REPLACEMENT_CHARACTER),
        0xAD => '\u{143}',
    }
}

/// The state of one decode: what a token's text depends on besides the token.
#[derive(Clone, Debug)]
pub(crate) struct DecodeState {
    first: bool,
    strip_left: usize,
    /// At most three bytes: the beginning of a character.
    pending: Vec<u8>,
}

impl DecodeState {
    pub(crate) fn new(decoding: &Decoding) -> Self {
        DecodeState { first: true, strip_left: decoding.strip, pending: Vec::new() }
    }

    /// Appends the text that `id` completes. Unknown ids stand for nothing, as in full decoding.
    pub(crate) fn push(&mut self, decoding: &Decoding, id: u32, skip_special: bool, text: &mut String) {
        let Some(bytes) = decoding.token_bytes(id) else { return };
        if skip_special && decoding.is_special(id) {
            return;
        }
        let first = std::mem::replace(&mut self.first, false);
        let is_byte = decoding.flags[id as usize] & BYTE != 0;
        let start = text.len();
        match decoding.assembly {
            Assembly::ByteLevel => {
                if first && !decoding.steps.is_empty() {
                    let bytes = decoding.first_bytes(id);
                    self.pending.extend_from_slice(&bytes);
                } else {
                    self.pending.extend_from_slice(bytes);
                }
                self.drain(text, false);
            }
            _ if is_byte => {
                self.pending.extend_from_slice(bytes);
                self.drain(text, true);
            }
            _ => {
                self.flush_bytes(text);
                if !first && decoding.assembly == Assembly::Spaced {
                    text.push(' ');
                }
                if first && !decoding.steps.is_empty() {
                    text.push_str(&String::from_utf8_lossy(&decoding.first_bytes(id)));
                } else {
                    text.push_str(&String::from_utf8_lossy(bytes));
                }
            }
        }
        self.strip(decoding, text, start);
    }

    /// Appends what is left: an incomplete character becomes U+FFFD.
    pub(crate) fn finish(&mut self, decoding: &Decoding, text: &mut String) {
        let start = text.len();
        if decoding.assembly == Assembly::ByteLevel {
            if !self.pending.is_empty() {
                self.pending.clear();
                text.push(char::REPLACEMENT_CHARACTER);
            }
        } else {
            self.flush_bytes(text);
        }
        self.strip(decoding, text, start);
    }

    /// Moves complete characters from `pending` to `text`. An invalid sequence becomes one U+FFFD, or with
    /// `each` one per byte, which is what byte tokens give in `tokenizers` and SentencePiece.
    fn drain(&mut self, text: &mut String, each: bool) {
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(invalid) = error.error_len() else { break };
                    let marks = if each { invalid } else { 1 };
                    text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, marks));
                    rest = &rest[invalid..];
                }
            }
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
    }

    fn flush_bytes(&mut self, text: &mut String) {
        text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, self.pending.len()));
        self.pending.clear();
    }

    /// Removes leading characters of the whole text, as `Strip` after `Fuse` does.
    fn strip(&mut self, decoding: &Decoding, text: &mut String, start: usize) {
        while self.strip_left > 0 {
            let Some(character) = text[start..].chars().next() else { return };
            if character == decoding.strip_char {
                text.remove(start);
                self.strip_left -= 1;
            } else {
                self.strip_left = 0;
            }
        }
    }
}

impl Decoding {
    fn first_bytes(&self, id: u32) -> Vec<u8> {
        let token = self.raw(id).unwrap_or_default();
        match self.piece(token, true) {
            Ok(piece) => self.assembled(&piece).into_owned(),
            Err(_) => token.as_bytes().to_vec(), // every token passed the same steps at load
        }
    }
}
