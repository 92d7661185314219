//! The engine's view of detokenization, which lives elsewhere: tokens in, whole characters out, stop strings spotted.

/// What one token added to a completion's text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextStep {
    /// Text that can no longer change; may be empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// The stop string that ended the completion; `text` then ends where it should.
    pub stopped: Option<String>,
}

/// The text of one completion as its tokens come.
pub trait TokenText: Send {
    /// Adds a token. Stop strings count only when `may_stop` (the completion has its `min_tokens`).
    fn push(&mut self, token: u32, may_stop: bool) -> TextStep;
    /// What was held back when the completion ends for another reason. An incomplete character's replacement may still complete a
    /// stop string.
    fn finish(&mut self) -> TextStep;
}

/// Makes the text of one more completion of a request.
pub type TextFactory = Box<dyn Fn() -> Box<dyn TokenText> + Send>;
