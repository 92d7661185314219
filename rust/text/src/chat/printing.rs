//! Values as Python's `str` and `repr` spell them.
//!
//! minijinja already prints `True`, `None` and floats nearly as Python does, but quotes strings inside lists and
//! dictionaries as Rust does.

use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting that is printed; deeper values print as `...`.
const MAX_DEPTH: usize = 100;
/// Longest text that is printed, in bytes.
pub(super) const MAX_BYTES: usize = 1 << 26;
/// Most items that are printed, those of lists in lists included: a list that holds another twice stands for many.
pub(super) const MAX_ITEMS: usize = 1 << 22;

/// `str(value)`. Undefined prints nothing, as in Jinja2.
///
/// # Errors
/// A value that prints as more than [`MAX_BYTES`], or has more than [`MAX_ITEMS`].
pub(super) fn python_str(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        _ => {
            let mut out = String::new();
            repr(value, &mut out, 0, &mut 0)?;
            Ok(out)
        }
    }
}

fn repr(value: &Value, out: &mut String, depth: usize, items: &mut usize) -> Result<(), Error> {
    *items += 1;
    if out.len() > MAX_BYTES || *items > MAX_ITEMS {
        return Err(Error::new(ErrorKind::InvalidOperation, too_long()));
    }
    if depth > MAX_DEPTH {
        out.push_str("...");
        return Ok(());
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String => string_repr(value.as_str().unwrap_or_default(), out),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::Iterable if value.len().is_none() => _ = write!(out, "{value}"),
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let length = value.len().unwrap_or(0);
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(&item, out, depth + 1, items)?;
            }
            out.push_str(if tuple && length == 1 { "," } else { "" });
            out.push(if tuple { ')' } else { ']' });
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(&key, out, depth + 1, items)?;
                out.push_str(": ");
                repr(&value.get_item(&key).unwrap_or(Value::UNDEFINED), out, depth + 1, items)?;
            }
            out.push('}');
        }
        _ => _ = write!(out, "{value}"),
    }
    Ok(())
}

/// What is said of a value with too many items or bytes.
pub(super) fn too_long() -> String {
    format!("a value is too long to be printed: at most {MAX_ITEMS} items and {MAX_BYTES} bytes are accepted")
}

/// A number as Python prints it: floats switch to exponents outside 1e-4 <= |x| < 1e16.
pub(super) fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return "nan".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let text = format!("{float:?}"); // shortest digits that read back, and the same thresholds as Python
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

/// `repr(str)`: single quotes unless the text has some and no double ones.
fn string_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if printable(c) => out.push(c),
            c => {
                let code = u32::from(c);
                _ = match code {
                    0..=0xFF => write!(out, "\\x{code:02x}"),
                    0x100..=0xFFFF => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// `str.isprintable` as far as control, separator and private-use characters go (not unassigned ones).
fn printable(character: char) -> bool {
    !matches!(u32::from(character),
        0..=0x1F | 0x7F..=0xA0 | 0xAD | 0x600..=0x605 | 0x61C | 0x6DD | 0x70F | 0x1680 | 0x180E
        | 0x2000..=0x200F | 0x2028..=0x202F | 0x205F..=0x206F | 0x3000 | 0xE000..=0xF8FF | 0xFEFF
        | 0xFFF9..=0xFFFB | 0xE0000..=0xE0FFF | 0xF0000..)
}

#[cfg(test)]
mod tests {
    use super::super::environment::value_of;
    use super::*;

    #[test]
    fn as_python_prints() {
        let value = value_of(&serde_json::json!(
            {"a": [1, 2.0, true, null, "it's", "say \"hi\"", "tab\t\u{e9}\u{200b}"], "b": {"c": 1e300, "d": 1e-7}}
        ));
        assert_eq!(
            python_str(&value).unwrap(),
            r#"{'a': [1, 2.0, True, None, "it's", 'say "hi"', 'tab\té\u200b'], 'b': {'c': 1e+300, 'd': 1e-07}}"#
        );
        assert_eq!(python_str(&Value::from("it's")).unwrap(), "it's");
        assert_eq!(python_str(&Value::UNDEFINED).unwrap(), "");
    }
}
