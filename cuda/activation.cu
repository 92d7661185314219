// Activation functions, alone and as the gate of a product.
#include "common.cuh"
#include "round.cuh"
#include "activation.cuh"

#ifndef VECTOR
#define VECTOR 1
#endif
#ifndef VECTORS
#define VECTORS 1 // of V values, for each thread: more keep memory busy where there are many rows
#endif
constexpr int V = VECTOR;

// A thread's part of a row: VECTORS times V values of the gate and of up, all read before the first is needed.
struct Pairs {
    Part<V> gates[VECTORS], ups[VECTORS];
    int first, step, width;

    DEVICE bool column(int i, int &column) const {
        column = first + i * step;
        return column < width;
    }

    // Gates become what is to be stored.
    DEVICE void activate_all(const T *gate, const T *up) {
        int at;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (!column(i, at)) continue;
            gates[i].read(gate + at);
            ups[i].read(up + at);
        }
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            float values[V], others[V];
            gates[i].get(values);
            ups[i].get(others);
#pragma unroll
            for (int j = 0; j < V; j++) values[j] = activate(values[j]) * others[j];
            gates[i].set(values);
        }
    }
};

// output = activation(gate) * up, all (rows, width). Launch: grid (ceil(width / (threads * V * VECTORS)), rows).
KERNEL gated_activation(const T *gate, const T *up, T *output, int gate_stride, int up_stride, int output_stride, int width) {
    let_next_start();
    wait_for_previous();
    Pairs own;
    own.first = (blockIdx.x * blockDim.x * VECTORS + threadIdx.x) * V, own.step = blockDim.x * V, own.width = width;
    own.activate_all(gate + size_t(blockIdx.y) * gate_stride, up + size_t(blockIdx.y) * up_stride);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at;
        if (own.column(i, at)) own.gates[i].write(output + size_t(blockIdx.y) * output_stride + at);
    }
}

// The same rounded to T, and then to E4M3 as `quantize` of linear.cu does: output (rows, width) and scales (rows). Launch: grid (rows), as
// many threads as VECTORS * V values for each need.
KERNEL gated_round(const T *gate, const T *up, e4m3 *output, float *scales, int gate_stride, int up_stride, int width) {
    __shared__ float scratch[WARP];
    let_next_start();
    wait_for_previous();
    Pairs own;
    own.first = threadIdx.x * V, own.step = blockDim.x * V, own.width = width;
    own.activate_all(gate + size_t(blockIdx.x) * gate_stride, up + size_t(blockIdx.x) * up_stride);
    float greatest = 0.0f, values[V];
    int at;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if (!own.column(i, at)) continue;
        own.gates[i].get(values);
#pragma unroll
        for (int j = 0; j < V; j++) greatest = fmaxf(greatest, fabsf(values[j]));
    }
    const float factor = round_factor(block_max(greatest, scratch), scales + blockIdx.x);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if (!own.column(i, at)) continue;
        own.gates[i].get(values);
        store_rounded<V>(output + size_t(blockIdx.x) * width + at, values, factor);
    }
}

// rows = activation(rows), (rows, width). Launch: grid (ceil(width / (threads * V)), rows).
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
