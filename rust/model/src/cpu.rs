//! The CPU backend: packs a checkpoint and interprets its program, one `match` arm per step.

use std::path::Path;

use infer_kernels::{
    Attention, AttentionRows, Context, Format, KvCache, KvElement, KvLayer, Norm, PAGE_TOKENS, Precision,
    RopeStyle, activation_in_place, add_in_place, attention, dequantize, gated_activation, linear, norm,
    norm_in_place, rope_in_place, scale_in_place, softcap_in_place,
};

use crate::arch::Positions;
use crate::batch::Batch;
use crate::checkpoint::Checkpoint;
use crate::experts::{ExpertNetworks, add_gated};
use crate::memory::Memory;
use crate::program::MatrixKey;
use crate::rope::RopeTable;
use crate::step::{Role, Slice, Step};
use crate::weights::{Loader, Matrix, Vector};
use crate::{ModelError, ModelSpec, Program};

/// How to load and compute.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Threads, the caller's included; `None`: one per core that the process may use.
    pub threads: Option<usize>,
    /// Exact activations, or rounded ones where weights are integers.
    pub precision: Precision,
    /// Map files during the load instead of reading them.
    pub mmap: bool,
    /// How keys and values are stored.
    pub kv_element: KvElement,
}

/// Rows that are looked up: embeddings and learned positions.
enum LookupTable {
    /// As the checkpoint stores them.
    Stored { format: Format, row_bytes: usize, bytes: Vec<u8> },
    /// The rows of a matrix that is multiplied as well: a tied head.
    Packed { matrix: usize },
}

impl LookupTable {
    fn row(&self, matrices: &[Option<Matrix>], row: usize, out: &mut [f32]) {
        match self {
            Self::Stored { format, row_bytes, bytes } => {
                dequantize(*format, &bytes[row * row_bytes..(row + 1) * row_bytes], out);
            }
            Self::Packed { matrix } => {
                if let Some(matrix) = &matrices[*matrix] {
                    matrix.packed.unpack_row(row, out);
                }
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Stored { bytes, .. } => bytes.len(),
            Self::Packed { .. } => 0,
        }
    }
}

/// A model in memory.
pub struct CpuModel {
    spec: ModelSpec,
    program: Program,
    context: Context,
    precision: Precision,
    kv_element: KvElement,
    matrices: Vec<Option<Matrix>>,
    vectors: Vec<Vector>,
    embedding: LookupTable,
    positions: Option<LookupTable>,
    ropes: Vec<RopeTable>,
    cache: Option<KvCache>,
    memory: Memory,
}

impl CpuModel {
    /// Loads a model folder or `.gguf` file. Weights are copied into compute layouts: no file stays mapped.
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint, or `INFER_ISA` naming an instruction set that this machine lacks.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        Self::from_checkpoint(&Checkpoint::open(path, options.mmap)?, options)
    }

    /// Loads an opened checkpoint.
    pub fn from_checkpoint(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let threads = options.threads.unwrap_or_else(default_threads).max(1);
        let context = Context::new(threads)?;
        let spec = checkpoint.spec.clone();
        let loader = Loader::new(checkpoint);
        let mut program = Program::new(&spec);
        program.fuse(|left, right| loader.may_merge(left, right));
        let matrix = |key: &MatrixKey| match key.parts.is_empty() {
            true => Ok(None),
            false => loader.matrix(key, &context.pool).map(Some),
        };
        let matrices = program.matrices.iter().map(matrix).collect::<Result<_, _>>()?;
        let vectors = program.vectors.iter().map(|key| loader.vector(key)).collect::<Result<_, _>>()?;
        let embedding = match tied_head(&spec, &program) {
            Some(matrix) => LookupTable::Packed { matrix },
            None => lookup(&loader, Role::Embedding, spec.vocabulary)?,
        };
        let positions = match spec.arch.positions {
            Positions::Learned => Some(lookup(&loader, Role::Position, spec.max_positions)?),
            Positions::Rope(_) => None,
        };
        let ropes = spec.ropes.iter().map(RopeTable::new).collect();
        Ok(Self {
            spec,
            program,
            context,
            precision: options.precision,
            kv_element: options.kv_element,
            matrices,
            vectors,
            embedding,
            positions,
            ropes,
            cache: None,
            memory: Memory::default(),
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its program, fused for this backend.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// The instruction set and threads in use.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Bytes of all weights in memory.
    pub fn weight_bytes(&self) -> usize {
        let matrices: usize = self.matrices.iter().flatten().map(|matrix| matrix.packed.bytes()).sum();
        matrices + self.embedding.bytes() + self.positions.as_ref().map_or(0, LookupTable::bytes)
    }

    /// Bytes of one page of the KV cache, all layers together.
    pub fn page_bytes(&self) -> usize {
        KvCache::page_bytes(&self.kv_layers(), self.kv_element)
    }

    /// Makes a KV cache of so many pages; an earlier one is dropped.
    pub fn allocate_cache(&mut self, pages: usize) -> Result<(), ModelError> {
        self.cache = None;
        self.cache = Some(KvCache::new(&self.kv_layers(), pages, self.kv_element)?);
        Ok(())
    }

    /// Computes a batch: writes its keys and values into the cache, and the logits of the wanted rows, as
    /// (logit_rows, vocabulary), into `logits`.
    ///
    /// # Errors
    /// A batch that does not fit the model or the cache.
    pub fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let pages = self.cache.as_ref().map_or(0, KvCache::pages);
        batch.check(&self.spec, pages)?;
        self.check_positions(batch)?;
        logits.clear();
        if batch.tokens.is_empty() {
            return Ok(());
        }
        let Some(mut cache) = self.cache.take() else {
            return Err(ModelError::Request("no KV cache was allocated".to_owned()));
        };
        let mut memory = std::mem::take(&mut self.memory);
        memory.prepare(&self.program, &self.ropes, batch);
        for step in &self.program.steps {
            let wanted = batch.logit_rows.len();
            if wanted == 0 && matches!(step, Step::Select { .. }) {
                break; // the rest is for logits only
            }
            self.step(step, batch, &mut cache, &mut memory);
        }
        if !batch.logit_rows.is_empty() {
            let size = batch.logit_rows.len() * self.spec.vocabulary;
            logits.extend_from_slice(memory.values(self.program.logits, size));
        }
        self.memory = memory;
        self.cache = Some(cache);
        Ok(())
    }

    fn check_positions(&self, batch: &Batch<'_>) -> Result<(), ModelError> {
        let limit = self.spec.max_positions;
        let longest = batch.sequences.iter().map(|sequence| sequence.first_position + sequence.rows).max();
        match longest {
            Some(longest) if self.positions.is_some() && longest > limit => {
                Err(ModelError::Request(format!(
                    "a sequence of {longest} tokens is longer than the {limit} positions that the model learned"
                )))
            }
            _ => Ok(()),
        }
    }

    fn kv_layers(&self) -> Vec<KvLayer> {
        vec![KvLayer { kv_heads: self.spec.kv_heads, head_dim: self.spec.head_dim }; self.spec.layers.len()]
    }

    /// One step. The match is exhaustive on purpose: a new kind of step must be given its meaning here.
    fn step(&self, step: &Step, batch: &Batch<'_>, cache: &mut KvCache, memory: &mut Memory) {
        let context = &self.context;
        match step {
            Step::Embed { output, scale } => self.embed(*output, *scale, batch, memory),
            Step::AddPosition { rows } => self.add_position(*rows, batch, memory),
            Step::Norm { input, output, kind, groups, epsilon, weight } => {
                let vector = &self.vectors[*weight];
                let (weight, bias) = (Some(&vector.weight[..]), vector.bias.as_deref());
                let parameters = Norm { kind: *kind, groups: *groups, weight, bias, epsilon: *epsilon };
                self.norm(&parameters, *input, *output, memory);
            }
            Step::Linear { input, output, weight } => {
                let Some(matrix) = &self.matrices[*weight] else { return };
                memory.map(&self.program, *input, *output, |scratch, input, output| {
                    linear(
                        context,
                        &matrix.packed,
                        input,
                        output,
                        matrix.bias.as_deref(),
                        self.precision,
                        scratch,
                    );
                });
            }
            Step::Rope { rows, heads, rope, style } => self.rope(*rows, *heads, *rope, *style, memory),
            Step::WriteKv { keys, values, layer } => {
                let (keys, values) = (memory.rows(*keys, &self.program), memory.rows(*values, &self.program));
                cache.write(context, *layer, keys, values, &memory.slots);
            }
            Step::Attend { queries, output, layer, window } => {
                self.attend(*queries, *output, *layer, *window, batch, cache, memory);
            }
            Step::GatedActivation { gate, up, output, activation } => {
                let up = *up;
                memory.map_two(&self.program, *gate, up, *output, |gate, up, output| {
                    gated_activation(context, *activation, gate, up, output);
                });
            }
            Step::Activation { rows, activation } => {
                activation_in_place(context, *activation, memory.rows_mut(*rows, &self.program));
            }
            Step::Add { destination, source, scale } => {
                memory.map(&self.program, *source, *destination, |_, source, destination| {
                    add_in_place(context, destination, source, *scale);
                });
            }
            Step::AddGated { destination, source, gate } => {
                memory.map_two(&self.program, *source, *gate, *destination, add_gated);
            }
            Step::Route { logits, used, renormalise } => {
                let mut routes = std::mem::take(&mut memory.routes);
                routes.choose(memory.rows(*logits, &self.program), *used, *renormalise);
                memory.routes = routes;
            }
            Step::Experts { input, output, gate_up, down, width, activation } => {
                let matrices = |indices: &[usize]| {
                    indices.iter().filter_map(|index| self.matrices[*index].as_ref()).collect::<Vec<_>>()
                };
                let (gate_up, down) = (matrices(gate_up), matrices(down));
                let (width, activation, precision) = (*width, *activation, self.precision);
                let networks = ExpertNetworks { gate_up, down, width, activation, precision };
                self.experts(&networks, *input, *output, memory);
            }
            Step::Select { input, output } => memory.select(&self.program, *input, *output, batch.logit_rows),
            Step::Scale { rows, scale } => {
                scale_in_place(context, memory.rows_mut(*rows, &self.program), *scale);
            }
            Step::Softcap { rows, cap } => {
                softcap_in_place(context, memory.rows_mut(*rows, &self.program), *cap);
            }
        }
    }

    fn norm(&self, parameters: &Norm<'_>, input: Slice, output: Slice, memory: &mut Memory) {
        match input == output {
            true => norm_in_place(&self.context, parameters, memory.rows_mut(output, &self.program)),
            false => memory.map(&self.program, input, output, |_, input, output| {
                norm(&self.context, parameters, input, output);
            }),
        }
    }

    fn rope(&self, rows: Slice, heads: usize, rope: usize, style: RopeStyle, memory: &mut Memory) {
        let rotary_dim = self.spec.ropes[rope].rotary_dim;
        let (cos, sin) = std::mem::take(&mut memory.rotations[rope]);
        let target = memory.rows_mut(rows, &self.program);
        rope_in_place(&self.context, target, heads, self.spec.head_dim, &cos, &sin, rotary_dim, style);
        memory.rotations[rope] = (cos, sin);
    }

    fn experts(&self, networks: &ExpertNetworks<'_>, input: Slice, output: Slice, memory: &mut Memory) {
        let mut routes = std::mem::take(&mut memory.routes);
        memory.map(&self.program, input, output, |scratch, input, output| {
            networks.run(&self.context, &mut routes, input, output, scratch);
        });
        memory.routes = routes;
    }

    fn embed(&self, output: Slice, scale: f32, batch: &Batch<'_>, memory: &mut Memory) {
        let mut rows = memory.rows_mut(output, &self.program);
        for (row, token) in batch.tokens.iter().enumerate() {
            self.embedding.row(&self.matrices, *token as usize, rows.row_mut(row));
        }
        if scale != 1.0 {
            scale_in_place(&self.context, rows, scale);
        }
    }

    fn add_position(&self, rows: Slice, batch: &Batch<'_>, memory: &mut Memory) {
        let Some(table) = &self.positions else { return };
        let mut rows = memory.rows_mut(rows, &self.program);
        let mut learned = vec![0.0; rows.width()];
        for (row, (position, _)) in batch.positions().enumerate() {
            table.row(&self.matrices, position, &mut learned);
            rows.row_mut(row).iter_mut().zip(&learned).for_each(|(value, more)| *value += more);
        }
    }

    fn attend(
        &self,
        queries: Slice,
        output: Slice,
        layer: usize,
        window: Option<usize>,
        batch: &Batch<'_>,
        cache: &KvCache,
        memory: &mut Memory,
    ) {
        let spec = &self.spec;
        let parameters = Attention {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            scale: spec.attention_scale,
            window,
            softcap: spec.attention_softcap,
        };
        let sequences: Vec<AttentionRows<'_>> = batch
            .sequences
            .iter()
            .map(|sequence| AttentionRows {
                first_row: sequence.first_row,
                rows: sequence.rows,
                first_position: sequence.first_position,
                pages: &sequence.pages[..(sequence.first_position + sequence.rows).div_ceil(PAGE_TOKENS)],
            })
            .collect();
        memory.map(&self.program, queries, output, |scratch, queries, output| {
            attention(&self.context, &parameters, cache, layer, &sequences, queries, output, scratch);
        });
    }
}

fn lookup(loader: &Loader<'_>, role: Role, rows: usize) -> Result<LookupTable, ModelError> {
    let table = loader.table(role, rows)?;
    let row_bytes = table.row_bytes();
    Ok(LookupTable::Stored { format: table.format, row_bytes, bytes: table.bytes.into_owned() })
}

/// The matrix of the head, if it is the embedding too.
fn tied_head(spec: &ModelSpec, program: &Program) -> Option<usize> {
    let is_head = |key: &MatrixKey| key.parts.len() == 1 && key.parts[0].role == Role::Head;
    if spec.tied { program.matrices.iter().position(is_head) } else { None }
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
