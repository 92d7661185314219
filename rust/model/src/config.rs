//! Typed, checked reading of a model's configuration (`config.json`, or GGUF metadata brought into the same form).

use std::path::Path;

use serde_json::{Map, Value};

use crate::ModelError;
use crate::folder::read_small;

/// A JSON object whose getters name the field, the value and what would be right.
#[derive(Debug, Clone)]
pub struct Config {
    fields: Map<String, Value>,
}

type Fields<'a> = &'a [&'a str];

impl Config {
    /// Reads and parses a `config.json`, or another file of its form.
    pub(crate) fn read(path: &Path) -> Result<Self, ModelError> {
        Self::parse(&read_small(path)?).map_err(|error| error.at(path))
    }

    /// Parses `config.json`. A `text_config` inside (multi-modal checkpoints) is laid over the outer object.
    pub fn parse(bytes: &[u8]) -> Result<Self, ModelError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| ModelError::NoObject(format!("it cannot be read: {error}")))?;
        Self::from_value(value)
    }

    /// Wraps a JSON object.
    pub fn from_value(value: Value) -> Result<Self, ModelError> {
        let Value::Object(mut fields) = value else {
            return Err(ModelError::NoObject(format!("it is {}", kind(&value))));
        };
        if let Some(Value::Object(text)) = fields.get("text_config").cloned() {
            fields.extend(text);
        }
        Ok(Self { fields })
    }

    /// The first of `names` that is present and not null.
    pub fn find<'a>(&self, names: Fields<'a>) -> Option<(&'a str, &Value)> {
        names.iter().find_map(|name| match self.fields.get(*name) {
            None | Some(Value::Null) => None,
            Some(value) => Some((*name, value)),
        })
    }

    /// Is the field written, be it null?
    pub fn contains(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// The names of all fields.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }

    /// An object inside, as a configuration of its own.
    pub fn object(&self, name: &str) -> Result<Option<Config>, ModelError> {
        match self.find(&[name]) {
            None => Ok(None),
            Some((_, Value::Object(fields))) => Ok(Some(Config { fields: fields.clone() })),
            Some((_, value)) => Err(ModelError::config(name, kind(value), "an object")),
        }
    }

    /// A whole number of at most `limit`.
    pub fn count(&self, names: Fields<'_>, limit: usize) -> Result<Option<usize>, ModelError> {
        let Some((name, value)) = self.find(names) else { return Ok(None) };
        let number = value
            .as_u64()
            .or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && *x >= 0.0).map(|x| x as u64));
        match number.and_then(|number| usize::try_from(number).ok()).filter(|number| *number <= limit) {
            Some(number) => Ok(Some(number)),
            None => Err(ModelError::config(name, value, format!("a whole number up to {limit}"))),
        }
    }

    /// A whole number from 1 to `limit` that must be there.
    pub fn size(&self, names: Fields<'_>, limit: usize) -> Result<usize, ModelError> {
        match self.count(names, limit)? {
            Some(0) => Err(ModelError::config(names[0], 0, format!("a whole number from 1 to {limit}"))),
            Some(number) => Ok(number),
            None => Err(ModelError::config(names[0], "missing", format!("a whole number from 1 to {limit}"))),
        }
    }

    /// A finite number.
    pub fn number(&self, names: Fields<'_>) -> Result<Option<f64>, ModelError> {
        let Some((name, value)) = self.find(names) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(ModelError::config(name, value, "a finite number")),
        }
    }

    /// A finite number above zero.
    pub fn positive(&self, names: Fields<'_>) -> Result<Option<f64>, ModelError> {
        match self.number(names)? {
            Some(number) if number <= 0.0 => Err(ModelError::config(names[0], number, "a number above 0")),
            number => Ok(number),
        }
    }

    /// True or false.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        match self.find(&[name]) {
            None => Ok(None),
            Some((_, Value::Bool(flag))) => Ok(Some(*flag)),
            Some((_, value)) => Err(ModelError::config(name, value, "true or false")),
        }
    }

    /// A string.
    pub fn text(&self, names: Fields<'_>) -> Result<Option<&str>, ModelError> {
        match self.find(names) {
            None => Ok(None),
            Some((_, Value::String(text))) => Ok(Some(text)),
            Some((name, value)) => Err(ModelError::config(name, value, "a string")),
        }
    }

    /// A list of strings.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<&str>>, ModelError> {
        self.list(name, "a list of strings", Value::as_str)
    }

    /// A list of numbers.
    pub fn numbers(&self, name: &str) -> Result<Option<Vec<f64>>, ModelError> {
        self.list(name, "a list of numbers", Value::as_f64)
    }

    /// A token id or a list of them.
    pub fn token_ids(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.find(&[name]) {
            None => Ok(Vec::new()),
            Some((_, Value::Array(_))) => {
                Ok(self.list(name, "a token id or a list of them", id)?.unwrap_or_default())
            }
            Some((_, value)) => match id(value) {
                Some(id) => Ok(vec![id]),
                None => Err(ModelError::config(name, value, "a token id or a list of them")),
            },
        }
    }

    fn list<'a, T>(
        &'a self,
        name: &str,
        expected: &str,
        item: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ModelError> {
        let Some((_, value)) = self.find(&[name]) else { return Ok(None) };
        let items = value.as_array().and_then(|items| items.iter().map(item).collect::<Option<Vec<T>>>());
        items.map(Some).ok_or_else(|| ModelError::config(name, kind(value), expected))
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a flag",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list with other items",
        Value::Object(_) => "an object",
    }
}
