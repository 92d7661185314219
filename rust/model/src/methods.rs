//! Methods by which a safetensors folder stores quantized weights, as `quantization_config` in `config.json` says. One row per method:
//! what it may say, and which tensors stand together for one weight. To the rest of this room they are one tensor.

use std::collections::HashMap;

use infer_formats::TensorInfo;

use crate::{Config, ModelError, packed, scaled};

/// A file's number and a tensor of it, by name.
pub(crate) type Tensors = HashMap<String, (usize, TensorInfo)>;

/// What a tensor of a file holds.
pub(crate) type Bytes<'a> = &'a dyn Fn(usize, &TensorInfo) -> Option<&'a [u8]>;

/// The scales of tensors that have some, by name.
#[derive(Debug, Default)]
pub(crate) struct AllScales {
    /// Of packed integers.
    pub packed: HashMap<String, packed::Scales>,
    /// Of 8-bit floats.
    pub scaled: HashMap<String, scaled::Scales>,
}

/// A method of `quantization_config`.
pub(crate) struct Method {
    /// `quant_method`.
    name: &'static str,
    /// `format`, where there is one.
    formats: &'static [&'static str],
    /// Refuses what we cannot compute.
    check: fn(&Config) -> Result<(), ModelError>,
    /// Puts the tensors together that stand for one weight: `Tensors` then has the weight by its usual name, and the result its
    /// scales. Refuses tensors that are missing or do not fit each other, and numbers of a kind that we do not compute.
    combine: fn(&Config, &mut Tensors, Bytes<'_>) -> Result<AllScales, ModelError>,
}

const METHODS: &[Method] = &[
    Method {
        name: "compressed-tensors",
        formats: &["pack-quantized"],
        check: packed::check,
        combine: |_, tensors, bytes| {
            Ok(AllScales { packed: packed::combine(tensors, bytes)?, ..AllScales::default() })
        },
    },
    Method {
        name: "compressed-tensors",
        formats: &["float-quantized", "naive-quantized"],
        check: scaled::check_compressed,
        combine: combine_scaled,
    },
    Method { name: "fp8", formats: &[], check: scaled::check_fp8, combine: combine_scaled },
    Method { name: "fbgemm_fp8", formats: &[], check: scaled::check_fp8, combine: combine_scaled },
];

fn combine_scaled(
    config: &Config,
    tensors: &mut Tensors,
    _bytes: Bytes<'_>,
) -> Result<AllScales, ModelError> {
    Ok(AllScales { scaled: scaled::combine(config, tensors)?, ..AllScales::default() })
}

/// How a folder's weights are stored, if `config.json` says that they are quantized.
pub(crate) struct Stored {
    method: &'static Method,
    config: Config,
}

impl Stored {
    /// # Errors
    /// A method, or details of one, that we do not read.
    pub fn read(config: &Config) -> Result<Option<Stored>, ModelError> {
        let Some(config) = config.object("quantization_config")? else { return Ok(None) };
        let name = config.text(&["quant_method"])?.unwrap_or("unnamed");
        let of_name: Vec<_> = METHODS.iter().filter(|method| method.name == name).collect();
        if of_name.is_empty() {
            let mut known: Vec<_> = METHODS.iter().map(|method| format!("`{}`", method.name)).collect();
            known.dedup();
            let expected =
                format!("{}, a checkpoint that is not quantized, or a quantized GGUF file", known.join(", "));
            return wrong("quant_method", name, &expected);
        }
        let format = config.text(&["format"])?.unwrap_or("missing");
        let fits = |method: &&&Method| method.formats.is_empty() || method.formats.contains(&format);
        let Some(&method) = of_name.iter().find(fits) else {
            let formats = of_name.iter().flat_map(|method| method.formats);
            let known: Vec<_> = formats.map(|format| format!("`{format}`")).collect();
            return wrong("format", format, &known.join(", "));
        };
        (method.check)(&config)?;
        Ok(Some(Stored { method, config }))
    }

    /// See [`Method::combine`].
    pub fn combine(&self, tensors: &mut Tensors, bytes: Bytes<'_>) -> Result<AllScales, ModelError> {
        (self.method.combine)(&self.config, tensors, bytes)
    }
}

/// A field of `quantization_config` that says something else than we read.
pub(crate) fn wrong<T>(field: &str, value: impl ToString, expected: &str) -> Result<T, ModelError> {
    Err(ModelError::config(&format!("quantization_config.{field}"), value, expected))
}
