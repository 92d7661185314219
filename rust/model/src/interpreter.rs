//! A packed program and its steps: one `match` arm per kind of step.

use std::path::Path;
use std::time::{Duration, Instant};

use infer_kernels::{
    Attention, AttentionRows, Context, Format, Norm, Precision, RopeStyle, activation_in_place, add_in_place,
    attention, gated_activation, gated_linear, linear, norm, norm_in_place, rope_in_place, scale_in_place,
    softcap_in_place,
};

use crate::batch::Batch;
use crate::checkpoint::Checkpoint;
use crate::experts::{ExpertNetworks, add_gated};
use crate::family::Positions;
use crate::gate::{Gated, Turn, turns};
use crate::kv::KvCaches;
use crate::late::{LateFiles, LateWeights};
use crate::loading::{CacheNews, LookupTable, Weights};
use crate::memory::Memory;
use crate::rope::RopeTable;
use crate::step::{Role, Slice, Step};
use crate::weights::{Loader, Matrix, Vector};
use crate::{ModelError, ModelSpec, Program, Quantization};

/// Everything about a model that a forward pass only reads.
pub(crate) struct Interpreter {
    pub spec: ModelSpec,
    pub program: Program,
    pub context: Context,
    pub ropes: Vec<RopeTable>,
    precision: Precision,
    matrices: Vec<Option<Matrix>>,
    vectors: Vec<Vector>,
    embedding: LookupTable,
    positions: Option<LookupTable>,
    late: Option<LateWeights>,
}

impl Interpreter {
    /// Writes the program, fuses what is stored alike, and packs all weights, rounded if that is wished for.
    pub fn load(
        checkpoint: &Checkpoint,
        quantization: Option<&'static Quantization>,
        context: Context,
        precision: Precision,
        packed_cache_dir: Option<&Path>,
    ) -> Result<(Self, CacheNews), ModelError> {
        let spec = checkpoint.spec.clone();
        let floats = match precision {
            Precision::Exact => Format::F32,
            Precision::Auto => Format::Bf16,
        };
        let files = LateFiles::new(checkpoint);
        let loader = Loader::new(checkpoint, quantization, floats);
        // What is kept in a folder is packed at once.
        let loader = if packed_cache_dir.is_none() { loader.late(&files) } else { loader };
        let mut program = Program::new(&spec);
        program.fuse(|left, right| loader.may_merge(left, right));
        program.narrow();
        program.release_unused_buffers();
        let (weights, news) = Weights::load(&loader, &program, &context, packed_cache_dir)?;
        let Weights { matrices, embedding } = weights;
        let vectors = program.vectors.iter().map(|key| loader.vector(key)).collect::<Result<_, _>>()?;
        let positions = match spec.arch.positions {
            Positions::Learned => {
                Some(LookupTable::load(&loader, &context, Role::Position, spec.max_positions)?)
            }
            Positions::Rope(_) => None,
        };
        loader.check_all_read()?;
        let ropes = spec.ropes.iter().map(RopeTable::new).collect();
        let late = LateWeights::of(
            files,
            &matrices,
            embedding.is_late() || positions.as_ref().is_some_and(LookupTable::is_late),
        );
        let own =
            Self { spec, program, context, ropes, precision, matrices, vectors, embedding, positions, late };
        Ok((own, news))
    }

    /// Bytes of all weights in memory.
    pub fn weight_bytes(&self) -> usize {
        let matrices: usize = self.matrices.iter().flatten().map(|matrix| matrix.packed.bytes()).sum();
        matrices + self.tables().map(LookupTable::bytes).sum::<usize>()
    }

    fn tables(&self) -> impl Iterator<Item = &LookupTable> {
        std::iter::once(&self.embedding).chain(&self.positions)
    }

    /// Bytes of weights that are not packed yet.
    pub fn late_bytes(&self) -> usize {
        let matrices = self.matrices.iter().flatten().filter(|matrix| matrix.packed.is_late());
        let tables = self.tables().filter(|table| table.is_late());
        matrices.map(|matrix| matrix.packed.bytes()).chain(tables.map(LookupTable::bytes)).sum()
    }

    /// Whether there are any.
    pub fn is_late(&self) -> bool {
        self.late.is_some()
    }

    /// Packs weights for so long, a matrix at least. When all are, `last` may read the files, too.
    ///
    /// # Errors
    /// A file that could not be read.
    pub fn pack_late(
        &mut self,
        span: Duration,
        last: impl FnOnce() -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let Some(late) = &mut self.late else { return Ok(()) };
        let begun = Instant::now();
        while let Some(index) = late.left.pop() {
            if let Some(matrix) = &mut self.matrices[index] {
                matrix.packed.pack_late(&self.context);
            }
            if begun.elapsed() >= span {
                break;
            }
        }
        let done = late.left.is_empty();
        if done {
            let tables = std::iter::once(&mut self.embedding).chain(&mut self.positions);
            tables.for_each(|table| table.read_late(&self.context.pool));
            last()?;
        }
        late.files.check()?;
        if done {
            self.late = None;
        }
        Ok(())
    }

    /// Whether what was read of the files up to now can be believed.
    ///
    /// # Errors
    /// A file that could not be read.
    pub fn check_late(&self) -> Result<(), ModelError> {
        self.late.as_ref().map_or(Ok(()), |late| late.files.check())
    }

    /// Computes a batch, up to the logits of the wanted rows in `memory`.
    pub fn forward(
        &self,
        batch: &Batch<'_>,
        caches: &mut KvCaches,
        memory: &mut Memory,
    ) -> Result<(), ModelError> {
        batch.check(&self.spec, caches.pages())?;
        self.check_positions(batch)?;
        if batch.tokens.is_empty() {
            return Ok(());
        }
        memory.prepare(&self.program, &self.ropes, batch);
        // From the last attention on, all is for logits only.
        let end = if batch.logit_rows.is_empty() { self.program.last_attention() } else { None };
        for turn in turns(&self.program.steps[..end.unwrap_or(self.program.steps.len())]) {
            match turn {
                Turn::Step(step) => self.step(step, batch, caches, memory),
                Turn::Gated(gated) => self.gated(&gated, memory),
            }
        }
        Ok(())
    }

    /// Learned positions end somewhere.
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

    /// One step. The match is exhaustive on purpose: a new kind of step must be given its meaning here.
    fn step(&self, step: &Step, batch: &Batch<'_>, caches: &mut KvCaches, memory: &mut Memory) {
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
                let slots = &memory.slots[usize::from(caches.place(*layer).local)];
                let (cache, index) = caches.layer_mut(*layer);
                cache.write(context, index, keys, values, slots);
            }
            Step::Attend { queries, output, layer, window } => {
                self.attend(*queries, *output, *layer, *window, batch, caches, memory);
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
            Step::Select { input, output } => memory.select(&self.program, *input, *output, batch),
            Step::Scale { rows, scale } => {
                scale_in_place(context, memory.rows_mut(*rows, &self.program), *scale);
            }
            Step::Softcap { rows, cap } => {
                softcap_in_place(context, memory.rows_mut(*rows, &self.program), *cap);
            }
        }
    }

    fn gated(&self, gated: &Gated, memory: &mut Memory) {
        let Some(Matrix { packed, bias, .. }) = &self.matrices[gated.weight] else { return };
        let (context, bias) = (&self.context, bias.as_deref());
        memory.map(&self.program, gated.input, gated.output, |scratch, input, output| {
            gated_linear(context, packed, input, output, bias, gated.activation, self.precision, scratch);
        });
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
        caches: &KvCaches,
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
        let local = caches.place(layer).local;
        let (cache, index) = caches.layer(layer);
        // Nothing after the last layer's attention reads the other rows.
        let sequences: Vec<AttentionRows<'_>> = match layer + 1 == spec.layers.len() {
            true => batch.wanted_runs().map(|(sequence, rows)| sequence.attention(rows, local)).collect(),
            false => {
                batch.sequences.iter().map(|sequence| sequence.attention(0..sequence.rows, local)).collect()
            }
        };
        memory.map(&self.program, queries, output, |scratch, queries, output| {
            attention(&self.context, &parameters, cache, index, &sequences, queries, output, scratch);
        });
    }
}
