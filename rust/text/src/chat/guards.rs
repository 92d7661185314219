//! A template's assignments are made to pass a check of what they assign: an engine cannot be asked to look at a value that templates
//! build step by step, and is lost in one that is nested without end, holds itself, or stands for billions of items.

use super::tags::Tag;

/// The filter that checks what a variable becomes. Names of filters, unlike those of functions, cannot be reassigned by a template.
pub(super) const VARIABLE: &str = "infer_checked_variable";
/// The filter that checks what becomes part of a namespace.
pub(super) const ATTRIBUTE: &str = "infer_checked_attribute";
/// The filter that checks what is multiplied.
pub(super) const FACTOR: &str = "infer_checked_factor";

/// The template with checks. Lines stay where they are, and so does every sign that removes white space.
pub(super) fn guarded(source: &str, tags: &[Tag]) -> String {
    let mut added = Vec::new();
    for tag in tags {
        let words: Vec<&str> = tag.tokens.iter().map(|token| &source[token.clone()]).collect();
        let assigned = (tag.keyword(source) == Some("set")).then(|| first_at_top(&words, "=")).flatten();
        if let Some(first) = assigned.map(|equals| equals + 1).filter(|first| *first < words.len()) {
            let is_attribute = words[..first].contains(&".");
            added.push((tag.tokens[first].start, "(".to_owned()));
            added.push((tag.end, format!(")|{} ", if is_attribute { ATTRIBUTE } else { VARIABLE })));
        }
        for last in factors(&words) {
            added.push((tag.tokens[last].end, format!("|{FACTOR}")));
        }
        for name in bound(&words, tag.keyword(source)) {
            added.push((tag.end, format!(" %}}{{% set {name} = {name}|{VARIABLE} ")));
        }
    }
    // What is added at a tag's end stays in order, after what is added to a factor that ends there.
    added.sort_by_key(|(place, text)| (*place, !text.starts_with('|')));
    let (mut output, mut written) = (String::with_capacity(source.len() + 64 * added.len()), 0);
    for (place, text) in added {
        output.push_str(&source[written..place]);
        output.push_str(&text);
        written = place;
    }
    output.push_str(&source[written..]);
    output
}

/// The last words of what stands on both sides of each `*`, methods and filters included.
fn factors(words: &[&str]) -> Vec<usize> {
    let is_product = |at: &usize| words[*at] == "*" && *at > 0 && !matches!(words[at - 1], "(" | ",");
    let sides = |at: usize| [Some(at - 1), end_of_factor(words, at + 1)];
    let mut found: Vec<usize> = (0..words.len()).filter(is_product).flat_map(sides).flatten().collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// The last word of the factor that starts at `at`.
fn end_of_factor(words: &[&str], mut at: usize) -> Option<usize> {
    let end_of_group =
        |at: usize| depths(&words[at..]).position(|depth| depth == 0).map(|length| at + length);
    while *words.get(at)? == "-" {
        at += 1;
    }
    let mut last = end_of_group(at)?;
    loop {
        last = match words.get(last + 1) {
            Some(&("(" | "[")) => end_of_group(last + 1)?,
            Some(&("." | "|")) if last + 2 < words.len() => last + 2,
            Some(next) if next.starts_with(['\'', '"']) && words[last].starts_with(['\'', '"']) => last + 1,
            _ => return Some(last),
        };
    }
}

/// Where a word is that no bracket surrounds.
fn first_at_top(words: &[&str], wanted: &str) -> Option<usize> {
    depths(words).zip(words).position(|(depth, word)| depth == 0 && *word == wanted)
}

/// How many brackets surround each word; those of a pair themselves are inside it and outside of it.
fn depths(words: &[&str]) -> impl Iterator<Item = usize> {
    words.iter().scan(0_usize, |depth, word| {
        *depth = match *word {
            "(" | "[" | "{" => *depth + 1,
            ")" | "]" | "}" => depth.saturating_sub(1),
            _ => *depth,
        };
        Some(*depth)
    })
}

/// The names that a loop, a scope or a macro gives values to.
fn bound<'a>(words: &[&'a str], keyword: Option<&str>) -> Vec<&'a str> {
    let is_name = |word: &str| word.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
    let listed = |from: usize| {
        let rest = words.get(from..).unwrap_or(&[]);
        let inside = depths(rest).take_while(|depth| *depth > 0).count();
        let names = (1..inside).filter(|at| matches!(rest[at - 1], "(" | ",")).zip(std::iter::repeat(rest));
        names.filter(|(at, _)| depths(rest).nth(*at) == Some(1)).map(|(at, rest)| rest[at]).collect()
    };
    let found: Vec<&str> = match keyword {
        Some("for") => words.iter().skip(1).take_while(|word| **word != "in").copied().collect(),
        Some("with") => {
            let named = |at: &usize| words.get(at + 1) == Some(&"=");
            depths(words)
                .enumerate()
                .filter(|(_, depth)| *depth == 0)
                .map(|(at, _)| at)
                .filter(named)
                .map(|at| words[at])
                .collect()
        }
        Some("macro") => listed(2),
        Some("call") => listed(1),
        _ => Vec::new(),
    };
    found.into_iter().filter(|word| is_name(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tags::tags;

    fn guarded(source: &str) -> String {
        let text = super::guarded(source, &tags(source).unwrap());
        text.replace(super::VARIABLE, "V").replace(super::ATTRIBUTE, "A").replace(super::FACTOR, "F")
    }

    #[test]
    fn what_is_assigned_is_checked() {
        for (source, expected) in [
            ("{%- set x = [a, '%}'] -%}", "{%- set x = ([a, '%}'] )|V -%}"),
            ("{% set a.b = 1, 2 %}{{ x == 2 }}", "{% set a.b = (1, 2 )|A %}{{ x == 2 }}"),
            (
                "{% for a, (b, c) in d[{}] -%}",
                "{% for a, (b, c) in d[{}]  %}{% set a = a|V  %}{% set b = b|V  %}{% set c = c|V -%}",
            ),
            (
                "{% macro m(a, b=f(c, d)) %}",
                "{% macro m(a, b=f(c, d))  %}{% set a = a|V  %}{% set b = b|V %}",
            ),
            ("{{ f(*a) * -b.c[0]|d(1).e - 2 ** 3 }}", "{{ f(*a)|F * -b.c[0]|d(1).e|F - 2 ** 3 }}"),
            ("{{ 1e-5*1.5E+3 }}", "{{ 1e-5|F*1.5E+3|F }}"),
            ("{% set x = 2 * a*'b' 'c'%}", "{% set x = (2|F * a|F*'b' 'c'|F)|V %}"),
            ("{% call(a) m(b) %}", "{% call(a) m(b)  %}{% set a = a|V %}"),
            (
                "{% with a = f(b=1), c = 2 %}",
                "{% with a = f(b=1), c = 2  %}{% set a = a|V  %}{% set c = c|V %}",
            ),
        ] {
            assert_eq!(guarded(source), expected);
        }
        for same in [
            "{% set x %}{% endset %}",
            "{% set x = %}",
            "{# {% set x = 1 %} #}",
            "{%- raw -%}{% set x = ' %}{%- endraw %}",
            "{% set x = 'unterminated",
            "{% call m(b) %}{ { {",
        ] {
            assert_eq!(guarded(same), same);
        }
    }
}
