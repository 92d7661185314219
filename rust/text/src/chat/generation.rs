//! transformers' `{% generation %}` block marks what the assistant wrote, for training masks.
//!
//! For rendering it only opens a scope, which is what `{% with %}` does.

/// Replaces the tags of generation blocks by those of plain scopes; whitespace control signs stay.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        output.push_str(before);
        let Some(end) = tag[2..].find("%}").map(|end| end + 4) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        let inside = &tag[2..tag.len() - 2];
        match inside.trim_matches(['-', '+']).trim() {
            "generation" => output.push_str(&tag.replacen("generation", "with", 1)),
            "endgeneration" => output.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            _ => {
                // Only the opening is consumed: a string in a tag may hold "%}".
                output.push_str(&tag[..2]);
                rest = &rest[start + 2..];
                continue;
            }
        }
        rest = after;
    }
    output.push_str(rest);
    output
}

#[cfg(test)]
mod tests {
    use super::without_generation_tags;

    #[test]
    fn only_the_tags_change() {
        let source =
            "{%- generation -%}a{% generation\n%}b{%endgeneration%}{{ 'generation' }}{%- endgeneration %}";
        let expected = "{%- with -%}a{% with\n%}b{%endwith%}{{ 'generation' }}{%- endwith %}";
        assert_eq!(without_generation_tags(source), expected);
        assert_eq!(without_generation_tags("{% if x %}{%"), "{% if x %}{%");
        assert_eq!(without_generation_tags("{%}"), "{%}");
    }
}
