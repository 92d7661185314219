// Mixture of experts: choosing experts per row, and running the chosen ones. A row's contributions are added in ascending order of
// experts, so its sum does not depend on its neighbours. Weights are read once per row that chose them: right for few rows.
#include "common.cuh"
#include "activation.cuh"
#include "weights.cuh"

#ifndef VECTOR
#define VECTOR 1
#endif
#ifndef MAX_EXPERTS
#define MAX_EXPERTS 256
#endif
constexpr int V = VECTOR;
constexpr int WARPS = 8;

// Softmax over all experts, then the `used` largest (ties go to the lower), written in ascending order of experts. Rows with a negative
// row_sequence choose no expert: -1. Launch: grid (rows), one warp.
KERNEL route(const T *logits, const int *row_sequence, int *chosen, float *weights, int stride, int experts, int used,
             int renormalise) {
    __shared__ float shares[MAX_EXPERTS];
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.x, lane = threadIdx.x;
    logits += size_t(row) * stride;
    chosen += row * used;
    weights += row * used;
    if (row_sequence[row] < 0) {
        for (int i = lane; i < used; i += WARP) chosen[i] = -1;
        return;
    }
    float most = -INFINITE, sum = 0.0f;
    for (int i = lane; i < experts; i += WARP) most = fmaxf(most, to_float(logits[i]));
    most = warp_max(most);
    for (int i = lane; i < experts; i += WARP) {
        shares[i] = expf(to_float(logits[i]) - most);
        sum += shares[i];
    }
    sum = warp_sum(sum);
    // Each expert counts those that come before it: it is chosen if they are fewer than `used`.
    __syncwarp();
    float total = 0.0f;
    int before = 0; // chosen experts of lower index, in all lanes
    for (int base = 0; base < experts; base += WARP) {
        const int own = base + lane;
        int rank = 0;
        for (int i = 0; i < experts && own < experts; i++) rank += shares[i] > shares[own] || (shares[i] == shares[own] && i < own);
        const bool is_chosen = own < experts && rank < used;
        const u32 votes = __ballot_sync(ALL_LANES, is_chosen);
        if (is_chosen) {
            const int place = before + __popc(votes & ((1u << lane) - 1));
            chosen[place] = own;
            weights[place] = shares[own];
            total += shares[own];
        }
        before += __popc(votes);
    }
    total = renormalise ? warp_sum(total) : sum;
    __syncwarp();
    for (int i = lane; i < used; i += WARP) weights[i] /= total;
}

// The dot product of a row of weights with a row of activations, by a warp.
DEVICE float dot(const Matrix &matrix, size_t row, const T *input, int lane) {
    float sum = 0.0f;
    for (int i = lane * V; i < matrix.columns; i += WARP * V) {
        float a[V], b[V];
        matrix.row(row, i, a);
        load<V>(input + i, b);
#pragma unroll
        for (int j = 0; j < V; j++) sum = fmaf(a[j], b[j], sum);
    }
    return warp_sum(sum);
}

// inner[row * used + i] = activation(gate) * up of the i-th chosen expert. weight is (experts, 2 * width, columns), gate first; bias
// (experts, 2 * width) may be null. Launch: grid (ceil(width / WARPS), rows * used), WARPS warps.
KERNEL experts_gate_up(const T *input, const int *chosen, const WEIGHT *weight, const float *bias, const Scale *scales,
                       const Scale *minima, T *inner, int input_stride, int columns, int width, int used, int group) {
    let_next_start();
    wait_for_previous();
    const int column = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, expert = chosen[blockIdx.y];
    if (column >= width || expert < 0) return;
    const size_t first = size_t(expert) * 2 * width;
    input += size_t(blockIdx.y / used) * input_stride;
    const Matrix matrix = {weight, scales, minima, columns, group};
    float gate = dot(matrix, first + column, input, lane), up = dot(matrix, first + width + column, input, lane);
    if (bias) gate += bias[first + column], up += bias[first + width + column];
    if (lane == 0) inner[size_t(blockIdx.y) * width + column] = from_float<T>(activate(gate) * up);
}

// output[row] = sum over the chosen experts of their weight times (down * inner). weight is (experts, rows of weight, width); bias
// (experts, rows of weight) may be null. Launch: grid (ceil(rows of weight / WARPS), rows), WARPS warps.
KERNEL experts_down(const T *inner, const int *chosen, const float *weights, const WEIGHT *weight, const float *bias,
                    const Scale *scales, const Scale *minima, T *output, int output_stride, int weight_rows, int width, int used,
                    int group) {
    let_next_start();
    wait_for_previous();
    const int column = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, row = blockIdx.y;
    if (column >= weight_rows) return;
    const Matrix matrix = {weight, scales, minima, width, group};
    float sum = 0.0f;
    for (int i = 0; i < used; i++) {
        const int expert = chosen[row * used + i];
        if (expert < 0) continue;
        const size_t place = size_t(expert) * weight_rows + column;
        float result = dot(matrix, place, inner + size_t(row * used + i) * width, lane);
        if (bias) result += bias[place];
        sum = fmaf(weights[row * used + i], result, sum);
    }
    if (lane == 0) output[size_t(row) * output_stride + column] = from_float<T>(sum);
}
