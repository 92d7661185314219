//! A device that is all law and no arithmetic: its "keys and values" remember which prefix they belong to, and its logits are a hash of
//! what it reads through the page table. Any page mixed up, overwritten too early, copied too late or left stale changes tokens or
//! panics. It has a draft model of the same kind, which often agrees with it.
#![allow(dead_code)] // each test file uses its own part

mod draws;
pub mod requests;
pub mod simulate;
pub mod tier;
pub mod world;

use draws::choose;
use infer_engine::{Batch, BatchSequence, Choice, Device, EngineConfig, PageRef, TextStep, TokenText};

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

/// One kind of a model's layers and their pages.
struct Slots {
    page_tokens: usize,
    window: Option<usize>,
    slots: Vec<Option<Slot>>,
}

impl Slots {
    fn new(config: &EngineConfig, window: Option<usize>, pages: usize) -> Self {
        let slots = vec![None; pages * config.page_tokens];
        Self { page_tokens: config.page_tokens, window, slots }
    }

    fn place(&self, table: &[u32], position: usize) -> usize {
        let page = table[position / self.page_tokens];
        assert_ne!(page, u32::MAX, "no position that is seen lies on a missing page");
        page as usize * self.page_tokens + position % self.page_tokens
    }

    /// Reads what `position` sees, as attention would, and checks that it is one sequence's; the digest of what ends before it.
    fn prefix(&self, table: &[u32], sequence: &BatchSequence, position: usize) -> u64 {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let mut last = 0;
        for past in first..position {
            let slot = self.slots[self.place(table, past)].expect("attention reads only written slots");
            let seen = (slot.position, slot.long_context);
            assert_eq!(seen, (past, sequence.long_context), "slot of another position");
            last = slot.prefix;
        }
        last
    }

    /// Computes one row: the digest of the prefix that it ends.
    fn row(&mut self, table: &[u32], sequence: &BatchSequence, position: usize, token: u32) -> u64 {
        let before = self.prefix(table, sequence, position);
        let prefix = mix(before, u64::from(token) | u64::from(sequence.long_context) << 40);
        let place = self.place(table, position);
        self.slots[place] = Some(Slot { prefix, position, long_context: sequence.long_context });
        prefix
    }

    fn page(&mut self, page: u32) -> &mut [Option<Slot>] {
        let first = page as usize * self.page_tokens;
        &mut self.slots[first..first + self.page_tokens]
    }

    fn copy(&mut self, from: u32, to: u32) {
        let contents = self.page(from).to_vec();
        self.page(to).copy_from_slice(&contents);
    }
}

/// One model's pages: of layers that see everything (or all the same window), and of those that see only a window.
struct Layers {
    full: Slots,
    local: Option<Slots>,
}

impl Layers {
    fn new(config: &EngineConfig) -> Self {
        let local = config.local.map(|local| Slots::new(config, Some(local.window), local.pages));
        Self { full: Slots::new(config, config.window, config.pages), local }
    }

    fn row(&mut self, sequence: &BatchSequence, position: usize, token: u32) -> u64 {
        let prefix = self.full.row(&sequence.pages, sequence, position, token);
        if let Some(local) = &mut self.local {
            // A window of one position sees nothing of what came before.
            let same = local.row(&sequence.local_pages, sequence, position, token) == prefix;
            assert!(same || local.window == Some(1), "all layers read one sequence");
        }
        prefix
    }

    fn copy(&mut self, from: PageRef, to: PageRef) {
        self.full.copy(from.page, to.page);
        if let (Some(local), Some(from), Some(to)) = (&mut self.local, from.local, to.local) {
            local.copy(from, to);
        }
    }

    fn export(&mut self, page: PageRef, bytes: &mut Vec<u8>) {
        let mut slots = self.full.page(page.page).to_vec();
        if let Some(local) = &mut self.local {
            let missing = vec![None; local.page_tokens];
            slots.extend(page.local.map_or(missing, |page| local.page(page).to_vec()));
        }
        for slot in slots {
            let slot = slot.unwrap_or(Slot { prefix: 0, position: usize::MAX, long_context: false });
            bytes.extend(slot.prefix.to_le_bytes());
            bytes.extend((slot.position as u64).to_le_bytes());
            bytes.push(u8::from(slot.long_context));
        }
    }

    /// False when there are too few bytes.
    fn import(&mut self, page: PageRef, slots: &mut impl Iterator<Item = Option<Slot>>) -> bool {
        let mut fill = |into: &mut [Option<Slot>]| {
            into.iter_mut().all(|slot| slots.next().map(|next| *slot = next).is_some())
        };
        let full = fill(self.full.page(page.page));
        let Some(local) = &mut self.local else { return full };
        let mut nowhere = vec![None; local.page_tokens];
        full && fill(page.local.map_or(&mut nowhere[..], |page| local.page(page)))
    }
}

pub struct FakeDevice {
    target: Layers,
    draft: Option<Layers>,
    pub steps: usize,
    pub rows: usize,
    /// Steps (by number) that fail, at their end or (odd ones) at their beginning.
    pub failing: Vec<usize>,
    /// Digests of prefixes whose logits are NaN.
    pub nan_every: Option<u64>,
    /// The draft model's logits are the target's but for one prefix of so many.
    pub draft_errs_every: u64,
    /// Draws tokens itself.
    pub draws: bool,
    /// What each wanted row of the last step chose, if it succeeded.
    chosen: Option<Vec<i32>>,
    choices: Vec<Choice>,
}

impl FakeDevice {
    pub fn new(config: &EngineConfig) -> Self {
        Self {
            target: Layers::new(config),
            draft: Some(Layers::new(config)),
            steps: 0,
            rows: 0,
            failing: Vec::new(),
            nan_every: None,
            draft_errs_every: 4,
            draws: false,
            chosen: None,
            choices: Vec::new(),
        }
    }

    pub fn compute(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.steps += 1;
        self.rows += batch.tokens.len();
        let fails = self.failing.contains(&self.steps);
        let failure = Err(format!("step {} failed", self.steps));
        let chosen = self.chosen.take();
        // What follows a step that failed at its beginning has nothing to follow.
        if fails && self.steps % 2 == 1 || chosen.is_none() && !batch.follows.is_empty() {
            return failure;
        }
        let mut tokens = batch.tokens.clone();
        for &(row, place) in &batch.follows {
            assert_eq!(tokens[row as usize], 0, "nobody knows the token yet");
            tokens[row as usize] = chosen.as_ref().map_or(0, |chosen| chosen[place as usize].max(0)) as u32;
        }
        self.copy(batch);
        let mut wanted = batch.logit_rows.iter().peekable();
        logits.clear();
        for sequence in &batch.sequences {
            for row in 0..sequence.rows {
                let position = sequence.first_position + row;
                let token = tokens[sequence.first_row + row];
                let prefix = self.target.row(sequence, position, token);
                if let Some(draft) = self.draft.as_mut().filter(|_| row >= sequence.drafted) {
                    assert_eq!(
                        draft.row(sequence, position, token),
                        prefix,
                        "both models' pages hold the same"
                    );
                }
                if wanted.next_if(|&&at| at as usize == sequence.first_row + row).is_some() {
                    logits.extend(self.row_logits(prefix));
                }
            }
        }
        assert!(wanted.next().is_none(), "logit rows are rows of the batch, ascending");
        if self.draws {
            self.draw(batch, logits, chosen.as_deref().unwrap_or_default());
        }
        if fails { failure } else { Ok(()) }
    }

    /// Draws with the engine's own sampler what may be drawn, and keeps the other rows' logits.
    fn draw(&mut self, batch: &Batch, logits: &mut Vec<f32>, before: &[i32]) {
        let (mut rest, mut chosen) = (Vec::new(), Vec::new());
        self.choices.clear();
        for (row, draw) in logits.chunks_exact(VOCABULARY).zip(&batch.draws) {
            let Some(draw) = draw else {
                rest.extend_from_slice(row);
                chosen.push(i32::MIN);
                continue;
            };
            let choice = choose(batch, draw, row, before);
            chosen.push(choice.token);
            self.choices.push(choice);
        }
        *logits = rest;
        self.chosen = Some(chosen);
    }

    fn row_logits(&self, prefix: u64) -> impl Iterator<Item = f32> + use<> {
        let poisoned = self.nan_every.is_some_and(|every| prefix.is_multiple_of(every));
        row_logits(prefix).map(move |logit| if poisoned { f32::NAN } else { logit })
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

impl FakeDevice {
    fn copy(&mut self, batch: &Batch) {
        for &(from, to) in &batch.copies {
            assert!(batch.copies.iter().all(|other| other.1.page != from.page), "copies have no order");
            self.target.copy(from, to);
            self.draft.iter_mut().for_each(|draft| draft.copy(from, to));
        }
    }

    fn draft_once(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        logits.clear();
        self.copy(batch);
        for sequence in &batch.sequences {
            let draft = self.draft.as_mut().ok_or("no draft model")?;
            let rows = (sequence.first_row..).zip(sequence.first_position..).take(sequence.rows);
            let prefixes = rows.map(|(row, at)| draft.row(sequence, at, batch.tokens[row]));
            let prefix = prefixes.last().ok_or("no rows")?;
            let errs = prefix.is_multiple_of(self.draft_errs_every);
            let nearly = errs && mix(prefix, 78).is_multiple_of(2);
            let row = self.row_logits(if errs && !nearly { mix(prefix, 77) } else { prefix });
            // It errs by one token that it holds too likely, or altogether.
            let liked = nearly.then(|| (mix(prefix, 79) % VOCABULARY as u64) as usize);
            logits.extend(row.enumerate().map(|(token, logit)| match liked {
                Some(liked) if liked == token => 9.0,
                Some(_) => 2.0 * logit,
                None => logit,
            }));
        }
        if self.draws {
            self.draw(batch, logits, &[]);
            self.chosen = None;
        }
        Ok(())
    }
}

impl Device for FakeDevice {
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.compute(batch, logits)
    }

    fn take_choices(&mut self) -> Vec<Choice> {
        std::mem::take(&mut self.choices)
    }

    fn draft(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), String> {
        self.draft_once(batch, logits)?;
        let mut all = self.choices.clone();
        // Now and then it stops after the first round.
        let rounds = if self.draws && batch.rounds > 1 && !batch.tokens[0].is_multiple_of(5) {
            batch.rounds
        } else {
            1
        };
        for round in 1..rounds {
            let mut next = batch.advanced(round);
            let latest = &all[all.len() - batch.tokens.len()..];
            for (token, choice) in next.tokens.iter_mut().zip(latest) {
                *token = choice.token.max(0) as u32; // who found none goes on with anything
            }
            self.draft_once(&next, logits)?;
            all.extend(self.choices.iter().cloned());
        }
        self.choices = all;
        Ok(())
    }

    fn export_page(&mut self, page: PageRef, bytes: &mut Vec<u8>) -> Result<(), String> {
        bytes.clear();
        let models = [Some(&mut self.target), self.draft.as_mut()];
        models.into_iter().flatten().for_each(|model| model.export(page, bytes));
        Ok(())
    }

    fn import_page(&mut self, page: PageRef, bytes: &[u8]) -> Result<(), String> {
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let mut slots = bytes.chunks_exact(17).map(|slot| {
            let position = word(&slot[8..16]) as usize;
            let slot = Slot { prefix: word(&slot[..8]), position, long_context: slot[16] == 1 };
            (position != usize::MAX).then_some(slot)
        });
        for model in [Some(&mut self.target), self.draft.as_mut()].into_iter().flatten() {
            model.import(page, &mut slots).then_some(()).ok_or("too few bytes for a page")?;
        }
        Ok(())
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
        max_waiting: None,
        patience: EngineConfig::PATIENCE,
        step_time_target: Some(EngineConfig::STEP_TIME_TARGET),
        row_unit: 1,
        window: None,
        local: None,
        speculation: None,
        digest_key: [7; 32],
        cache_events: false,
        trace: false,
        device_draws: true,
        check_invariants: true,
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
