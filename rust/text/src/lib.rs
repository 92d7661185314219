//! Text in and out of a language model: tokenizers, incremental detokenization, chat templates.
//!
//! - [`Tokenizer`] reads what model folders and GGUF files hold (`tokenizer.json`, SentencePiece and tiktoken
//!   `tokenizer.model`, `vocab.json` with `merges.txt`, [`GgufVocabulary`]) and gives ids for text and back.
//!   Whatever the file, the work is done by the `tokenizers` crate, so there is one behaviour to trust.
//! - [`Detokenizer`] turns a stream of ids into whole characters and watches for stop strings.
//! - [`ChatTemplate`] renders messages as transformers' Jinja2 environment does, under limits on time, steps and sizes.
//!
//! Every file here comes from strangers: sizes are limited, numbers are checked, and panics of third-party
//! parsers are caught; each failure is one [`TextError`].
#![forbid(unsafe_code)]

mod chat;
mod decoding;
mod detokenizer;
mod error;
mod folder;
mod gguf;
mod growth;
mod merges;
mod pre_tokenizers;
mod sentencepiece;
mod stop;
mod tiktoken;
mod to_gguf;
mod tokenizer;
mod vocabulary;

pub use chat::{ChatTemplate, Ending};
pub use detokenizer::{Detokenizer, TextStep};
pub use error::TextError;
pub use folder::SpecialTokens;
pub use gguf::GgufVocabulary;
pub use stop::StopMatch;
pub use tokenizer::{MAX_SPACE_RUN, MAX_TEXT_BYTES, Tokenizer};
