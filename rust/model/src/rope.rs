//! Rotary position embedding: the frequencies of every scaling in use, and the cosines and sines of a row.
//!
//! RoPE: Su et al. 2021 (arXiv:2104.09864). Linear: Chen et al. 2023 (arXiv:2306.15595). Dynamic NTK: bloc97 and
//! emozilla 2023. YaRN: Peng et al. 2023 (arXiv:2309.00071). LongRoPE: Ding et al. 2024 (arXiv:2402.13753).
//! Llama 3: the frequency smoothing of the Llama 3.1 release.
//!
//! Two of these depend on the length of the text in transformers, and a token's result must not depend on what
//! comes after it (batch invariance). So *dynamic* uses, for the token at position p, the length p + 1: what
//! decoding token by token computes. *LongRoPE* chooses per sequence: short factors while the whole sequence is within
//! the original length, long ones from its first token otherwise; the engine recomputes a sequence that crosses.

use crate::{Config, ModelError};

/// How frequencies are scaled.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// The base grows with the length beyond `original`.
    Dynamic {
        /// Growth per length.
        factor: f64,
        /// Length up to which nothing is scaled.
        original: usize,
    },
    /// Divided by a factor each.
    Factors {
        /// One per frequency.
        factors: Vec<f32>,
    },
    /// Divided by a factor each, of two sets.
    Long {
        /// While the sequence is within `original`.
        short: Vec<f32>,
        /// For longer sequences.
        long: Vec<f32>,
        /// The length where they switch.
        original: usize,
    },
    /// YaRN's ramp between unscaled and divided frequencies.
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Rotations over `original` above which a frequency is left alone.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Length of pretraining.
        original: f64,
        /// Whether ends of the ramp are rounded to whole dimensions.
        truncate: bool,
    },
    /// Llama 3's ramp.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Rotations over `original` below which a frequency is divided.
        low: f64,
        /// Rotations above which it is left alone.
        high: f64,
        /// Length of pretraining.
        original: f64,
    },
}

/// One kind of rotation that layers of a model use.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Dimensions of each head that are rotated (the first ones).
    pub rotary_dim: usize,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
    /// Factor on cosines and sines.
    pub attention_factor: f64,
}

impl RopeSpec {
    /// Reads a `rope_parameters` / `rope_scaling` object (or none) of a model with the given limits.
    pub fn read(
        parameters: Option<&Config>,
        theta: f64,
        rotary_dim: usize,
        max_positions: usize,
        outer_original: Option<usize>,
    ) -> Result<Self, ModelError> {
        let mut spec = Self { theta, rotary_dim, scaling: RopeScaling::None, attention_factor: 1.0 };
        let Some(parameters) = parameters else { return Ok(spec) };
        let kind = parameters.text(&["rope_type", "type"])?.unwrap_or("default").to_owned();
        // Phi-3's configuration calls LongRoPE "yarn" as well; the factors tell.
        let long = parameters.contains("short_factor") || parameters.contains("long_factor");
        let kind = if kind == "yarn" && long { "longrope".to_owned() } else { kind };
        let original = parameters
            .count(&["original_max_position_embeddings"], 1 << 31)?
            .or(outer_original)
            .unwrap_or(max_positions);
        if original == 0 {
            let field = "original_max_position_embeddings";
            return Err(ModelError::config(field, 0, "a number above 0"));
        }
        let ratio = max_positions as f64 / original.max(1) as f64;
        let factor = |default: Option<f64>| {
            parameters
                .positive(&["factor"])?
                .or(default)
                .ok_or_else(|| ModelError::config("rope_parameters.factor", "missing", "a number above 0"))
        };
        let required = |name: &str| {
            parameters
                .positive(&[name])?
                .ok_or_else(|| ModelError::config(name, "missing", "a number above 0"))
        };
        let attention_factor = parameters.positive(&["attention_factor"])?;
        spec.scaling = match kind.as_str() {
            "default" | "none" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: factor(None)? },
            "dynamic" => RopeScaling::Dynamic { factor: factor(None)?, original: max_positions },
            "llama3" => {
                let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
                if high <= low {
                    return Err(ModelError::config(
                        "high_freq_factor",
                        high,
                        format!("a number above {low}"),
                    ));
                }
                RopeScaling::Llama3 { factor: factor(None)?, low, high, original: original as f64 }
            }
            "yarn" => {
                let factor = factor(Some(ratio))?;
                spec.attention_factor = match attention_factor {
                    Some(given) => given,
                    None => yarn_attention_factor(parameters, factor)?,
                };
                RopeScaling::Yarn {
                    factor,
                    beta_fast: parameters.positive(&["beta_fast"])?.unwrap_or(32.0),
                    beta_slow: parameters.positive(&["beta_slow"])?.unwrap_or(1.0),
                    original: original as f64,
                    truncate: parameters.flag("truncate")?.unwrap_or(true),
                }
            }
            "longrope" | "su" => {
                let factor = factor(Some(ratio))?;
                let computed = if factor <= 1.0 {
                    1.0
                } else {
                    (1.0 + factor.ln() / (original.max(2) as f64).ln()).sqrt()
                };
                spec.attention_factor = attention_factor.unwrap_or(computed);
                RopeScaling::Long {
                    short: factors(parameters, "short_factor", rotary_dim)?,
                    long: factors(parameters, "long_factor", rotary_dim)?,
                    original,
                }
            }
            "frequency_factors" => {
                RopeScaling::Factors { factors: factors(parameters, "factors", rotary_dim)? }
            }
            other => {
                return Err(ModelError::config(
                    "rope_type",
                    format!("`{other}`"),
                    "default, linear, dynamic, yarn, llama3 or longrope",
                ));
            }
        };
        Ok(spec)
    }

    /// The length beyond which a sequence is computed with other frequencies from its first token on.
    pub fn context_switch(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::Long { original, short, long } if short != long => Some(*original),
            _ => None,
        }
    }

    /// What each unscaled frequency is divided by (rotary_dim / 2), as GGUF stores it.
    pub(crate) fn frequency_factors(&self) -> Vec<f32> {
        let plain = Self { scaling: RopeScaling::None, ..self.clone() };
        plain
            .frequencies(0, false)
            .iter()
            .zip(self.frequencies(0, false))
            .map(|(plain, own)| plain / own)
            .collect()
    }

    /// Whether another rotates alike but for a last digit, however it says so.
    pub(crate) fn is_near(&self, other: &Self) -> bool {
        let near = |left: f64, right: f64| (left - right).abs() <= 1e-6 * left.abs();
        let dynamic = |spec: &Self| matches!(spec.scaling, RopeScaling::Dynamic { .. });
        let frequencies = |long: bool| {
            let pairs = self.frequencies(0, long).into_iter().zip(other.frequencies(0, long));
            pairs.into_iter().all(|(left, right)| near(f64::from(left), f64::from(right)))
        };
        near(self.attention_factor, other.attention_factor)
            && self.context_switch() == other.context_switch()
            && frequencies(false)
            && frequencies(true)
            && (!dynamic(self) || self == other)
    }

    /// Frequencies in radians per position (rotary_dim / 2), for a token at `position` of a sequence.
    fn frequencies(&self, position: usize, long_context: bool) -> Vec<f32> {
        let dim = self.rotary_dim as f64;
        let base = |theta: f64| (0..self.rotary_dim / 2).map(move |i| theta.powf(2.0 * i as f64 / dim));
        let divided = |factors: &[f32]| {
            base(self.theta)
                .zip(factors)
                .map(|(power, factor)| (1.0 / (f64::from(*factor) * power)) as f32)
                .collect()
        };
        match &self.scaling {
            RopeScaling::None => base(self.theta).map(|power| (1.0 / power) as f32).collect(),
            RopeScaling::Linear { factor } => {
                base(self.theta).map(|power| (1.0 / power / factor) as f32).collect()
            }
            RopeScaling::Factors { factors } => divided(factors),
            RopeScaling::Long { short, long, .. } => divided(if long_context { long } else { short }),
            RopeScaling::Dynamic { factor, original } => {
                let length = (position + 1).max(*original) as f64;
                let growth = factor * length / *original as f64 - (factor - 1.0);
                base(self.theta * growth.powf(dim / (dim - 2.0))).map(|power| (1.0 / power) as f32).collect()
            }
            RopeScaling::Yarn { .. } => self.yarn_frequencies(base(self.theta)),
            RopeScaling::Llama3 { factor, low, high, original } => base(self.theta)
                .map(|power| {
                    let frequency = 1.0 / power;
                    let rotations = original * frequency / std::f64::consts::TAU;
                    let smooth = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                    ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
                })
                .collect(),
        }
    }

    fn yarn_frequencies(&self, powers: impl Iterator<Item = f64>) -> Vec<f32> {
        let RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate } = self.scaling else {
            return Vec::new();
        };
        let dim = self.rotary_dim as f64;
        let correction = |rotations: f64| {
            dim * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        powers
            .enumerate()
            .map(|(i, power)| {
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                (ramp / (factor * power) + (1.0 - ramp) / power) as f32
            })
            .collect()
    }
}

fn yarn_attention_factor(parameters: &Config, factor: f64) -> Result<f64, ModelError> {
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let (one, all) = (parameters.number(&["mscale"])?, parameters.number(&["mscale_all_dim"])?);
    Ok(match (one, all) {
        (Some(one), Some(all)) if one != 0.0 && all != 0.0 => scale(one) / scale(all),
        _ => scale(1.0),
    })
}

fn factors(parameters: &Config, name: &str, rotary_dim: usize) -> Result<Vec<f32>, ModelError> {
    let expected = format!("{} positive numbers", rotary_dim / 2);
    let found = parameters.numbers(name)?.ok_or_else(|| ModelError::config(name, "missing", &expected))?;
    if found.len() != rotary_dim / 2 || found.iter().any(|x| !x.is_finite() || *x <= 0.0) {
        return Err(ModelError::config(name, format!("{} numbers", found.len()), expected));
    }
    Ok(found.into_iter().map(|x| x as f32).collect())
}

/// Cosines and sines of one kind of rotation.
#[derive(Debug)]
pub struct RopeTable {
    spec: RopeSpec,
    /// Frequencies that do not depend on the position: of short and of long sequences.
    fixed: [Vec<f32>; 2],
}

impl RopeTable {
    /// Computes what can be computed once.
    pub fn new(spec: &RopeSpec) -> Self {
        let fixed = [false, true].map(|long| spec.frequencies(0, long));
        Self { spec: spec.clone(), fixed }
    }

    /// Appends the cosines and sines (rotary_dim / 2 each) of one row. Angles are rounded to f32 before the
    /// cosine is taken, as the reference implementations do.
    pub fn append(&self, position: usize, long_context: bool, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        let own;
        let frequencies = match self.spec.scaling {
            RopeScaling::Dynamic { original, .. } if position >= original => {
                own = self.spec.frequencies(position, long_context);
                &own
            }
            _ => &self.fixed[usize::from(long_context)],
        };
        let factor = self.spec.attention_factor as f32;
        for frequency in frequencies {
            let angle = f64::from(frequency * position as f32);
            cos.push(angle.cos() as f32 * factor);
            sin.push(angle.sin() as f32 * factor);
        }
    }
}
