//! Methods of Python's strings, lists and dictionaries that templates call, and Jinja2's tests and filters that minijinja lacks.
//!
//! `minijinja_contrib::pycompat` has the most usual ones; here are those that it lacks or knows with fewer arguments. Places in strings are
//! counted in characters, as in Python. What is not there: `text % values` (an operator that minijinja does not let one define; the filter
//! `format` does the same) and `varargs` in macros. No template that was found needs either.

use std::fmt::Display;

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::formats;

/// Widest padding of `center`, `ljust`, `rjust` and `zfill`, in characters.
const MAX_WIDTH: i64 = 1024;

pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(call);
    environment.add_test("callable", is_callable);
    environment.add_filter("wordcount", word_count);
    environment.add_filter("center", |text: &str, width: Option<i64>| {
        padded(text, width.unwrap_or(80), None, Side::Both)
    });
}

fn call(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let known = match value.kind() {
        ValueKind::String if method == "format" => {
            let text = value.as_str().unwrap_or_default();
            formats::formatted(state, FormatStyle::StrFormat, text, args).map(Some)
        }
        ValueKind::String => of_string(value.as_str().unwrap_or_default(), method, args),
        ValueKind::Seq => of_list(value, method, args),
        ValueKind::Map if method == "copy" => from_args(args).map(|()| Some(value.clone())),
        _ => Ok(None),
    };
    known?.map_or_else(|| unknown_method_callback(state, value, method, args), Ok)
}

/// What a string's method gives; none for methods that are not of this file.
fn of_string(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found = match method {
        "split" | "rsplit" => split(text, method, args)?,
        "find" | "rfind" | "index" | "rindex" => place(text, method, args)?,
        "partition" | "rpartition" => partition(text, method, args)?,
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "center" | "ljust" | "rjust" => {
            let (width, fill): (i64, Option<&str>) = from_args(args)?;
            let side = match method {
                "ljust" => Side::Right,
                "rjust" => Side::Left,
                _ => Side::Both,
            };
            Value::from(padded(text, width, fill, side)?)
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let sign = usize::from(text.starts_with(['+', '-']));
            let digits = padded(&text[sign..], width.saturating_sub(sign as i64), Some("0"), Side::Left)?;
            Value::from(format!("{}{digits}", &text[..sign]))
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

/// What a list's method gives; none for methods that are not of this file.
fn of_list(list: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "copy" => from_args(args).map(|()| Some(list.clone())),
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = list.try_iter()?.position(|item| item == *wanted);
            at.map(|at| Some(Value::from(at))).ok_or_else(|| refusal(format!("{wanted} is not in the list")))
        }
        _ => Ok(None),
    }
}

/// `split(sep=None, maxsplit=-1)`, from the left or from the right.
fn split(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, most, named): (Option<&Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = separator.cloned().or(named.get("sep")?).filter(|given| !given.is_none());
    let most = most.or(named.get("maxsplit")?).and_then(|most| usize::try_from(most).ok());
    named.assert_all_used()?;
    let separator =
        separator.as_ref().map(|given| given.as_str().ok_or_else(|| refusal("sep must be a string")));
    let (most, is_right) = (most.unwrap_or(usize::MAX - 1), method == "rsplit");
    let Some(separator) = separator.transpose()? else { return Ok(words(text, most, is_right)) };
    if separator.is_empty() {
        return Err(refusal(format!("{method}: empty separator")));
    }
    if !is_right {
        return Ok(text.splitn(most + 1, separator).map(Value::from).collect());
    }
    let mut parts: Vec<&str> = text.rsplitn(most + 1, separator).collect();
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

/// At most `most` words from one end, and what is left, with the blanks at its other end, if anything is.
fn words(text: &str, most: usize, is_right: bool) -> Value {
    let after = if is_right { str::trim_end } else { str::trim_start };
    let (mut rest, mut found) = (after(text), Vec::new());
    while !rest.is_empty() && found.len() < most {
        let (word, left) = match is_right {
            false => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
            true => rest.rsplit_once(char::is_whitespace).map_or((rest, ""), |(left, word)| (word, left)),
        };
        found.push(word);
        rest = after(left);
    }
    found.extend((!rest.is_empty()).then_some(rest));
    if is_right {
        found.reverse();
    }
    found.into_iter().map(Value::from).collect()
}

/// `find(sub, start=0, end=len)` and its like: places count characters; negative ones count from the end.
fn place(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let length = text.chars().count() as i64;
    let from_start = |at: i64| (if at < 0 { at.saturating_add(length) } else { at }).max(0);
    let (start, end) = (from_start(start.unwrap_or(0)), from_start(end.unwrap_or(length)).min(length));
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    let part = (start <= end).then(|| &text[byte(start)..byte(end)]);
    let found = part.and_then(|part| {
        let at = if method.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) };
        at.map(|at| start + part[..at].chars().count() as i64)
    });
    match found {
        Some(at) => Ok(Value::from(at)),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(refusal(format!("{method}: substring not found"))),
    }
}

/// The text before a separator, the separator, and the text after it.
fn partition(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(refusal(format!("{method}: empty separator")));
    }
    let (found, missing) = match method {
        "rpartition" => (text.rsplit_once(separator), ["", "", text]),
        _ => (text.split_once(separator), [text, "", ""]),
    };
    let parts = found.map_or(missing, |(before, after)| [before, separator, after]);
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// Where padding goes.
enum Side {
    Left,
    Right,
    Both,
}

/// A text with padding up to a width in characters.
fn padded(text: &str, width: i64, fill: Option<&str>, side: Side) -> Result<String, Error> {
    let fill = fill.unwrap_or(" ");
    if width > MAX_WIDTH || fill.chars().count() != 1 {
        return Err(refusal(format!("padding: expected a width of at most {MAX_WIDTH} and one character")));
    }
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        // Python puts what is left over on the left where the width is odd.
        Side::Both => missing / 2 + (missing & width & 1),
    };
    Ok(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
}

/// Functions and macros are; so is, in Jinja2, what is undefined.
fn is_callable(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined)
}

/// How many runs of letters, digits and underscores there are.
fn word_count(text: &str) -> usize {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_')
        .filter(|word| !word.is_empty())
        .count()
}

fn refusal(message: impl Display) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_string())
}
