//! The steps that programs are made of, and how they read as text.

use std::fmt;

use infer_kernels::{Activation, NormKind, RopeStyle};

use crate::Program;

/// Part of the columns of a buffer, for all its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Index into [`crate::Program::buffers`].
    pub buffer: usize,
    /// First column.
    pub offset: usize,
    /// Columns.
    pub width: usize,
}

impl Slice {
    /// The columns from `offset` on, `width` of them.
    pub fn part(self, offset: usize, width: usize) -> Self {
        assert!(offset + width <= self.width);
        Self { buffer: self.buffer, offset: self.offset + offset, width }
    }
}

/// One operation on all rows of a batch. Backends match on this exhaustively.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Rows of the embedding, times `scale`.
    Embed {
        /// (rows, hidden)
        output: Slice,
        /// Factor.
        scale: f32,
    },
    /// Adds the learned vector of each row's position.
    AddPosition {
        /// (rows, hidden)
        rows: Slice,
    },
    /// Normalises groups of columns; input and output may be the same.
    Norm {
        /// Rows to read.
        input: Slice,
        /// Rows to write.
        output: Slice,
        /// Root mean square or layer norm.
        kind: NormKind,
        /// Groups a row is cut into, each normalised alone.
        groups: usize,
        /// Added to the variance.
        epsilon: f32,
        /// Index into [`crate::Program::vectors`].
        weight: usize,
    },
    /// Matrix product, plus the bias where the checkpoint has one.
    Linear {
        /// Rows to read.
        input: Slice,
        /// Rows to write.
        output: Slice,
        /// Index into [`crate::Program::matrices`].
        weight: usize,
    },
    /// Rotates heads by their row's position.
    Rope {
        /// (rows, heads * head_dim)
        rows: Slice,
        /// Heads in a row.
        heads: usize,
        /// Index into [`crate::ModelSpec::ropes`].
        rope: usize,
        /// Which dimensions pair up.
        style: RopeStyle,
    },
    /// Stores keys and values of the rows' positions.
    WriteKv {
        /// (rows, kv_heads * head_dim)
        keys: Slice,
        /// (rows, kv_heads * head_dim)
        values: Slice,
        /// Layer of the cache.
        layer: usize,
    },
    /// Attention over the pages of each row's sequence.
    Attend {
        /// (rows, heads * head_dim)
        queries: Slice,
        /// (rows, heads * head_dim)
        output: Slice,
        /// Layer of the cache.
        layer: usize,
        /// Tokens visible.
        window: Option<usize>,
    },
    /// `activation(gate) * up`.
    GatedActivation {
        /// (rows, width)
        gate: Slice,
        /// (rows, width)
        up: Slice,
        /// (rows, width)
        output: Slice,
        /// The function.
        activation: Activation,
    },
    /// Activation in place.
    Activation {
        /// (rows, width)
        rows: Slice,
        /// The function.
        activation: Activation,
    },
    /// `destination += scale * source`.
    Add {
        /// Rows to add to.
        destination: Slice,
        /// Rows to add.
        source: Slice,
        /// Factor.
        scale: f32,
    },
    /// `destination += sigmoid(gate) * source`, a gate per row.
    AddGated {
        /// Rows to add to.
        destination: Slice,
        /// Rows to add.
        source: Slice,
        /// (rows, 1)
        gate: Slice,
    },
    /// Chooses experts per row from router logits.
    Route {
        /// (rows, experts)
        logits: Slice,
        /// Experts per row.
        used: usize,
        /// Divide the weights of the chosen by their sum.
        renormalise: bool,
    },
    /// Weighted sum of the chosen experts' gated networks.
    Experts {
        /// (rows, hidden)
        input: Slice,
        /// (rows, hidden)
        output: Slice,
        /// Per expert, index of gate and up together: (2 * width, hidden).
        gate_up: Vec<usize>,
        /// Per expert, index of (hidden, width).
        down: Vec<usize>,
        /// Inner width.
        width: usize,
        /// The function.
        activation: Activation,
    },
    /// Keeps only the rows whose logits are wanted: copies them; all steps but other selections have only these from there on.
    Select {
        /// All rows.
        input: Slice,
        /// Wanted rows.
        output: Slice,
    },
    /// Multiplies in place.
    Scale {
        /// Rows.
        rows: Slice,
        /// Factor.
        scale: f32,
    },
    /// `cap * tanh(x / cap)` in place.
    Softcap {
        /// Rows.
        rows: Slice,
        /// Bound.
        cap: f32,
    },
}

/// What a weight is for. A weight's key is a role, a layer and, for experts, an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the roles
pub enum Role {
    Embedding,
    Position,
    FinalNorm,
    Head,
    AttentionNorm,
    AttentionPostNorm,
    FeedForwardNorm,
    FeedForwardPostNorm,
    Query,
    Key,
    Value,
    Output,
    QueryNorm,
    KeyNorm,
    Gate,
    Up,
    Down,
    Router,
    ExpertGate,
    ExpertUp,
    ExpertDown,
    SharedGate,
    SharedUp,
    SharedDown,
    SharedRouter,
}

/// One weight of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeightKey {
    /// What it is for.
    pub role: Role,
    /// Its layer, for roles that layers have.
    pub layer: Option<usize>,
    /// Its expert, for roles that experts have.
    pub expert: Option<usize>,
}

impl fmt::Display for WeightKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.role)?;
        if let Some(layer) = self.layer {
            write!(f, ".{layer}")?;
        }
        match self.expert {
            Some(expert) => write!(f, ".{expert}"),
            None => Ok(()),
        }
    }
}

/// One line per step: what the snapshots in `tests/programs` hold.
impl fmt::Display for Program {
    /// One line per step: what the snapshots in the tests hold.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |slice: &Slice| {
            let buffer = &self.buffers[slice.buffer];
            match slice.width == buffer.width {
                true => buffer.name.to_owned(),
                false => format!("{}[{}..{}]", buffer.name, slice.offset, slice.offset + slice.width),
            }
        };
        let matrix = |index: &usize| {
            self.matrices[*index].parts.iter().map(ToString::to_string).collect::<Vec<_>>().join("|")
        };
        for step in &self.steps {
            match step {
                Step::Embed { output, scale } => writeln!(f, "embed {} scale={scale}", name(output)),
                Step::AddPosition { rows } => writeln!(f, "add_position {}", name(rows)),
                Step::Norm { input, output, kind, groups, epsilon, weight } => writeln!(
                    f,
                    "norm {} -> {} {kind:?} groups={groups} epsilon={epsilon} {}",
                    name(input),
                    name(output),
                    self.vectors[*weight].key
                ),
                Step::Linear { input, output, weight } => {
                    writeln!(f, "linear {} -> {} {}", name(input), name(output), matrix(weight))
                }
                Step::Rope { rows, heads, rope, style } => {
                    writeln!(f, "rope {} heads={heads} rope={rope} {style:?}", name(rows))
                }
                Step::WriteKv { keys, values, layer } => {
                    writeln!(f, "write_kv {} {} layer={layer}", name(keys), name(values))
                }
                Step::Attend { queries, output, layer, window } => {
                    writeln!(
                        f,
                        "attend {} -> {} layer={layer} window={window:?}",
                        name(queries),
                        name(output)
                    )
                }
                Step::GatedActivation { gate, up, output, activation } => {
                    writeln!(f, "gated {activation:?} {} {} -> {}", name(gate), name(up), name(output))
                }
                Step::Activation { rows, activation } => {
                    writeln!(f, "activation {activation:?} {}", name(rows))
                }
                Step::Add { destination, source, scale } => {
                    writeln!(f, "add {} += {scale} * {}", name(destination), name(source))
                }
                Step::AddGated { destination, source, gate } => {
                    writeln!(f, "add_gated {} += {} gate={}", name(destination), name(source), name(gate))
                }
                Step::Route { logits, used, renormalise } => {
                    writeln!(f, "route {} used={used} renormalise={renormalise}", name(logits))
                }
                Step::Experts { input, output, gate_up, width, activation, .. } => writeln!(
                    f,
                    "experts {} -> {} count={} width={width} {activation:?}",
                    name(input),
                    name(output),
                    gate_up.len()
                ),
                Step::Select { input, output } => writeln!(f, "select {} -> {}", name(input), name(output)),
                Step::Scale { rows, scale } => writeln!(f, "scale {} {scale}", name(rows)),
                Step::Softcap { rows, cap } => writeln!(f, "softcap {} {cap}", name(rows)),
            }?;
        }
        Ok(())
    }
}
