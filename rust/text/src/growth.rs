//! What is asked of a `tokenizer.json` before it is read: that it has its fields, and that its steps do not multiply a text.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::TextError;
use crate::tiktoken::base64;

/// How many times longer the steps of a file may make a text. Published ones make it some fifty times longer at the very worst: a
/// charsmap 11 times, replaced spaces three or four times.
const MAX_GROWTH: u64 = 256;
/// How many bytes the steps may add to a text, however short.
const MAX_ADDED: u64 = 1 << 16;
/// The fields of a file.
const FIELDS: [&str; 9] = [
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
];

/// Checks a file's fields and the growth of what normalizes, cuts and decodes texts. What is no JSON is left to its reader.
///
/// # Errors
/// [`TextError::Invalid`] without `model`, with an unknown field, or with steps that multiply a text.
pub(crate) fn check(what: &str, json: &[u8]) -> Result<(), TextError> {
    let Some(fields) = fields(json) else { return Ok(()) };
    let invalid = |message: String| Err(TextError::invalid(what, message));
    if !fields.iter().any(|(name, _)| name == "model") {
        return invalid("the field `model` is missing; expected an object with the vocabulary".to_owned());
    }
    if let Some((name, _)) = fields.iter().find(|(name, _)| !FIELDS.contains(&name.as_str())) {
        return invalid(format!("unknown field `{name:.80}`; expected only {}", FIELDS.join(", ")));
    }
    let mut growths: BTreeMap<&str, Growth> = BTreeMap::new();
    for (name, value) in &fields {
        let place = match name.as_str() {
            "normalizer" | "pre_tokenizer" => "normalizer and pre_tokenizer",
            "decoder" => "decoder",
            _ => continue,
        };
        let Ok(step) = serde_json::from_slice::<Value>(value) else { return Ok(()) };
        growths.entry(place).or_insert(Growth { factor: 1, added: 0 }).step(&step);
    }
    for (place, Growth { factor, added }) in growths {
        if factor > MAX_GROWTH || added > MAX_ADDED {
            return invalid(format!(
                "{place}: the steps make a text up to {factor} times longer and add up to {added} bytes; \
                 at most {MAX_GROWTH} times and {MAX_ADDED} bytes are accepted"
            ));
        }
    }
    Ok(())
}

/// A text of `n` bytes becomes one of at most `factor * n + added`.
struct Growth {
    factor: u64,
    added: u64,
}

impl Growth {
    /// Follows the text through a step, or through those of a sequence.
    fn step(&mut self, step: &Value) {
        for name in ["normalizers", "pretokenizers", "decoders"] {
            for inner in step.get(name).and_then(Value::as_array).into_iter().flatten() {
                self.step(inner);
            }
        }
        let text = |name: &str| step.get(name).and_then(Value::as_str);
        let length = |text: Option<&str>| text.map_or(0, |text| text.len() as u64);
        let pattern = step.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Value::as_str);
        // A file of an old version leaves the type out: what a step has tells what it may do.
        if let Some(content) = text("content").filter(|_| step.get("pattern").is_some()) {
            match length(pattern) {
                // An expression may match between all characters.
                0 => self.grow(1 + content.len() as u64, content.len() as u64),
                old => self.grow((content.len() as u64).div_ceil(old), 0),
            }
        }
        self.grow(1, length(text("prepend")));
        if let Some(coded) = text("precompiled_charsmap") {
            self.grow(charsmap_growth(coded), 0);
        }
        if text("type") == Some("ByteLevel") {
            self.grow(2, 1);
        }
    }

    fn grow(&mut self, factor: u64, added: u64) {
        let factor = factor.max(1);
        self.factor = self.factor.saturating_mul(factor);
        self.added = self.added.saturating_mul(factor).saturating_add(added);
    }
}

/// How much longer a charsmap makes a text: the longest of what it puts in, for a character of three bytes.
fn charsmap_growth(coded: &str) -> u64 {
    let Some(map) = base64(coded.as_bytes()) else { return 1 };
    let Some((size, rest)) = map.split_first_chunk::<4>() else { return 1 };
    let texts = rest.get(u32::from_le_bytes(*size) as usize..).unwrap_or(&[]);
    let longest = texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0);
    (longest as u64).div_ceil(3)
}

/// The fields of an object, in order, with the text of each value; none for what is no object.
fn fields(json: &[u8]) -> Option<Vec<(String, &[u8])>> {
    let mut found = Vec::new();
    let mut at = after_space(json, 0);
    (json.get(at) == Some(&b'{')).then_some(())?;
    at = after_space(json, at + 1);
    while json.get(at)? != &b'}' {
        let end = end_of_value(json, at)?;
        let name = serde_json::from_slice(&json[at..end]).ok()?;
        at = after_space(json, end);
        (json.get(at) == Some(&b':')).then_some(())?;
        at = after_space(json, at + 1);
        let end = end_of_value(json, at)?;
        found.push((name, &json[at..end]));
        at = after_space(json, end);
        if json.get(at) == Some(&b',') {
            at = after_space(json, at + 1);
        }
    }
    Some(found)
}

fn after_space(json: &[u8], at: usize) -> usize {
    at + json[at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count()
}

/// Where the value ends that starts at `at`; none if it does not.
fn end_of_value(json: &[u8], mut at: usize) -> Option<usize> {
    let mut depth = 0_usize;
    loop {
        match json.get(at)? {
            b'"' => {
                at += 1;
                while json.get(at)? != &b'"' {
                    at += if json[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        at += 1;
        if depth == 0 && json.get(at).is_none_or(|next| b",:}] \t\r\n".contains(next)) {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        check("x", json.as_bytes()).err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn fields_are_named() {
        for json in ["{}", "{\"version\" : \"1.0\"}", "{\"a\": {\"model\": 1}}"] {
            assert!(error(json).contains("the field `model` is missing"), "{json}");
        }
        assert!(
            error(r#"{"a\u0062": "}\"", "model": 5}"#)
                .contains("unknown field `ab`; expected only version, ")
        );
        for json in [
            "",
            "[1]",
            "{\"a\"",
            "{\"a\":}",
            "{\"a\": \"",
            "{\"a\": [}",
            "nul",
            r#"{ "model": {} , "decoder": null }"#,
        ] {
            assert_eq!(error(json), "", "{json}");
        }
    }

    #[test]
    fn growth_is_bounded() {
        let replace = |pattern: &str, content: &str| {
            format!(r#"{{"type": "Replace", "pattern": {pattern}, "content": "{content}"}}"#)
        };
        let sequence = |steps: &[String]| {
            format!(
                r#"{{"model": {{}}, "normalizer": {{"type": "Sequence", "normalizers": [{}]}}}}"#,
                steps.join(", ")
            )
        };
        let hundred = replace(r#"{"String": "a"}"#, &"a".repeat(100));
        assert_eq!(error(&sequence(std::slice::from_ref(&hundred))), "");
        assert!(error(&sequence(&vec![hundred; 6])).contains("up to 1000000000000 times longer"));
        let regex = replace(r#"{"Regex": "a"}"#, "aaa");
        assert!(error(&sequence(&vec![regex; 5])).contains("up to 1024 times longer"));
        let bytes = r#"{"type": "ByteLevel"}"#.to_owned();
        assert!(error(&sequence(&vec![bytes; 40])).contains("times longer"));
        let prepended = format!(r#"{{"type": "Prepend", "prepend": "{}"}}"#, "a".repeat(1000));
        assert!(error(&sequence(&vec![prepended; 66])).contains("add up to 66000 bytes"));
        let usual = [
            replace(r#"{"String": " "}"#, "▁"),
            replace(r#"{"Regex": " {2,}"}"#, "▁"),
            replace(r#"{"String": "``"}"#, "\\\""),
        ];
        assert_eq!(error(&sequence(&usual)), "");
    }
}
