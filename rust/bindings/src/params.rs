//! `SamplingParams` as a Python value.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use infer_engine as core;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyString, PyTuple};

use crate::convert::{Arg, Int, number, shown, text, token_ids, type_name};
use crate::error::{guarded, refusal};

/// How to choose tokens and when to stop; names, defaults and meanings are vLLM's. Immutable.
#[pyclass(frozen, module = "infer._core")]
pub struct SamplingParams {
    pub inner: core::SamplingParams,
}

#[pymethods]
impl SamplingParams {
    #[new]
    #[pyo3(signature = (
        *, n=Arg::int(1), temperature=Arg::of(1.0), top_k=Arg::int(0), top_p=Arg::of(1.0), min_p=Arg::of(0.0),
        repetition_penalty=Arg::of(1.0), presence_penalty=Arg::of(0.0), frequency_penalty=Arg::of(0.0), seed=None,
        max_tokens=Some(Arg::int(16)), min_tokens=Arg::int(0), stop=None, stop_token_ids=None,
        include_stop_str_in_output=Arg::of(false), ignore_eos=Arg::of(false), logprobs=None, prompt_logprobs=None,
        skip_special_tokens=Arg::of(true), detokenize=Arg::of(true), logit_bias=None, allowed_token_ids=None
    ), text_signature = "(*, n=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, \
        presence_penalty=0.0, frequency_penalty=0.0, seed=None, max_tokens=16, min_tokens=0, stop=None, \
        stop_token_ids=None, include_stop_str_in_output=False, ignore_eos=False, logprobs=None, prompt_logprobs=None, \
        skip_special_tokens=True, detokenize=True, logit_bias=None, allowed_token_ids=None)")]
    fn new(
        n: Arg<Int>,
        temperature: Arg<f64>,
        top_k: Arg<Int>,
        top_p: Arg<f64>,
        min_p: Arg<f64>,
        repetition_penalty: Arg<f64>,
        presence_penalty: Arg<f64>,
        frequency_penalty: Arg<f64>,
        seed: Option<Arg<Int>>,
        max_tokens: Option<Arg<Int>>,
        min_tokens: Arg<Int>,
        stop: Option<Bound<'_, PyAny>>,
        stop_token_ids: Option<Bound<'_, PyAny>>,
        include_stop_str_in_output: Arg<bool>,
        ignore_eos: Arg<bool>,
        logprobs: Option<Arg<Int>>,
        prompt_logprobs: Option<Arg<Int>>,
        skip_special_tokens: Arg<bool>,
        detokenize: Arg<bool>,
        logit_bias: Option<Bound<'_, PyAny>>,
        allowed_token_ids: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        guarded(|| {
            // -0.0 equals 0.0 but would hash apart.
            let real = |name: &str, value: Arg<f64>| Ok::<_, PyErr>(value.number(name)? + 0.0);
            let inner = core::SamplingParams {
                n: n.fit("n", "from 1 to 1024")?,
                temperature: real("temperature", temperature)?,
                top_k: keep_all_or(top_k)?,
                top_p: real("top_p", top_p)?,
                min_p: real("min_p", min_p)?,
                repetition_penalty: real("repetition_penalty", repetition_penalty)?,
                presence_penalty: real("presence_penalty", presence_penalty)?,
                frequency_penalty: real("frequency_penalty", frequency_penalty)?,
                seed: seed.map(|seed| seed.fit("seed", "from 0 to 2**64 - 1")).transpose()?,
                max_tokens: max_tokens
                    .map(|tokens| tokens.fit("max_tokens", "None or at least 1"))
                    .transpose()?,
                min_tokens: min_tokens.fit("min_tokens", "at least 0")?,
                stop: stop.map_or(Ok(Vec::new()), |stop| stop_strings(&stop))?,
                stop_token_ids: stop_token_ids
                    .map_or(Ok(Vec::new()), |ids| token_ids("stop_token_ids", &ids))?,
                include_stop_str_in_output: include_stop_str_in_output.flag("include_stop_str_in_output")?,
                ignore_eos: ignore_eos.flag("ignore_eos")?,
                logprobs: logprobs.map(|top| top_or_all("logprobs", top)).transpose()?,
                prompt_logprobs: prompt_logprobs.map(|top| top_or_all("prompt_logprobs", top)).transpose()?,
                skip_special_tokens: skip_special_tokens.flag("skip_special_tokens")?,
                detokenize: detokenize.flag("detokenize")?,
                logit_bias: logit_bias.map_or(Ok(BTreeMap::new()), |bias| biases(&bias))?,
                allowed_token_ids: allowed_token_ids
                    .map(|ids| token_ids("allowed_token_ids", &ids))
                    .transpose()?,
            };
            inner.validate().map_err(refusal)?;
            Ok(Self { inner })
        })
    }

    /// How many completions of the prompt to generate.
    #[getter]
    fn n(&self) -> u32 {
        self.inner.n
    }
    /// Divides the logits; 0 takes the most likely token, the lowest id among equals.
    #[getter]
    fn temperature(&self) -> f64 {
        self.inner.temperature
    }
    /// Keep this many most likely tokens; 0 (or -1) keeps all.
    #[getter]
    fn top_k(&self) -> u32 {
        self.inner.top_k
    }
    /// Keep the fewest most likely tokens whose probabilities reach this sum.
    #[getter]
    fn top_p(&self) -> f64 {
        self.inner.top_p
    }
    /// Keep tokens at least this likely relative to the most likely.
    #[getter]
    fn min_p(&self) -> f64 {
        self.inner.min_p
    }
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output.
    #[getter]
    fn repetition_penalty(&self) -> f64 {
        self.inner.repetition_penalty
    }
    /// Subtracted from the logits of tokens seen in the output.
    #[getter]
    fn presence_penalty(&self) -> f64 {
        self.inner.presence_penalty
    }
    /// Subtracted from logits once per occurrence in the output.
    #[getter]
    fn frequency_penalty(&self) -> f64 {
        self.inner.frequency_penalty
    }
    /// Seed of the random numbers; None takes one from the engine's seed and the request's number.
    #[getter]
    fn seed(&self) -> Option<u64> {
        self.inner.seed
    }
    /// Most tokens to generate; None goes on until `max_model_len`.
    #[getter]
    fn max_tokens(&self) -> Option<usize> {
        self.inner.max_tokens
    }
    /// Tokens before which neither stop tokens nor stop strings end a completion.
    #[getter]
    fn min_tokens(&self) -> usize {
        self.inner.min_tokens
    }
    /// Strings that end a completion.
    #[getter]
    fn stop(&self) -> Vec<String> {
        self.inner.stop.clone()
    }
    /// Tokens that end a completion, besides the end-of-sequence tokens.
    #[getter]
    fn stop_token_ids(&self) -> Vec<u32> {
        self.inner.stop_token_ids.clone()
    }
    /// Whether the stop string, or the stop token's text, stays in the output.
    #[getter]
    fn include_stop_str_in_output(&self) -> bool {
        self.inner.include_stop_str_in_output
    }
    /// Whether to go on after end-of-sequence tokens.
    #[getter]
    fn ignore_eos(&self) -> bool {
        self.inner.ignore_eos
    }
    /// Report log-probabilities of the chosen token and of this many most likely ones; -1 of all.
    #[getter]
    fn logprobs(&self) -> Option<i64> {
        self.inner.logprobs.map(shown_top)
    }
    /// The same for every prompt token but the first.
    #[getter]
    fn prompt_logprobs(&self) -> Option<i64> {
        self.inner.prompt_logprobs.map(shown_top)
    }
    /// Whether special tokens are left out of the text.
    #[getter]
    fn skip_special_tokens(&self) -> bool {
        self.inner.skip_special_tokens
    }
    /// Whether to produce text at all.
    #[getter]
    fn detokenize(&self) -> bool {
        self.inner.detokenize
    }
    /// Added to the logits of these tokens, from -100 to 100.
    #[getter]
    fn logit_bias(&self) -> BTreeMap<u32, f32> {
        self.inner.logit_bias.clone()
    }
    /// Choose among these tokens only.
    #[getter]
    fn allowed_token_ids(&self) -> Option<Vec<u32>> {
        self.inner.allowed_token_ids.clone()
    }

    /// A copy with some fields changed; the result is validated like a new one.
    #[pyo3(signature = (**changes))]
    fn replace<'py>(
        slf: &Bound<'py, Self>,
        changes: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let fields = slf.get().fields(slf.py())?;
        if let Some(changes) = changes {
            fields.update(changes.as_mapping())?;
        }
        slf.get_type().call((), Some(&fields))
    }

    /// For pickle and copy: the arguments that make it again.
    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        Ok((PyTuple::empty(py), self.fields(py)?))
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().inner == self.inner)
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        format!("{:?}", self.inner).hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let defaults = Self { inner: core::SamplingParams::default() }.fields(py)?;
        let mut parts = Vec::new();
        for (name, value) in self.fields(py)? {
            if !defaults.get_item(&name)?.is_some_and(|usual| usual.eq(&value).unwrap_or(false)) {
                parts.push(format!("{name}={}", value.repr()?));
            }
        }
        Ok(format!("SamplingParams({})", parts.join(", ")))
    }
}

impl SamplingParams {
    /// The engine's parameters, for a model of so many tokens.
    pub fn of_vocabulary(&self, vocabulary: usize) -> core::SamplingParams {
        let tokens = u32::try_from(vocabulary).unwrap_or(ALL);
        let resolved = |top: Option<u32>| top.map(|top| if top == ALL { tokens } else { top });
        let (logprobs, prompt_logprobs) =
            (resolved(self.inner.logprobs), resolved(self.inner.prompt_logprobs));
        core::SamplingParams { logprobs, prompt_logprobs, ..self.inner.clone() }
    }

    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let fields = PyDict::new(py);
        let inner = &self.inner;
        fields.set_item("n", inner.n)?;
        fields.set_item("temperature", inner.temperature)?;
        fields.set_item("top_k", inner.top_k)?;
        fields.set_item("top_p", inner.top_p)?;
        fields.set_item("min_p", inner.min_p)?;
        fields.set_item("repetition_penalty", inner.repetition_penalty)?;
        fields.set_item("presence_penalty", inner.presence_penalty)?;
        fields.set_item("frequency_penalty", inner.frequency_penalty)?;
        fields.set_item("seed", inner.seed)?;
        fields.set_item("max_tokens", inner.max_tokens)?;
        fields.set_item("min_tokens", inner.min_tokens)?;
        fields.set_item("stop", &inner.stop)?;
        fields.set_item("stop_token_ids", &inner.stop_token_ids)?;
        fields.set_item("include_stop_str_in_output", inner.include_stop_str_in_output)?;
        fields.set_item("ignore_eos", inner.ignore_eos)?;
        fields.set_item("logprobs", self.logprobs())?;
        fields.set_item("prompt_logprobs", self.prompt_logprobs())?;
        fields.set_item("skip_special_tokens", inner.skip_special_tokens)?;
        fields.set_item("detokenize", inner.detokenize)?;
        fields.set_item("logit_bias", &inner.logit_bias)?;
        fields.set_item("allowed_token_ids", &inner.allowed_token_ids)?;
        Ok(fields)
    }
}

/// A count of most likely tokens that stands for all of them, as vLLM's -1 does. No vocabulary has so many.
const ALL: u32 = u32::MAX;

/// A count of most likely tokens, where -1 is all of them.
fn top_or_all(name: &str, top: Arg<Int>) -> PyResult<u32> {
    let right = "None, at least 0, or -1 for all tokens";
    match top.fit::<i64>(name, right)? {
        -1 => Ok(ALL),
        count => match Arg::int(count.into()).fit(name, right)? {
            ALL => Err(refusal(format!("{name} must be {right}, got {count}, which is too large"))),
            count => Ok(count),
        },
    }
}

/// The same as Python sees it.
fn shown_top(top: u32) -> i64 {
    if top == ALL { -1 } else { top.into() }
}

/// `top_k`, where vLLM's -1 and 0 both keep all tokens.
fn keep_all_or(top_k: Arg<Int>) -> PyResult<u32> {
    let right = "0 or -1 for all tokens, or at least 1";
    match top_k.fit::<i64>("top_k", right)? {
        -1 => Ok(0),
        count => Arg::int(count.into()).fit("top_k", right),
    }
}

/// One string or several.
fn stop_strings(object: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
    if object.is_instance_of::<PyString>() {
        return Ok(vec![text("stop", object)?]);
    }
    let wrong =
        || refusal(format!("stop must be a string or a sequence of strings, got {}", type_name(object)));
    let items = object.try_iter().map_err(|_| wrong())?;
    items.enumerate().map(|(index, item)| text(&format!("stop[{index}]"), &item?)).collect()
}

fn biases(object: &Bound<'_, PyAny>) -> PyResult<BTreeMap<u32, f32>> {
    let Ok(mapping) = object.cast::<PyMapping>() else {
        let found = type_name(object);
        return Err(refusal(format!("logit_bias must be a mapping of token ids to numbers, got {found}")));
    };
    let mut biases = BTreeMap::new();
    for item in mapping.items()?.iter() {
        let (key, value) = item.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
        let wrong = || {
            let (key, value) = (shown(&key), shown(&value));
            refusal(format!("logit_bias must map token ids to finite numbers, got {key}: {value}"))
        };
        let bias: f64 = number(&value).ok_or_else(wrong)?;
        if !(bias as f32).is_finite() {
            return Err(wrong());
        }
        biases.insert(number(&key).ok_or_else(wrong)?, bias as f32);
    }
    Ok(biases)
}
