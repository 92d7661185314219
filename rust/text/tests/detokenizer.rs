//! Incremental detokenization against full decoding, and stop strings.

mod common;

use common::{Random, all_tokenizers, shared};
use infer_text::{Detokenizer, Tokenizer};
use serde_json::json;

/// Pushes all ids; every delta must be whole characters (a `String` is) and the sum must be the full decode.
fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut detokenizer = Detokenizer::new(tokenizer, skip_special, Vec::new(), false).unwrap();
    let mut text: String = ids.iter().map(|&id| detokenizer.push(id).text).collect();
    text.push_str(&detokenizer.finish());
    text
}

fn random_ids(random: &mut Random, tokenizer: &Tokenizer) -> Vec<u32> {
    let length = random.below(40);
    // Byte tokens and special tokens sit at the ends of most vocabularies: visit those often, and unknown ids too.
    let size = tokenizer.vocabulary_size();
    (0..length)
        .map(|_| match random.below(4) {
            0 => random.below(300.min(size)) as u32,
            1 => (size - 1 - random.below(64.min(size))) as u32,
            2 if random.below(20) == 0 => size as u32 + 7,
            _ => random.below(size) as u32,
        })
        .collect()
}

#[test]
fn streams_equal_full_decoding() {
    for (name, tokenizer) in all_tokenizers() {
        let mut random = Random(1);
        for _ in 0..3000 {
            let ids = random_ids(&mut random, tokenizer);
            for skip in [false, true] {
                assert_eq!(stream(tokenizer, &ids, skip), tokenizer.decode(&ids, skip), "{name} {ids:?}");
            }
        }
    }
}

#[test]
fn text_survives_encoding_and_streaming() {
    let text = "Hello, wörld! \u{1F999}\u{200D}\u{1F469}\u{1F3FD} 日本語 ﷺ \t\n\n  def f(x):\r\n    return x ** 2  # ½ \u{0}\u{7f}";
    for (name, tokenizer) in all_tokenizers() {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text, "{name}");
        assert_eq!(stream(tokenizer, &ids, false), text, "{name}");
    }
}

#[test]
fn characters_come_out_as_soon_as_they_are_complete() {
    for (name, tokenizer) in all_tokenizers() {
        let ids = tokenizer.encode("a\u{1F999}b", false).unwrap();
        let mut detokenizer = Detokenizer::new(tokenizer, false, Vec::new(), false).unwrap();
        let pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).text).collect();
        assert!(pieces.iter().any(|piece| piece.ends_with('\u{1F999}')), "{name} {pieces:?}");
        assert!(!pieces.iter().any(|piece| piece.contains('\u{FFFD}')), "{name} {pieces:?}");
        assert_eq!(detokenizer.finish(), "", "{name}");
    }
}

#[test]
fn an_incomplete_character_is_replaced_at_the_end() {
    for (name, tokenizer) in all_tokenizers() {
        let mut ids = tokenizer.encode("a\u{1F999}", false).unwrap();
        let whole = ids.len();
        ids.pop();
        let text = stream(tokenizer, &ids, false);
        if tokenizer.encode("\u{1F999}", false).unwrap().len() > 2 && whole > 2 {
            assert!(text.ends_with('\u{FFFD}'), "{name} {text:?}");
        }
        assert_eq!(text, tokenizer.decode(&ids, false), "{name}");
    }
}

/// Vocabularies as small as can be, one for each way of decoding that the library knows and we take apart.
fn small_vocabularies() -> Vec<String> {
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    let decoders = [
        json!(null),
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        metaspace("always"),
        metaspace("never"),
        json!({"type": "ByteFallback"}),
        json!({"type": "Sequence", "decoders": [{"type": "Strip", "content": "a", "start": 2, "stop": 0}, metaspace("first")]}),
        json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "[ab]"}, "content": "<"},
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 3, "stop": 0}]}),
    ];
    let tokens = [
        "▁",
        "▁a",
        "a",
        "##b",
        "b▁c",
        ".",
        " do not",
        "Ġ",
        "Ã",
        "©",
        "é",
        "<0xC3>",
        "<0xA9>",
        "<0x41>",
        "<0xF0>",
        "x\u{1F999}",
    ];
    let vocabulary: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let special = json!({"id": 16, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let file = |decoder: &serde_json::Value| {
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []}})
        .to_string()
    };
    decoders.iter().map(file).collect()
}

/// Whether the library's own treatment is expected to differ: it replaces a run of byte tokens wholly when any part
/// of it is invalid, we keep the characters that are whole (they have been emitted already).
fn differs_by_design(text: &str) -> bool {
    text.contains('\u{FFFD}')
}

#[test]
fn decoding_equals_the_library() {
    let mut files = small_vocabularies();
    let data = ["gpt2", "phi3", "smollm2", "gpt-neox"].map(|name| format!("{name}/tokenizer.json"));
    files.extend(data.iter().filter_map(|name| String::from_utf8(common::vocabulary_file(name)?).ok()));
    let mut compared = 0;
    for (index, file) in files.iter().enumerate() {
        let library = tokenizers::Tokenizer::from_bytes(file).unwrap();
        let tokenizer = Tokenizer::from_json(file.as_bytes()).unwrap();
        let bytes_are_exact = !file.contains("ByteFallback");
        let mut random = Random(index as u64);
        for _ in 0..2000 {
            let ids = random_ids(&mut random, &tokenizer);
            for skip in [false, true] {
                let expected = library.decode(&ids, skip).unwrap();
                if bytes_are_exact || !differs_by_design(&expected) {
                    assert_eq!(
                        tokenizer.decode(&ids, skip),
                        expected,
                        "{ids:?} {}",
                        &file[file.len() - 200..]
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 20_000, "only {compared} compared");
}

fn tinylm() -> Option<Tokenizer> {
    Some(Tokenizer::from_folder(&shared("tinylm/target")?).unwrap().unwrap())
}

/// Text and the stop string found, with the pieces joined.
fn run(tokenizer: &Tokenizer, text: &str, stops: &[&str], include: bool) -> (String, Option<String>) {
    let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
    let mut detokenizer = Detokenizer::new(tokenizer, false, stops, include).unwrap();
    let mut out = String::new();
    for id in tokenizer.encode(text, false).unwrap() {
        out.push_str(&detokenizer.push(id).text);
    }
    out.push_str(&detokenizer.finish());
    (out, detokenizer.stopped().map(|found| found.stop.clone()))
}

#[test]
fn stop_strings_end_the_text_across_tokens() {
    let Some(tokenizer) = tinylm() else { return };
    let found = |stop: &str| Some(stop.to_owned());
    let text = "Once upon a time there was a fox. The end.";
    assert_eq!(
        run(&tokenizer, text, &["time there"], false),
        ("Once upon a ".to_owned(), found("time there"))
    );
    assert_eq!(run(&tokenizer, text, &["e th"], true), ("Once upon a time th".to_owned(), found("e th")));
    assert_eq!(run(&tokenizer, text, &["never"], false), (text.to_owned(), None));
    // The one that is complete first wins; of two that end together, the longer.
    assert_eq!(run(&tokenizer, text, &["fox", "a", "upon a"], false), ("Once ".to_owned(), found("upon a")));
    // A beginning of a stop string that leads nowhere is given back.
    assert_eq!(run(&tokenizer, text, &["end.!"], false), (text.to_owned(), None));
}

#[test]
fn stopping_does_not_depend_on_how_text_is_cut() {
    let Some(tokenizer) = tinylm() else { return };
    let mut random = Random(7);
    let letters = ["a", "b", "aa", "ab", "é", "🦙", " "];
    for _ in 0..2000 {
        let mut pick =
            |count: usize| (0..count).map(|_| letters[random.below(letters.len())]).collect::<String>();
        let text = pick(14);
        let stops = [pick(3), pick(2)];
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let expected = (0..=text.len())
            .filter(|&end| text.is_char_boundary(end))
            .find_map(|end| {
                let matching = stops.iter().filter(|stop| text[..end].ends_with(**stop));
                matching.max_by_key(|stop| stop.len()).map(|stop| text[..end - stop.len()].to_owned())
            })
            .unwrap_or_else(|| text.clone());
        assert_eq!(run(&tokenizer, &text, &stops, false).0, expected, "{text:?} {stops:?}");
    }
}

#[test]
fn text_is_held_back_only_while_it_may_become_a_stop_string() {
    let Some(tokenizer) = tinylm() else { return };
    let mut detokenizer = Detokenizer::new(&tokenizer, false, vec!["###".to_owned()], false).unwrap();
    let hash = tokenizer.encode("#", false).unwrap();
    let letter = tokenizer.encode("x", false).unwrap();
    assert_eq!(detokenizer.push(hash[0]).text, "");
    assert_eq!(detokenizer.push(hash[0]).text, "");
    assert_eq!(detokenizer.push(letter[0]).text, "##x");
    assert_eq!(detokenizer.push(hash[0]).text, "");
    assert_eq!(detokenizer.finish(), "#");
    assert!(Detokenizer::new(&tokenizer, false, vec![String::new()], false).is_err());
}

#[test]
fn a_stop_string_may_begin_before_texts_may_stop() {
    let Some(tokenizer) = tinylm() else { return };
    let hash = tokenizer.encode("#", false).unwrap()[0];
    let new = |stop: &str| Detokenizer::new(&tokenizer, false, vec![stop.to_owned()], false).unwrap();
    // What was complete too early ends nothing, also as the beginning of what is complete later.
    let mut detokenizer = new("##");
    let early: String = (0..3).map(|_| detokenizer.push_without_stops(hash)).collect();
    assert_eq!(early, "##");
    let step = detokenizer.push(hash);
    assert_eq!((step.text.as_str(), step.stopped.is_some()), ("", true));
    // Half of it too early.
    let mut detokenizer = new("###");
    assert_eq!(detokenizer.push_without_stops(hash), "");
    assert_eq!(detokenizer.push_without_stops(hash), "");
    assert!(detokenizer.push(hash).stopped.is_some());
}

#[test]
fn a_generated_text_keeps_the_space_after_its_prompt() {
    let Some(tokenizer) = common::from_files(&[("llama2/tokenizer.model", "tokenizer.model")]) else {
        return;
    };
    let prompt = tokenizer.encode("The capital of France is", true).unwrap();
    let answer = tokenizer.encode("Paris", false).unwrap();
    let new = || Detokenizer::new(&tokenizer, true, Vec::new(), false).unwrap();
    assert_eq!(new().push(answer[0]).text, "Paris");
    assert_eq!(new().after_prompt(&prompt).push(answer[0]).text, " Paris");
    assert_eq!(new().after_prompt(&[1]).push(answer[0]).text, "Paris");
    // Half a character at the end of a prompt is completed by the answer.
    let bytes: Vec<u32> =
        "🦙".bytes().map(|byte| tokenizer.id(&format!("<0x{byte:02X}>")).unwrap()).collect();
    let mut detokenizer = new().after_prompt(&bytes[..3]);
    assert_eq!(detokenizer.push(bytes[3]).text, "🦙");
}
