//! What both JSON parsers share: a memory budget while serde reads, and typed refusals out of it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};

use crate::budget::Budget;
use crate::error::{Container, FormatError, quoted};

/// The safetensors reference implementation's limit on its JSON header; an index gets the same.
pub(crate) const MAX_JSON_BYTES: usize = 100_000_000;
/// What an entry of a map costs beside its two texts: sorted keys leave B-tree nodes half full.
const ENTRY_BYTES: usize = 128;

/// What is carried through a deserialization.
pub(crate) struct JsonState {
    container: Container,
    budget: Budget,
    /// Serde's errors are text; the typed one waits here.
    refusal: Option<FormatError>,
}

impl JsonState {
    /// Reads all of `text` as one JSON value, by `read`, which gets the state and the deserializer.
    pub(crate) fn read<'t, T>(
        container: Container,
        part: &'static str,
        text: &'t [u8],
        file_bytes: usize,
        read: impl FnOnce(
            &mut JsonState,
            &mut serde_json::Deserializer<serde_json::de::SliceRead<'t>>,
        ) -> Result<T, serde_json::Error>,
    ) -> Result<T, FormatError> {
        let budget = Budget::for_file(container, file_bytes);
        let mut state = JsonState { container, budget, refusal: None };
        let mut json = serde_json::Deserializer::from_slice(text);
        let value = read(&mut state, &mut json).and_then(|value| json.end().map(|()| value));
        value.map_err(|error| state.refusal.take().unwrap_or(FormatError::json(container, part, &error)))
    }

    /// Takes memory out of the budget.
    pub(crate) fn charge<E: serde::de::Error>(&mut self, bytes: usize, field: &str) -> Result<(), E> {
        let charged = self.budget.charge(1, bytes, field);
        charged.map_err(|error| self.refuse(error))
    }

    /// An owned copy of `text`, charged.
    pub(crate) fn own<E: serde::de::Error>(&mut self, text: &str, field: &str) -> Result<String, E> {
        let owned = self.budget.own(text, field);
        owned.map_err(|error| self.refuse(error))
    }

    /// The error that stops serde, while `error` waits to replace it.
    pub(crate) fn refuse<E: serde::de::Error>(&mut self, error: FormatError) -> E {
        self.refusal = Some(error);
        E::custom("refused")
    }
}

/// Text that is borrowed from the JSON where it has no escapes.
#[derive(Deserialize)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// Reads an object from strings to strings, refusing a key that occurs twice.
pub(crate) struct TextMapSeed<'s> {
    pub(crate) state: &'s mut JsonState,
    /// What a key is, for messages.
    pub(crate) key: &'static str,
    /// What the object is, for messages.
    pub(crate) object: &'static str,
}

impl<'de> DeserializeSeed<'de> for TextMapSeed<'_> {
    type Value = BTreeMap<String, String>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextMapSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: an object from strings to strings", self.object)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut texts = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<Text<'de>, Text<'de>>()? {
            self.state.charge::<A::Error>(ENTRY_BYTES, self.object)?;
            let value = self.state.own(&value.0, self.object)?;
            if texts.contains_key(key.0.as_ref()) {
                let (container, name) = (self.state.container, quoted(&key.0));
                return Err(self.state.refuse(FormatError::Duplicate { container, field: self.key, name }));
            }
            texts.insert(self.state.own(&key.0, self.object)?, value);
        }
        Ok(texts)
    }
}
