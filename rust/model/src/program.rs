//! From a spec to a program: a flat list of steps over named buffers. Every `if` about architecture lives here.

use infer_kernels::NormKind;

use crate::family::Positions;
use crate::spec::{FeedForward, LayerSpec, ModelSpec};
use crate::step::{Role, Slice, Step, WeightKey};

/// Working memory of a program: one row per token of a batch, or one per row whose logits are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    /// For people.
    pub name: &'static str,
    /// f32 values per row.
    pub width: usize,
    /// It has a row for each row whose logits are wanted only.
    pub wanted: bool,
    /// The buffer that takes its wanted rows, if they may be needed after [`Step::Select`].
    pub selected: Option<usize>,
}

/// Weights that are multiplied as one: outputs of the parts are laid side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatrixKey {
    /// Parts in the order of their outputs.
    pub parts: Vec<WeightKey>,
    /// Outputs of each part.
    pub rows: Vec<usize>,
    /// Inputs.
    pub columns: usize,
}

impl MatrixKey {
    /// How many numbers it has.
    pub fn weights(&self) -> usize {
        self.rows.iter().sum::<usize>() * self.columns
    }
}

/// A norm's weight, and its bias where the checkpoint has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VectorKey {
    /// The weight.
    pub key: WeightKey,
    /// Values, or 0 with `per_head` where a norm has either one weight for all heads or one each.
    pub width: usize,
    /// Heads, if the weight may be given per head.
    pub heads: usize,
}

/// A model's computation.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// Working memory.
    pub buffers: Vec<Buffer>,
    /// In order.
    pub steps: Vec<Step>,
    /// Matrices which `Linear` and `Experts` refer to.
    pub matrices: Vec<MatrixKey>,
    /// Vectors which `Norm` refers to.
    pub vectors: Vec<VectorKey>,
    /// Buffer with the logits of the selected rows.
    pub logits: Slice,
}

impl Program {
    /// How many weights there are, with tables of vectors that are looked up.
    pub(crate) fn weights(&self, spec: &ModelSpec) -> u64 {
        let matrices: usize = self.matrices.iter().map(MatrixKey::weights).sum();
        let vectors: usize = self.vectors.iter().map(|key| key.width).sum();
        let embedding = if spec.tied { 0 } else { spec.vocabulary * spec.hidden };
        let positions = match spec.arch.positions {
            Positions::Learned => spec.max_positions * spec.hidden,
            Positions::Rope(_) => 0,
        };
        (matrices + vectors + embedding + positions) as u64
    }

    /// Writes the program of a model, unfused: the truth that all backends share.
    pub fn new(spec: &ModelSpec) -> Self {
        let mut builder = Builder::new(spec);
        builder.model();
        builder.program
    }

    /// Merges neighbouring products of the same input into one, where `may_merge` allows (the checkpoint stores
    /// them in one format), so that a decode step walks one long matrix instead of three short ones.
    pub fn fuse(&mut self, may_merge: impl Fn(&MatrixKey, &MatrixKey) -> bool) {
        let mut fused: Vec<Step> = Vec::with_capacity(self.steps.len());
        for step in std::mem::take(&mut self.steps) {
            if let (
                Some(Step::Linear { input: a, output: first, weight: left }),
                Step::Linear { input: b, output: second, weight: right },
            ) = (fused.last_mut(), &step)
            {
                let adjacent = first.buffer == second.buffer && first.offset + first.width == second.offset;
                if *a == *b && adjacent && may_merge(&self.matrices[*left], &self.matrices[*right]) {
                    let other = std::mem::replace(
                        &mut self.matrices[*right],
                        MatrixKey { parts: Vec::new(), rows: Vec::new(), columns: 0 },
                    );
                    self.matrices[*left].parts.extend(other.parts);
                    self.matrices[*left].rows.extend(other.rows);
                    first.width += second.width;
                    continue;
                }
            }
            fused.push(step);
        }
        self.steps = fused;
    }
}

struct Builder<'a> {
    spec: &'a ModelSpec,
    program: Program,
    hidden: Slice,
    normed: Slice,
    qkv: Slice,
    attended: Slice,
    attention_branch: Slice,
    branch: Slice,
    gate_up: Slice,
    activated: Slice,
    router: Slice,
    selected: Slice,
}

/// Widest inner layer, and number of experts.
fn widest(spec: &ModelSpec) -> (usize, usize) {
    spec.layers.iter().fold((1, 1), |(width, experts), layer| match layer.feed_forward {
        FeedForward::Dense { width: own } => (width.max(own), experts),
        FeedForward::Experts { count, shared_width, .. } => {
            (width.max(shared_width.unwrap_or(1)), experts.max(count))
        }
    })
}

impl<'a> Builder<'a> {
    fn new(spec: &'a ModelSpec) -> Self {
        let mut buffers = Vec::new();
        let mut buffer = |name, width| {
            buffers.push(Buffer { name, width, wanted: false, selected: None });
            Slice { buffer: buffers.len() - 1, offset: 0, width }
        };
        let queries = spec.heads * spec.head_dim;
        let (width, experts) = widest(spec);
        let hidden = buffer("hidden", spec.hidden);
        let normed = buffer("normed", spec.hidden);
        let qkv = buffer("qkv", queries + 2 * spec.kv_heads * spec.head_dim);
        let attended = buffer("attended", queries);
        let attention_branch = buffer("attention_branch", spec.hidden);
        let branch = buffer("branch", spec.hidden);
        let gate_up = buffer("gate_up", 2 * width);
        let activated = buffer("activated", width);
        let router = buffer("router", experts);
        let selected = buffer("selected", spec.hidden);
        let logits = buffer("logits", spec.vocabulary);
        let pairs = [
            (hidden, selected),
            (attended, buffer("selected_attended", queries)),
            (normed, buffer("selected_normed", spec.hidden)),
        ];
        buffers[logits.buffer].wanted = true;
        for (all, wanted) in pairs {
            buffers[all.buffer].selected = Some(wanted.buffer);
            buffers[wanted.buffer].wanted = true;
        }
        let program =
            Program { buffers, steps: Vec::new(), matrices: Vec::new(), vectors: Vec::new(), logits };
        Self {
            spec,
            program,
            hidden,
            normed,
            qkv,
            attended,
            attention_branch,
            branch,
            gate_up,
            activated,
            router,
            selected,
        }
    }

    fn model(&mut self) {
        let (hidden, selected, logits) = (self.hidden, self.selected, self.program.logits);
        self.push(Step::Embed { output: hidden, scale: self.spec.embedding_scale });
        if self.spec.arch.positions == Positions::Learned {
            self.push(Step::AddPosition { rows: hidden });
        }
        for (index, layer) in self.spec.layers.iter().enumerate() {
            match self.spec.parallel {
                true => self.parallel_layer(index, layer),
                false => self.sequential_layer(index, layer),
            }
        }
        self.push(Step::Select { input: hidden, output: selected });
        self.norm(selected, selected, Role::FinalNorm, None);
        self.linear(selected, logits, Role::Head, None);
        if self.spec.logit_scale != 1.0 {
            self.push(Step::Scale { rows: logits, scale: self.spec.logit_scale });
        }
        if let Some(cap) = self.spec.logit_softcap {
            self.push(Step::Softcap { rows: logits, cap });
        }
    }

    fn sequential_layer(&mut self, index: usize, layer: &LayerSpec) {
        let (pre, post) = (self.spec.arch.pre_norm, self.spec.arch.post_norm);
        let (hidden, normed, branch) = (self.hidden, self.normed, self.branch);
        let at = Some(index);
        let half = |this: &mut Self, before: Role, after: Role, body: &mut dyn FnMut(&mut Self, Slice)| {
            if pre {
                this.norm(hidden, normed, before, at);
            }
            body(this, if pre { normed } else { hidden });
            if post {
                this.norm(branch, branch, after, at);
            }
            this.push(Step::Add { destination: hidden, source: branch, scale: this.spec.residual_scale });
        };
        half(self, Role::AttentionNorm, Role::AttentionPostNorm, &mut |this, input| {
            this.attention(index, layer, input, branch);
        });
        half(self, Role::FeedForwardNorm, Role::FeedForwardPostNorm, &mut |this, input| {
            this.feed_forward(index, layer, input);
        });
    }

    fn parallel_layer(&mut self, index: usize, layer: &LayerSpec) {
        let (hidden, normed, scale) = (self.hidden, self.normed, self.spec.residual_scale);
        let (attention_branch, branch) = (self.attention_branch, self.branch);
        self.norm(hidden, normed, Role::AttentionNorm, Some(index));
        self.attention(index, layer, normed, attention_branch);
        if !self.spec.shared_norm {
            self.norm(hidden, normed, Role::FeedForwardNorm, Some(index));
        }
        self.feed_forward(index, layer, normed);
        self.push(Step::Add { destination: hidden, source: attention_branch, scale });
        self.push(Step::Add { destination: hidden, source: branch, scale });
    }

    fn attention(&mut self, index: usize, layer: &LayerSpec, input: Slice, output: Slice) {
        let spec = self.spec;
        let (query_width, key_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let queries = self.qkv.part(0, query_width);
        let keys = self.qkv.part(query_width, key_width);
        let values = self.qkv.part(query_width + key_width, key_width);
        self.linear(input, queries, Role::Query, Some(index));
        self.linear(input, keys, Role::Key, Some(index));
        self.linear(input, values, Role::Value, Some(index));
        for (rows, heads, role) in
            [(queries, spec.heads, Role::QueryNorm), (keys, spec.kv_heads, Role::KeyNorm)]
        {
            if let Some(norm) = spec.qk_norm {
                let groups = if norm.per_head { heads } else { 1 };
                self.norm_groups(rows, rows, role, Some(index), norm.kind, groups);
            }
            if let (Some(rope), Positions::Rope(style)) = (layer.rope, spec.arch.positions) {
                self.push(Step::Rope { rows, heads, rope, style });
            }
        }
        let attended = self.attended;
        self.push(Step::WriteKv { keys, values, layer: index });
        self.push(Step::Attend { queries, output: attended, layer: index, window: layer.window });
        self.linear(attended, output, Role::Output, Some(index));
    }

    fn feed_forward(&mut self, index: usize, layer: &LayerSpec, input: Slice) {
        let branch = self.branch;
        match layer.feed_forward {
            FeedForward::Dense { width } if self.spec.arch.gated => {
                self.gated(index, input, branch, width, [Role::Gate, Role::Up, Role::Down]);
            }
            FeedForward::Dense { width } => {
                let inner = self.activated.part(0, width);
                self.linear(input, inner, Role::Up, Some(index));
                self.push(Step::Activation { rows: inner, activation: self.spec.activation });
                self.linear(inner, branch, Role::Down, Some(index));
            }
            FeedForward::Experts { count, used, width, renormalise, shared_width } => {
                let logits = self.router.part(0, count);
                self.linear(input, logits, Role::Router, Some(index));
                self.push(Step::Route { logits, used, renormalise });
                self.experts(index, input, count, width);
                if let Some(shared) = shared_width {
                    let (source, gate) = (self.shared_output(), self.router.part(0, 1));
                    self.gated(
                        index,
                        input,
                        source,
                        shared,
                        [Role::SharedGate, Role::SharedUp, Role::SharedDown],
                    );
                    self.linear(input, gate, Role::SharedRouter, Some(index));
                    self.push(Step::AddGated { destination: branch, source, gate });
                }
            }
        }
    }

    /// Room for the shared expert's output: no family has both parallel branches and a shared expert.
    fn shared_output(&self) -> Slice {
        assert!(!self.spec.parallel);
        self.attention_branch
    }

    fn gated(&mut self, index: usize, input: Slice, output: Slice, width: usize, roles: [Role; 3]) {
        let (gate, up) = (self.gate_up.part(0, width), self.gate_up.part(width, width));
        let inner = self.activated.part(0, width);
        self.linear(input, gate, roles[0], Some(index));
        self.linear(input, up, roles[1], Some(index));
        self.push(Step::GatedActivation { gate, up, output: inner, activation: self.spec.activation });
        self.linear(inner, output, roles[2], Some(index));
    }

    fn experts(&mut self, index: usize, input: Slice, count: usize, width: usize) {
        let hidden = self.spec.hidden;
        let key = |role, expert| WeightKey { role, layer: Some(index), expert: Some(expert) };
        let mut add = |parts: Vec<WeightKey>, rows: usize, columns: usize| {
            let rows = vec![rows; parts.len()];
            self.program.matrices.push(MatrixKey { parts, rows, columns });
            self.program.matrices.len() - 1
        };
        let gate_up = (0..count)
            .map(|expert| {
                add(vec![key(Role::ExpertGate, expert), key(Role::ExpertUp, expert)], width, hidden)
            })
            .collect();
        let down = (0..count).map(|expert| add(vec![key(Role::ExpertDown, expert)], hidden, width)).collect();
        let (output, activation) = (self.branch, self.spec.activation);
        self.push(Step::Experts { input, output, gate_up, down, width, activation });
    }

    fn norm(&mut self, input: Slice, output: Slice, role: Role, layer: Option<usize>) {
        self.norm_groups(input, output, role, layer, self.spec.arch.norm, 1);
    }

    fn norm_groups(
        &mut self,
        input: Slice,
        output: Slice,
        role: Role,
        layer: Option<usize>,
        kind: NormKind,
        groups: usize,
    ) {
        let key = WeightKey { role, layer, expert: None };
        self.program.vectors.push(VectorKey { key, width: input.width / groups, heads: groups });
        let weight = self.program.vectors.len() - 1;
        self.push(Step::Norm { input, output, kind, groups, epsilon: self.spec.epsilon, weight });
    }

    fn linear(&mut self, input: Slice, output: Slice, role: Role, layer: Option<usize>) {
        let parts = vec![WeightKey { role, layer, expert: None }];
        self.program.matrices.push(MatrixKey { parts, rows: vec![output.width], columns: input.width });
        let weight = self.program.matrices.len() - 1;
        self.push(Step::Linear { input, output, weight });
    }

    fn push(&mut self, step: Step) {
        self.program.steps.push(step);
    }
}
