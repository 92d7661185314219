//! What the fake device draws with: the engine's own sampler.

use infer_engine::{Batch, Choice, Draw, SampleError, Sampler, SamplingParams, TokenHistory};

use super::VOCABULARY;

/// What a draw is, in the engine's own words.
pub fn choose(batch: &Batch, draw: &Draw, row: &[f32], before: &[i32]) -> Choice {
    let mut params = SamplingParams {
        temperature: match draw.inverse_temperature {
            0.0 => 0.0,
            inverse => 1.0 / f64::from(inverse),
        },
        min_p: f64::from(draw.min_p),
        top_k: draw.top_k,
        top_p: draw.top_p,
        repetition_penalty: f64::from(draw.repetition),
        frequency_penalty: f64::from(draw.frequency),
        presence_penalty: f64::from(draw.presence),
        ..SamplingParams::default()
    };
    let (mut history, mut banned) = (TokenHistory::default(), Vec::new());
    for change in &batch.changes[draw.changes.0 as usize..][..draw.changes.1 as usize] {
        match change.bias == f32::NEG_INFINITY {
            true => banned.push(change.token),
            false => drop(params.logit_bias.insert(change.token, change.bias)),
        }
        if change.count > 0 {
            history.output.insert(change.token, change.count);
        } else if change.seen {
            history.prompt.insert(change.token);
        }
    }
    if let Some(token) = draw.uncounted.map(|place| before[place as usize]).filter(|&token| token >= 0) {
        *history.output.entry(token as u32).or_default() += 1;
    }
    params.allowed_token_ids = draw.allowed.map(|first| {
        let set = |&token: &u32| batch.allowed[first as usize + token as usize / 32] >> (token % 32) & 1 == 1;
        (0..VOCABULARY as u32).filter(set).collect()
    });
    let mut sampler = Sampler::default();
    match sampler.sample(row, &params, &history, &banned, draw.seed, draw.position) {
        Ok(token) => {
            let logprobs = draw.logprobs.map(|count| sampler.logprobs(row, token, count));
            Choice { token: token as i32, logprobs }
        }
        Err(SampleError::NothingLeft) => Choice { token: -2, logprobs: None },
        Err(_) => Choice { token: -1, logprobs: None },
    }
}
