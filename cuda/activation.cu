// Activation functions, alone and as the gate of a product. Launch: grid (ceil(width / (threads * V)), rows).
#include "common.cuh"
#include "activation.cuh"

#ifndef VECTOR
#define VECTOR 1
#endif
constexpr int V = VECTOR;

// output = activation(gate) * up, all (rows, width).
KERNEL gated_activation(const T *gate, const T *up, T *output, int gate_stride, int up_stride, int output_stride, int width) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    float gates[V], ups[V];
    load<V>(gate + size_t(blockIdx.y) * gate_stride + column, gates);
    load<V>(up + size_t(blockIdx.y) * up_stride + column, ups);
#pragma unroll
    for (int i = 0; i < V; i++) gates[i] = activate(gates[i]) * ups[i];
    store<V>(output + size_t(blockIdx.y) * output_stride + column, gates);
}

// rows = activation(rows), (rows, width).
KERNEL activation(T *rows, int stride, int width) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    rows += size_t(blockIdx.y) * stride + column;
    float values[V];
    load<V>(rows, values);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] = activate(values[i]);
    store<V>(rows, values);
}
