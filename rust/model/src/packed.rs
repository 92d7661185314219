//! Weights that a safetensors folder stores as packed integers: compressed-tensors, format "pack-quantized", has `x.weight_packed` (I32,
//! rows by columns * bits / 32), `x.weight_scale` (rows by groups) and `x.weight_shape` (I64, rows and columns).

use std::collections::HashMap;
use std::ops::Range;

use half::{bf16, f16};
use infer_formats::{TensorInfo, TensorType};
use infer_kernels::PackedFormat;

use crate::methods::{Bytes, Tensors, wrong};
use crate::{Config, ModelError};

/// Where the scales of a packed tensor lie, and how both read.
#[derive(Debug, Clone)]
pub(crate) struct Scales {
    pub file: usize,
    pub range: Range<usize>,
    tensor_type: TensorType,
    packed: PackedFormat,
}

/// A packed tensor's integers and scales.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// How the integers are packed.
    pub format: PackedFormat,
    tensor_type: TensorType,
    /// Bytes of the scales.
    pub scales: &'a [u8],
}

impl Scales {
    /// The name of the packed format.
    pub fn name(&self) -> &'static str {
        self.packed.format.name()
    }

    pub fn packed<'a>(&self, bytes: &'a [u8]) -> Packed<'a> {
        Packed { format: self.packed, tensor_type: self.tensor_type, scales: bytes }
    }
}

impl Packed<'_> {
    /// Whole blocks of the format, row after row; none where a scale has no exact half-precision number.
    pub fn blocks(&self, integers: &[u8]) -> Option<Vec<u8>> {
        let halves: Option<Vec<[u8; 2]>> = match self.tensor_type {
            TensorType::F16 => Some(self.scales.as_chunks().0.to_vec()),
            TensorType::Bf16 => {
                let numbers = self.scales.as_chunks().0.iter();
                numbers.map(|bytes| half(bf16::from_le_bytes(*bytes).to_f32())).collect()
            }
            _ => self.scales.as_chunks().0.iter().map(|bytes| half(f32::from_le_bytes(*bytes))).collect(),
        };
        let halves = halves?;
        let bytes = halves.len().checked_mul(self.format.group_bytes() + 2)?;
        let mut blocks = Vec::with_capacity(bytes);
        self.format.join(integers, &halves, &mut blocks);
        Some(blocks)
    }
}

/// The half-precision number that is this one.
fn half(number: f32) -> Option<[u8; 2]> {
    let half = f16::from_f32(number);
    (half.to_f32() == number).then(|| half.to_le_bytes())
}

pub(crate) fn check(config: &Config) -> Result<(), ModelError> {
    let Some(groups) = config.object("config_groups")? else {
        return wrong("config_groups", "missing", "an object");
    };
    for name in groups.names() {
        let Some(group) = groups.object(name)? else { continue };
        if group.find(&["input_activations"]).is_some() {
            let field = format!("config_groups.{name}.input_activations");
            return wrong(&field, "an object", "null: activations are rounded as this program sees fit");
        }
        let Some(weights) = group.object("weights")? else { continue };
        let kind = weights.text(&["type"])?.unwrap_or("int");
        let symmetric = weights.flag("symmetric")?.unwrap_or(true);
        if kind != "int" || !symmetric {
            let found = format!("type {kind}, symmetric {symmetric}");
            return wrong(&format!("config_groups.{name}.weights"), found, "type int, symmetric true");
        }
    }
    Ok(())
}

pub(crate) fn combine(
    tensors: &mut Tensors,
    bytes: Bytes<'_>,
) -> Result<HashMap<String, Scales>, ModelError> {
    let mut found = HashMap::new();
    let names: Vec<String> =
        tensors.keys().filter(|name| name.ends_with(".weight_packed")).cloned().collect();
    for name in names {
        let base = name.trim_end_matches("_packed");
        let mut part = |suffix: &str| {
            let name = format!("{base}_{suffix}");
            tensors.remove(&name).ok_or(ModelError::MissingTensor { name })
        };
        let ((file, info), (scale_file, scale), (shape_file, shape)) =
            (part("packed")?, part("scale")?, part("shape")?);
        let stated = bytes(shape_file, &shape).filter(|_| shape.tensor_type == TensorType::I64);
        let columns =
            stated.and_then(|bytes| bytes.as_chunks::<8>().0.get(1)).copied().map(i64::from_le_bytes);
        let columns = columns.and_then(|columns| usize::try_from(columns).ok()).unwrap_or(0);
        let packed = packed_format(&info, &scale, columns)?;
        let scales =
            Scales { file: scale_file, range: scale.range.clone(), tensor_type: scale.tensor_type, packed };
        let info = TensorInfo { name: base.to_owned(), shape: vec![info.shape[0], columns], ..info };
        if let Some((_, twice)) = tensors.insert(base.to_owned(), (file, info)) {
            let expected = "none, since it is stored in packed form too".to_owned();
            return Err(ModelError::Shape { name: base.to_owned(), found: twice.shape, expected });
        }
        found.insert(base.to_owned(), scales);
    }
    Ok(found)
}

/// The kind of packed integers that shapes make.
fn packed_format(info: &TensorInfo, scale: &TensorInfo, columns: usize) -> Result<PackedFormat, ModelError> {
    let floats = [TensorType::F16, TensorType::Bf16, TensorType::F32];
    if let ([rows, words], [scale_rows, groups]) = (&info.shape[..], &scale.shape[..])
        && rows == scale_rows
        && info.tensor_type == TensorType::I32
        && floats.contains(&scale.tensor_type)
    {
        let fits = |packed: &&PackedFormat| {
            groups.checked_mul(packed.group) == Some(columns)
                && groups.checked_mul(packed.group_bytes()) == words.checked_mul(4)
        };
        if let Some(packed) = PackedFormat::ALL.iter().find(fits) {
            return Ok(*packed);
        }
    }
    let kinds: Vec<String> = (PackedFormat::ALL.iter())
        .map(|packed| format!("{} bits in groups of {}", packed.bits, packed.group))
        .collect();
    let (integers, scales) = (info.tensor_type, scale.tensor_type);
    Err(ModelError::TensorType {
        name: info.name.clone(),
        found: format!(
            "{integers} {:?} with scales {scales} {:?} for {columns} columns",
            info.shape, scale.shape
        ),
        known: format!("I32 with F16, BF16 or F32 scales, {}", kinds.join(", ")),
    })
}
