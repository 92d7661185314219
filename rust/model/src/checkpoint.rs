//! A checkpoint on disk, opened and checked: which tensors there are, where their bytes lie, and the configuration.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use infer_formats::{
    Container, FormatError, Gguf, Metadata, Safetensors, TensorInfo, check_splits, shortened,
};

use crate::file_bytes::FileBytes;
use crate::folder::{files_with_extension, in_file, not_a_model, safetensors_files};
use crate::methods::{AllScales, Stored};
use crate::names::{self, Names};
use crate::packed::Packed;
use crate::scaled::Scaled;
use crate::{Config, ModelError, ModelSpec, Program, Quantization, arch, dummy, gguf};

/// A tensor of a checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Name, type, shape.
    pub info: &'a TensorInfo,
    /// Its bytes; where it is packed, those of its integers.
    pub bytes: &'a [u8],
    /// Scales, where it is packed.
    pub packed: Option<Packed<'a>>,
    /// Scales, where it holds 8-bit floats that have some.
    pub scaled: Option<Scaled<'a>>,
}

impl<'a> Tensor<'a> {
    /// One that has no scales.
    pub(crate) fn plain(info: &'a TensorInfo, bytes: &'a [u8]) -> Self {
        Self { info, bytes, packed: None, scaled: None }
    }
}

/// The field of `config.json` that says how a folder that we wrote was rounded: its embedding and head are whole in it, and are
/// rounded while they are loaded.
pub(crate) const QUANTIZATION_FIELD: &str = "infer_quantization";

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    /// What the model is.
    pub spec: ModelSpec,
    /// Metadata, for GGUF: the vocabulary and chat template are inside.
    pub metadata: Option<Metadata>,
    /// How its tensors are called.
    pub(crate) names: &'static Names,
    path: PathBuf,
    files: Vec<FileBytes>,
    tensors: HashMap<String, (usize, TensorInfo)>,
    scales: AllScales,
    /// How what is not packed is to be rounded.
    pub(crate) quantization: Option<&'static Quantization>,
    /// Weights are random, from this seed, and no file is read for them.
    pub(crate) dummy: Option<u64>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and safetensors files, a `.gguf` file, or a folder with one `.gguf` model.
    ///
    /// # Errors
    /// Whatever is wrong with the files: missing, malformed, an unknown architecture, values that cannot be right.
    pub fn open(path: &Path, mmap: bool) -> Result<Self, ModelError> {
        Self::open_any(path, mmap).map_err(|error| error.at(path))
    }

    fn open_any(path: &Path, mmap: bool) -> Result<Self, ModelError> {
        let kind = fs::metadata(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        if kind.is_file() {
            return match path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
                true => Self::open_gguf(path, mmap),
                false => Err(not_a_model(
                    path,
                    "a file must be a .gguf; a safetensors model is given as its folder",
                )),
            };
        }
        if !kind.is_dir() {
            return Err(not_a_model(path, "it is neither a regular file nor a folder"));
        }
        let found = files_with_extension(path, "gguf")?;
        // Some folders keep the configuration beside a GGUF file that was made from it; that file needs no other.
        let only_gguf = !found.is_empty() && files_with_extension(path, "safetensors")?.is_empty();
        if path.join("config.json").is_file() && !only_gguf {
            return Self::open_folder(path, mmap);
        }
        let first = |file: &&PathBuf| {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            !name.contains("-of-") || name.contains("-00001-of-")
        };
        match found.iter().filter(first).collect::<Vec<_>>()[..] {
            [single] => Self::open_gguf(single, mmap),
            [] => Err(not_a_model(path, "the folder has neither config.json nor a .gguf file")),
            _ => Err(not_a_model(path, "the folder has several .gguf models; name one of the files")),
        }
    }

    /// Opens the configuration of a folder alone: weights are random, those of a seed.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; a path that is no folder with a `config.json`.
    pub fn open_dummy(path: &Path, seed: u64) -> Result<Self, ModelError> {
        if !path.join("config.json").is_file() {
            return Err(not_a_model(path, "load_format \"dummy\" needs a folder with config.json"));
        }
        Self::open_config(path, Some(seed)).map(|(checkpoint, _)| checkpoint)
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks a tensor up by its name in the file.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (file, info) = self.tensors.get(name)?;
        let bytes = self.files[*file].bytes().get(info.range.clone())?;
        let bytes_of = |file: usize, range: &Range<usize>| self.files[file].bytes().get(range.clone());
        let packed = match self.scales.packed.get(name) {
            Some(scales) => Some(scales.packed(bytes_of(scales.file, &scales.range)?)),
            None => None,
        };
        let scaled = match self.scales.scaled.get(name) {
            Some(scales) => Some(scales.scaled(bytes_of(scales.file, &scales.range)?)),
            None => None,
        };
        Some(Tensor { info, bytes, packed, scaled })
    }

    /// Where each tensor lies: file, first byte, name.
    pub(crate) fn places(&self) -> impl Iterator<Item = (usize, usize, String)> {
        self.tensors.iter().map(|(name, (file, info))| (*file, info.range.start, name.clone()))
    }

    /// The configuration of a folder.
    pub(crate) fn config(&self) -> Result<Config, ModelError> {
        Config::read(&self.path.join("config.json"))
    }

    /// The storage type of most of its bytes, or what we call the way it was rounded.
    pub fn storage(&self) -> &'static str {
        let mut bytes_of = BTreeMap::<&str, usize>::new();
        for (name, (_, info)) in &self.tensors {
            let kind = self.scales.packed.get(name).map_or(info.tensor_type.name(), |scales| scales.name());
            *bytes_of.entry(kind).or_default() += info.range.len();
        }
        if self.dummy.is_some() {
            bytes_of.insert(dummy::FORMAT.name(), 1);
        }
        let most = bytes_of.into_iter().max_by_key(|(_, bytes)| *bytes);
        self.quantization.map_or(most.map_or("none", |(name, _)| name), Quantization::name)
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        let stored: u64 = self.tensors().map(|info| info.elements() as u64).sum();
        if self.dummy.is_some() { Program::new(&self.spec).weights(&self.spec) } else { stored }
    }

    /// Bytes of all weights in the files, or of random ones.
    pub fn weight_bytes(&self) -> u64 {
        if self.dummy.is_some() {
            return self.parameters() * dummy::FORMAT.block_bytes() as u64;
        }
        let packed = self.scales.packed.values().map(|scales| scales.range.len() as u64);
        let scaled = self.scales.scaled.values().map(|scales| scales.range.len() as u64);
        packed.chain(scaled).chain(self.tensors().map(|info| info.range.len() as u64)).sum()
    }

    /// Are weights integers or 8-bit floats already?
    pub fn is_quantized(&self) -> bool {
        !self.scales.packed.is_empty()
            || !self.scales.scaled.is_empty()
            || self.tensors().any(|info| info.tensor_type.block_len() > 1)
    }

    /// Says that these bytes of some tensor were read for the last time, most likely: a model is then never in memory twice.
    pub(crate) fn release(&self, bytes: &[u8]) {
        if let Some((file, part)) = self.place(bytes) {
            file.release(&part);
        }
    }

    /// The same bytes of some tensor, read without mapping their pages.
    pub(crate) fn read<'a>(&'a self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        self.place(bytes).map_or(Cow::Borrowed(bytes), |(file, part)| file.read(part))
    }

    /// The file that these bytes of some tensor lie in, and where.
    pub(crate) fn place(&self, bytes: &[u8]) -> Option<(&FileBytes, Range<usize>)> {
        let first = bytes.as_ptr().addr();
        let start = |file: &FileBytes| file.bytes().as_ptr().addr();
        let within = |file: &&FileBytes| (start(file)..start(file) + file.bytes().len()).contains(&first);
        let file = self.files.iter().find(within)?;
        let offset = first - start(file);
        Some((file, offset..offset + bytes.len()))
    }

    /// Its files.
    pub(crate) fn files(&self) -> &[FileBytes] {
        &self.files
    }

    /// Length and time of the last change of each file.
    pub(crate) fn stamps(&self) -> Vec<(usize, Option<SystemTime>)> {
        self.files.iter().map(|file| (file.bytes().len(), file.modified())).collect()
    }

    /// All tensors, in no order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|(_, info)| info)
    }

    /// Was it made by llama.cpp's converter, with rows reordered and constants folded?
    pub fn is_gguf(&self) -> bool {
        self.metadata.is_some()
    }

    /// How to round what is stored as floats, if it is to be: as wished for, or as the folder was begun.
    ///
    /// # Errors
    /// A wish for a checkpoint that is quantized already.
    pub(crate) fn rounding(
        &self,
        wish: Option<&'static Quantization>,
    ) -> Result<Option<&'static Quantization>, ModelError> {
        match wish {
            Some(wish) if self.is_quantized() => Err(ModelError::Quantization(format!(
                "quantization is {:?}, but {} is quantized already ({}); leave quantization away, or name the model it was made from",
                wish.name(),
                self.path.display(),
                self.storage()
            ))),
            wish => Ok(wish.or(self.quantization)),
        }
    }

    /// A folder without its tensors, and how these are stored.
    fn open_config(path: &Path, dummy: Option<u64>) -> Result<(Self, Option<Stored>), ModelError> {
        let file = path.join("config.json");
        let config = Config::read(&file)?;
        let read = || {
            let wish = config.text(&[QUANTIZATION_FIELD])?.map(Quantization::from_name).transpose()?;
            Ok((Stored::read(&config)?, wish, ModelSpec::from_config(&config)?))
        };
        let (stored, quantization, mut spec) = read().map_err(|error: ModelError| error.at(&file))?;
        let generation = path.join("generation_config.json");
        if generation.is_file() {
            let more = Config::read(&generation)?.token_ids("eos_token_id");
            spec.eos_token_ids.extend(more.map_err(|error| error.at(&generation))?);
            spec.eos_token_ids.sort_unstable();
            spec.eos_token_ids.dedup();
        }
        let names = spec.arch.names;
        let checkpoint = Self {
            spec,
            metadata: None,
            names,
            path: path.to_owned(),
            files: Vec::new(),
            tensors: HashMap::new(),
            scales: AllScales::default(),
            quantization,
            dummy,
        };
        Ok((checkpoint, stored))
    }

    fn open_folder(path: &Path, mmap: bool) -> Result<Self, ModelError> {
        let (mut checkpoint, stored) = Self::open_config(path, None)?;
        for file in safetensors_files(path)? {
            let bytes = FileBytes::open(&file, mmap)?;
            let parsed = Safetensors::parse(bytes.bytes()).map_err(in_file(&file))?;
            checkpoint.add(&file, bytes, parsed.tensors)?;
        }
        checkpoint.normalise_prefix();
        if let Some(stored) = stored {
            let Self { files, tensors, scales, .. } = &mut checkpoint;
            *scales = stored.combine(tensors, &|file, info| info.bytes(files.get(file)?.bytes()))?;
        }
        Ok(checkpoint)
    }

    /// Some checkpoints leave out the first part of every name (`wte` for `transformer.wte`: the first GPT-2 files), and
    /// multi-modal ones put `language_model.` before it. Names are brought to the row's form.
    fn normalise_prefix(&mut self) {
        let embedding = format!("{}.weight", self.names.embedding);
        let Some((first, short)) = embedding.split_once('.') else { return };
        if self.tensors.contains_key(&embedding) {
            return;
        }
        let outer = "language_model.";
        let outer = self.tensors.contains_key(&format!("{outer}{embedding}")).then_some(outer);
        let bare = self.tensors.contains_key(short);
        let head = format!("{}.", self.names.head);
        let renamed = |name: String| match outer.and_then(|outer| name.strip_prefix(outer)) {
            Some(inner) => inner.to_owned(),
            None if bare && !name.starts_with(&head) => format!("{first}.{name}"),
            None => name,
        };
        self.tensors =
            std::mem::take(&mut self.tensors).into_iter().map(|(name, at)| (renamed(name), at)).collect();
    }

    fn open_gguf(path: &Path, mmap: bool) -> Result<Self, ModelError> {
        let first = FileBytes::open(path, mmap)?;
        let parsed = Gguf::parse(first.bytes()).map_err(in_file(path))?;
        let mut parts = vec![(first, parsed)];
        if let Some(split) = parts[0].1.split().map_err(in_file(path))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            parts.clear();
            for sibling in split.file_names(&name).map_err(in_file(path))? {
                let sibling = path.with_file_name(sibling);
                let bytes = FileBytes::open(&sibling, mmap)?;
                let parsed = Gguf::parse(bytes.bytes()).map_err(in_file(&sibling))?;
                parts.push((bytes, parsed));
            }
            let (bytes, parsed): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
            check_splits(&parsed).map_err(in_file(path))?;
            parts = bytes.into_iter().zip(parsed).collect();
        }
        let mut files = Vec::with_capacity(parts.len());
        let mut tensors = HashMap::new();
        let mut metadata = None;
        for (index, (bytes, parsed)) in parts.into_iter().enumerate() {
            files.push(bytes);
            insert(&mut tensors, index, parsed.tensors, Container::Gguf).map_err(in_file(path))?;
            metadata.get_or_insert(parsed.metadata);
        }
        let Some(metadata) = metadata else { return Err(not_a_model(path, "no parts")) };
        let tensor = |name: &str| {
            let (file, info) = tensors.get(name)?;
            Some(Tensor::plain(info, files[*file].bytes().get(info.range.clone())?))
        };
        let (row, config) = gguf::config(&metadata, &tensor, path)?;
        let spec = ModelSpec::read(row, &config)?;
        Ok(Self {
            spec,
            metadata: Some(metadata),
            names: &names::GGUF,
            path: path.to_owned(),
            files,
            tensors,
            scales: AllScales::default(),
            quantization: None,
            dummy: None,
        })
    }

    fn add(&mut self, path: &Path, bytes: FileBytes, tensors: Vec<TensorInfo>) -> Result<(), ModelError> {
        let file = self.files.len();
        self.files.push(bytes);
        insert(&mut self.tensors, file, tensors, Container::Safetensors).map_err(in_file(path))
    }
}

/// Adds a file's tensors; a name that an earlier file has is refused, since only one of the two could be meant.
fn insert(
    all: &mut HashMap<String, (usize, TensorInfo)>,
    file: usize,
    tensors: Vec<TensorInfo>,
    container: Container,
) -> Result<(), FormatError> {
    for info in tensors {
        if let Some((_, twice)) = all.insert(info.name.clone(), (file, info)) {
            let name = format!("{:?}, which another file of the model has too,", shortened(&twice.name));
            return Err(FormatError::Duplicate { container, field: "tensor", name });
        }
    }
    Ok(())
}

/// Whether there is an architecture of this name, for messages of other rooms.
pub fn known_architectures() -> String {
    arch::known()
}
