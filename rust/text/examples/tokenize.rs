//! Tokenizes lines of a file: `tokenize FOLDER FILE`.
//!
//! Each line of FILE is a JSON string; each line of the output is `{"ids": [...], "text": "..."}`, ids without special
//! tokens and the text decoded from them. `tests/text/compare_tokenizers.py` compares this with other tokenizers.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line program")]

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use infer_text::Tokenizer;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, file] = arguments.as_slice() else { return Err("usage: tokenize FOLDER FILE".into()) };
    let start = Instant::now();
    let tokenizer = Tokenizer::from_folder(Path::new(folder))?.ok_or("no tokenizer files in the folder")?;
    let loaded = start.elapsed();
    let mut output = std::io::BufWriter::new(std::io::stdout().lock());
    let (mut encoding, mut decoding, mut bytes, mut tokens) = (Duration::ZERO, Duration::ZERO, 0, 0);
    for line in std::io::BufReader::new(std::fs::File::open(file)?).lines() {
        let text: String = serde_json::from_str(&line?)?;
        let start = Instant::now();
        let ids = tokenizer.encode(&text, false)?;
        let between = Instant::now();
        let decoded = tokenizer.decode(&ids, false);
        decoding += between.elapsed();
        encoding += between - start;
        (bytes, tokens) = (bytes + text.len(), tokens + ids.len());
        writeln!(output, "{}", serde_json::json!({"ids": ids, "text": decoded}))?;
    }
    eprintln!(
        "loaded in {loaded:.1?}; {bytes} bytes, {tokens} tokens; encoded in {encoding:.1?}, decoded in {decoding:.1?}"
    );
    Ok(())
}
