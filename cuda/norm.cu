// Root-mean-square and layer normalisation of rows, whole or in groups (heads).
//
// LAYER_NORM 1 subtracts the mean as well. Input and output may be the same rows: a thread reads again only what it wrote itself.
// Whole rows stay in registers, VECTORS of V values for each thread, so memory is read once; V is 1 where rows are not aligned, and then
// they are read again. The division among threads follows from the width alone, and so does the order of sums.
//
// The weight of whole rows is read before the kernel waits for what is to be normalised (64 rows rounded to E4M3: 3.0 us on an H100, now 2.1).
// Behind a product, a block's 256 threads read and add up a row of 8,192 numbers in 1.0 to 1.4 us, normalise it in 0.7 and store it in 0.5; that
// they run once on nothing while they wait, so that their instructions are there, changed nothing.
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
#ifndef AHEAD
#define AHEAD 0 // 1: blocks take several rows of bfloat16, of which the next are read while one is finished
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
    float factors[VECTORS][8]; // the norm's weight
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

    // Reads the norm's weight, or ones where it is null: before the row, which earlier kernels write.
    DEVICE void read_weight(const float *weight) {
        int at;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (weight && column(i, at)) {
                load<8>(weight + at, factors[i]);
            } else {
#pragma unroll
                for (int j = 0; j < 8; j++) factors[i][j] = 1.0f;
            }
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
    DEVICE void normalise(const float *bias, float epsilon, Reductions &block) {
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
            mean = block.sum(mean) / width;
        }
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (!column(i, at)) continue;
            parts[i].get(values);
#pragma unroll
            for (int j = 0; j < 8; j++) square = fmaf(values[j] - mean, values[j] - mean, square);
        }
        const float scale = 1.0f / sqrtf(block.sum(square) / width + epsilon);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (!column(i, at)) continue;
            parts[i].get(values);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                values[j] = (values[j] - mean) * scale * factors[i][j];
                if (bias) values[j] += bias[at + j];
            }
            parts[i].set(values);
        }
    }

#ifndef INFER_F32
    // Stores the row in E4M3, and its scale, as `quantize` of linear.cu does.
    template <class Threads> DEVICE void write_rounded(e4m3 *output, float *place, Threads &all) const {
        u32 greatest = 0;
        int at;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (column(i, at)) greatest = greatest_of(parts[i], greatest);
        }
        const float factor = round_factor(all, greatest, place);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (column(i, at)) store_rounded(output + at, parts[i], factor);
        }
    }
#endif
};

// Reads the block's row and finishes it, or with AHEAD its rows one after the other: then each is asked for when the second before it has been
// read, in shared memory of which a thread alone writes and reads its places, for memory takes long to answer; and the norm's weight is
// read but once.
template <class Finish> DEVICE void over_rows(const T *input, int stride, int rows, HeldRow &row, const Finish &finish) {
    input += size_t(blockIdx.x) * stride;
#if AHEAD
    extern __shared__ uint4 dynamic[]; // (2, VECTORS, threads)
    uint4 *const places = dynamic + threadIdx.x;
    int asked = blockIdx.x, at;
    const auto ask = [&](int slot) {
#pragma unroll
        for (int j = 0; j < VECTORS; j++) {
            if (asked < rows && row.column(j, at)) copy_16(places + (slot * VECTORS + j) * blockDim.x, input + at);
        }
        end_group();
        asked += gridDim.x, input += size_t(gridDim.x) * stride;
    };
    ask(0), ask(1);
    int slot = 0;
#pragma unroll 1
    for (int i = blockIdx.x; i < rows; i += gridDim.x, slot ^= 1) {
        wait_group<1>();
#pragma unroll
        for (int j = 0; j < VECTORS; j++) row.parts[j].words[0] = places[(slot * VECTORS + j) * blockDim.x];
        ask(slot);
        finish(i);
    }
#else
    row.read(input);
    finish(blockIdx.x);
#endif
}
#endif

// output = norm(input), (rows, width). Launch: grid (rows); with V of 8 VECTORS * 8 values for each thread,
// and with AHEAD any grid, and 2 * VECTORS * 16 bytes of dynamic shared memory for each.
KERNEL norm_rows(const T *input, T *output, const float *weight, const float *bias, int input_stride, int output_stride, int width, int rows,
            float epsilon) {
    let_next_start();
#if VECTOR == 8
    __shared__ alignas(16) u32 scratch[2][WARP];
    Reductions block(scratch);
    HeldRow row;
    row.width = width;
    row.read_weight(weight);
    wait_for_previous();
    over_rows(input, input_stride, rows, row, [&](int i) {
        row.normalise(bias, epsilon, block);
        row.write(output + size_t(i) * output_stride);
    });
#else
    __shared__ float scratch[WARP];
    wait_for_previous();
    input += size_t(blockIdx.x) * input_stride, output += size_t(blockIdx.x) * output_stride;
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
    let_next_start();
    hidden += size_t(blockIdx.x) * hidden_stride, output += size_t(blockIdx.x) * output_stride;
    branch += size_t(blockIdx.x) * branch_stride;
    float sum[V], more[V];
#if VECTOR == 8
    __shared__ alignas(16) u32 scratch[2][WARP];
    Reductions block(scratch);
    HeldRow row, other;
    row.width = other.width = width;
    row.read_weight(weight);
    wait_for_previous();
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
    row.normalise(bias, epsilon, block);
    row.write(output);
#else
    __shared__ float scratch[WARP];
    wait_for_previous();
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

#if VECTOR == 8 && !defined(INFER_F32)
// The norm rounded to T, and then to E4M3: output (rows, width) and scales (rows). Launch: as norm_rows.
KERNEL norm_round(const T *input, e4m3 *output, float *scales, const float *weight, int input_stride, int width, int rows, float epsilon) {
    __shared__ alignas(16) u32 scratch[2][WARP];
    Reductions block(scratch);
    let_next_start();
    HeldRow row;
    row.width = width;
    row.read_weight(weight);
    wait_for_previous();
    over_rows(input, input_stride, rows, row, [&](int i) {
        row.normalise(nullptr, epsilon, block);
        row.write_rounded(output + size_t(i) * width, scales + i, block);
    });
}

// Rows as they are, likewise. Where SHARES blocks share each row, they are a cluster, without AHEAD: grid (rows * SHARES).
KERNEL round_rows(const T *input, e4m3 *output, float *scales, int input_stride, int width, int rows) {
    __shared__ alignas(16) u32 scratch[2][WARP];
    let_next_start();
    HeldRow row;
#if SHARES > 1
    __shared__ u64 barrier;
    const Sharers all = {u32(__cvta_generic_to_shared(&barrier)), u32(__cvta_generic_to_shared(scratch)), blockIdx.x % SHARES};
    all.begin();
    wait_for_previous();
    const int number = blockIdx.x / SHARES, part = (width / 8 + SHARES - 1) / SHARES * 8, first = int(all.rank) * part;
    row.width = min(part, width - first);
    row.read(input + size_t(number) * input_stride + first);
    row.write_rounded(output + size_t(number) * width + first, scales + number, all); // all store the same scale
#else
    Reductions block(scratch);
    wait_for_previous();
    row.width = width;
    over_rows(input, input_stride, rows, row, [&](int i) { row.write_rounded(output + size_t(i) * width, scales + i, block); });
#endif
}
#endif
