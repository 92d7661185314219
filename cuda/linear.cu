// A weight matrix times input rows, the plain way: any shape, alignment and type of weight, in float. What runs where neither the
// streaming kernel (linear_stream.cu) nor cuBLASLt applies, and the oracle of both.
#include "common.cuh"
#include "weights.cuh"
#include "round.cuh"
#include "digits.cuh"
#include "halves.cuh"

#ifndef OUTPUT
#define OUTPUT T
#endif
#ifndef VECTOR
#define VECTOR 1
#endif
constexpr int V = VECTOR;
constexpr int WARPS = 8;
constexpr int ROWS = 4; // input rows that share a reading of the weights

// output = input * weight^T + bias; weight, scales and minima as weights.cuh says; bias (weight_rows) may be null. With `add` not 0: output += add * that. A warp per row of the weight.
// Launch: grid (ceil(weight_rows / WARPS), ceil(rows / ROWS)), WARPS warps.
KERNEL linear(const T *input, const WEIGHT *weight, const float *bias, const Scale *scales, const Scale *minima, OUTPUT *output,
              int input_stride, int output_stride, int rows, int weight_rows, int columns, int group, float add) {
    let_next_start();
    wait_for_previous();
    const int column = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, first = blockIdx.y * ROWS;
    if (column >= weight_rows) return;
    const Matrix matrix = {weight, scales, minima, columns, group};
    float sums[ROWS] = {};
    for (int i = lane * V; i < columns; i += WARP * V) {
        float a[V];
        matrix.row(column, i, a);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (first + row >= rows) break;
            float b[V];
            load<V>(input + size_t(first + row) * input_stride + i, b);
#pragma unroll
            for (int j = 0; j < V; j++) sums[row] = fmaf(a[j], b[j], sums[row]);
        }
    }
    for (int row = 0; row < ROWS && first + row < rows; row++) {
        const float sum = warp_sum(sums[row]) + (bias ? bias[column] : 0.0f);
        OUTPUT *place = output + size_t(first + row) * output_stride + column;
        if (lane == 0) *place = from_float<OUTPUT>(add != 0.0f ? fmaf(add, sum, to_float(*place)) : sum);
    }
}

// output = weight as T, times its scales: what cuBLASLt multiplies by many rows. Rows from `first` on, weight_rows of them in all.
// Launch: grid (ceil(columns / (threads * V)), rows).
KERNEL dequantize(const WEIGHT *weight, const Scale *scales, const Scale *minima, T *output, int first, int columns, int group) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= columns) return;
    const Matrix matrix = {weight, scales, minima, columns, group};
    float values[V];
    matrix.row(first + blockIdx.y, column, values);
    store<V>(output + size_t(blockIdx.y) * columns + column, values);
}

// Rows in E4M3, each with its scale: the greatest magnitude becomes 448. output is (rows, columns), contiguous. Launch: grid (rows).
KERNEL quantize(const T *input, e4m3 *output, float *scales, int input_stride, int columns) {
    __shared__ float scratch[WARP];
    let_next_start();
    wait_for_previous();
    input += size_t(blockIdx.x) * input_stride;
    output += size_t(blockIdx.x) * columns;
    float greatest = 0.0f, values[V];
    for (int i = threadIdx.x * V; i < columns; i += blockDim.x * V) {
        load<V>(input + i, values);
#pragma unroll
        for (int j = 0; j < V; j++) greatest = fmaxf(greatest, fabsf(values[j]));
    }
    const float factor = round_factor(block_max(greatest, scratch), scales + blockIdx.x);
    for (int i = threadIdx.x * V; i < columns; i += blockDim.x * V) {
        load<V>(input + i, values);
        store_rounded<V>(output + i, values, factor);
    }
}

// Rows as digits.cuh says, for packed weights, or halves.cuh, for linear_stream.cu: (ceil(columns / 128), rows, bytes of a row's step).
// columns are a multiple of 8, and rows aligned to 16 bytes. Launch: grid (ceil(columns / (256 * WARPS)), rows), WARPS warps.
KERNEL prepare(const T *input, u8 *output, int input_stride, int rows, int columns) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % WARP, step = (blockIdx.x * WARPS + threadIdx.x / WARP) * 2 + lane / 16, column = step * 128 + lane % 16 * 8;
    float values[8] = {};
    if (column < columns) load<8>(input + size_t(blockIdx.y) * input_stride + column, values);
    const bool exists = step * 128 < columns;
    if (PACKED) {
        write_digits(values, output + size_t(step) * rows * DIGIT_BYTES, rows, blockIdx.y, lane % 16, exists);
    } else {
        write_halves(values, output + size_t(step) * rows * HALF_BYTES, rows, blockIdx.y, lane % 16, exists);
    }
}
