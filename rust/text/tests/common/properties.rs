//! What must hold for every input: no panic, and whatever is accepted can be used. The fuzz target calls this too.

use infer_text::{TextError, Tokenizer};

/// Texts of one script and of several, with bytes that few vocabularies have, and with spellings of special tokens.
const TEXTS: [&str; 5] = ["", "Hello", "H é🦙x", "  two  blanks \n", "<s>▁Hell</s><unk><0x41>"];

/// Reads a model; on success its ids are those of its vocabulary, each has one spelling, and texts become ids and texts again.
pub fn sentencepiece(bytes: &[u8]) -> Result<Tokenizer, TextError> {
    let tokenizer = Tokenizer::from_sentencepiece(bytes)?;
    let size = tokenizer.vocabulary_size();
    for id in 0..size.min(1 << 10) as u32 {
        let Some(token) = tokenizer.token(id) else { continue };
        let known = tokenizer.id(&token).expect("a token's spelling is known");
        assert_eq!(tokenizer.token(known).as_deref(), Some(token.as_str()), "a spelling means one token");
    }
    for text in TEXTS {
        for special in [false, true] {
            let Ok(ids) = tokenizer.encode(text, special) else { continue };
            assert!(ids.iter().all(|&id| tokenizer.token(id).is_some()), "{ids:?} of {size} tokens");
            let whole = tokenizer.decode(&ids, special);
            assert_eq!(whole, tokenizer.decode(&ids, special));
        }
    }
    tokenizer.decode(&[0, 1, u32::MAX], true);
    Ok(tokenizer)
}
