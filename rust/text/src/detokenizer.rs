//! Incremental detokenization with stop strings.

use crate::decoding::DecodeState;
use crate::error::TextError;
use crate::stop::{StopMatch, StopStrings};
use crate::tokenizer::Tokenizer;

/// What one token added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextStep {
    /// Text that is final: whole characters, and no part of them can belong to a stop string.
    pub text: String,
    /// Set when a stop string was completed; nothing more will be emitted.
    pub stopped: Option<StopMatch>,
}

/// Turns a stream of token ids into a stream of text.
///
/// The concatenation of every [`TextStep::text`] and of [`Detokenizer::finish`] equals
/// [`Tokenizer::decode`] of the same ids (cut at the stop string, if one appears). No piece ends inside a
/// UTF-8 character. A token costs time in proportion to its own text.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    state: DecodeState,
    skip_special: bool,
    stops: StopStrings,
    stop_texts: Vec<String>,
    include_stop: bool,
    /// The end of the text that could still become a stop string.
    held: String,
    stopped: Option<StopMatch>,
}

impl Detokenizer {
    /// A detokenizer at the beginning of a text.
    ///
    /// `skip_special` leaves special tokens out of the text. A stop string ends the text just before itself, or
    /// just after itself with `include_stop_str_in_output`.
    ///
    /// # Errors
    /// An empty stop string.
    pub fn new(
        tokenizer: &Tokenizer,
        skip_special: bool,
        stop: Vec<String>,
        include_stop_str_in_output: bool,
    ) -> Result<Self, TextError> {
        Ok(Detokenizer {
            tokenizer: tokenizer.clone(),
            state: DecodeState::new(tokenizer.decoding()),
            skip_special,
            stops: StopStrings::new(&stop)?,
            stop_texts: stop,
            include_stop: include_stop_str_in_output,
            held: String::new(),
            stopped: None,
        })
    }

    /// Continues after `prompt`, whose own text is not emitted.
    ///
    /// Without this the first generated token would be taken for the beginning of a text, and a SentencePiece
    /// vocabulary would lose its leading space. Stop strings do not look into the prompt.
    #[must_use]
    pub fn after_prompt(mut self, prompt: &[u32]) -> Self {
        let mut text = String::new();
        for &id in prompt {
            self.state.push(self.tokenizer.decoding(), id, self.skip_special, &mut text);
            text.clear();
        }
        self
    }

    /// Takes the next token. After a stop nothing is emitted any more.
    pub fn push(&mut self, token: u32) -> TextStep {
        if self.stopped.is_some() {
            return TextStep { text: String::new(), stopped: self.stopped.clone() };
        }
        let mut text = String::new();
        self.state.push(self.tokenizer.decoding(), token, self.skip_special, &mut text);
        self.release(text, true)
    }

    /// Takes the next token before `min_tokens` are reached: stop strings that it completes end nothing, but one may begin with it, as in vLLM.
    pub fn push_without_stops(&mut self, token: u32) -> String {
        let mut text = String::new();
        if self.stopped.is_none() {
            self.state.push(self.tokenizer.decoding(), token, self.skip_special, &mut text);
        }
        self.release(text, false).text
    }

    /// Ends the text: what was held back comes out, an incomplete character as U+FFFD.
    ///
    /// The replacement character may itself complete a stop string; [`Detokenizer::stopped`] tells.
    pub fn finish(&mut self) -> String {
        if self.stopped.is_some() {
            return String::new();
        }
        let mut text = String::new();
        self.state.finish(self.tokenizer.decoding(), &mut text);
        let mut text = self.release(text, true).text;
        if self.stopped.is_none() {
            text.push_str(&std::mem::take(&mut self.held));
        }
        text
    }

    /// The stop string that ended the text, if one did.
    pub fn stopped(&self) -> Option<&StopMatch> {
        self.stopped.as_ref()
    }

    fn release(&mut self, new: String, may_stop: bool) -> TextStep {
        if self.stops.is_empty() {
            return TextStep { text: new, stopped: None };
        }
        let before = self.held.len();
        let mut found = self.stops.find(&new);
        let mut rest = &new[..];
        while let Some(ignored) = found.as_ref().filter(|_| !may_stop) {
            rest = &rest[ignored.end..];
            found = self.stops.find(rest);
        }
        self.held.push_str(&new);
        let mut text = std::mem::take(&mut self.held);
        if let Some(found) = found {
            let end = before + found.end;
            text.truncate(if self.include_stop { end } else { end - found.length });
            self.stopped = Some(StopMatch { index: found.index, stop: self.stop_texts[found.index].clone() });
        } else {
            self.held = text.split_off(text.len() - self.stops.undecided());
        }
        TextStep { text, stopped: self.stopped.clone() }
    }
}
