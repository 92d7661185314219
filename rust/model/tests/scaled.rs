//! Folders of 8-bit floats with scales: what is computed is what their numbers times their scales give, bit for bit.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::models::{experts, llama};
use common::{exact, logits};
use half::bf16;
use infer_formats::{Safetensors, SafetensorsWriter, TensorType};
use infer_kernels::{KvElement, Precision, decode_e4m3};
use infer_model::{Blueprint, Checkpoint, CpuModel, KvTypes, LoadOptions, ModelError, PlainType, RowForm};
use serde_json::{Value, json};

/// Type, shape and bytes of each tensor.
type Tensors = BTreeMap<String, (TensorType, Vec<usize>, Vec<u8>)>;

fn read(folder: &Path) -> Tensors {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let parsed = Safetensors::parse(&bytes).unwrap();
    let entry = |info: infer_formats::TensorInfo| {
        (info.name, (info.tensor_type, info.shape, bytes[info.range].to_vec()))
    };
    parsed.tensors.into_iter().map(entry).collect()
}

fn write(folder: &Path, source: &Path, quantization: Option<&Value>, tensors: &Tensors) {
    std::fs::create_dir_all(folder).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization.clone();
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut writer = SafetensorsWriter::new();
    for (name, (kind, shape, _)) in tensors {
        writer.declare(name, *kind, shape).unwrap();
    }
    let mut file = std::fs::File::create(folder.join("model.safetensors")).unwrap();
    writer.write_with(&mut file, |name: &str| Ok::<_, std::io::Error>(tensors[name].2.clone())).unwrap();
}

fn nearest(value: f32) -> u8 {
    let distance = |code: &u8| (decode_e4m3(*code) - value.abs()).abs();
    let code = (0..0x7f).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap();
    code | u8::from(value < 0.0) << 7
}

/// How many neighbouring rows and columns share a scale, and how scales are stored.
struct Way {
    name: &'static str,
    block: fn(usize, usize) -> [usize; 2],
    suffix: &'static str,
    /// Type and shape of scales that are so many down and across.
    scale: fn(usize, usize) -> (TensorType, Vec<usize>),
    config: fn() -> Value,
}

fn compressed(strategy: &str, structure: &Value) -> Value {
    let activations = json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true});
    json!({"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*layers.1.mlp.*"],
        "kv_cache_scheme": null, "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": activations,
        "weights": {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true, "dynamic": false,
        "block_structure": structure}}}})
}

const WAYS: &[Way] = &[
    Way {
        name: "tensor",
        block: |rows, columns| [rows, columns],
        suffix: "_scale",
        scale: |_, _| (TensorType::F32, vec![]),
        config: || json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}),
    },
    Way {
        name: "channel",
        block: |_, columns| [1, columns],
        suffix: "_scale",
        scale: |down, _| (TensorType::Bf16, vec![down, 1]),
        config: || compressed("channel", &Value::Null),
    },
    Way {
        name: "fbgemm",
        block: |_, columns| [1, columns],
        suffix: "_scale",
        scale: |down, _| (TensorType::F32, vec![down]),
        config: || json!({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}),
    },
    Way {
        name: "block",
        block: |_, _| [128, 128],
        suffix: "_scale_inv",
        scale: |down, across| (TensorType::F32, vec![down, across]),
        config: || {
            json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                   "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]})
        },
    },
    Way {
        name: "uneven",
        block: |_, _| [48, 40],
        suffix: "_scale",
        scale: |down, across| (TensorType::Bf16, vec![down, across]),
        config: || compressed("block", &json!([48, 40])),
    },
];

/// Rounds all matrices of layers but one; returns the folder's tensors and what their weights are, in f32.
fn rounded(plain: &Tensors, way: &Way) -> (Tensors, Tensors) {
    let (mut scaled, mut exact) = (Tensors::new(), Tensors::new());
    for (name, (kind, shape, bytes)) in plain {
        let values: Vec<f32> =
            bytes.as_chunks().0.iter().map(|two| bf16::from_le_bytes(*two).to_f32()).collect();
        let is_rounded =
            name.contains("_proj") && shape.len() == 2 && !name.contains("layers.1.mlp.down_proj");
        let (&[rows, columns], true) = (&shape[..], is_rounded) else {
            scaled.insert(name.clone(), (*kind, shape.clone(), bytes.clone()));
            let floats = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            exact.insert(name.clone(), (TensorType::F32, shape.clone(), floats));
            continue;
        };
        let [height, width] = (way.block)(rows, columns);
        let (down, across) = (rows.div_ceil(height), columns.div_ceil(width));
        let mut greatest = vec![0.0_f32; down * across];
        let place = |index: usize| index / columns / height * across + index % columns / width;
        for (index, value) in values.iter().enumerate() {
            greatest[place(index)] = greatest[place(index)].max(value.abs());
        }
        let (kind, scale_shape) = (way.scale)(down, across);
        let scales: Vec<f32> = greatest
            .iter()
            .map(|most| match kind {
                TensorType::Bf16 => bf16::from_f32(most / 448.0).to_f32(),
                _ => most / 448.0,
            })
            .collect();
        let codes: Vec<u8> =
            values.iter().enumerate().map(|(at, value)| nearest(value / scales[place(at)])).collect();
        let weights = codes.iter().enumerate().map(|(at, code)| decode_e4m3(*code) * scales[place(at)]);
        exact.insert(
            name.clone(),
            (TensorType::F32, shape.clone(), weights.flat_map(f32::to_le_bytes).collect()),
        );
        scaled.insert(name.clone(), (TensorType::F8E4M3, shape.clone(), codes));
        let stored = scales.iter().flat_map(|scale| match kind {
            TensorType::Bf16 => bf16::from_f32(*scale).to_le_bytes().to_vec(),
            _ => scale.to_le_bytes().to_vec(),
        });
        scaled.insert(format!("{name}{}", way.suffix), (kind, scale_shape, stored.collect()));
        let other = name.replace(".weight", ".input_scale");
        scaled.insert(other, (TensorType::F32, vec![], 1.0_f32.to_le_bytes().to_vec()));
    }
    (scaled, exact)
}

fn halved(exact: &Tensors) -> Tensors {
    let half = |bytes: &[u8]| {
        let values = bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four));
        values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
    };
    exact
        .iter()
        .map(|(name, (_, shape, bytes))| (name.clone(), (TensorType::Bf16, shape.clone(), half(bytes))))
        .collect()
}

fn computed(path: &Path, options: &LoadOptions) -> Vec<u32> {
    let mut model =
        CpuModel::load(path, options).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let tokens: Vec<u32> = (0..40).map(|at| (at * 29 + at * at % 7) % 80).collect();
    logits(&mut model, &tokens, 17, false).iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn every_way_of_scaling_is_what_its_numbers_are() {
    let folder = tempfile::tempdir().unwrap();
    let sources = [folder.path().join("llama"), folder.path().join("experts")];
    llama(&sources[0], false);
    experts(&sources[1]);
    for source in &sources {
        let plain = read(source);
        for way in WAYS {
            let (scaled, floats) = rounded(&plain, way);
            let path = |kind: &str| source.with_extension(format!("{}-{kind}", way.name));
            write(&path("scaled"), source, Some(&(way.config)()), &scaled);
            write(&path("f32"), source, None, &floats);
            write(&path("bf16"), source, None, &halved(&floats));
            let whole = exact(2);
            let rough = LoadOptions { precision: Precision::Auto, ..exact(2) };
            assert!(computed(&path("scaled"), &whole) == computed(&path("f32"), &whole), "{}", way.name);
            assert!(computed(&path("scaled"), &rough) == computed(&path("bf16"), &rough), "{}", way.name);
            assert!(
                computed(&path("scaled"), &whole) != computed(source, &whole),
                "{} rounds nothing",
                way.name
            );
            let cached = LoadOptions { packed_cache_dir: Some(folder.path().join("cache")), ..whole.clone() };
            for _ in 0..2 {
                assert!(computed(&path("scaled"), &cached) == computed(&path("f32"), &whole), "{}", way.name);
            }
            let opened = Checkpoint::open(&path("scaled"), true).unwrap();
            assert_eq!((opened.storage(), opened.is_quantized()), ("F8_E4M3", true));
        }
    }
}

#[test]
fn a_backend_gets_numbers_and_scales() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("llama");
    llama(&source, false);
    let plain = read(&source);
    for way in WAYS {
        let (scaled, floats) = rounded(&plain, way);
        let path = |kind: &str| source.with_extension(format!("{}-{kind}", way.name));
        write(&path("scaled"), &source, Some(&(way.config)()), &scaled);
        write(&path("f32"), &source, None, &floats);
        let open = |kind: &str| {
            let types = KvTypes::all(KvElement::F32);
            let checkpoint = Checkpoint::open(&path(kind), true).unwrap();
            Blueprint::new(checkpoint, types, PlainType::F32, None, "test").unwrap()
        };
        let (own, other) = (open("scaled"), open("f32"));
        let mut groups = 0;
        for matrix in 0..own.program().matrices.len() {
            let (rows, columns) = own.matrix_shape(matrix);
            let read = |model: &Blueprint| {
                let mut bytes = vec![0; rows * columns * 4];
                model.read_matrix(matrix, 0, 2, RowForm::Plain(PlainType::F32), &mut bytes).unwrap();
                bytes
            };
            let formats = own.matrix_formats(matrix).unwrap();
            let whole = read(&own);
            assert_eq!(whole.len(), rows * columns * 4);
            if own.program().matrices == other.program().matrices {
                assert!(whole == read(&other), "{} matrix {matrix}", way.name);
            }
            let Some(group) = formats.first().and_then(|part| part.group) else { continue };
            assert!(formats.iter().all(|part| part.group == Some(group)), "merged where scaled alike");
            groups += 1;
            // Rows from one on, without scales, and scales by themselves.
            let mut codes = vec![0; (rows - 1) * columns];
            own.read_matrix(matrix, 1, 2, RowForm::Stored, &mut codes).unwrap();
            let scales = own.matrix_scales(matrix).unwrap();
            let across = columns.div_ceil(group);
            assert_eq!(scales.len(), rows * across);
            for (at, code) in codes.iter().enumerate() {
                let (row, column) = (at / columns + 1, at % columns);
                let value = decode_e4m3(*code) * scales[row * across + column / group];
                let bytes = &whole[(row * columns + column) * 4..][..4];
                assert_eq!(bytes, value.to_le_bytes(), "{} matrix {matrix} row {row}", way.name);
            }
        }
        assert!(groups >= 7, "{}: {groups} matrices in 8 bits", way.name);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("llama");
    llama(&source, false);
    let block = &WAYS[3];
    let (scaled, _) = rounded(&read(&source), block);
    let told = |change: &dyn Fn(&mut Value, &mut Tensors), words: &[&str]| {
        let (mut config, mut tensors) = ((block.config)(), scaled.clone());
        change(&mut config, &mut tensors);
        let path = folder.path().join("changed");
        write(&path, &source, Some(&config), &tensors);
        let error: ModelError = CpuModel::load(&path, &exact(1)).map(|_| ()).unwrap_err();
        let message = error.to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    let scale = "model.layers.0.mlp.up_proj.weight_scale_inv";
    told(&|_, tensors| drop(tensors.remove(scale)), &["layers.0.mlp.up_proj.weight_scale"]);
    told(&|config, _| config["weight_block_size"] = json!([64, 128]), &["scales F32 [", "64 rows"]);
    told(
        &|config, _| config["weight_block_size"] = json!([128, 100]),
        &["weight_block_size", "multiple of 8"],
    );
    told(&|config, _| config["fmt"] = json!("e5m2"), &["quantization_config.fmt", "e5m2", "e4m3"]);
    told(&|config, _| config["quant_method"] = json!("modelopt"), &["quant_method", "modelopt", "`fp8`"]);
    told(&|config, _| config["modules_to_not_convert"] = json!(7), &["modules_to_not_convert"]);
    told(
        &|config, _| {
            *config = compressed("channel", &Value::Null);
            config["config_groups"]["group_0"]["weights"]["num_bits"] = json!(4);
        },
        &["config_groups.group_0.weights", "num_bits 4", "num_bits 8"],
    );
    told(
        &|config, _| *config = compressed("group", &Value::Null),
        &["weights.strategy", "group", "tensor, channel or block"],
    );
    told(
        &|config, _| {
            *config = compressed("channel", &Value::Null);
            config["format"] = json!("nvfp4-pack-quantized");
        },
        &["quantization_config.format", "nvfp4-pack-quantized", "`float-quantized`"],
    );
}
