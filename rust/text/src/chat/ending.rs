//! How a rendered conversation ends.
//!
//! A message that is to be continued ends where its content ends, without the tokens that a template writes after it. Templates do not tell
//! where that is, so a mark goes in at the end of the content, and the text is cut at it, as transformers does it. The blank at the mark's end
//! shows whether the template trims contents: then the model has never seen blanks at an end, and none stay.

use serde_json::Value;

use crate::error::TextError;

/// How a rendered conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With what the template writes after the last message.
    Closed,
    /// Where the assistant's answer begins: the template sees `add_generation_prompt`.
    GenerationPrompt,
    /// Where the last message's content ends, so that it is continued.
    Open,
}

/// Of characters without a meaning, which no filter for letters changes.
const MARK: &str = "\u{e0c7}\u{e0c8}\u{e0c9} ";

/// Messages whose last one is to be continued.
pub(super) struct Continued {
    /// With the mark.
    pub messages: Value,
    /// What is to be continued.
    content: String,
}

impl Continued {
    /// # Errors
    /// [`TextError::Template`] when there is no message, or the last one has no text.
    pub fn of(messages: &Value) -> Result<Self, TextError> {
        let mut messages = messages.clone();
        let last = messages.as_array_mut().and_then(|list| list.last_mut());
        let last = last.ok_or_else(|| refusal("there is no message to continue"))?;
        let text = match last.get_mut("content") {
            Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
            content => content,
        };
        let Some(Value::String(text)) = text else {
            return Err(refusal("the last message's content has no text to continue"));
        };
        let content = text.clone();
        text.push_str(MARK);
        Ok(Self { messages, content })
    }

    /// The rendered text up to the end of the last message's content.
    ///
    /// # Errors
    /// [`TextError::Template`] when the template does not write the content as it is.
    pub fn cut(&self, rendered: &str) -> Result<String, TextError> {
        let Some((text, rest)) = rendered.rsplit_once(MARK.trim_end()) else {
            return Err(refusal("the template does not show the last message"));
        };
        let text = if rest.starts_with(' ') { text } else { text.trim_end() };
        if !text.trim_end().ends_with(self.content.trim()) {
            return Err(refusal(
                "the template changes the last message, so that nobody can tell where it ends",
            ));
        }
        Ok(text.to_owned())
    }
}

fn refusal(message: &str) -> TextError {
    TextError::Template(format!("continue_final_message: {message}"))
}
