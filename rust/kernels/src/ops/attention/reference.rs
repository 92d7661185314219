//! The oracle of attention: plain softmax in f64 over keys and values given as a function.

use super::Attention;

/// The result of one query row, (heads, head_dim), at `position`. `key(j, kv_head)` and `value(j, kv_head)` give the key and the value at
/// position `j`, as stored.
pub fn attention_ref<'a>(
    attention: &Attention,
    query: &[f32],
    position: usize,
    key: impl Fn(usize, usize) -> &'a [f32],
    value: impl Fn(usize, usize) -> &'a [f32],
) -> Vec<f64> {
    let visible = attention.first_visible(position)..position + 1;
    let mut output = Vec::with_capacity(query.len());
    for (head, query) in query.chunks_exact(attention.head_dim).enumerate() {
        let kv_head = head / attention.group();
        let scores: Vec<f64> = visible
            .clone()
            .map(|j| {
                let dot: f64 =
                    query.iter().zip(key(j, kv_head)).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                let score = dot * f64::from(attention.scale);
                attention.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            })
            .collect();
        let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - greatest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut sums = vec![0.0; attention.head_dim];
        for (j, weight) in visible.clone().zip(&weights) {
            for (sum, &value) in sums.iter_mut().zip(value(j, kv_head)) {
                *sum += weight * f64::from(value);
            }
        }
        output.extend(sums.iter().map(|sum| sum / total));
    }
    output
}
