// A weight matrix times input rows, the plain way: any shape, alignment and type of weight, in float. What runs where neither the
// streaming kernel (linear_stream.cu) nor cuBLASLt applies, and the oracle of both.
#include "common.cuh"

#ifndef WEIGHT
#define WEIGHT bf16
#endif
#ifndef OUTPUT
#define OUTPUT T
#endif
#ifndef VECTOR
#define VECTOR 1
#endif
constexpr int V = VECTOR;
constexpr int WARPS = 8;
constexpr int ROWS = 4; // input rows that share a reading of the weights

// output = input * weight^T + bias; weight is (weight_rows, columns), scales (weight_rows, ceil(columns / group)) for 8-bit types, else null;
// bias (weight_rows) may be null. With `add` not 0: output += add * that. A warp per row of the weight.
// Launch: grid (ceil(weight_rows / WARPS), ceil(rows / ROWS)), WARPS warps.
KERNEL linear(const T *input, const WEIGHT *weight, const float *bias, const float *scales, OUTPUT *output, int input_stride,
              int output_stride, int rows, int weight_rows, int columns, int group, float add) {
    let_next_start();
    wait_for_previous();
    const int column = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, first = blockIdx.y * ROWS;
    if (column >= weight_rows) return;
    float sums[ROWS] = {};
    for (int i = lane * V; i < columns; i += WARP * V) {
        float a[V];
        load<V>(weight + size_t(column) * columns + i, a);
        const float factor = sizeof(WEIGHT) == 1 ? scales[size_t(column) * ((columns + group - 1) / group) + i / group] : 1.0f;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (first + row >= rows) break;
            float b[V], part = 0.0f;
            load<V>(input + size_t(first + row) * input_stride + i, b);
#pragma unroll
            for (int j = 0; j < V; j++) part = fmaf(a[j], b[j], part);
            sums[row] = fmaf(factor, part, sums[row]);
        }
    }
    for (int row = 0; row < ROWS && first + row < rows; row++) {
        const float sum = warp_sum(sums[row]) + (bias ? bias[column] : 0.0f);
        OUTPUT *place = output + size_t(first + row) * output_stride + column;
        if (lane == 0) *place = from_float<OUTPUT>(add != 0.0f ? fmaf(add, sum, to_float(*place)) : sum);
    }
}

// output = weight as bfloat16: what cuBLASLt multiplies by many rows. Launch: grid (ceil(columns / (threads * V)), weight_rows).
KERNEL dequantize(const WEIGHT *weight, const float *scales, bf16 *output, int columns, int group) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= columns) return;
    const size_t row = blockIdx.y;
    const float factor = sizeof(WEIGHT) == 1 ? scales[row * ((columns + group - 1) / group) + column / group] : 1.0f;
    float values[V];
    load<V>(weight + row * columns + column, values);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] *= factor;
    store<V>(output + row * columns + column, values);
}
