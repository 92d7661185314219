//! `format`, Python's method of strings and Jinja2's filter, with bounds: minijinja makes whatever a template asks for.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Rest, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::printing;

/// Greatest width and precision.
const MAX_WIDTH: usize = 1024;

pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter("format", |state: &State<'_, '_>, text: &str, values: Rest<ValueOrKwargs>| {
        formatted(state, FormatStyle::Printf, text, &values.into_values())
    });
}

/// The text with values in its fields.
///
/// # Errors
/// A width, a precision or a result that is too long, and whatever minijinja refuses.
pub(super) fn formatted(
    state: &State<'_, '_>,
    style: FormatStyle,
    text: &str,
    values: &[Value],
) -> Result<Value, Error> {
    let (mark, has_wide): (&str, fn(&str) -> bool) = match style {
        FormatStyle::Printf => ("%", has_wide_percent),
        FormatStyle::StrFormat => ("{", has_wide_brace),
    };
    let fields = text.matches(mark).count();
    // Two marks stand for the sign itself.
    if text.replace(&mark.repeat(2), "").split(mark).skip(1).any(has_wide) {
        return Err(refusal(format!("format: expected a width and a precision of at most {MAX_WIDTH}")));
    }
    // Every field may hold the longest value.
    let length = |value: &Value| match value.as_str() {
        Some(text) => Ok(text.len()),
        None => printing::python_str(value).map(|text| text.len()),
    };
    let longest =
        values.iter().map(length).try_fold(0, |longest, length| Ok::<_, Error>(length?.max(longest)))?;
    let most = fields.saturating_mul(longest + 2 * MAX_WIDTH).saturating_add(text.len());
    if most > printing::MAX_BYTES {
        return Err(refusal(format!("format: the result may have more than {} bytes", printing::MAX_BYTES)));
    }
    state.consume_fuel(4 * fields as u64)?;
    format(style, text, values).map(Value::from)
}

/// Whether the description of a field after `%` asks for a width or a precision that is too great.
fn has_wide_percent(field: &str) -> bool {
    let key = field.strip_prefix('(').and_then(|key| key.split_once(')'));
    let described = key.map_or(field, |(_, after)| after).trim_start_matches(['#', '0', '-', ' ', '+']);
    let end = described.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    has_wide_number(&described[..end.unwrap_or(described.len())])
}

/// The same of a field after `{`, where the sign of the padding may be anything.
fn has_wide_brace(field: &str) -> bool {
    let Some((name, described)) = field.split_once(':') else { return false };
    let padding = described.chars().next().map_or(0, char::len_utf8);
    let is_padded = described[padding..].starts_with(['<', '>', '^', '=']);
    let described = if is_padded { &described[padding..] } else { described };
    !name.contains('}') && has_wide_number(described.split('}').next().unwrap_or_default())
}

fn has_wide_number(text: &str) -> bool {
    let numbers = text.split(|letter: char| !letter.is_ascii_digit()).filter(|digits| !digits.is_empty());
    numbers.map(str::parse::<usize>).any(|number| number.map_or(true, |number| number > MAX_WIDTH))
}

fn refusal(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_widths_count() {
        for field in ["d 99999", "(99999)s", "-5.3f99999", "", " 1024d", "(a 99999"] {
            assert!(!has_wide_percent(field), "{field}");
        }
        for field in ["99999d", "(a)-1025s", ".99999999999999999999999f", "0.1025f"] {
            assert!(has_wide_percent(field), "{field}");
        }
        for field in ["99999}", ":9>1024}", ":} 99999", "} a: 99999", ":"] {
            assert!(!has_wide_brace(field), "{field}");
        }
        for field in [":9>99999}", ":}>99999}", "0:99999}", "0.a:.99999f}", ":é^99999}"] {
            assert!(has_wide_brace(field), "{field}");
        }
    }
}
