//! SentencePiece files, field by field, and the seeds of the fuzz target: honest ones, and one liar of each kind.

/// A field of a protocol buffer with a length.
pub fn field(number: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = payload.len();
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend_from_slice(payload);
    bytes
}

fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
    let mut payload = field(1, text.as_bytes());
    payload.push(2 << 3 | 5);
    payload.extend_from_slice(&score.to_le_bytes());
    payload.extend_from_slice(&[3 << 3, kind]);
    field(1, &payload)
}

/// A small but complete SentencePiece file; `algorithm` is 1 (Unigram) or 2 (BPE).
pub fn sentencepiece(algorithm: u8) -> Vec<u8> {
    let mut bytes = [piece("<unk>", 0.0, 2), piece("<s>", 0.0, 3), piece("</s>", 0.0, 3)].concat();
    for (index, text) in ["▁", "H", "e", "l", "o", "▁H", "ll", "▁He", "▁Hell", "x"].iter().enumerate()
    {
        bytes.extend(piece(text, -(index as f32), 1));
    }
    for byte in 0..=255u8 {
        bytes.extend(piece(&format!("<0x{byte:02X}>"), 0.0, 6));
    }
    bytes.extend(field(2, &[3 << 3, algorithm, 0x98, 0x02, 1])); // model_type; byte_fallback is field 35
    bytes.extend(field(3, &[3 << 3, 1, 4 << 3, 0])); // add_dummy_prefix, no remove_extra_whitespaces
    bytes
}

/// The seeds by name, which `fuzz/seeds/sentencepiece` holds as files.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let bpe = || sentencepiece(2);
    let with = |more: &[u8]| [&bpe()[..], more].concat();
    vec![
        ("bpe", bpe()),
        ("unigram", sentencepiece(1)),
        ("empty", Vec::new()),
        ("only_a_control", piece("<s>", 0.0, 3)),
        ("word_algorithm", sentencepiece(3)),
        ("kind_of_no_piece", with(&piece("y", 0.0, 7))),
        ("piece_twice", with(&piece("x", -9.0, 1))),
        ("score_is_no_number", with(&piece("y", f32::NAN, 1))),
        ("piece_is_no_text", with(&field(1, &field(1, &[0xff])))),
        ("length_beyond_the_end", with(&[1 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0x0f])),
        ("endless_varint", with(&[9 << 3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1])),
        ("group", with(&[9 << 3 | 3])),
        ("lying_charsmap", with(&field(3, &field(2, &[0xff; 12])))),
        ("unknown_field", with(&field(15, b"later"))),
    ]
}
