//! Token ids that llama.cpp's test files expect, for every vocabulary at hand.

mod common;

use common::{from_files, from_gguf, vocabulary_file};
use infer_text::Tokenizer;

/// (text, ids without special tokens)
fn cases(name: &str) -> Option<Vec<(String, Vec<u32>)>> {
    let texts = String::from_utf8(vocabulary_file(&format!("{name}.inp"))?).unwrap();
    let ids = String::from_utf8(vocabulary_file(&format!("{name}.out"))?).unwrap();
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let ids: Vec<&str> = ids.lines().collect();
    assert_eq!(texts.len(), ids.len() + 1, "the last separator ends the file");
    let parse = |line: &str| line.split_whitespace().map(|id| id.parse().unwrap()).collect();
    Some(texts.into_iter().zip(ids).map(|(text, line)| (text.to_owned(), parse(line))).collect())
}

fn check(name: &str, tokenizer: Option<Tokenizer>) {
    let (Some(tokenizer), Some(cases)) = (tokenizer, cases(name)) else { return };
    let mut wrong = Vec::new();
    for (text, expected) in &cases {
        let ids = tokenizer.encode(text, false).unwrap();
        if ids != *expected {
            wrong.push(format!("{text:?}:\n  expected {expected:?}\n  got      {ids:?}"));
        }
    }
    assert!(cases.len() >= 40, "{name} has only {} cases", cases.len());
    assert!(
        wrong.is_empty(),
        "{name}: {} of {} cases differ\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn gpt2() {
    let name = "gpt2/ggml-vocab-gpt-2.gguf";
    check(name, from_files(&[("gpt2/tokenizer.json", "tokenizer.json")]));
    check(name, from_files(&[("gpt2/vocab.json", "vocab.json"), ("gpt2/merges.txt", "merges.txt")]));
    check(name, from_gguf(name));
}

#[test]
fn llama2() {
    let name = "llama2/ggml-vocab-llama-spm.gguf";
    check(name, from_files(&[("llama2/tokenizer.model", "tokenizer.model")]));
    check(name, from_gguf(name));
}

#[test]
fn llama3() {
    check("llama3/ggml-vocab-llama-bpe.gguf", from_files(&[("llama3/tokenizer.model", "tokenizer.model")]));
}

#[test]
fn phi3() {
    let name = "phi3/ggml-vocab-phi-3.gguf";
    check(name, from_files(&[("phi3/tokenizer.json", "tokenizer.json")]));
    let config = ("phi3/tokenizer_config.json", "tokenizer_config.json");
    check(name, from_files(&[("phi3/tokenizer.json", "tokenizer.json"), config]));
    check(name, from_gguf(name));
}

#[test]
fn qwen() {
    for name in ["qwen/ggml-vocab-qwen2.gguf", "qwen/ggml-vocab-deepseek-r1-qwen.gguf"] {
        check(name, from_files(&[("qwen/voyage3_base.tiktoken", "qwen.tiktoken")]));
    }
}

#[test]
fn other_gguf_vocabularies() {
    for name in [
        "falcon/ggml-vocab-falcon.gguf",
        "starcoder/ggml-vocab-starcoder.gguf",
        "deepseek/ggml-vocab-deepseek-coder.gguf",
        "deepseek/ggml-vocab-deepseek-llm.gguf",
    ] {
        check(name, from_gguf(name));
    }
}

#[test]
fn special_tokens_are_added_and_recognized() {
    if let Some(tokenizer) = from_files(&[("llama3/tokenizer.model", "tokenizer.model")]) {
        assert_eq!(tokenizer.encode("Hello<|eot_id|>", true).unwrap(), [128_000, 9906, 128_009]);
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(128_000), Some(128_001)));
        assert_eq!(tokenizer.decode(&[128_000, 9906, 128_009], true), "Hello");
        assert_eq!(tokenizer.decode(&[128_000, 9906, 128_009], false), "<|begin_of_text|>Hello<|eot_id|>");
        assert_eq!(tokenizer.vocabulary_size(), 128_256);
        assert!(tokenizer.end_of_turn().contains(&128_009));
    }
    for tokenizer in [
        from_files(&[("llama2/tokenizer.model", "tokenizer.model")]),
        from_gguf("llama2/ggml-vocab-llama-spm.gguf"),
    ]
    .into_iter()
    .flatten()
    {
        assert_eq!(tokenizer.encode("Hello", true).unwrap(), [1, 15043]);
        assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
        assert_eq!(tokenizer.encode("<s>Hello</s>", false).unwrap(), [1, 15043, 2]);
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
        assert_eq!(tokenizer.decode(&[1, 15043, 3186, 2], true), "Hello world");
    }
}

#[test]
fn phi3_special_tokens_swallow_white_space() {
    let text = "<|user|>\nHi<|end|>\n<|assistant|>\n<s> a";
    if let Some(tokenizer) = from_gguf("phi3/ggml-vocab-phi-3.gguf") {
        assert_eq!(tokenizer.encode(text, false).unwrap(), [32010, 6324, 32007, 32001, 1, 29871, 263]);
    }
    // This tokenizer.json is of a later version, in which only <|assistant|> does.
    if let Some(tokenizer) = from_files(&[("phi3/tokenizer.json", "tokenizer.json")]) {
        let expected = [32010, 29871, 13, 18567, 32007, 29871, 13, 32001, 1, 29871, 263];
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected);
    }
}

#[test]
fn a_story_model_reads_its_prompts() {
    let Some(path) = common::shared("data/weights/stories260K") else { return };
    let vocabulary = common::gguf_vocabulary(&std::fs::read(path.join("stories260K.f32.gguf")).unwrap());
    let tokenizer = Tokenizer::from_gguf(&vocabulary).unwrap().unwrap();
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("EXPECTED.json")).unwrap()).unwrap();
    for case in expected["cases"].as_array().unwrap() {
        let ids = |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
        assert_eq!(tokenizer.encode(case["prompt"].as_str().unwrap(), true).unwrap(), ids("prompt_ids"));
        let text = case["text"].as_str().unwrap();
        let decoded = tokenizer.decode(&ids("all_ids"), true);
        assert!(decoded.starts_with(text.trim_start()), "{decoded:?} {text:?}");
    }
}
