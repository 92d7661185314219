//! Malformed, huge and lying files end in an error, never in a panic or an endless loop.

mod common;

use common::sentencepiece::{field, sentencepiece};
use common::{Random, mutate, vocabulary_file};
use infer_text::{ChatTemplate, Ending, GgufVocabulary, TextError, Tokenizer};
use serde_json::{Value, json};

/// Loads a folder with one file, and uses what loads.
fn load(name: &str, bytes: &[u8]) -> Result<Option<Tokenizer>, TextError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(name), bytes).unwrap();
    let loaded = Tokenizer::from_folder(folder.path());
    if let Ok(Some(tokenizer)) = &loaded {
        if let Ok(ids) = tokenizer.encode("Hello 🦙 <s> x", true) {
            tokenizer.decode(&ids, false);
        }
        tokenizer.decode(&[0, 1, u32::MAX], true);
    }
    loaded
}

#[test]
fn a_small_sentencepiece_file_works() {
    for algorithm in [1, 2] {
        let tokenizer = load("tokenizer.model", &sentencepiece(algorithm)).unwrap().unwrap();
        let ids = tokenizer.encode("Hello", false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true), "Hello");
        assert_eq!(tokenizer.decode(&tokenizer.encode("H é🦙x", false).unwrap(), true), "H é🦙x");
        assert_eq!(tokenizer.token(ids[0]).as_deref(), Some("▁Hell"));
    }
}

fn survives_mutation(name: &str, original: &[u8], rounds: u64) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {})); // panics inside the library are caught; do not print them
    let mut refused = 0;
    for seed in 0..rounds {
        let bytes = mutate(&mut Random(seed), original);
        refused += u64::from(load(name, &bytes).is_err());
    }
    std::panic::set_hook(hook);
    assert!(refused > rounds / 20, "{name}: only {refused} of {rounds} mutants were refused");
}

#[test]
fn mutated_files_never_panic() {
    for algorithm in [1, 2] {
        survives_mutation("tokenizer.model", &sentencepiece(algorithm), 1000);
    }
    let ranks = b"YQ== 0\nYg== 1\nYWI= 2\nIA== 3\nYWJh 4\n8J+mmQ== 5\n";
    survives_mutation("tokenizer.model", ranks, 1000);
    survives_mutation("x.tiktoken", ranks, 500);
    survives_mutation("tokenizer.json", small_json().as_bytes(), 1500);
}

fn small_json() -> String {
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<s>"},
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                       {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": 0.5, "unk_token": "<s>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": {"<s>": 0, "▁": 1, "H": 2, "e": 3, "l": 4, "o": 5, "▁H": 6, "ll": 7, "<0x41>": 8},
            "merges": [["▁", "H"], ["l", "l"]]},
    })
    .to_string()
}

#[test]
fn truncation_padding_and_dropout_are_switched_off() {
    let tokenizer = load("tokenizer.json", small_json().as_bytes()).unwrap().unwrap();
    for _ in 0..20 {
        assert_eq!(tokenizer.encode("Hello", true).unwrap(), [0, 6, 3, 7, 5]);
    }
    assert_eq!(tokenizer.decode(&[0, 6, 3, 7, 5, 8], true), "HelloA");
}

#[test]
fn hostile_tokenizer_json_is_refused() {
    let mut value: serde_json::Value = serde_json::from_str(&small_json()).unwrap();
    let mut refused = |path: &str, new: serde_json::Value| {
        let old = value.pointer(path).unwrap().clone();
        *value.pointer_mut(path).unwrap() = new;
        let result = load("tokenizer.json", value.to_string().as_bytes());
        assert!(result.is_err(), "{path}: {}", value.pointer(path).unwrap());
        *value.pointer_mut(path).unwrap() = old;
    };
    refused("/model/vocab", json!({"a": 4_294_967_295u32}));
    refused("/model/vocab", json!({"a": -1}));
    refused("/model/vocab", json!([1, 2]));
    refused("/model/merges", json!([["▁", "missing"]]));
    refused("/model/merges", json!([["H", "H"]]));
    refused("/model/merges", json!(["one"]));
    refused("/model/continuing_subword_prefix", json!("##"));
    refused(
        "/decoder",
        json!({"type": "CTC", "pad_token": "x", "word_delimiter_token": "y", "cleanup": true}),
    );
    refused("/decoder", json!({"type": "BPEDecoder", "suffix": "</w>"}));
    refused("/model", json!({"type": "Unigram", "unk_id": 3, "vocab": []}));
    refused("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "////"}));
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(100)});
    refused("/normalizer", json!({"type": "Sequence", "normalizers": vec![replace.clone(); 6]}));
    refused("/decoder", json!({"type": "Sequence", "decoders": vec![replace; 6]}));
    refused(
        "/pre_tokenizer",
        json!({"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false}),
    );

    for nested in
        ["[".repeat(200_000), "{\"a\":".repeat(200_000), format!("{{\"model\":{}", "[".repeat(99_999))]
    {
        assert!(load("tokenizer.json", nested.as_bytes()).is_err());
    }
    for short in ["", "null", "[]", "{}", "{\"model\": {}}", "\u{0}"] {
        assert!(load("tokenizer.json", short.as_bytes()).is_err(), "{short}");
        assert!(load("tokenizer.model", short.as_bytes()).is_err(), "{short}");
    }
}

#[test]
fn hostile_configuration_is_refused() {
    for (config, expected) in [
        ("[]", "tokenizer_config.json: expected a JSON object"),
        ("{\"added_tokens_decoder\": {\"x\": {\"content\": \"y\"}}}", "\"x\" is not a token id"),
        ("{\"added_tokens_decoder\": {\"1\": 2}}", "token 1 has no content"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert!(Tokenizer::from_folder(empty.path()).unwrap().is_none());
}

#[test]
fn lying_charsmaps_are_refused() {
    for map in [&[1u8, 2][..], &[0xFF; 12], &[8, 0, 0, 0, 1, 2], &[3, 0, 0, 0, 1, 2, 3, 4]] {
        let mut bytes = sentencepiece(2);
        bytes.extend(field(3, &field(2, map)));
        let error = load("tokenizer.model", &bytes).unwrap_err().to_string();
        assert!(error.contains("precompiled_charsmap"), "{error}");
    }
}

fn gguf() -> GgufVocabulary {
    GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens: ["a", "b", "ab", "<x>", ""].map(str::to_owned).to_vec(),
        token_type: vec![1, 1, 1, 3, 1],
        merges: vec!["a b".to_owned(), "ab ab".to_owned()],
        bos_token_id: Some(3),
        ..GgufVocabulary::default()
    }
}

#[test]
fn gguf_vocabularies_are_checked() {
    let good = Tokenizer::from_gguf(&gguf()).unwrap().unwrap();
    assert_eq!(good.encode("ab<x>ba", false).unwrap(), [2, 3, 1, 0]);
    assert_eq!(good.bos(), Some(3));
    let refused = |change: &dyn Fn(&mut GgufVocabulary), expected: &str| {
        let mut vocabulary = gguf();
        change(&mut vocabulary);
        let error = Tokenizer::from_gguf(&vocabulary).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(&|v| v.pre = Some("nonsense".to_owned()), "tokenizer.ggml.pre \"nonsense\" is not supported");
    refused(&|v| v.model = "rwkv".to_owned(), "tokenizer.ggml.model \"rwkv\" is not supported");
    refused(&|v| v.tokens.clear(), "tokens");
    refused(&|v| v.tokens[1] = "a".to_owned(), "tokens 0 and 1 are both \"a\"");
    refused(&|v| v.token_type.truncate(2), "2 entries for 5 tokens");
    refused(&|v| v.merges = vec!["ab".to_owned()], "entry 0");
    refused(&|v| v.merges.clear(), "missing");
    refused(&|v| v.eos_token_id = Some(5), "5 is outside the vocabulary of 5 tokens");
    refused(&|v| v.model = "llama".to_owned(), "scores");
    refused(&|v| (v.model, v.scores) = ("llama".to_owned(), vec![f32::NAN; 5]), "entry 0 is not a number");
    let unset = GgufVocabulary { eos_token_id: Some(u32::MAX), ..gguf() }; // -1, as some writers say "none"
    assert_eq!(Tokenizer::from_gguf(&unset).unwrap().unwrap().eos(), None);
    let whole = GgufVocabulary { huggingface_json: Some(small_json()), add_bos_token: Some(true), ..gguf() };
    let whole = Tokenizer::from_gguf(&whole).unwrap().unwrap();
    assert_eq!(whole.encode("Hello", true).unwrap(), [0, 6, 3, 7, 5]);
    for none in ["none", "no_vocab"] {
        let vocabulary = GgufVocabulary { model: none.to_owned(), ..GgufVocabulary::default() };
        assert!(Tokenizer::from_gguf(&vocabulary).unwrap().is_none());
    }
}

fn render(source: &str) -> Result<String, String> {
    let template = ChatTemplate::new(source, None, None).map_err(|error| error.to_string())?;
    let messages = json!([{"role": "user", "content": "x"}]);
    template
        .render(&messages, None, Ending::GenerationPrompt, &serde_json::Map::new())
        .map_err(|error| error.to_string())
}

#[test]
fn hostile_templates_end() {
    let error =
        render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}").unwrap_err();
    assert!(error.contains("too many steps"), "{error}");
    for source in [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(s='xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 'x' * 999999999999 }}",
        "{{ 'x'.center(99999999999) }}",
        "{{ 'x'.zfill(99999999999) }}",
        "{{ 'x'.ljust(9, 'ab') }}",
        "{{ 'x' | center(99999999999) }}",
        "{{ 'x'.rsplit('') }}",
        "{{ 'x'.rsplit(5) }}",
        "{{ 'x'.split(separator=' ') }}",
        "{{ 'x'.index('y') }}",
        "{{ 'x'.rindex('y', -99999999999999999999999) }}",
        "{{ 'x'.partition('') }}",
        "{{ [1].index(2) }}",
        "{{ '%999999999999d' | format(1) }}",
        "{{ range(999999999999) | list }}",
        "{{ [1] | tojson(indent=999999999999) }}",
        "{{ 'x' | indent(999999999999) }}",
        "{{ 2 ** 99999999999 }}",
        "{{ 1 // 0 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ raise_exception() }}",
        "{{ strftime_now('%Q') }}",
        "{{",
        "{% if %}",
    ] {
        assert!(render(source).is_err(), "{source}");
    }
    for source in
        [format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000)), "{% if x %}".repeat(50_000)]
    {
        assert!(render(&source).is_err());
    }
    assert_eq!(render("{{ raise_exception('no ' ~ 5) }}"), Err("chat template: no 5".to_owned()));
    assert!(render(&" ".repeat(2 << 20)).unwrap_err().contains("at most"));
    let mut deep = json!("x");
    for _ in 0..120 {
        deep = json!([deep]);
    }
    let template = ChatTemplate::new("{{ messages }}", None, None).unwrap();
    let result = template.render(&json!([{"content": deep}]), None, Ending::Closed, &serde_json::Map::new());
    assert!(result.unwrap_err().to_string().contains("levels deep"));
    let refused = |messages: Value, tools: Option<Value>| {
        let result = template.render(&messages, tools.as_ref(), Ending::Closed, &serde_json::Map::new());
        result.unwrap_err().to_string()
    };
    assert!(refused(json!([{"role": "user"}, 5]), None).contains("messages[1]: expected an object"));
    assert!(refused(json!([]), Some(json!({}))).contains("tools: expected a list"));
    assert!(refused(json!([]), Some(json!([{}, 5]))).contains("tools[1]: expected an object"));
}

#[test]
fn long_runs_are_tokenized_like_short_ones() {
    let Some(bytes) = vocabulary_file("gpt2/tokenizer.json") else { return };
    let tokenizer = load("tokenizer.json", &bytes).unwrap().unwrap();
    for unit in [" ", "\n", "a", "é", "1", "🦙", " \n"] {
        let text = format!("{}x y", unit.repeat(200_000));
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text, "{unit:?}");
        // A pattern that gave up half-way would leave the end in one piece, with other ids.
        let end = tokenizer.encode(" y", false).unwrap();
        assert_eq!(ids[ids.len() - end.len()..], end, "{unit:?}");
    }
    let error = tokenizer.encode(&format!("a{}b", " \n".repeat(250_001)), false).unwrap_err().to_string();
    assert!(error.contains("500000 characters of white space"), "{error}");
    assert!(tokenizer.encode(&"a b ".repeat(300_000), false).is_ok());
}
