// Sums and scalings of whole rows. Launch: grid (ceil(width / (threads * V)), rows).
#include "common.cuh"

#ifndef VECTOR
#define VECTOR 1
#endif
#ifndef GATE
#define GATE T
#endif
constexpr int V = VECTOR;

// First column of this thread, or `width` and beyond if it has none.
DEVICE int column() { return (blockIdx.x * blockDim.x + threadIdx.x) * V; }

// destination += scale * source, both (rows, width); one rounding to float and one to T.
KERNEL add(T *destination, const T *source, int destination_stride, int source_stride, int width, float scale) {
    let_next_start();
    wait_for_previous();
    if (column() >= width) return;
    destination += size_t(blockIdx.y) * destination_stride + column();
    source += size_t(blockIdx.y) * source_stride + column();
    float sum[V], more[V];
    load<V>(destination, sum);
    load<V>(source, more);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] = fmaf(scale, more[i], sum[i]);
    store<V>(destination, sum);
}

// destination += sigmoid(gate) * source; gate is (rows, 1), of type GATE.
KERNEL add_gated(T *destination, const T *source, const GATE *gate, int destination_stride, int source_stride, int gate_stride,
                 int width) {
    let_next_start();
    wait_for_previous();
    if (column() >= width) return;
    const float share = 1.0f / (1.0f + expf(-to_float(gate[size_t(blockIdx.y) * gate_stride])));
    destination += size_t(blockIdx.y) * destination_stride + column();
    source += size_t(blockIdx.y) * source_stride + column();
    float sum[V], more[V];
    load<V>(destination, sum);
    load<V>(source, more);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] = fmaf(share, more[i], sum[i]);
    store<V>(destination, sum);
}

// destination = beta * destination + alpha * (the sum of `count` parts, one after the other as wide as the rows, + bias). The parts are floats.
KERNEL add_parts(T *destination, const float *parts, const float *bias, int stride, int width, int count, float alpha, float beta) {
    let_next_start();
    if (column() >= width) return;
    destination += size_t(blockIdx.y) * stride + column(), parts += size_t(blockIdx.y) * width + column();
    float sum[V], more[V];
#pragma unroll
    for (int i = 0; i < V; i++) more[i] = bias ? bias[column() + i] : 0.0f;
    wait_for_previous();
    load<V>(parts, sum);
#pragma unroll 4
    for (int part = 1; part < count; part++) {
        float own[V];
        load<V>(parts + size_t(part) * gridDim.y * width, own);
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] += own[i];
    }
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] = alpha * (sum[i] + more[i]);
    if (beta != 0.0f) {
        load<V>(destination, more);
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] = fmaf(beta, more[i], sum[i]);
    }
    store<V>(destination, sum);
}

// rows *= factor.
KERNEL scale(T *rows, int stride, int width, float factor) {
    let_next_start();
    wait_for_previous();
    if (column() >= width) return;
    rows += size_t(blockIdx.y) * stride + column();
    float values[V];
    load<V>(rows, values);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] *= factor;
    store<V>(rows, values);
}

// rows = cap * tanh(rows / cap).
KERNEL softcap(T *rows, int stride, int width, float cap) {
    let_next_start();
    wait_for_previous();
    if (column() >= width) return;
    rows += size_t(blockIdx.y) * stride + column();
    const float inverse = 1.0f / cap;
    float values[V];
    load<V>(rows, values);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] = cap * tanhf(values[i] * inverse);
    store<V>(rows, values);
}

// rows += factor * bias, the same for every row.
KERNEL add_bias(T *rows, const float *bias, int stride, int width, float factor) {
    let_next_start();
    wait_for_previous();
    if (column() >= width) return;
    rows += size_t(blockIdx.y) * stride + column();
    float values[V], more[V];
    load<V>(rows, values);
    load<V>(bias + column(), more);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] = fmaf(factor, more[i], values[i]);
    store<V>(rows, values);
}
