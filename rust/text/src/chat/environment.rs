//! The environment that templates run in, configured as transformers configures Jinja2.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value};

use super::{clock, formats, json, methods, printing, values};

/// Steps that one rendering may take: about a second of work, and hundreds of times what long chats need.
const FUEL: u64 = 20_000_000;

/// Marks errors of `raise_exception`, so that the message reaches the caller without decoration.
pub(super) const RAISED: &str = "\u{1}raised: ";

pub(super) fn new() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(|out, _, value| {
        match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&printing::python_str(value)?),
        }
        .map_err(|_| Error::new(ErrorKind::WriteFailure, "cannot write output"))
    });
    minijinja_contrib::add_to_environment(&mut environment);
    methods::add_to(&mut environment);
    values::add_to(&mut environment);
    formats::add_to(&mut environment);
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("string", |value: &Value| printing::python_str(value));
    environment.add_filter("indent", indent);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        let message = printing::python_str(message)?;
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    set_clock(&mut environment, None);
    environment
}

fn syntax() -> SyntaxConfig {
    // Only delimiters can be refused, and these are the usual ones.
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default()
}

/// Sets what `strftime_now` sees; `None` is the real time.
pub(super) fn set_clock(environment: &mut Environment<'static>, fixed: Option<i64>) {
    environment.add_function("strftime_now", move |format: &str| -> Result<String, Error> {
        clock::strftime(format, fixed.unwrap_or_else(clock::now))
            .map_err(|message| Error::new(ErrorKind::InvalidOperation, message))
    });
}

/// Jinja2's `indent(width=4, first=False, blank=False)`; minijinja's drops a final newline.
fn indent(text: &str, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        positional.get(index).map_or_else(|| named.get(name), |value| Ok(Some(value.clone())))
    };
    let indentation = match argument(0, "width")? {
        Some(width) if width.as_str().is_some() => printing::python_str(&width)?,
        Some(width) => match usize::try_from(width) {
            Ok(width @ ..=1024) => " ".repeat(width),
            _ => return Err(Error::new(ErrorKind::InvalidOperation, "indent: expected at most 1024 spaces")),
        },
        None => " ".repeat(4),
    };
    let first = argument(1, "first")?.is_some_and(|value| value.is_true());
    let blank = argument(2, "blank")?.is_some_and(|value| value.is_true());
    named.assert_all_used()?;
    let mut out = String::new();
    for (index, line) in text.split('\n').enumerate() {
        out.push_str(if index > 0 { "\n" } else { "" });
        let indented = if index == 0 { first } else { blank || !line.is_empty() };
        out.push_str(if indented { &indentation } else { "" });
        out.push_str(line);
    }
    Ok(out)
}

/// Jinja2 asks for a length and for indexing, which Python's strings and dictionaries have too.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
}

fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || matches!(value.kind(), ValueKind::Iterable)
}

/// Turns JSON into template values. The caller has limited the nesting.
pub(super) fn value_of(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(flag) => Value::from(*flag),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(list) => list.iter().map(value_of).collect(),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), value_of(value))))
        }
    }
}

/// Turns messages into template values. As in transformers, reasoning that is passed under an older name can be
/// read as `reasoning_content`, and any as `thinking`.
pub(super) fn messages_of(json: &serde_json::Value) -> Value {
    let Some(messages) = json.as_array() else { return value_of(json) };
    messages.iter().map(message_of).collect()
}

fn message_of(message: &serde_json::Value) -> Value {
    let names = ["reasoning_content", "thinking", "reasoning"];
    let found = names.iter().filter_map(|name| message.get(name)).find(|value| !value.is_null());
    let (Some(reasoning), Some(fields)) = (found, message.as_object()) else { return value_of(message) };
    let mut all = serde_json::Map::new();
    all.insert("thinking".to_owned(), reasoning.clone());
    all.extend(fields.iter().map(|(name, value)| (name.clone(), value.clone())));
    all.insert("reasoning_content".to_owned(), reasoning.clone());
    value_of(&serde_json::Value::Object(all))
}
