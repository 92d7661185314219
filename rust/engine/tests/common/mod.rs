//! A device that is all law and no arithmetic: its "keys and values" remember which prefix they belong to, and its logits are a hash of
//! what it reads through the page table. Any page mixed up, overwritten too early or left stale changes tokens or panics.
#![allow(dead_code)] // each test file uses its own part

use infer_engine::{Batch, BatchSequence, Device, EngineConfig, TextStep, TokenText};

pub const VOCABULARY: usize = 48;
pub const EOS: u32 = 0;

/// Mixes two words (the finalizer of splitmix64 over their combination).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0xD1B5_4A32_D192_ED03);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What one slot of the cache holds: the digest of the prefix that ends there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Slot {
    prefix: u64,
    position: usize,
    long_context: bool,
}

pub struct FakeDevice {
    page_tokens: usize,
    slots: Vec<Option<Slot>>,
    pub steps: usize,
    pub rows: usize,
    /// Steps (by number) that fail.
    pub failing: Vec<usize>,
    /// Digests of prefixes whose logits are NaN.
    pub nan_every: Option<u64>,
}

impl FakeDevice {
    pub fn new(config: &EngineConfig) -> Self {
        Self {
            page_tokens: config.page_tokens,
            slots: vec![None; config.pages * config.page_tokens],
            steps: 0,
            rows: 0,
            failing: Vec::new(),
            nan_every: None,
        }
    }

    fn slot(&mut self, sequence: &BatchSequence, position: usize) -> &mut Option<Slot> {
        let page = sequence.pages[position / self.page_tokens] as usize;
        &mut self.slots[page * self.page_tokens + position % self.page_tokens]
    }

    /// Reads the whole past of `position`, as attention would, and checks that it is one sequence's.
    fn prefix(&mut self, sequence: &BatchSequence, position: usize) -> u64 {
        let mut last = 0;
        for past in 0..position {
            let slot = self.slot(sequence, past).expect("attention reads only written slots");
            assert_eq!(
                (slot.position, slot.long_context),
                (past, sequence.long_context),
                "slot of another position"
            );
            last = slot.prefix;
        }
        last
    }

    pub fn compute(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.steps += 1;
        self.rows += batch.tokens.len();
        let mut wanted = batch.logit_rows.iter().peekable();
        logits.clear();
        for sequence in &batch.sequences {
            for row in 0..sequence.rows {
                let position = sequence.first_position + row;
                let before = self.prefix(sequence, position);
                let token = batch.tokens[sequence.first_row + row];
                let prefix = mix(before, u64::from(token) | u64::from(sequence.long_context) << 40);
                *self.slot(sequence, position) =
                    Some(Slot { prefix, position, long_context: sequence.long_context });
                if wanted.next_if(|&&at| at as usize == sequence.first_row + row).is_some() {
                    let poisoned = self.nan_every.is_some_and(|every| prefix.is_multiple_of(every));
                    logits.extend(row_logits(prefix).map(|logit| if poisoned { f32::NAN } else { logit }));
                }
            }
        }
        assert!(wanted.next().is_none(), "logit rows are rows of the batch, ascending");
        if self.failing.contains(&self.steps) { Err(format!("step {} failed", self.steps)) } else { Ok(()) }
    }
}

/// Logits with ties, in [-4, 4).
pub fn row_logits(prefix: u64) -> impl Iterator<Item = f32> {
    (0..VOCABULARY as u64).map(move |token| (mix(prefix, token) % 64) as f32 / 8.0 - 4.0)
}

/// The logits after each prefix of `tokens`, straight from the definition.
pub fn expected_logits(tokens: &[u32], long_context: bool) -> Vec<f32> {
    let mut prefix = 0;
    let rows = tokens.iter().map(|&token| {
        prefix = mix(prefix, u64::from(token) | u64::from(long_context) << 40);
        prefix
    });
    rows.flat_map(row_logits).collect()
}

impl Device for FakeDevice {
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.compute(batch, logits)
    }
}

pub fn config(pages: usize, page_tokens: usize) -> EngineConfig {
    EngineConfig {
        pages,
        page_tokens,
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        max_model_len: pages * page_tokens,
        enable_prefix_caching: true,
        vocabulary: VOCABULARY,
        context_switch: None,
        eos_token_ids: vec![EOS],
        seed: 1,
        max_logit_values: EngineConfig::MAX_LOGIT_VALUES,
    }
}

/// Writes every token as `<id>` and stops at a given id's text.
pub struct TagText {
    pub stop: Option<String>,
    pub held: String,
}

impl TokenText for TagText {
    fn push(&mut self, token: u32, may_stop: bool) -> TextStep {
        let piece = format!("<{token}>");
        if may_stop && self.stop.as_deref() == Some(&piece) {
            return TextStep { text: std::mem::take(&mut self.held), stopped: Some(piece) };
        }
        // Holds back one piece, as a detokenizer does with an incomplete character.
        TextStep { text: std::mem::replace(&mut self.held, piece), stopped: None }
    }

    fn finish(&mut self) -> TextStep {
        TextStep { text: std::mem::take(&mut self.held), stopped: None }
    }
}
