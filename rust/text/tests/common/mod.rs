//! Real vocabularies for the tests. They lie beside the repository, not in it; tests skip without them.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod properties;
pub mod sentencepiece;

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use infer_text::{GgufVocabulary, Tokenizer};

/// A file or folder of the shared data, or `None` where there is no such data.
pub fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    path.exists().then_some(path)
}

/// The decompressed contents of `data/tokenizers/<path>` (`.xz` or `.gz` may be appended to the name).
pub fn vocabulary_file(path: &str) -> Option<Vec<u8>> {
    let base = format!("data/tokenizers/{path}");
    if let Some(found) = shared(&base) {
        return Some(std::fs::read(found).unwrap());
    }
    let mut bytes = Vec::new();
    if let Some(found) = shared(&format!("{base}.xz")) {
        lzma_rs::xz_decompress(&mut std::io::BufReader::new(std::fs::File::open(found).unwrap()), &mut bytes)
            .unwrap();
        return Some(bytes);
    }
    let found = shared(&format!("{base}.gz"))?;
    flate2::read::GzDecoder::new(std::fs::File::open(found).unwrap()).read_to_end(&mut bytes).unwrap();
    Some(bytes)
}

/// A tokenizer from a folder made of (file in the data, name in the folder).
pub fn from_files(files: &[(&str, &str)]) -> Option<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    for (source, name) in files {
        std::fs::write(folder.path().join(name), vocabulary_file(source)?).unwrap();
    }
    Some(Tokenizer::from_folder(folder.path()).unwrap().unwrap())
}

/// A tokenizer out of a GGUF file.
pub fn from_gguf(path: &str) -> Option<Tokenizer> {
    let vocabulary = gguf_vocabulary(&vocabulary_file(path)?);
    Some(Tokenizer::from_gguf(&vocabulary).unwrap().unwrap())
}

/// Every tokenizer at hand, by name; loaded once.
pub fn all_tokenizers() -> &'static [(&'static str, Tokenizer)] {
    static ALL: std::sync::OnceLock<Vec<(&str, Tokenizer)>> = std::sync::OnceLock::new();
    ALL.get_or_init(load_all)
}

fn load_all() -> Vec<(&'static str, Tokenizer)> {
    let folders: &[(&str, &[(&str, &str)])] = &[
        ("gpt2/tokenizer.json", &[("gpt2/tokenizer.json", "tokenizer.json")]),
        ("gpt2/vocab.json", &[("gpt2/vocab.json", "vocab.json"), ("gpt2/merges.txt", "merges.txt")]),
        ("llama2/tokenizer.model", &[("llama2/tokenizer.model", "tokenizer.model")]),
        ("llama3/tokenizer.model", &[("llama3/tokenizer.model", "tokenizer.model")]),
        ("llama4/tokenizer.model", &[("llama4/tokenizer.model", "tokenizer.model")]),
        ("phi3/tokenizer.json", &[("phi3/tokenizer.json", "tokenizer.json")]),
        ("qwen/ranks", &[("qwen/voyage3_base.tiktoken", "qwen.tiktoken")]),
        ("openai/o200k", &[("openai/o200k_base.tiktoken", "o200k_base.tiktoken")]),
        ("openai/cl100k", &[("openai/cl100k_base.tiktoken", "cl100k_base.tiktoken")]),
        ("gpt-neox/tokenizer.json", &[("gpt-neox/tokenizer.json", "tokenizer.json")]),
        ("smollm2/tokenizer.json", &[("smollm2/tokenizer.json", "tokenizer.json")]),
        ("mistral/v1", &[("mistral/tokenizer.model.v1", "tokenizer.model")]),
        ("mistral/v2", &[("mistral/mistral_instruct_tokenizer_240216.model.v2", "tokenizer.model")]),
        ("mistral/v3", &[("mistral/mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model")]),
        ("mistral/v7", &[("mistral/mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model")]),
    ];
    let mut tokenizers: Vec<_> =
        folders.iter().filter_map(|(name, files)| Some((*name, from_files(files)?))).collect();
    let ggufs = [
        "gpt2/ggml-vocab-gpt-2.gguf",
        "llama2/ggml-vocab-llama-spm.gguf",
        "phi3/ggml-vocab-phi-3.gguf",
        "falcon/ggml-vocab-falcon.gguf",
        "starcoder/ggml-vocab-starcoder.gguf",
        "deepseek/ggml-vocab-deepseek-coder.gguf",
        "deepseek/ggml-vocab-deepseek-llm.gguf",
    ];
    tokenizers.extend(ggufs.into_iter().filter_map(|path| Some((path, from_gguf(path)?))));
    if let Some(folder) = shared("tinylm/target") {
        tokenizers.push(("tinylm", Tokenizer::from_folder(&folder).unwrap().unwrap()));
    }
    tokenizers
}

/// A metadata value, as far as vocabularies need them.
enum Value {
    Number(f64),
    Text(String),
    List(Vec<Value>),
}

impl Value {
    fn number(&self) -> Option<f64> {
        if let Value::Number(number) = self { Some(*number) } else { None }
    }

    fn text(&self) -> Option<String> {
        if let Value::Text(text) = self { Some(text.clone()) } else { None }
    }
}

/// The vocabulary in a GGUF file. A reader for well-formed files only, so that this crate's tests need no other.
pub fn gguf_vocabulary(bytes: &[u8]) -> GgufVocabulary {
    let values = gguf_metadata(bytes);
    let get = |key: &str| values.get(&format!("tokenizer.ggml.{key}"));
    let list = |key: &str| match get(key) {
        Some(Value::List(list)) => list.as_slice(),
        _ => &[],
    };
    let id = |key: &str| get(key).and_then(Value::number).map(|number| number as u32);
    let flag = |key: &str| get(key).and_then(Value::number).map(|number| number != 0.0);
    GgufVocabulary {
        model: get("model").and_then(Value::text).unwrap_or_default(),
        pre: get("pre").and_then(Value::text),
        tokens: list("tokens").iter().filter_map(Value::text).collect(),
        scores: list("scores").iter().filter_map(Value::number).map(|score| score as f32).collect(),
        token_type: list("token_type").iter().filter_map(Value::number).map(|kind| kind as i32).collect(),
        merges: list("merges").iter().filter_map(Value::text).collect(),
        bos_token_id: id("bos_token_id"),
        eos_token_id: id("eos_token_id"),
        unknown_token_id: id("unknown_token_id"),
        padding_token_id: id("padding_token_id"),
        end_of_turn_ids: id("eot_token_id").into_iter().collect(),
        add_bos_token: flag("add_bos_token"),
        add_eos_token: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
        remove_extra_whitespaces: flag("remove_extra_whitespaces"),
        precompiled_charsmap: Vec::new(),
        chat_template: values.get("tokenizer.chat_template").and_then(Value::text),
        named_templates: std::collections::BTreeMap::new(),
        huggingface_json: values.get("tokenizer.huggingface.json").and_then(Value::text),
    }
}

fn gguf_metadata(bytes: &[u8]) -> HashMap<String, Value> {
    let mut reader = Reader(bytes);
    assert_eq!(reader.take(4), b"GGUF");
    reader.take(4 + 8);
    let count = reader.u64();
    (0..count)
        .map(|_| {
            let key = reader.text();
            let kind = reader.u32();
            (key, reader.value(kind))
        })
        .collect()
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().unwrap())
    }

    fn text(&mut self) -> String {
        let length = self.u64() as usize;
        String::from_utf8(self.take(length).to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Value {
        Value::Number(match kind {
            0 | 7 => f64::from(self.take(1)[0]),
            1 => f64::from(self.take(1)[0] as i8),
            2 | 3 => f64::from(u16::from_le_bytes(self.take(2).try_into().unwrap())),
            4 => f64::from(self.u32()),
            5 => f64::from(self.u32() as i32),
            6 => f64::from(f32::from_bits(self.u32())),
            8 => return Value::Text(self.text()),
            9 => {
                let (kind, length) = (self.u32(), self.u64());
                return Value::List((0..length).map(|_| self.value(kind)).collect());
            }
            10 | 11 => self.u64() as f64,
            12 => f64::from_bits(self.u64()),
            other => panic!("GGUF value type {other}"),
        })
    }
}

/// A small deterministic generator (SplitMix64), so that failures can be repeated.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Flips, cuts, repeats and overwrites parts of a file.
pub fn mutate(random: &mut Random, original: &[u8]) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len());
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0x00, 0x7F, 0x80, 0xFF, b'"', b'{', b'-', b'9'][random.below(8)],
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..(at + 1 + random.below(9)).min(bytes.len()))),
            4 => {
                let part = bytes[at..(at + 1 + random.below(40)).min(bytes.len())].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, part);
            }
            _ => bytes.splice(at..at, (0..random.below(12)).map(|_| random.next() as u8)).for_each(drop),
        }
    }
    bytes
}
