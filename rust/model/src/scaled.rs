//! Weights that a safetensors folder stores as 8-bit floats (E4M3) with scales beside them, as `quantization_config` says: one scale for a
//! tensor, one for each row, or one for each block of rows and columns. A weight is the number times its scale.
//!
//! * compressed-tensors, formats "float-quantized" and "naive-quantized", and `fbgemm_fp8`: `x.weight` (F8_E4M3) and `x.weight_scale`.
//! * `fp8`: the same, or with `weight_block_size` `x.weight_scale_inv`, which is no inverse in spite of its name.
//!
//! Scales of activations, keys and values may stand there too and are left out: what is rounded beside weights is decided when a model
//! is loaded. Which weights are stored in this way is seen from the tensors; lists of modules that are not only say the same again.

use std::collections::HashMap;
use std::ops::Range;

use half::{bf16, f16};
use infer_formats::{TensorInfo, TensorType};
use infer_kernels::{Format, decode_e4m3, quantize};

use crate::methods::{Tensors, wrong};
use crate::{Config, ModelError};

/// Ends of names of scales that nobody needs.
const LEFT_OUT: &[&str] = &[
    ".input_scale",
    ".input_scale_ub",
    ".output_scale",
    ".activation_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
];

/// Columns that share a scale are a multiple of so many, where a row has more than one.
const GROUP_STEP: usize = 8;

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Grid {
    /// Neighbouring rows.
    rows: usize,
    /// Neighbouring columns; all of them where there are no more.
    columns: usize,
    /// Scales of a row.
    across: usize,
}

/// Where the scales of a tensor lie, and how they read.
#[derive(Debug, Clone)]
pub(crate) struct Scales {
    pub file: usize,
    pub range: Range<usize>,
    tensor_type: TensorType,
    grid: Grid,
}

impl Scales {
    pub fn scaled<'a>(&self, bytes: &'a [u8]) -> Scaled<'a> {
        Scaled { grid: self.grid, tensor_type: self.tensor_type, scales: bytes }
    }
}

/// The scales of a tensor of 8-bit floats.
#[derive(Debug, Clone, Copy)]
pub struct Scaled<'a> {
    grid: Grid,
    tensor_type: TensorType,
    /// Bytes of the scales.
    pub scales: &'a [u8],
}

impl Scaled<'_> {
    /// How many neighbouring columns of a row share a scale; none where all do.
    pub fn group(&self) -> Option<usize> {
        (self.grid.across > 1).then_some(self.grid.columns)
    }

    /// The scales of a row: one, or one for each group of columns.
    pub fn row(&self, row: usize) -> impl Iterator<Item = f32> {
        let first = row / self.grid.rows * self.grid.across;
        (first..first + self.grid.across).map(|index| self.scale(index))
    }

    /// A row's weights: the numbers, in f32, times their scales, rounded to f32.
    pub fn decode(&self, row: usize, codes: &[u8], out: &mut [f32]) {
        let groups = codes.chunks(self.grid.columns).zip(out.chunks_mut(self.grid.columns));
        for ((codes, out), scale) in groups.zip(self.row(row)) {
            codes.iter().zip(out).for_each(|(code, out)| *out = decode_e4m3(*code) * scale);
        }
    }

    /// Appends a row's weights in a format of floats.
    pub fn append(&self, row: usize, codes: &[u8], format: Format, out: &mut Vec<u8>) {
        let mut values = vec![0.0; codes.len()];
        self.decode(row, codes, &mut values);
        quantize(format, &values, out);
    }

    fn scale(&self, index: usize) -> f32 {
        match self.tensor_type {
            TensorType::F16 => f16::from_le_bytes(self.scales.as_chunks().0[index]).to_f32(),
            TensorType::Bf16 => bf16::from_le_bytes(self.scales.as_chunks().0[index]).to_f32(),
            _ => f32::from_le_bytes(self.scales.as_chunks().0[index]),
        }
    }
}

/// Of the methods `fp8` and `fbgemm_fp8`.
pub(crate) fn check_fp8(config: &Config) -> Result<(), ModelError> {
    let format = config.text(&["fmt"])?.unwrap_or("e4m3");
    if !format.to_ascii_lowercase().contains("e4m3") {
        return wrong("fmt", format, "e4m3");
    }
    block(config)?;
    check_names(config)
}

/// Of compressed-tensors.
pub(crate) fn check_compressed(config: &Config) -> Result<(), ModelError> {
    let Some(groups) = config.object("config_groups")? else {
        return wrong("config_groups", "missing", "an object");
    };
    for name in groups.names() {
        let Some(group) = groups.object(name)? else { continue };
        let Some(weights) = group.object("weights")? else { continue };
        let kind = weights.text(&["type"])?.unwrap_or("int");
        let bits = weights.count(&["num_bits"], 64)?.unwrap_or(8);
        let symmetric = weights.flag("symmetric")?.unwrap_or(true);
        if (kind, bits, symmetric) != ("float", 8, true) {
            let found = format!("type {kind}, num_bits {bits}, symmetric {symmetric}");
            let expected = "type float, num_bits 8, symmetric true";
            return wrong(&format!("config_groups.{name}.weights"), found, expected);
        }
        let strategy = weights.text(&["strategy"])?.unwrap_or("tensor");
        if !["tensor", "channel", "block"].contains(&strategy) {
            return wrong(
                &format!("config_groups.{name}.weights.strategy"),
                strategy,
                "tensor, channel or block",
            );
        }
    }
    block(config)?;
    check_names(config)
}

/// Lists of modules that are stored as usual are lists of names.
fn check_names(config: &Config) -> Result<(), ModelError> {
    for name in ["ignore", "ignored_layers", "modules_to_not_convert"] {
        config.texts(name)?;
    }
    Ok(())
}

/// Rows and columns of a block that shares a scale, if there is such.
fn block(config: &Config) -> Result<Option<[usize; 2]>, ModelError> {
    let mut found = config.numbers("weight_block_size")?.map(|sizes| ("weight_block_size".to_owned(), sizes));
    if let Some(groups) = config.object("config_groups")? {
        for name in groups.names() {
            let weights = groups.object(name)?.map(|group| group.object("weights")).transpose()?.flatten();
            let sizes = weights.map(|weights| weights.numbers("block_structure")).transpose()?.flatten();
            let field = format!("config_groups.{name}.weights.block_structure");
            found = found.or(sizes.map(|sizes| (field, sizes)));
        }
    }
    let Some((field, sizes)) = found else { return Ok(None) };
    let whole = |size: f64| size.fract() == 0.0 && (1.0..=65536.0).contains(&size);
    match sizes[..] {
        [rows, columns] if whole(rows) && whole(columns) && (columns as usize).is_multiple_of(GROUP_STEP) => {
            Ok(Some([rows as usize, columns as usize]))
        }
        _ => {
            wrong(&field, format!("{sizes:?}"), "two numbers of rows and columns, the second a multiple of 8")
        }
    }
}

/// Takes the scales of all weights of 8-bit floats from the tensors, and those that nobody needs.
pub(crate) fn combine(config: &Config, tensors: &mut Tensors) -> Result<HashMap<String, Scales>, ModelError> {
    let block = block(config)?;
    let is_scaled = |info: &TensorInfo| info.tensor_type == TensorType::F8E4M3;
    let names: Vec<String> =
        (tensors.iter()).filter(|(_, (_, info))| is_scaled(info)).map(|(name, _)| name.clone()).collect();
    let mut found = HashMap::new();
    for name in names {
        let missing = format!("{name}_scale");
        let scale = tensors.remove(&missing).or_else(|| tensors.remove(&format!("{missing}_inv")));
        let (file, scale) = scale.ok_or(ModelError::MissingTensor { name: missing })?;
        let info = &tensors[&name].1;
        let grid = grid(info, &scale, block)?;
        found.insert(name, Scales { file, range: scale.range, tensor_type: scale.tensor_type, grid });
    }
    tensors.retain(|name, _| !LEFT_OUT.iter().any(|end| name.ends_with(end)));
    Ok(found)
}

/// Which weights share a scale, by the shapes of both.
fn grid(info: &TensorInfo, scale: &TensorInfo, block: Option<[usize; 2]>) -> Result<Grid, ModelError> {
    let floats = [TensorType::F16, TensorType::Bf16, TensorType::F32];
    if let [rows, columns] = info.shape[..]
        && rows > 0
        && columns > 0
        && floats.contains(&scale.tensor_type)
    {
        if let Some([height, width]) = block
            && scale.shape == [rows.div_ceil(height), columns.div_ceil(width)]
        {
            let across = columns.div_ceil(width);
            return Ok(Grid { rows: height, columns: if across > 1 { width } else { columns }, across });
        }
        if scale.shape.iter().all(|size| *size == 1) {
            return Ok(Grid { rows, columns, across: 1 });
        }
        if scale.shape == [rows] || scale.shape == [rows, 1] {
            return Ok(Grid { rows: 1, columns, across: 1 });
        }
    }
    let blocks = block.map(|[rows, columns]| format!(", or for blocks of {rows} rows and {columns} columns"));
    Err(ModelError::TensorType {
        name: info.name.clone(),
        found: format!(
            "{} {:?} with scales {} {:?}",
            info.tensor_type, info.shape, scale.tensor_type, scale.shape
        ),
        known: format!(
            "F8_E4M3 of two dimensions with F32, BF16 or F16 scales for the tensor, for each row{}",
            blocks.unwrap_or_default()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_grid_finds_the_scale_of_a_weight() {
        let scales: Vec<u8> = (0..6).flat_map(|index| (index as f32 + 1.0).to_le_bytes()).collect();
        let scaled = |rows, columns, across| Scaled {
            grid: Grid { rows, columns, across },
            tensor_type: TensorType::F32,
            scales: &scales,
        };
        let one = [0x38, 0xb8, 0x38, 0x38, 0x40]; // 1, -1, 1, 1, 2
        let decoded = |scaled: Scaled<'_>, row| {
            let mut out = [0.0; 5];
            scaled.decode(row, &one, &mut out);
            out
        };
        assert_eq!(decoded(scaled(9, 5, 1), 8), [1.0, -1.0, 1.0, 1.0, 2.0]);
        assert_eq!(decoded(scaled(1, 5, 1), 3), [4.0, -4.0, 4.0, 4.0, 8.0]);
        assert_eq!(decoded(scaled(2, 2, 3), 1), [1.0, -1.0, 2.0, 2.0, 6.0]);
        assert_eq!(decoded(scaled(2, 2, 3), 2), [4.0, -4.0, 5.0, 5.0, 12.0]);
        assert_eq!((scaled(2, 2, 3).group(), scaled(1, 5, 1).group()), (Some(2), None));
    }
}
