// Rows that are looked up: embeddings, learned positions, and the rows whose logits are wanted.
// Launch: grid (ceil(width / (threads * V)), rows).
#include "common.cuh"

#ifndef VECTOR
#define VECTOR 1
#endif
#ifndef WEIGHT
#define WEIGHT T // element type of the table
#endif
#include "weights.cuh"
constexpr int V = VECTOR;

// output[row] = scale * table[token]; a token beyond the table gives zeros. A token of -1 - i is the one that `chosen` has in place i.
KERNEL embed(const WEIGHT *table, const Scale *scales, const Scale *minima, const int *tokens, const int *chosen, T *output,
             int table_rows, int output_stride, int width, int group, float scale) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    int token = tokens[blockIdx.y];
    if (token < 0) token = chosen[~token];
    float values[V] = {};
    if (u32(token) < u32(table_rows)) Matrix{table, scales, minima, width, group}.row(token, column, values);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] *= scale;
    store<V>(output + size_t(blockIdx.y) * output_stride + column, values);
}

// rows[row] += table[positions[row]]; a position beyond the table adds nothing.
KERNEL add_position(const WEIGHT *table, const int *positions, T *rows, int table_rows, int stride, int width) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    const int position = positions[blockIdx.y];
    if (u32(position) >= u32(table_rows)) return;
    rows += size_t(blockIdx.y) * stride + column;
    float learned[V], values[V];
    load<V>(table + size_t(position) * width + column, learned);
    load<V>(rows, values);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] += learned[i];
    store<V>(rows, values);
}

// output[row] = input[wanted[row]].
KERNEL select(const T *input, const int *wanted, T *output, int input_stride, int output_stride, int width) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    float values[V];
    load<V>(input + size_t(wanted[blockIdx.y]) * input_stride + column, values);
    store<V>(output + size_t(blockIdx.y) * output_stride + column, values);
}
