//! Mixture of experts: choosing experts per row, and running each expert over the rows that chose it.
//!
//! Rows of an expert are gathered, so its weights are read once per batch. Contributions are added in ascending order
//! of experts for every row, so a row's sum does not depend on its neighbours.

use infer_kernels::{Activation, Context, Precision, Rows, RowsMut, Scratch, gated_linear, linear};

use crate::weights::Matrix;

/// Which experts each row uses, and how much.
#[derive(Default)]
pub(crate) struct Routes {
    /// (expert, row, weight), in that order.
    chosen: Vec<(usize, usize, f32)>,
    order: Vec<usize>,
    weights: Vec<f32>,
    gathered: Vec<f32>,
    inner: Vec<f32>,
    result: Vec<f32>,
}

impl Routes {
    /// Softmax over all experts, then the `used` largest; ties go to the lower expert.
    pub fn choose(&mut self, logits: Rows<'_>, used: usize, renormalise: bool) {
        self.chosen.clear();
        for row in 0..logits.rows() {
            let logits = logits.row(row);
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            self.weights.clear();
            self.weights.extend(logits.iter().map(|logit| (logit - most).exp()));
            let sum: f32 = self.weights.iter().sum();
            self.order.clear();
            self.order.extend(0..logits.len());
            self.order.sort_by(|a, b| self.weights[*b].total_cmp(&self.weights[*a]).then(a.cmp(b)));
            self.order.truncate(used);
            let total = match renormalise {
                true => self.order.iter().map(|expert| self.weights[*expert]).sum(),
                false => sum,
            };
            self.chosen.extend(self.order.iter().map(|expert| (*expert, row, self.weights[*expert] / total)));
        }
        self.chosen.sort_unstable_by_key(|(expert, row, _)| (*expert, *row));
    }
}

/// The experts of one layer.
pub(crate) struct ExpertNetworks<'a> {
    pub gate_up: Vec<&'a Matrix>,
    pub down: Vec<&'a Matrix>,
    pub width: usize,
    pub activation: Activation,
    pub precision: Precision,
}

impl ExpertNetworks<'_> {
    /// Writes the weighted sum of the chosen experts of each row.
    pub fn run(
        &self,
        context: &Context,
        routes: &mut Routes,
        input: Rows<'_>,
        mut output: RowsMut<'_>,
        scratch: &mut Scratch,
    ) {
        for row in 0..output.rows() {
            output.row_mut(row).fill(0.0);
        }
        let chosen = std::mem::take(&mut routes.chosen);
        for group in chosen.chunk_by(|a, b| a.0 == b.0) {
            routes.gathered.clear();
            for (_, row, _) in group {
                routes.gathered.extend_from_slice(input.row(*row));
            }
            self.expert(context, group[0].0, group.len(), routes, input.width(), output.width(), scratch);
            for ((_, row, weight), result) in group.iter().zip(routes.result.chunks_exact(output.width())) {
                output.row_mut(*row).iter_mut().zip(result).for_each(|(sum, value)| *sum += weight * value);
            }
        }
        routes.chosen = chosen;
    }

    fn expert(
        &self,
        context: &Context,
        expert: usize,
        rows: usize,
        routes: &mut Routes,
        input_width: usize,
        output_width: usize,
        scratch: &mut Scratch,
    ) {
        let width = self.width;
        routes.inner.resize(rows * width, 0.0);
        routes.result.resize(rows * output_width, 0.0);
        let (gate_up, down) = (self.gate_up[expert], self.down[expert]);
        let gathered = Rows::new(&routes.gathered, rows, input_width, input_width);
        let inner = RowsMut::new(&mut routes.inner, rows, width, width);
        let (bias, activation) = (gate_up.bias.as_deref(), self.activation);
        gated_linear(context, &gate_up.packed, gathered, inner, bias, activation, self.precision, scratch);
        let inner = Rows::new(&routes.inner, rows, width, width);
        let result = RowsMut::new(&mut routes.result, rows, output_width, output_width);
        linear(context, &down.packed, inner, result, down.bias.as_deref(), self.precision, scratch);
    }
}

/// `destination += sigmoid(gate) * source`, one gate per row.
pub(crate) fn add_gated(source: Rows<'_>, gate: Rows<'_>, mut destination: RowsMut<'_>) {
    for row in 0..destination.rows() {
        let share = 1.0 / (1.0 + (-gate.row(row)[0]).exp());
        let target = destination.row_mut(row).iter_mut();
        target.zip(source.row(row)).for_each(|(sum, value)| *sum += share * value);
    }
}
