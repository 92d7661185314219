//! Ways of rounding a model's weights: one row each. What a row says holds alike for a model that is rounded while it is loaded, and
//! for files that are written.
//!
//! Kept as they are: norms, biases, learned positions, and the routers of experts, which choose rather than add up and are small. The
//! embedding and the output head get more bits than the rest: they are the first and the last thing that each token meets. But the head
//! is read for every token, so that 16 bits would cost more time than all else of a small model, and beside matrices of 4 bits even 8
//! are much: Q6_K, as `llama-quantize` chooses, is 8 % less that a Llama of 1.2 billion weights reads for a token. An executor outside rounds
//! them to Q8_0 all the same: our GPU kernels take longer with Q6_K (a head of 128,256 x 4,096 on an H200: 178 us, and 137 with Q8_0).

use infer_kernels::Format;

use crate::ModelError;
use crate::step::Role;

/// A way of rounding.
#[derive(Debug, PartialEq, Eq)]
pub struct Quantization {
    /// What users call it; the first name is the one that we print, the others are GGUF's.
    pub names: &'static [&'static str],
    /// Of every matrix that is multiplied.
    pub matrices: Format,
    /// Of the embedding and the output head; Q8_0 instead where rows are no multiple of its blocks.
    pub ends: Format,
    /// `general.file_type` of a GGUF file; none where GGUF has no such type.
    pub file_type: Option<u32>,
}

/// Of embedding and head where a quantization's own does not do: rows are no whole blocks, or an executor outside computes.
pub(crate) const PLAIN_ENDS: Format = Format::Q8_0;

/// All of them.
pub const QUANTIZATIONS: &[Quantization] = &[
    Quantization { names: &["int8", "Q8_0"], matrices: Format::Q8_0, ends: Format::Q8_0, file_type: Some(7) },
    Quantization { names: &["int4", "Q4_0"], matrices: Format::Q4_0, ends: Format::Q6_K, file_type: Some(2) },
    Quantization { names: &["int4-g128"], matrices: Format::INT4_G128, ends: Format::Q6_K, file_type: None },
];

impl Quantization {
    /// The row of a name, whatever its case.
    ///
    /// # Errors
    /// There is none; the message lists them.
    pub fn from_name(name: &str) -> Result<&'static Quantization, ModelError> {
        let named = |row: &&Quantization| row.names.iter().any(|own| own.eq_ignore_ascii_case(name));
        QUANTIZATIONS.iter().find(named).ok_or_else(|| {
            ModelError::Quantization(format!(
                "quantization must be one of {}, got {:?}",
                known(),
                infer_formats::shortened(name)
            ))
        })
    }

    /// What we call it.
    pub fn name(&self) -> &'static str {
        self.names[0]
    }

    /// The format of the embedding and the output head, in rows of so many columns.
    pub(crate) fn ends_of(&self, columns: usize) -> Format {
        if self.ends.row_bytes(columns).is_some() { self.ends } else { PLAIN_ENDS }
    }

    /// The format of a role's weights, if those of embedding and head are `ends`; none for those that are kept as they are.
    pub(crate) fn format(&self, role: Role, ends: Format) -> Option<Format> {
        match role {
            Role::Embedding | Role::Head => Some(ends),
            Role::Query
            | Role::Key
            | Role::Value
            | Role::Output
            | Role::Gate
            | Role::Up
            | Role::Down
            | Role::ExpertGate
            | Role::ExpertUp
            | Role::ExpertDown
            | Role::SharedGate
            | Role::SharedUp
            | Role::SharedDown => Some(self.matrices),
            Role::Position
            | Role::FinalNorm
            | Role::AttentionNorm
            | Role::AttentionPostNorm
            | Role::FeedForwardNorm
            | Role::FeedForwardPostNorm
            | Role::QueryNorm
            | Role::KeyNorm
            | Role::Router
            | Role::SharedRouter => None,
        }
    }
}

/// The names, for messages.
fn known() -> String {
    let quoted = |row: &Quantization| {
        row.names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" or ")
    };
    QUANTIZATIONS.iter().map(quoted).collect::<Vec<_>>().join(", ")
}

/// A tensor that cannot be rounded.
pub(crate) fn unsuitable(name: &str, shape: &[usize], format: Format) -> ModelError {
    let block = format.block_len();
    let instead = if block > 32 { "; \"int4\" and \"int8\" have groups of 32" } else { "" };
    ModelError::Quantization(format!(
        "quantization: tensor `{name}` has shape {shape:?}, and groups of {block} weights need rows of a multiple of {block}{instead}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_any_case_and_unknown_ones_refused() {
        for row in QUANTIZATIONS {
            for name in row.names {
                assert_eq!(Quantization::from_name(name).unwrap(), row);
                assert_eq!(Quantization::from_name(&name.to_lowercase()).unwrap(), row);
            }
        }
        let message = Quantization::from_name("int3").unwrap_err().to_string();
        assert!(message.contains("\"int4\" or \"Q4_0\"") && message.contains("\"int3\""), "{message}");
    }
}
