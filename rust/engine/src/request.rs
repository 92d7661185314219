//! Requests: what is submitted, what is refused, what is remembered while it lives.

use std::sync::Arc;
use std::time::Duration;

use crate::config::EngineConfig;
use crate::draw::mask;
use crate::error::{EngineError, refuse};
use crate::metrics::RequestMetrics;
use crate::params::SamplingParams;
use crate::text::TextFactory;

/// Number of a request; later requests have higher numbers.
pub type RequestId = u64;

/// Token ids of a prompt, shared by all completions of a request.
pub type Prompt = Arc<[u32]>;

/// What is wanted.
#[derive(Debug, Clone, PartialEq)]
pub enum RequestKind {
    /// Completions of the prompt.
    Generate(Box<SamplingParams>),
    /// The logits of every prompt row, chunk by chunk: after each chunk the request pauses until `Core::resume`.
    Logits,
}

/// How a request is to be served; nothing of it changes what is generated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestOptions {
    /// Lower is served first; 0 is usual.
    pub priority: i32,
    /// Whom it is for: requests of equal priority are admitted so that users are served evenly, by tokens. Requests without one
    /// are one user's.
    pub user: Option<Arc<str>>,
    /// When, on the engine's clock, it ends with [`crate::FinishReason::Timeout`].
    pub deadline: Option<Duration>,
    /// It shares cached pages only with requests of the same salt.
    pub cache_salt: Option<Arc<str>>,
    /// Nobody looks at a token before its completion ends: steps that it is part of may take long, if more tokens a second come of it.
    pub final_only: bool,
}

/// A request on its way in.
pub struct Submission {
    /// Its number: unused, and higher than all before. It orders service and seeds requests that bring no seed.
    pub id: RequestId,
    /// The prompt.
    pub prompt: Prompt,
    /// What is wanted.
    pub kind: RequestKind,
    /// Makes each completion's text; without it text stays empty and stop strings are refused.
    pub text: Option<TextFactory>,
    /// How it is to be served.
    pub options: RequestOptions,
}

impl Submission {
    /// Checks everything that could go wrong later, so that an accepted request always ends by itself.
    ///
    /// # Errors
    /// Names what is wrong and what would be right.
    pub fn validate(&self, config: &EngineConfig) -> Result<(), EngineError> {
        let length = self.prompt.len();
        if length == 0 {
            return refuse("the prompt has no tokens; give at least one");
        }
        let outside = self.prompt.iter().position(|&token| token as usize >= config.vocabulary);
        if let Some(position) = outside {
            return refuse(format!(
                "prompt token {} at position {position} is outside this model's vocabulary of {} tokens",
                self.prompt[position], config.vocabulary
            ));
        }
        let limit = config.max_model_len;
        match &self.kind {
            RequestKind::Logits if length > limit => refuse(format!(
                "the prompt has {length} tokens, but max_model_len is {limit}; shorten it or raise max_model_len"
            )),
            RequestKind::Logits => Ok(()),
            RequestKind::Generate(_) if length >= limit => refuse(format!(
                "the prompt has {length} tokens and max_model_len is {limit}, which leaves no room to generate; shorten it to at \
                 most {} tokens or raise max_model_len",
                limit - 1
            )),
            RequestKind::Generate(params) => {
                params.validate()?;
                params.validate_for(config.vocabulary)?;
                if !params.stop.is_empty() && self.text.is_none() {
                    return refuse(
                        "stop strings need a tokenizer, and this model has none; use stop_token_ids",
                    );
                }
                Ok(())
            }
        }
    }
}

/// A request that has not ended.
pub(crate) struct Request {
    pub kind: RequestKind,
    pub prompt: Prompt,
    pub text: Option<TextFactory>,
    pub options: RequestOptions,
    pub metrics: RequestMetrics,
    /// Per completion, whether it has ended.
    pub ended: Vec<bool>,
    /// Whether the completions after the first exist. They start when the first has computed the prompt, to share its pages.
    pub spawned: bool,
    /// Tokens that end a completion, sorted.
    pub stop_tokens: Vec<u32>,
    /// Most tokens a completion may generate.
    pub max_output: usize,
    /// `allowed_token_ids` as a mask.
    pub allowed: Option<Arc<[u32]>>,
}

impl Request {
    /// A checked submission, ready to run.
    pub fn new(submission: Submission, config: &EngineConfig, metrics: RequestMetrics) -> Self {
        let Submission { prompt, kind, text, options, .. } = submission;
        let room = config.max_model_len - prompt.len();
        let (completions, max_output, stop_tokens) = match &kind {
            RequestKind::Logits => (1, 0, Vec::new()),
            RequestKind::Generate(params) => {
                let mut stop_tokens = params.stop_token_ids.clone();
                if !params.ignore_eos {
                    let inside =
                        config.eos_token_ids.iter().filter(|&&token| (token as usize) < config.vocabulary);
                    stop_tokens.extend(inside);
                }
                stop_tokens.sort_unstable();
                stop_tokens.dedup();
                (params.n, params.max_tokens.unwrap_or(room).min(room), stop_tokens)
            }
        };
        let ended = vec![false; completions as usize];
        let allowed = match &kind {
            RequestKind::Generate(params) => mask(params, config.vocabulary),
            RequestKind::Logits => None,
        };
        Self {
            spawned: ended.len() == 1,
            kind,
            prompt,
            text,
            options,
            metrics,
            ended,
            stop_tokens,
            max_output,
            allowed,
        }
    }

    /// The sampling parameters, unless only logits are wanted.
    pub fn params(&self) -> Option<&SamplingParams> {
        match &self.kind {
            RequestKind::Generate(params) => Some(params),
            RequestKind::Logits => None,
        }
    }

    /// Tokens that a completion of so many tokens may not choose next.
    pub fn banned(&self, generated: usize) -> &[u32] {
        let too_early = self.params().is_some_and(|params| generated < params.min_tokens);
        if too_early { &self.stop_tokens } else { &[] }
    }

    /// Prompt rows, from the first, whose logits are wanted: row i is the prediction of token i + 1.
    pub fn prompt_rows(&self) -> usize {
        match &self.kind {
            RequestKind::Logits => self.prompt.len(),
            RequestKind::Generate(params) if params.prompt_logprobs.is_some() => self.prompt.len() - 1,
            RequestKind::Generate(_) => 0,
        }
    }
}
