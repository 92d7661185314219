//! The tags of a template, found as minijinja's lexer finds them, so that what it would recurse into is bounded before it reads any.

use std::ops::Range;

use crate::error::TextError;

/// Most words, signs and brackets of one tag (the longest of a published template has some 140): each may nest an expression once more.
const MAX_TOKENS: usize = 2000;
/// Most `elif`s of a template: each nests a condition once more.
const MAX_BRANCHES: usize = 500;

/// What is between `{%` and `%}`, or between `{{` and `}}`.
pub(super) struct Tag {
    /// Whether it is a statement.
    pub(super) is_statement: bool,
    /// Where its words, signs, brackets and strings are in the source.
    pub(super) tokens: Vec<Range<usize>>,
    /// Where its end marker is, with the sign for white space.
    pub(super) end: usize,
}

impl Tag {
    /// The word that tells which statement it is.
    pub(super) fn keyword<'a>(&self, source: &'a str) -> Option<&'a str> {
        self.tokens.first().filter(|_| self.is_statement).map(|token| &source[token.clone()])
    }
}

/// All tags of a template up to the first that minijinja refuses.
///
/// # Errors
/// [`TextError::Template`] for a tag or a chain of `elif`s that is too long, or brackets that are closed before they are opened.
pub(super) fn tags(source: &str) -> Result<Vec<Tag>, TextError> {
    let (mut found, mut at, mut branches) = (Vec::new(), 0, 0);
    while let Some(start) = source[at..].find('{').map(|start| at + start) {
        let rest = &source[start..];
        let end = match rest.as_bytes().get(1) {
            Some(b'#') => rest[2..].find("#}").map(|end| start + 2 + end + 2),
            Some(b'%') if raw_tag(&rest[2..], "raw").is_some() => end_of_raw(source, start + 2),
            Some(&kind @ (b'%' | b'{')) => {
                let after = start + 2 + usize::from(rest[2..].starts_with(['-', '+']));
                let (tag, end) = tag(source, after, kind == b'%')?;
                branches += usize::from(tag.keyword(source) == Some("elif"));
                found.push(tag);
                end
            }
            _ => Some(start + 1),
        };
        let Some(end) = end else { break };
        at = end;
    }
    if branches > MAX_BRANCHES {
        return Err(refusal(format!("it has {branches} `elif`s; at most {MAX_BRANCHES} are accepted")));
    }
    Ok(found)
}

fn refusal(message: String) -> TextError {
    TextError::Template(message)
}

/// The length of a tag's rest, after the opening, if it is the plain tag of that name.
fn raw_tag(rest: &str, name: &str) -> Option<usize> {
    let inner = rest.strip_prefix(['-', '+']).unwrap_or(rest).trim_ascii_start();
    let inner = inner.strip_prefix(name)?.trim_ascii_start();
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    inner.strip_prefix("%}").map(|after| rest.len() - after.len())
}

/// Where a raw block ends whose opening tag's contents start at `at`; nothing in it is a tag.
fn end_of_raw(source: &str, at: usize) -> Option<usize> {
    let mut at = at + raw_tag(&source[at..], "raw")?;
    loop {
        at += source[at..].find("{%")? + 2;
        if let Some(length) = raw_tag(&source[at..], "endraw") {
            return Some(at + length);
        }
    }
}

/// The tag whose contents start at `at`, and where the text after it starts if it has an end.
fn tag(source: &str, mut at: usize, is_statement: bool) -> Result<(Tag, Option<usize>), TextError> {
    let bytes = source.as_bytes();
    let ending: &[u8] = if is_statement { b"%}" } else { b"}}" };
    let (mut tokens, mut depth) = (Vec::new(), 0_usize);
    loop {
        at += bytes[at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        let rest = &bytes[at..];
        let sign = usize::from(matches!(rest.first(), Some(b'-' | b'+')));
        if depth == 0 && rest.get(sign..).is_some_and(|rest| rest.starts_with(ending)) {
            return Ok((Tag { is_statement, tokens, end: at }, Some(at + sign + 2)));
        }
        let Some(length) = token(rest) else { return Ok((Tag { is_statement, tokens, end: at }, None)) };
        match rest[0] {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' if depth == 0 => {
                let line = source[..at].matches('\n').count() + 1;
                let found = char::from(rest[0]);
                return Err(refusal(format!(
                    "not a valid template: unexpected `{found}` (line {line} of the template)"
                )));
            }
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        tokens.push(at..at + length);
        if tokens.len() > MAX_TOKENS {
            let line = source[..at].matches('\n').count() + 1;
            return Err(refusal(format!(
                "a tag has more than {MAX_TOKENS} words and signs (line {line} of the template)"
            )));
        }
        at += length;
    }
}

/// The length of the first token; none where minijinja finds none.
fn token(rest: &[u8]) -> Option<usize> {
    let word = rest.iter().take_while(|&&byte| byte.is_ascii_alphanumeric() || byte == b'_').count();
    match rest.first()? {
        b'0'..=b'9' if rest[..word].ends_with(b"e") || rest[..word].ends_with(b"E") => {
            let is_signed =
                matches!(rest.get(word), Some(b'-' | b'+')) && !matches!(rest.get(1), Some(b'x' | b'X'));
            let digits = || rest[word + 1..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            Some(if is_signed { word + 1 + digits() } else { word })
        }
        _ if word > 0 => Some(word),
        quote @ (b'\'' | b'"') => {
            let mut at = 1;
            while rest.get(at)? != quote {
                at += if rest[at] == b'\\' { 2 } else { 1 };
            }
            Some(at + 1)
        }
        _ if [b"//", b"**", b"==", b"!=", b">=", b"<="].iter().any(|sign| rest.starts_with(*sign)) => Some(2),
        byte if byte.is_ascii_punctuation() => Some(1),
        _ => None,
    }
}
