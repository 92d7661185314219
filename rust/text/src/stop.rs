//! Stop strings in a stream of text.
//!
//! One Knuth-Morris-Pratt automaton per stop string, fed byte by byte: the work does not depend on how the text
//! is cut into pieces, nor on how repetitive a stop string is, and the automata's states say exactly how much of
//! the end of the text could still become a match and must be held back.

use crate::error::TextError;

/// A stop string that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Its place in the list of stop strings.
    pub index: usize,
    /// The stop string.
    pub stop: String,
}

#[derive(Clone, Debug)]
struct Automaton {
    pattern: Vec<u8>,
    /// `failure[i]`: length of the longest proper prefix of the pattern that ends at byte `i`.
    failure: Vec<usize>,
    state: usize,
}

impl Automaton {
    fn new(pattern: &str) -> Self {
        let pattern = pattern.as_bytes().to_vec();
        let mut failure = vec![0; pattern.len()];
        let mut length = 0;
        for i in 1..pattern.len() {
            while length > 0 && pattern[i] != pattern[length] {
                length = failure[length - 1];
            }
            if pattern[i] == pattern[length] {
                length += 1;
            }
            failure[i] = length;
        }
        Automaton { pattern, failure, state: 0 }
    }

    /// Takes one byte; true when the pattern ends here.
    fn step(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.pattern[self.state] != byte {
            self.state = self.failure[self.state - 1];
        }
        if self.pattern[self.state] == byte {
            self.state += 1;
        }
        if self.state < self.pattern.len() {
            return false;
        }
        self.state = self.failure[self.state - 1];
        true
    }
}

/// All stop strings of one request.
#[derive(Clone, Debug)]
pub(crate) struct StopStrings {
    automata: Vec<Automaton>,
}

/// Where a stop string was found in the text just given.
pub(crate) struct Found {
    pub(crate) index: usize,
    /// Byte offset in that text just after the stop string.
    pub(crate) end: usize,
    pub(crate) length: usize,
}

impl StopStrings {
    pub(crate) fn new(stops: &[String]) -> Result<Self, TextError> {
        if let Some(index) = stops.iter().position(String::is_empty) {
            return Err(TextError::invalid(
                format!("stop[{index}]"),
                "an empty stop string would stop everything; give at least one character",
            ));
        }
        Ok(StopStrings { automata: stops.iter().map(|stop| Automaton::new(stop)).collect() })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.automata.is_empty()
    }

    /// The match that ends first in `text` (of several that end there, the longest).
    pub(crate) fn find(&mut self, text: &str) -> Option<Found> {
        for (position, byte) in text.bytes().enumerate() {
            let mut found: Option<Found> = None;
            for (index, automaton) in self.automata.iter_mut().enumerate() {
                let length = automaton.pattern.len();
                if automaton.step(byte) && found.as_ref().is_none_or(|f| length > f.length) {
                    found = Some(Found { index, end: position + 1, length });
                }
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// How many bytes at the end of the text so far are the beginning of some stop string.
    pub(crate) fn undecided(&self) -> usize {
        self.automata.iter().map(|automaton| automaton.state).max().unwrap_or(0)
    }
}
