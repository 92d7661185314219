//! How a request wants its tokens chosen and when it wants to stop. Names, defaults and meanings are vLLM's.

use std::collections::BTreeMap;

use crate::error::{EngineError, refuse};

/// Sampling parameters of one request.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Completions of the prompt.
    pub n: u32,
    /// Divides the logits; 0 takes the most likely token, the lowest id among equals.
    pub temperature: f64,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest most likely tokens whose probabilities reach this sum.
    pub top_p: f64,
    /// Keep tokens at least this likely relative to the most likely.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output.
    pub repetition_penalty: f64,
    /// Subtracted from logits of tokens seen in the output.
    pub presence_penalty: f64,
    /// Subtracted from logits once per occurrence in the output.
    pub frequency_penalty: f64,
    /// Seed of the request's random numbers; without one they follow from the engine's seed and the request's number.
    pub seed: Option<u64>,
    /// Most tokens to generate; without a limit until `max_model_len`.
    pub max_tokens: Option<usize>,
    /// Tokens before which neither stop tokens nor stop strings end the completion.
    pub min_tokens: usize,
    /// Strings that end the completion.
    pub stop: Vec<String>,
    /// Tokens that end the completion, besides the end-of-sequence tokens.
    pub stop_token_ids: Vec<u32>,
    /// Leave the stop string, or the stop token's text, in the output.
    pub include_stop_str_in_output: bool,
    /// Go on after end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Report log-probabilities of the chosen token and of this many most likely ones.
    pub logprobs: Option<u32>,
    /// The same for every prompt token but the first.
    pub prompt_logprobs: Option<u32>,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Produce text at all.
    pub detokenize: bool,
    /// Added to the logits of these tokens.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Choose among these tokens only.
    pub allowed_token_ids: Option<Vec<u32>>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            max_tokens: Some(16),
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            skip_special_tokens: true,
            detokenize: true,
            logit_bias: BTreeMap::new(),
            allowed_token_ids: None,
        }
    }
}

/// Most completions of one request: each has its own state, made before anything is computed.
const MAX_COMPLETIONS: u32 = 1024;
/// Most stop strings, and most bytes of one: each costs work on every character of output.
const MAX_STOPS: usize = 64;
const MAX_STOP_BYTES: usize = 4096;
/// The range of vLLM and OpenAI for `logit_bias`.
const MAX_BIAS: f32 = 100.0;
/// Beyond these, logits would become infinite or lose all order.
const REPETITION_PENALTIES: std::ops::RangeInclusive<f64> = 1e-6..=1e6;

impl SamplingParams {
    /// Checks everything that does not depend on the model.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub fn validate(&self) -> Result<(), EngineError> {
        if !(1..=MAX_COMPLETIONS).contains(&self.n) {
            return refuse(format!("n must be from 1 to {MAX_COMPLETIONS}, got {}", self.n));
        }
        self.validate_numbers()?;
        if self.max_tokens == Some(0) {
            return refuse("max_tokens must be at least 1, or None for no limit; got 0");
        }
        if let Some(max_tokens) = self.max_tokens
            && self.min_tokens > max_tokens
        {
            return refuse(format!(
                "min_tokens ({}) must not exceed max_tokens ({max_tokens})",
                self.min_tokens
            ));
        }
        self.validate_stops()?;
        if let Some((token, bias)) =
            self.logit_bias.iter().find(|(_, bias)| bias.is_nan() || bias.abs() > MAX_BIAS)
        {
            return refuse(format!("logit_bias[{token}] must be from -{MAX_BIAS} to {MAX_BIAS}, got {bias}"));
        }
        if self.allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
            return refuse(
                "allowed_token_ids must name at least one token, or be None to allow all; got an empty list",
            );
        }
        Ok(())
    }

    fn validate_numbers(&self) -> Result<(), EngineError> {
        let within = |name: &str, value: f64, right: &str, ok: bool| {
            if ok { Ok(()) } else { refuse(format!("{name} must be {right}, got {value:?}")) }
        };
        let (t, p, m) = (self.temperature, self.top_p, self.min_p);
        within("temperature", t, "a finite number from 0 on (0 is greedy)", t.is_finite() && t >= 0.0)?;
        within("top_p", p, "greater than 0 and at most 1", p > 0.0 && p <= 1.0)?;
        within("min_p", m, "from 0 to 1", (0.0..=1.0).contains(&m))?;
        let repetition = self.repetition_penalty;
        let allowed = REPETITION_PENALTIES.contains(&repetition);
        within("repetition_penalty", repetition, "from 1e-6 to 1e6 (1 is none)", allowed)?;
        let two = -2.0..=2.0;
        within(
            "presence_penalty",
            self.presence_penalty,
            "from -2 to 2",
            two.contains(&self.presence_penalty),
        )?;
        within(
            "frequency_penalty",
            self.frequency_penalty,
            "from -2 to 2",
            two.contains(&self.frequency_penalty),
        )
    }

    fn validate_stops(&self) -> Result<(), EngineError> {
        if self.stop.len() > MAX_STOPS {
            return refuse(format!("stop takes at most {MAX_STOPS} strings, got {}", self.stop.len()));
        }
        for (index, stop) in self.stop.iter().enumerate() {
            if stop.is_empty() {
                return refuse(format!("stop[{index}] must not be an empty string"));
            }
            if stop.len() > MAX_STOP_BYTES {
                return refuse(format!(
                    "stop[{index}] takes at most {MAX_STOP_BYTES} bytes, got {}",
                    stop.len()
                ));
            }
        }
        if !self.stop.is_empty() && !self.detokenize {
            return refuse(
                "stop strings need text: use detokenize=True with stop, or stop_token_ids without it",
            );
        }
        Ok(())
    }

    /// Checks the token ids and counts that depend on the model's vocabulary.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn validate_for(&self, vocabulary: usize) -> Result<(), EngineError> {
        let outside = |token: u32| token as usize >= vocabulary;
        let mut lists = vec![("stop_token_ids", &self.stop_token_ids)];
        lists.extend(self.allowed_token_ids.as_ref().map(|allowed| ("allowed_token_ids", allowed)));
        for (name, list) in lists {
            if let Some(token) = list.iter().find(|&&token| outside(token)) {
                return refuse(format!(
                    "{name} holds {token}, but this model's token ids end at {}",
                    vocabulary - 1
                ));
            }
        }
        if let Some((token, _)) = self.logit_bias.iter().find(|&(&token, _)| outside(token)) {
            return refuse(format!(
                "logit_bias names {token}, but this model's token ids end at {}",
                vocabulary - 1
            ));
        }
        for (name, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(count) = count.filter(|&count| count as usize > vocabulary) {
                return refuse(format!(
                    "{name} must be at most the vocabulary's {vocabulary} tokens, got {count}"
                ));
            }
        }
        Ok(())
    }

    /// Whether any penalty needs to know which tokens were seen.
    pub(crate) fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether tokens are chosen from other logits than the model's.
    pub(crate) fn changes_logits(&self) -> bool {
        self.allowed_token_ids.is_some() || !self.logit_bias.is_empty() || self.has_penalties()
    }
}

/// What logits are multiplied by. Tiny temperatures would divide to infinity; any number this large already leaves only the largest. Huge ones
/// would divide to zero, which makes no number of a logit of minus infinity; any number this small already leaves all others alike.
pub(crate) fn inverse_temperature(temperature: f64) -> f32 {
    (1.0 / temperature).clamp(f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(change: impl FnOnce(&mut SamplingParams)) -> String {
        let mut params = SamplingParams::default();
        change(&mut params);
        params.validate().and_then(|()| params.validate_for(100)).expect_err("refused").to_string()
    }

    #[test]
    fn no_temperature_multiplies_by_zero_or_infinity() {
        for temperature in [f64::MIN_POSITIVE, 1e-300, 1.0, 1e46, f64::MAX] {
            assert!(inverse_temperature(temperature).is_normal(), "{temperature}");
        }
    }

    #[test]
    fn defaults_are_valid() {
        SamplingParams::default().validate().unwrap();
        SamplingParams::default().validate_for(1).unwrap();
    }

    #[test]
    fn refusals_name_field_and_value() {
        assert_eq!(message(|p| p.n = 0), "n must be from 1 to 1024, got 0");
        assert!(message(|p| p.temperature = f64::NAN).starts_with("temperature must be a finite number"));
        assert!(message(|p| p.temperature = -0.5).ends_with("got -0.5"));
        assert_eq!(message(|p| p.top_p = 0.0), "top_p must be greater than 0 and at most 1, got 0.0");
        assert_eq!(message(|p| p.min_p = 1.5), "min_p must be from 0 to 1, got 1.5");
        assert!(message(|p| p.repetition_penalty = 0.0).starts_with("repetition_penalty"));
        assert_eq!(
            message(|p| p.repetition_penalty = 1e-45),
            "repetition_penalty must be from 1e-6 to 1e6 (1 is none), got 1e-45"
        );
        assert!(message(|p| p.presence_penalty = 2.1).starts_with("presence_penalty"));
        assert!(message(|p| p.frequency_penalty = f64::INFINITY).starts_with("frequency_penalty"));
        assert!(message(|p| p.max_tokens = Some(0)).starts_with("max_tokens"));
        assert_eq!(message(|p| p.min_tokens = 17), "min_tokens (17) must not exceed max_tokens (16)");
        assert_eq!(message(|p| p.stop = vec![String::new()]), "stop[0] must not be an empty string");
        assert!(message(|p| p.stop = vec!["x".repeat(5000)]).starts_with("stop[0]"));
        assert!(message(|p| p.stop = vec!["x".into(); 65]).starts_with("stop takes at most 64"));
        assert!(
            message(|p| (p.stop, p.detokenize) = (vec!["x".into()], false))
                .starts_with("stop strings need text")
        );
        assert!(message(|p| p.allowed_token_ids = Some(vec![])).starts_with("allowed_token_ids"));
        assert!(message(|p| p.logit_bias = [(3, f32::NAN)].into()).starts_with("logit_bias[3]"));
    }

    #[test]
    fn token_ids_stay_inside_the_vocabulary() {
        assert_eq!(
            message(|p| p.stop_token_ids = vec![5, 100]),
            "stop_token_ids holds 100, but this model's token ids end at 99"
        );
        assert!(message(|p| p.allowed_token_ids = Some(vec![u32::MAX])).contains("4294967295"));
        assert!(message(|p| p.logit_bias = [(100, 1.0)].into()).starts_with("logit_bias names 100"));
        assert!(message(|p| p.logprobs = Some(101)).starts_with("logprobs must be at most"));
        assert!(message(|p| p.prompt_logprobs = Some(101)).starts_with("prompt_logprobs"));
    }
}
