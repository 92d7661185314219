// Root-mean-square and layer normalisation of rows, whole or in groups (heads).
//
// LAYER_NORM 1 subtracts the mean as well. Input and output may be the same rows: a thread reads again only what it wrote itself.
#include "common.cuh"

#ifndef VECTOR
#define VECTOR 1
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

// output = norm(input), (rows, width). Launch: grid (rows).
KERNEL norm_rows(const T *input, T *output, const float *weight, const float *bias, int input_stride, int output_stride, int width,
            float epsilon) {
    __shared__ float scratch[WARP];
    let_next_start();
    wait_for_previous();
    normalise(input + size_t(blockIdx.x) * input_stride, output + size_t(blockIdx.x) * output_stride, weight, bias, width,
              epsilon, threadIdx.x, blockDim.x, BlockSum{scratch});
}

// The same for `groups` groups of `width` values in every row; a group's weights begin at group * weight_step. A warp per group.
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

// hidden += scale * branch; output = norm(hidden). Launch: grid (rows).
KERNEL add_norm(T *hidden, const T *branch, T *output, const float *weight, const float *bias, int hidden_stride,
                int branch_stride, int output_stride, int width, float scale, float epsilon) {
    __shared__ float scratch[WARP];
    let_next_start();
    wait_for_previous();
    hidden += size_t(blockIdx.x) * hidden_stride;
    branch += size_t(blockIdx.x) * branch_stride;
    for (int i = threadIdx.x * V; i < width; i += blockDim.x * V) {
        float sum[V], more[V];
        load<V>(hidden + i, sum);
        load<V>(branch + i, more);
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] = fmaf(scale, more[j], sum[j]);
        store<V>(hidden + i, sum);
    }
    normalise(hidden, output + size_t(blockIdx.x) * output_stride, weight, bias, width, epsilon, threadIdx.x, blockDim.x,
              BlockSum{scratch});
}
