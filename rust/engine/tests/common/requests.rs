//! Random configurations and requests.

use std::time::Duration;

use infer_engine::{
    EngineConfig, LocalLayers, Prompt, RequestId, RequestKind, RequestOptions, SamplingParams, Speculation,
    Submission, TextFactory, pages_at_once,
};

use super::{TagText, VOCABULARY, mix};

/// Random numbers of a simulation.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 = mix(self.0, 1);
        (self.0 % sides as u64) as usize
    }

    pub fn chance(&mut self, one_in: usize) -> bool {
        self.roll(one_in) == 0
    }
}

pub fn random_config(dice: &mut Dice) -> EngineConfig {
    let page_tokens = [1, 2, 4, 16][dice.roll(4)];
    let mut config = super::config(1 + dice.roll(24), page_tokens);
    config.max_model_len = 1 + dice.roll(config.pages * page_tokens);
    config.max_num_seqs = 1 + dice.roll(6);
    config.max_num_batched_tokens = config.max_num_seqs + dice.roll(24);
    config.enable_prefix_caching = !dice.chance(4);
    config.context_switch = dice.chance(3).then(|| 1 + dice.roll(config.max_model_len));
    config.max_logit_values = VOCABULARY * (1 + dice.roll(8));
    config.seed = dice.roll(100) as u64;
    config.max_waiting = dice.chance(4).then(|| 1 + dice.roll(8));
    config.patience = Duration::from_millis(1 + dice.roll(500) as u64);
    config.step_time_target = dice.chance(2).then(|| Duration::from_micros(1 + dice.roll(5000) as u64));
    config.window = dice.chance(3).then(|| 2 + dice.roll(40));
    config.local = (config.window.is_none() && dice.chance(2)).then(|| random_local(dice, &config));
    config.speculation = random_speculation(dice);
    if config.speculation.as_ref().is_some_and(|drafts| drafts.num_draft_tokens().is_some()) {
        config.max_logit_values *= 1 + (dice.0 % 5) as usize; // trees need more rows than chains
    }
    config.cache_events = true;
    config.trace = true;
    config
}

/// Layers with a window, and no more pages for them than one sequence needs and a few.
fn random_local(dice: &mut Dice, config: &EngineConfig) -> LocalLayers {
    let window = 1 + dice.roll(30);
    let (tokens, rows) = (config.max_model_len, config.max_num_batched_tokens);
    let pages = pages_at_once(tokens, config.page_tokens, Some(window), rows) + dice.roll(8);
    LocalLayers { window, pages }
}

pub fn random_speculation(dice: &mut Dice) -> Option<Speculation> {
    let num_speculative_tokens = 1 + dice.roll(5);
    let prompt_lookup_min = 1 + dice.roll(2);
    // Without a throw of its own: others would change what runs of old seeds show.
    let num_draft_tokens =
        dice.0.is_multiple_of(2).then(|| num_speculative_tokens + (dice.0 / 2 % 13) as usize);
    match dice.roll(3) {
        0 => None,
        1 => Some(Speculation::DraftModel { num_speculative_tokens, num_draft_tokens }),
        _ => Some(Speculation::Ngram {
            num_speculative_tokens,
            num_draft_tokens,
            prompt_lookup_min,
            prompt_lookup_max: 3,
        }),
    }
}

pub fn random_options(dice: &mut Dice, now: Duration) -> RequestOptions {
    let priority = if dice.chance(2) { 0 } else { dice.roll(5) as i32 - 2 };
    RequestOptions {
        priority,
        user: dice.chance(2).then(|| ["ann", "bob", "cy"][dice.roll(3)].into()),
        deadline: dice.chance(10).then(|| now + Duration::from_millis(dice.roll(300) as u64)),
        cache_salt: dice.chance(3).then(|| ["red", "blue"][dice.roll(2)].into()),
        // Without a throw of its own: others would change what runs of old seeds show.
        final_only: priority % 2 == 0,
    }
}

pub fn random_params(dice: &mut Dice) -> SamplingParams {
    let mut params =
        SamplingParams { n: 1 + dice.roll(3) as u32 * dice.roll(2) as u32, ..SamplingParams::default() };
    params.temperature = [0.0, 0.7, 1.3][dice.roll(3)];
    params.top_k = [0, 5, 2][dice.roll(3)];
    params.top_p = [1.0, 0.9][dice.roll(2)];
    params.min_p = [0.0, 0.05][dice.roll(2)];
    params.repetition_penalty = [1.0, 1.2][dice.roll(2)];
    params.frequency_penalty = [0.0, 0.5][dice.roll(2)];
    params.seed = dice.chance(2).then(|| dice.roll(1000) as u64);
    params.max_tokens = if dice.chance(4) { None } else { Some(1 + dice.roll(20)) };
    params.min_tokens = params.max_tokens.map_or(0, |max| dice.roll(max.min(4)));
    params.ignore_eos = dice.chance(3);
    params.stop_token_ids = if dice.chance(3) { vec![7] } else { vec![] };
    params.stop = if dice.chance(3) { vec!["<9>".to_owned()] } else { vec![] };
    // Of few tokens, so that completions often meet again after they have parted.
    params.allowed_token_ids = dice.chance(4).then(|| vec![3, 5, 9]);
    params.logprobs = dice.chance(3).then(|| dice.roll(4) as u32);
    params.prompt_logprobs = dice.chance(5).then(|| dice.roll(3) as u32);
    params
}

#[derive(Clone)]
pub struct Planned {
    pub prompt: Prompt,
    pub kind: RequestKind,
    pub options: RequestOptions,
}

/// Prompts begin alike now and then, so that prefixes are shared.
pub fn random_request(dice: &mut Dice, config: &EngineConfig, stems: &[Vec<u32>], now: Duration) -> Planned {
    let stem = &stems[dice.roll(stems.len())];
    let mut prompt = stem[..dice.roll(stem.len() + 1)].to_vec();
    prompt.extend((0..=dice.roll(6)).map(|_| dice.roll(VOCABULARY) as u32));
    prompt.truncate(config.max_model_len.saturating_sub(1).max(1));
    let kind = if dice.chance(6) {
        RequestKind::Logits
    } else {
        RequestKind::Generate(Box::new(random_params(dice)))
    };
    Planned { prompt: prompt.into(), kind, options: random_options(dice, now) }
}

pub fn submission(id: RequestId, planned: &Planned) -> Submission {
    let stop = match &planned.kind {
        RequestKind::Generate(params) => params.stop.first().cloned(),
        RequestKind::Logits => None,
    };
    let text: TextFactory = Box::new(move || Box::new(TagText { stop: stop.clone(), held: String::new() }));
    let (prompt, kind, options) = (planned.prompt.clone(), planned.kind.clone(), planned.options.clone());
    Submission { id, prompt, kind, text: Some(text), options }
}
