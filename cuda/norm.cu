// Root-mean-square and layer normalisation of rows, whole or in groups (heads).
//
// LAYER_NORM 1 subtracts the mean as well. Input and output may be the same rows: a thread reads again only what it wrote itself.
// Whole rows stay in registers, VECTORS of V values for each thread, so memory is read once; V is 1 where rows are not aligned, and then
// they are read again. The division among threads follows from the width alone, and so does the order of sums.
#include "common.cuh"
#include "round.cuh"

#ifndef VECTOR
#define VECTOR 1
#endif
#ifndef VECTORS
#define VECTORS 4
#endif
#ifndef LAYER_NORM
#define LAYER_NORM 0
#endif
constexpr int V = VECTOR;

struct BlockSum {
    float *scratch;
    DEVICE float operator()(float value) const { return block_sum(value, scratch); }
};

struct WarpSum {
    DEVICE float operator()(float value) const { return warp_sum(value); }
};

// Normalises `width` values with `threads` threads, of which this is number `thread`. weight and bias may be null.
template <class Sum>
DEVICE void normalise(const T *input, T *output, const float *weight, const float *bias, int width, float epsilon, int thread,
                      int threads, Sum sum) {
    float mean = 0.0f, square = 0.0f, values[V];
    if (LAYER_NORM) {
        for (int i = thread * V; i < width; i += threads * V) {
            load<V>(input + i, values);
#pragma unroll
            for (int j = 0; j < V; j++) mean += values[j];
        }
        mean = sum(mean) / width;
    }
    for (int i = thread * V; i < width; i += threads * V) {
        load<V>(input + i, values);
#pragma unroll
        for (int j = 0; j < V; j++) square = fmaf(values[j] - mean, values[j] - mean, square);
    }
    const float scale = 1.0f / sqrtf(sum(square) / width + epsilon);
    for (int i = thread * V; i < width; i += threads * V) {
        load<V>(input + i, values);
#pragma unroll
        for (int j = 0; j < V; j++) {
            values[j] = (values[j] - mean) * scale;
            if (weight) values[j] *= weight[i + j];
            if (bias) values[j] += bias[i + j];
        }
        store<V>(output + i, values);
    }
}

#if VECTOR == 8
// A block's row in registers, as it lies in memory: values (threadIdx.x + i * blockDim.x) * 8 and those that follow.
struct HeldRow {
    Part<8> parts[VECTORS];
    int width;

    DEVICE bool column(int i, int &column) const {
        column = (threadIdx.x + i * blockDim.x) * 8;
        return column < width;
    }

    DEVICE void read(const T *input) {
        int at;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (column(i, at)) parts[i].read(input + at);
        }
    }

    DEVICE void write(T *output) const {
        int at;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (column(i, at)) parts[i].write(output + at);
        }
    }

    // The row's norm in its place.
    DEVICE void normalise(const float *weight, const float *bias, float epsilon, float *scratch) {
        float mean = 0.0f, square = 0.0f, values[8];
        int at;
        if (LAYER_NORM) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                if (!column(i, at)) continue;
                parts[i].get(values);
#pragma unroll
                for (int j = 0; j < 8; j++) mean += values[j];
            }
            mean = block_sum(mean, scratch) / width;
        }
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (!column(i, at)) continue;
            parts[i].get(values);
#pragma unroll
            for (int j = 0; j < 8; j++) square = fmaf(values[j] - mean, values[j] - mean, square);
        }
        const float scale = 1.0f / sqrtf(block_sum(square, scratch) / width + epsilon);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (!column(i, at)) continue;
            float factors[8];
            parts[i].get(values);
            if (weight) load<8>(weight + at, factors);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                values[j] = (values[j] - mean) * scale;
                if (weight) values[j] *= factors[j];
                if (bias) values[j] += bias[at + j];
            }
            parts[i].set(values);
        }
    }
};
#endif

// output = norm(input), (rows, width). Launch: grid (rows); with V of 8, VECTORS * 8 values for each thread.
KERNEL norm_rows(const T *input, T *output, const float *weight, const float *bias, int input_stride, int output_stride, int width,
            float epsilon) {
    __shared__ float scratch[WARP];
    let_next_start();
    wait_for_previous();
    input += size_t(blockIdx.x) * input_stride, output += size_t(blockIdx.x) * output_stride;
#if VECTOR == 8
    HeldRow row;
    row.width = width;
    row.read(input);
    row.normalise(weight, bias, epsilon, scratch);
    row.write(output);
#else
    normalise(input, output, weight, bias, width, epsilon, threadIdx.x, blockDim.x, BlockSum{scratch});
#endif
}

// output = norm(input) for `groups` groups of `width` values in every row; a group's weights begin at group * weight_step. A warp per group.
// Launch: grid (ceil(groups / warps), rows).
KERNEL norm_groups(const T *input, T *output, const float *weight, const float *bias, int input_stride, int output_stride,
                   int width, int groups, int weight_step, float epsilon) {
    let_next_start();
    wait_for_previous();
    const int group = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (group >= groups) return;
    normalise(input + size_t(blockIdx.y) * input_stride + group * width,
              output + size_t(blockIdx.y) * output_stride + group * width, weight ? weight + group * weight_step : nullptr,
              bias ? bias + group * weight_step : nullptr, width, epsilon, threadIdx.x % WARP, WARP, WarpSum{});
}

// hidden += scale * branch; output = norm(hidden). Launch: as norm_rows.
KERNEL add_norm(T *hidden, const T *branch, T *output, const float *weight, const float *bias, int hidden_stride,
                int branch_stride, int output_stride, int width, float scale, float epsilon) {
    __shared__ float scratch[WARP];
    let_next_start();
    wait_for_previous();
    hidden += size_t(blockIdx.x) * hidden_stride, output += size_t(blockIdx.x) * output_stride;
    branch += size_t(blockIdx.x) * branch_stride;
    float sum[V], more[V];
#if VECTOR == 8
    HeldRow row, other;
    row.width = other.width = width;
    row.read(hidden);
    other.read(branch);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at;
        if (!row.column(i, at)) continue;
        row.parts[i].get(sum);
        other.parts[i].get(more);
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] = fmaf(scale, more[j], sum[j]);
        row.parts[i].set(sum);
        row.parts[i].write(hidden + at);
    }
    row.normalise(weight, bias, epsilon, scratch);
    row.write(output);
#else
    for (int i = threadIdx.x * V; i < width; i += blockDim.x * V) {
        load<V>(hidden + i, sum);
        load<V>(branch + i, more);
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] = fmaf(scale, more[j], sum[j]);
        store<V>(hidden + i, sum);
    }
    normalise(hidden, output, weight, bias, width, epsilon, threadIdx.x, blockDim.x, BlockSum{scratch});
#endif
}

#if VECTOR == 8
// The norm rounded to T, and then to E4M3 as `quantize` of linear.cu does: output (rows, width) and scales (rows). Launch: as norm_rows.
KERNEL norm_round(const T *input, e4m3 *output, float *scales, const float *weight, int input_stride, int width, float epsilon) {
    __shared__ float scratch[WARP];
    let_next_start();
    wait_for_previous();
    HeldRow row;
    row.width = width;
    row.read(input + size_t(blockIdx.x) * input_stride);
    row.normalise(weight, nullptr, epsilon, scratch);
    float greatest = 0.0f, values[8];
    int at;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if (!row.column(i, at)) continue;
        row.parts[i].get(values);
#pragma unroll
        for (int j = 0; j < 8; j++) greatest = fmaxf(greatest, fabsf(values[j]));
    }
    const float factor = round_factor(block_max(greatest, scratch), scales + blockIdx.x);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if (!row.column(i, at)) continue;
        row.parts[i].get(values);
        store_rounded(output + size_t(blockIdx.x) * width + at, values, factor);
    }
}
#endif
