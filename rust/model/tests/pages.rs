//! Pages of keys and values as things: holes before windows, copies, exports, and what identifies them.

mod common;

use common::{Expected, all_kv_types, exact, golden_folder, logits};
use infer_kernels::{KvCache, KvElement, PAGE_TOKENS, Precision};
use infer_model::{Batch, BatchSequence, CpuModel, KvPage, KvTypes, LoadOptions, ModelError, NO_PAGE};

fn load(case: &str, options: &LoadOptions) -> CpuModel {
    CpuModel::load(&golden_folder().join(case), options).expect("loads")
}

/// The logits of the text's last row, its earlier rows being in the cache.
fn last_row(model: &mut CpuModel, text: &[u32], pages: &[u32]) -> Result<Vec<u32>, ModelError> {
    let first_position = text.len() - 1;
    let sequence =
        BatchSequence { first_row: 0, rows: 1, first_position, pages, local_pages: &[], long_context: false };
    let batch = Batch { tokens: &text[first_position..], sequences: &[sequence], logit_rows: &[0] };
    let mut out = Vec::new();
    model.forward(&batch, &mut out)?;
    Ok(out.iter().map(|value| value.to_bits()).collect())
}

/// The pages that `logits` uses.
fn pages_of(text: &[u32]) -> Vec<u32> {
    (0..text.len().div_ceil(PAGE_TOKENS) as u32).rev().collect()
}

#[test]
fn pages_before_every_window_may_be_missing() {
    let mut model = load("mistral", &exact(2));
    let window = model.spec().page_window().expect("every layer has a window");
    let text = Expected::read("mistral").token_ids.repeat(4);
    logits(&mut model, &text, 16, false);
    let mut pages = pages_of(&text);
    let whole = last_row(&mut model, &text, &pages).expect("computable");
    let unseen = (text.len() - window) / PAGE_TOKENS;
    assert!(unseen > 0, "the text must be longer than the window of {window}");
    pages[..unseen].fill(NO_PAGE);
    assert_eq!(last_row(&mut model, &text, &pages).expect("computable"), whole);
    pages[unseen] = NO_PAGE;
    let refused = last_row(&mut model, &text, &pages).expect_err("a hole that the row sees").to_string();
    assert!(refused.contains(&format!("page {unseen} of a sequence is missing")), "{refused}");
}

#[test]
fn pages_may_not_be_missing_where_a_layer_sees_everything() {
    for case in ["llama", "gemma2"] {
        let mut model = load(case, &exact(1));
        assert_eq!(model.spec().page_window(), None, "{case}");
        let text = Expected::read(case).token_ids.repeat(4);
        logits(&mut model, &text, 16, false);
        let mut pages = pages_of(&text);
        pages[0] = NO_PAGE;
        let refused = last_row(&mut model, &text, &pages).expect_err("a hole that the row sees").to_string();
        assert!(refused.contains("page 0 of a sequence is missing"), "{case}: {refused}");
    }
}

/// Computes the text in a split cache, in chunks, and gives up local pages as an engine would; the bits of its last row's logits.
fn last_row_split(model: &mut CpuModel, text: &[u32], window: usize) -> Result<Vec<u32>, ModelError> {
    let pages = pages_of(text);
    // As few local pages as the window and a chunk span, used in turn.
    let chunk = PAGE_TOKENS;
    let spanned = (window + chunk).div_ceil(PAGE_TOKENS) + 1;
    model.allocate_split_cache(pages.len(), spanned)?;
    let mut local_pages: Vec<u32> = (0..pages.len()).map(|place| (place % spanned) as u32).collect();
    let mut out = Vec::new();
    for (index, part) in text.chunks(chunk).enumerate() {
        let first_position = index * chunk;
        let unseen = (first_position + 1).saturating_sub(window) / PAGE_TOKENS;
        local_pages[..unseen].fill(NO_PAGE);
        let sequence = BatchSequence {
            first_row: 0,
            rows: part.len(),
            first_position,
            pages: &pages,
            local_pages: &local_pages,
            long_context: false,
        };
        let last = [part.len() as u32 - 1];
        model.forward(&Batch { tokens: part, sequences: &[sequence], logit_rows: &last }, &mut out)?;
    }
    Ok(out.iter().map(|value| value.to_bits()).collect())
}

#[test]
fn a_split_cache_gives_the_same_bits_in_fewer_pages() {
    for case in ["gemma2", "gemma3"] {
        let mut model = load(case, &exact(2));
        let window = model.spec().local_window().expect("some layers have a window");
        let text = Expected::read(case).token_ids.repeat(4);
        let whole = logits(&mut model, &text, 16, false);
        let vocabulary = model.spec().vocabulary;
        let last: Vec<u32> = whole[whole.len() - vocabulary..].iter().map(|value| value.to_bits()).collect();
        assert_eq!(last_row_split(&mut model, &text, window).expect("computable"), last, "{case}");
        let refused = last_row_split(&mut model, &text, 1).expect_err("a hole that rows see").to_string();
        assert!(refused.contains("of a sequence is missing"), "{case}: {refused}");
        // Pages go out and come back in both kinds of layers; a local page that is not there stays as it is.
        let mut bytes = Vec::new();
        let both = KvPage { page: 0, local: Some(1) };
        model.export_page(both, &mut bytes).expect("pages of the cache");
        assert_eq!(bytes.len(), model.page_bytes());
        model.import_page(KvPage { page: 1, local: Some(0) }, &bytes).expect("its own bytes");
        let mut again = Vec::new();
        model.export_page(KvPage { page: 1, local: Some(0) }, &mut again).expect("pages of the cache");
        assert_eq!(again, bytes);
        model.export_page(0, &mut again).expect("a page of the cache");
        let full = model.page_bytes() - model.local_page_bytes();
        assert_eq!((&again[..full], again.len()), (&bytes[..full], bytes.len()));
        assert!(again[full..].iter().all(|&byte| byte == 0));
        model.copy_page(both, KvPage { page: 1, local: Some(2) }).expect("pages of the cache");
        assert!(model.copy_page(both, KvPage { page: 1, local: Some(99) }).is_err());
    }
}

#[test]
fn copied_and_imported_pages_give_the_same_bits() {
    for kv_types in all_kv_types() {
        copied_and_imported(&kv_types);
    }
}

fn copied_and_imported(kv_types: &KvTypes) {
    let options = |threads| LoadOptions { kv_types: kv_types.clone(), ..exact(threads) };
    let text = Expected::read("llama").token_ids;
    let mut model = load("llama", &options(1));
    assert_eq!(model.page_bytes(), kv_types.page_bytes(model.spec()).expect("layers of the model"));
    logits(&mut model, &text, text.len(), false);
    let pages = pages_of(&text);
    let expected = last_row(&mut model, &text, &pages).expect("computable");
    let mut exported = vec![Vec::new(); pages.len()];
    for (page, bytes) in pages.iter().zip(&mut exported) {
        model.export_page(*page, bytes).expect("a page of the cache");
        assert_eq!(bytes.len(), model.page_bytes());
    }
    let mut other = load("llama", &options(2));
    let count = pages.len() as u32;
    other.allocate_cache(2 * pages.len()).expect("memory");
    for (page, bytes) in (0..).zip(&exported) {
        other.import_page(page, bytes).expect("a page of a like cache");
        other.copy_page(page, page + count).expect("pages of the cache");
    }
    let moved: Vec<u32> = (count..2 * count).collect();
    assert_eq!(last_row(&mut other, &text, &moved).expect("computable"), expected, "{kv_types:?}");
    let beyond = 2 * count;
    assert!(other.copy_page(beyond, 0).is_err() && other.copy_page(0, NO_PAGE).is_err());
    assert!(other.export_page(beyond, &mut Vec::new()).is_err());
    assert!(other.import_page(beyond, &exported[0]).is_err());
    let short = other.import_page(0, &exported[0][1..]).expect_err("too short").to_string();
    assert!(short.contains(&exported[0].len().to_string()), "{short}");
}

#[test]
fn the_fingerprint_tells_apart_what_computes_other_bits() {
    let base = load("llama", &exact(1)).fingerprint().get().unwrap();
    let alike = LoadOptions { mmap: false, ..exact(3) };
    assert_eq!(load("llama", &alike).fingerprint().get().unwrap(), base, "threads and reading change no bit");
    let mut seen = vec![base];
    let mut differs = |fingerprint: [u8; 32], what: &str| {
        assert!(!seen.contains(&fingerprint), "{what}");
        seen.push(fingerprint);
    };
    differs(load("llama_tied", &exact(1)).fingerprint().get().unwrap(), "another model");
    differs(load("llama/model.q8_0.gguf", &exact(1)).fingerprint().get().unwrap(), "another container");
    let auto = LoadOptions { precision: Precision::Auto, ..exact(1) };
    differs(load("llama", &auto).fingerprint().get().unwrap(), "precision");
    let with = |kv_types| load("llama", &LoadOptions { kv_types, ..exact(1) }).fingerprint().get().unwrap();
    for kv_types in all_kv_types().into_iter().skip(1) {
        differs(with(kv_types), "types of the cache");
    }
    let skipping =
        |skip_layers| KvTypes { skip_layers, kept: KvElement::F16, ..KvTypes::all(KvElement::Int8) };
    differs(with(skipping(vec![0])), "the layer with another type");
    differs(with(skipping(vec![-1])), "the layer with another type");
    differs(with(KvTypes { values: KvElement::F16, ..KvTypes::all(KvElement::Int8) }), "the values' type");
    differs(one_bit_changed(), "one bit of one weight");
}

#[test]
fn skipped_layers_keep_their_type() {
    let skip = |skip_layers: &[i64]| KvTypes {
        keys: KvElement::Int8,
        values: KvElement::E4m3,
        skip_layers: skip_layers.to_vec(),
        kept: KvElement::F32,
    };
    let model = load("llama", &exact(1));
    let count = model.spec().layers.len() as i64;
    let layers = skip(&[0, -1, 0]).layers(model.spec()).expect("layers of the model");
    for (index, layer) in (0..count).zip(&layers) {
        let kept = index == 0 || index == count - 1;
        let expected =
            if kept { (KvElement::F32, KvElement::F32) } else { (KvElement::Int8, KvElement::E4m3) };
        assert_eq!((layer.keys, layer.values), expected);
    }
    assert_eq!(skip(&[0, -1]).page_bytes(model.spec()).expect("known"), KvCache::page_bytes(&layers));
    for wrong in [count, -count - 1, i64::MIN, i64::MAX] {
        let refused = skip(&[0, wrong]).layers(model.spec()).expect_err("no such layer").to_string();
        assert!(refused.contains(&format!("from -{count} to {}, got {wrong}", count - 1)), "{refused}");
    }
    // A model whose layers are all skipped computes as one of that type.
    let text = Expected::read("llama").token_ids;
    let all: Vec<i64> = (0..count).collect();
    let mut skipped = load("llama", &LoadOptions { kv_types: skip(&all), ..exact(1) });
    let mut exact = model;
    assert_eq!(logits(&mut skipped, &text, 16, false), logits(&mut exact, &text, 16, false));
    assert_eq!(skipped.fingerprint().get().unwrap(), exact.fingerprint().get().unwrap());
}

/// The fingerprint of the model with the last bit of its file changed.
fn one_bit_changed() -> [u8; 32] {
    let (from, to) = (golden_folder().join("llama"), tempfile::tempdir().expect("a folder"));
    for name in ["config.json", "model.safetensors"] {
        let mut bytes = std::fs::read(from.join(name)).expect("readable");
        if name == "model.safetensors" {
            *bytes.last_mut().expect("not empty") ^= 1;
        }
        std::fs::write(to.path().join(name), bytes).expect("writable");
    }
    CpuModel::load(to.path(), &exact(1)).expect("loads").fingerprint().get().unwrap()
}
