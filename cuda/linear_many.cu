// A weight matrix times 17 to 128 input rows, at the speed of reading the weights once: decoding of many sequences.
//
// A warp has 16 weight rows and all tokens, and four warps are a group; there is one block on a multiprocessor. Columns come in steps,
// through a ring of STAGES in shared memory: of the weights each lane reads what it multiplies itself, in the order of the matrix
// instructions, and the input rows, which `arrange` has brought into the order that their columns have there, are shared by all warps.
// Where there are fewer blocks than multiprocessors, columns are split: among groups of warps (those of a column group share the input
// rows of a step), and among the blocks of a cluster, which add their sums through their shared memory, each for its part of the outputs.
// The order is fixed, and a row's result depends on no other row.
//
// Instructions are what limits it: unpacking a weight takes two, so everything else is kept short. Input rows are brought by the copy
// engine where there is one (BULK); it takes a thread ten instructions a piece, so weights, in many small pieces, are copied by all lanes.
//
// EPILOGUE: as epilogue.cuh says.
#include "common.cuh"
#include "activation.cuh"
#include "mma.cuh"
#include "many_weights.cuh"
#include "epilogue.cuh"

#ifndef STAGES
#define STAGES 4
#endif
static_assert(STAGES >= 4, "copies are two steps ahead, and warps up to two steps apart");
static_assert(TOKENS % 32 == 0 && TILES == 1, "tokens are a multiple of 32, weight rows of a warp 16");

constexpr int AHEAD = STAGES - 2; // steps that are under way before one is multiplied

#if __CUDA_ARCH__ >= 900
#define BULK 1
#else
#define BULK 0
#endif

// The ring of stages: which are full, and which nobody reads any more. Warps may be two steps apart, so that while one unpacks, another
// multiplies.
struct Ring {
    u32 barriers, stage_bytes;

    DEVICE void begin(int warps) const {
        const int arrivals = warps * (BULK ? WARP + 1 : WARP);
        for (int i = 0; i < STAGES; i++) begin_barrier(full(i), arrivals), begin_barrier(free(i), warps);
#if BULK
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // the copy engine sees them
#endif
    }

    DEVICE u32 full(int slot) const { return barriers + slot * 8; }
    DEVICE u32 free(int slot) const { return barriers + (STAGES + slot) * 8; }
};

// What a warp copies of each step.
struct Copies {
    Weights &weights;
    const Ring &ring;
    const u8 *arranged; // input rows
    u64 keeping;
    u32 own, inputs; // where the warp's weights and the column group's input rows are in a stage
    int begin, end, row_warp, row_warps, lane;

    // Starts copying the weights of step i of the column group, or tells that there are none. They do not wait for earlier kernels.
    DEVICE void start_weights(int slot, int i) const {
        const bool exists = begin + i < end;
        if (exists) weights.copy(own + slot * ring.stage_bytes);
#if BULK
        if (lane == 0) arrive_expecting(ring.full(slot), exists && row_warp == 0 ? INPUT_BYTES : 0);
        arrive_with_copies(ring.full(slot));
#endif
    }

    // The same for input rows.
    DEVICE void start_inputs(int slot, int i) const {
        const u32 to = inputs + slot * ring.stage_bytes, barrier = ring.full(slot);
        const u8 *from = arranged + size_t(u32(begin + i)) * INPUT_BYTES;
#if BULK
        if (begin + i < end && row_warp == 0 && lane == 0) copy_bulk(to, from, INPUT_BYTES, barrier, keeping);
#else
        if (begin + i < end) {
            for (int at = (row_warp * WARP + lane) * 16; at < INPUT_BYTES; at += row_warps * WARP * 16) copy_16_to(to + at, from + at, true);
        }
        arrive_with_copies(barrier);
#endif
    }
};

// Multiplies all steps of a column group, of which the first AHEAD are under way.
DEVICE void multiply_steps(const Copies &copies, int steps, Totals &sums) {
    const Ring &ring = copies.ring;
    const Constants constants;
    const int lane = copies.lane;
    RingTurn<STAGES> turn = {0, 0}, ahead = {AHEAD, 0};
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        wait_for_phase(ring.full(turn.slot), turn.round);
        finish_products<SPANS - 1>(); // of the step before, those whose registers are taken next
        Step step;
        Operands operands[2];
        const bool is_mine = copies.begin + i < copies.end; // the same for all warps of a group
        const u32 stage = turn.slot * ring.stage_bytes;
        if (is_mine) {
            copies.weights.read(copies.own + stage, step);
            weights_of(step, 0, lane % 4, constants, operands[0]);
        }
        finish_products<0>();
        __syncwarp();
        if (i > 0 && lane == 0) arrive(ring.free(turn.slot == 0 ? STAGES - 1 : turn.slot - 1)); // the step before is multiplied
        if (is_mine) {
            multiply_span(operands[0], copies.inputs + stage, lane, sums);
            if constexpr (SPANS == 2) {
                weights_of(step, 1, lane % 4, constants, operands[1]);
                multiply_span(operands[1], copies.inputs + stage + SPAN_BYTES, lane, sums);
            }
        }
        if (i + AHEAD < steps) {
            if (i + AHEAD >= STAGES) wait_for_phase(ring.free(ahead.slot), ahead.round ^ 1);
            copies.start_weights(ahead.slot, i + AHEAD);
            copies.start_inputs(ahead.slot, i + AHEAD);
        }
        turn.next(), ahead.next();
    }
    finish_products<0>();
}

// Leaves a warp's sums at its place in (tokens, weight rows of the block) with `stride`; the second 8 rows lie `second` after the first.
DEVICE void publish(const Totals &sums, float *place, int stride, int second, int g, int t) {
#pragma unroll
    for (int i = 0; i < PARTS * 4; i++) {
        const int half = i / 2 % 2, token = i / 4 * 8 + 2 * t + i % 2;
        place[token * stride + half * second + g] = sums[i];
    }
}

// Four neighbouring sums over all column groups of all blocks of the cluster, in order.
DEVICE float4 sum_of_groups(u32 place, u32 group_bytes, int column_groups, int splits) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int i = 0; i < splits * column_groups; i++) {
        const float4 part = load_of_block(place + i % column_groups * group_bytes, i / column_groups);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    return sum;
}

// Four neighbouring outputs.
struct alignas(4 * sizeof(OUTPUT)) Four {
    u32 words[sizeof(OUTPUT)];
};

// What ends a product.
struct Ending {
    const float *bias;
    const Scale *scales;
    int outputs, second;
    float add;

    // The sums of four neighbouring outputs, or `count`, times their scales, with the bias; `row` is the weight's.
    DEVICE void finish(const float4 &sums, int row, int count, float (&results)[4]) const {
        results[0] = sums.x, results[1] = sums.y, results[2] = sums.z, results[3] = sums.w;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j >= count) return;
            if (!PACKED && sizeof(WEIGHT) == 1 && !GROUPED) results[j] *= to_float(scales[row + j]);
            if (bias) results[j] += bias[row + j];
        }
    }

    DEVICE void store(const float4 &sums, const float4 &paired, int column, OUTPUT *to) const {
        const int count = min(4, outputs - column);
        float results[4], ups[4];
        finish(sums, column, count, results);
        if (EPILOGUE == GATED) finish(paired, column + second, count, ups);
        alignas(Four) OUTPUT four[4];
        if (EPILOGUE == ADD && count == 4) *reinterpret_cast<Four *>(four) = *reinterpret_cast<const Four *>(to);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j >= count) return;
            if (EPILOGUE == GATED) results[j] = activate(results[j]) * ups[j];
            if (EPILOGUE == ADD) results[j] = fmaf(add, results[j], to_float(count == 4 ? four[j] : to[j]));
            four[j] = from_float<OUTPUT>(results[j]);
            if (count < 4) to[j] = four[j];
        }
        *reinterpret_cast<Four *>(to) = *reinterpret_cast<const Four *>(four);
    }
};

// Input rows as linear_many multiplies them: (spans of 64 columns, to whole steps, TOKENS, 64), pieces of 16 bytes exchanged as warp_group.cuh
// says. A piece holds two neighbouring columns of each of the four lanes that multiply them together; columns that do not exist are zeros.
// Launch: grid (spans, ceil(rows / 8)), 8 warps.
KERNEL arrange(const bf16 *input, u32 *arranged, int input_stride, int rows, int columns) {
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.y * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP, column = blockIdx.x * SPAN + lane * 2;
    const int piece = WIDE_LANES ? lane % 8 : lane / 16 * 4 + lane % 4, word = WIDE_LANES ? lane / 8 : lane / 4 % 4;
    if (token >= rows) return;
    const u32 *from = reinterpret_cast<const u32 *>(input + size_t(token) * input_stride + column);
    arranged[(size_t(blockIdx.x) * TOKENS + token) * 32 + (piece ^ token % 8) * 4 + word] = column < columns ? *from : 0;
}

// input (rows, columns), rows up to TOKENS, columns a multiple of 8, or 16 for E4M3 weights, as `arrange` leaves it; weight (weight_rows,
// columns), scales, minima and bias as in linear_stream.cu; output aligned to four elements, its stride too. Launch: row_groups * any number
// of column groups of four warps, up to four groups; for each row_groups * 4 * OUTPUTS outputs, `splits` blocks, which are a cluster; dynamic
// shared memory, and 1024 bytes to align it, for STAGES of the input rows of all column groups (INPUT_BYTES) and the weights of all warps
// (WARP_BYTES), to a multiple of 1024 bytes, or for the sums: (column groups, TOKENS, row_groups * 64 + 4) floats, if that is more.
BOUNDED_KERNEL(512, 1)
linear_many(const u8 *arranged, const WEIGHT *weight, const float *bias, const Scale *scales, const Scale *minima, OUTPUT *output,
            int output_stride, int rows, int weight_rows, int columns, int row_groups, int splits, float add) {
    extern __shared__ uint4 dynamic[];
    __shared__ u64 barriers[2 * STAGES];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const int row_warps = row_groups * 4, column_groups = warps / row_warps, group = warp / row_warps, row_warp = warp % row_warps;
    const int rank = blockIdx.x % splits, unit = blockIdx.x / splits;
    const int outputs = PAIRED ? weight_rows / 2 : weight_rows, second = outputs, unit_outputs = row_warps * OUTPUTS;
    const Product product = {nullptr, weight, scales, minima, nullptr, 0, rows, weight_rows, columns, 1, second};
    const int steps = (columns + STEP - 1) / STEP, per_group = (steps + splits * column_groups - 1) / (splits * column_groups);
    const int begin = (rank * column_groups + group) * per_group, end = min(begin + per_group, steps);
    const u32 unaligned = u32(__cvta_generic_to_shared(dynamic)), memory = (unaligned + 1023) / 1024 * 1024;
    const u32 stage_bytes = (column_groups * INPUT_BYTES + warps * WARP_BYTES + 1023) / 1024 * 1024;
    const Ring ring = {u32(__cvta_generic_to_shared(barriers)), stage_bytes};
    Weights weights(product, unit * unit_outputs + row_warp * OUTPUTS, begin, lane);
    const u32 own = memory + column_groups * INPUT_BYTES + warp * WARP_BYTES, inputs = memory + group * INPUT_BYTES;
    const Copies copies = {weights, ring, arranged, keeping_policy(), own, inputs, begin, end, row_warp, row_warps, lane};
    if (threadIdx.x == 0) ring.begin(warps);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++) copies.start_weights(i, i);
    let_next_start();
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++) copies.start_inputs(i, i);
    Totals sums = {};
    multiply_steps(copies, per_group, sums);
    __syncthreads();
    const int stride = row_warps * 16 + 4;
    float *place = reinterpret_cast<float *>(reinterpret_cast<u8 *>(dynamic) + (memory - unaligned)) + group * TOKENS * stride;
    publish(sums, place + row_warp * OUTPUTS, stride, PAIRED ? unit_outputs : 8, lane / 4, lane % 4);
    cluster_barrier(splits == 1);
    const Ending ending = {bias, scales, outputs, second, add};
    const int fours = unit_outputs / 4, all = rows * fours;
    for (int i = all * rank / splits + threadIdx.x; i < all * (rank + 1) / splits; i += blockDim.x) {
        const int token = i / fours, four = i % fours * 4, column = unit * unit_outputs + four;
        if (column >= outputs) continue;
        const u32 from = memory + (token * stride + four) * 4, group_bytes = TOKENS * stride * 4;
        const float4 gates = sum_of_groups(from, group_bytes, column_groups, splits);
        float4 ups = gates;
        if (PAIRED) ups = sum_of_groups(from + unit_outputs * 4, group_bytes, column_groups, splits);
        ending.store(gates, ups, column, output + size_t(token) * output_stride + column);
    }
    if (splits > 1) cluster_barrier(false); // the others still read what is here
}
