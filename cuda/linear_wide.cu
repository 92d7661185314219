// A weight matrix times 97 to 256 input rows, both in bfloat16 or both in E4M3, on the matrix instructions of warp groups (compute capability
// 9.0): decoding of so many sequences that multiplying takes as long as reading the weights. In bfloat16 also times the rows of prompts, where what is
// multiplied are gates and what they are gates of: nothing is written but what they make.
//
// A block has 128 weight rows, 64 for each of two warp groups, times all tokens: 128 registers of sums a thread. One thread starts copies, by tensor
// maps, into a ring of STAGES of 128 bytes of each row. Blocks stay, and take one tile after the other; where tiles are few, blocks share the columns,
// and `add_parts` of elementwise.cu adds what they have. Sums of E4M3 are the matrix instructions' own, as cuBLASLt's with fast accumulation.
//
// On an H200 a step of 256 tokens takes 0.57 us, of the 0.52 that the matrix instructions need, and a tile 3.5 us beside. Pairs of blocks that copy input
// rows for each other changed nothing: the L2 cache is not what limits. A third of the instructions at a tile's end was worth 2 us of each. Whether blocks
// share the tokens, too, is a matter of what they leave idle: `down` of Llama 8B takes 27.4 us in E4M3 with two blocks for the tokens and two for the columns,
// 29.8 with four for the columns, and cuBLASLt 39. Where its tiles keep all multiprocessors busy, cuBLASLt is faster (gates and ups of 70B, 256 rows: 180 of 190).
#include "common.cuh"
#include "activation.cuh"
#include "mma.cuh"
#include "warp_group.cuh"
#include "warp_group_shared.cuh"
#include "wide_product.cuh"

#ifndef WEIGHT
#define WEIGHT e4m3
#endif
#ifndef TOKENS
#define TOKENS 256
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef PAIRED
#define PAIRED 0 // 1: of each 16 weight rows of a block the second 8 are combined with the first
#endif
#include "epilogue.cuh"
static_assert(TOKENS % 32 == 0 && TOKENS >= 128 && TOKENS <= 256, "instructions of wide_product.cuh");

constexpr bool IS_ROUNDED = sizeof(WEIGHT) == 1, IS_FLOAT = sizeof(OUTPUT) == 4;
constexpr int STEP_BYTES = 128, TILE_ROWS = 128, OUTPUTS = PAIRED ? 64 : 128; // of a block at a time
constexpr int TOKEN_GROUP = 16; // blocks of tokens that meet all weights together: their rows stay in the L2 cache
constexpr int COMPUTING = 256, THREADS = COMPUTING + WARP;
constexpr int WEIGHT_BYTES = TILE_ROWS * STEP_BYTES, STAGE_BYTES = WEIGHT_BYTES + TOKENS * STEP_BYTES;
constexpr int AT_ONCE = 32, TOKEN_BYTES = PAIRED ? 16 : 48;   // tokens that a warp ends at once, and what lies between them: banks differ
constexpr int STAGED_BYTES = AT_ONCE * 48; // of a warp

// What the driver makes of a matrix for the copy engine.
struct alignas(64) TensorMap {
    u64 words[16];
};

#if HAS_WARP_GROUPS
// Starts a copy of 128 bytes of each of a tile's rows; those that do not exist become zeros. `group`: of sixteen rows, or of eight pairs.
DEVICE void bring_weights(u32 place, const TensorMap &map, int column, int group, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(place),
                 "l"(&map), "r"(column), "r"(0), "r"(group), "r"(barrier), "l"(policy)
                 : "memory");
}

// The same of TOKENS input rows.
DEVICE void bring_inputs(u32 place, const TensorMap &map, int column, int token, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(place),
                 "l"(&map), "r"(column), "r"(token), "r"(barrier)
                 : "memory");
}

// The ring of stages; a place is free when no warp reads it any more.
struct Ring {
    u32 barriers, memory;

    DEVICE void begin() const {
        for (int slot = 0; slot < STAGES; slot++) begin_barrier(full(slot), 1), begin_barrier(free(slot), COMPUTING / WARP);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // the copy engine sees them
    }

    DEVICE u32 full(int slot) const { return barriers + slot * 16; }
    DEVICE u32 free(int slot) const { return full(slot) + 8; }
    DEVICE u32 weights(int slot) const { return memory + slot * STAGE_BYTES; }
    DEVICE u32 inputs(int slot) const { return weights(slot) + WEIGHT_BYTES; }

    DEVICE void leave(int slot) const {
        if (threadIdx.x % WARP == 0) arrive(free(slot));
    }
};

// How weight rows, columns and tokens are shared out: units of weight rows and columns, each with all tokens, TOKENS at a time.
struct Division {
    int steps, splits, tokens, units;
};

// A tile of weight rows, its first token, and the steps of its columns.
struct Piece {
    int tile, token, split, begin, end;

    DEVICE Piece(int number, const Division &all) {
        const int each = (all.steps + all.splits - 1) / all.splits, group = number / (all.units * TOKEN_GROUP);
        const int some = min(TOKEN_GROUP, all.tokens - group * TOKEN_GROUP), inside = number - group * (all.units * TOKEN_GROUP);
        token = (group * TOKEN_GROUP + inside % some) * TOKENS;
        tile = inside / some / all.splits, split = inside / some % all.splits;
        begin = split * each, end = min(begin + each, all.steps);
    }
};

// Copies all that the block multiplies, by one thread.
DEVICE void bring_all(const Ring &ring, const TensorMap &weights, const TensorMap &inputs, int pieces, const Division &all) {
    const u64 policy = streaming_policy();
    RingTurn<STAGES> turn = {0, 1};
    const auto bring = [&](int slot, const Piece &piece, int step) {
        arrive_expecting(ring.full(slot), STAGE_BYTES);
        bring_weights(ring.weights(slot), weights, step * STEP_BYTES, piece.tile * (TILE_ROWS / 16), ring.full(slot), policy);
    };
    const Piece first(blockIdx.x, all);
    const int early = min(STAGES, first.end - first.begin);
    for (int i = 0; i < early; i++) bring(i, first, first.begin + i);
    wait_for_previous();
    int done = 0;
#pragma unroll 1
    for (int number = blockIdx.x; number < pieces; number += gridDim.x) {
        const Piece piece(number, all);
#pragma unroll 1
        for (int step = piece.begin; step < piece.end; step++, turn.next(), done++) {
            if (done >= early) {
                sleep_for_phase(ring.free(turn.slot), turn.round);
                bring(turn.slot, piece, step);
            }
            bring_inputs(ring.inputs(turn.slot), inputs, step * STEP_BYTES, piece.token, ring.full(turn.slot));
        }
    }
}

typedef float Sums[TOKENS / 2]; // of a thread, as warp_group.cuh says

// Multiplies all steps of a piece.
DEVICE void multiply_piece(const Ring &ring, const Piece &piece, RingTurn<STAGES> &turn, Sums &sums) {
    const int group = threadIdx.x / 128;
    int before = 0;
    hold(sums);
#pragma unroll 1
    for (int step = piece.begin; step < piece.end; step++) {
        sleep_for_phase(ring.full(turn.slot), turn.round);
        const u64 a = swizzled(ring.weights(turn.slot) + group * (64 * STEP_BYTES)), b = swizzled(ring.inputs(turn.slot));
        multiplied_from_here();
#pragma unroll
        for (int i = 0; i < 4; i++) WideProduct<WEIGHT>::multiply(sums, a + 2 * i, b + 2 * i, i > 0 || step > piece.begin);
        end_products();
        wait_for_products<1>(); // those of the step before are made
        if (step > piece.begin) ring.leave(before);
        before = turn.slot;
        turn.next();
    }
    wait_for_products<0>();
    hold(sums);
    if (piece.end > piece.begin) ring.leave(before);
}

// What a thread's two weight rows, 8 from each other in the tile, are scaled by, and what is added.
struct Factors {
    float scales[2], biases[2];

    DEVICE Factors(const float *all_scales, const float *bias, int first, int second, bool exists) {
        scales[0] = IS_ROUNDED && exists ? all_scales[first] : 1.0f, scales[1] = IS_ROUNDED && exists ? all_scales[second] : 1.0f;
        biases[0] = bias && exists ? bias[first] : 0.0f, biases[1] = bias && exists ? bias[second] : 0.0f;
    }

    // Four sums, of two tokens and both rows, as they lie in registers.
    DEVICE void apply(const float *sums, const float *token_scales, float (&values)[4]) const {
        const float2 tokens = IS_ROUNDED ? *reinterpret_cast<const float2 *>(token_scales) : make_float2(1.0f, 1.0f);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            values[i] = IS_ROUNDED ? fmaf(sums[i] * (i % 2 ? tokens.y : tokens.x), scales[i / 2], biases[i / 2]) : sums[i] + biases[i / 2];
        }
    }
};

// Stores floats; eight lanes have neighbours, which are a sector of memory.
DEVICE void store_floats(const Sums &sums, const Factors &factors, const float *token_scales, float *output, int stride, int rows) {
    const int first = threadIdx.x % 4 * 2;
    float *to = output + size_t(first) * stride;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++, to += size_t(8) * stride) {
        float values[4];
        factors.apply(sums + i * 4, token_scales + i * 8 + first, values);
        if (i * 8 + first < rows) to[0] = values[0], to[8] = values[2];
        if (i * 8 + first + 1 < rows) to[stride] = values[1], to[stride + 8] = values[3];
    }
}

DEVICE void store_matrices(u32 place, const u32 (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
}

// Stores bfloat16 by way of shared memory of the warp, where tokens lie apart, each with the warp's sixteen outputs, or eight of what is PAIRED.
DEVICE void store_rounded(const Sums &sums, const Factors &factors, const float *token_scales, u8 *staged, OUTPUT *output, int stride, int rows,
                          bool exists) {
    constexpr int LANES = PAIRED ? 1 : 2, PASSES = AT_ONCE * LANES / WARP, EACH = PAIRED ? 4 : 2; // of a token; eights of tokens at a time
    const int lane = threadIdx.x % WARP, own = lane / LANES; // its token when it stores
    const u32 place = u32(__cvta_generic_to_shared(staged)) + (PAIRED ? lane * TOKEN_BYTES : (lane / 16 * 8 + lane % 8) * TOKEN_BYTES + lane / 8 % 2 * 16);
    const uint4 *from = reinterpret_cast<const uint4 *>(staged + own * TOKEN_BYTES + lane % LANES * 16);
    OUTPUT *to = output + size_t(own) * stride + lane % LANES * 8;
#pragma unroll
    for (int turn = 0; turn < TOKENS / AT_ONCE; turn++) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < AT_ONCE / 8; i += EACH) {
            u32 words[4];
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int eight = turn * (AT_ONCE / 8) + i + j;
                float values[4];
                factors.apply(sums + eight * 4, token_scales + eight * 8 + lane % 4 * 2, values);
                if constexpr (PAIRED) {
                    words[j] = pack_bf16(activate(values[0]) * values[2], activate(values[1]) * values[3]);
                } else {
                    words[2 * j] = pack_bf16(values[0], values[1]), words[2 * j + 1] = pack_bf16(values[2], values[3]);
                }
            }
            store_matrices(place + i * 8 * TOKEN_BYTES, words);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PASSES; i++, to += size_t(WARP / LANES) * stride) {
            if (exists && turn * AT_ONCE + i * (WARP / LANES) + own < rows) *reinterpret_cast<uint4 *>(to) = from[i * (WARP / LANES) * (TOKEN_BYTES / 16)];
        }
    }
}
#endif

// output = input * weight^T + bias, as linear_warp_group says, TOKENS rows at a time in `token_blocks`, of E4M3 up to 256; or, where blocks share the columns, what each of them has of that, in floats,
// part_stride elements apart. PAIRED: output = activation(the first half of these) * the second half. weights: the matrix as (columns, 8, 2, weight_rows / 16),
// bytes, in boxes of (128, 8, 2, 8), PAIRED with the second half of the rows as second of 2; inputs: (columns, rows) in boxes of (128, TOKENS); both with
// pieces of 16 bytes exchanged. steps: of 128 bytes of the columns. outputs: a multiple of 16, PAIRED of 8; in bfloat16 aligned to 16 bytes, their
// stride too. Launch: up to as many blocks as run at once, THREADS threads; 1024 bytes of dynamic shared memory to align it, STAGES * STAGE_BYTES,
// and 8 * STAGED_BYTES.
BOUNDED_KERNEL(THREADS, 1)
linear_wide(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap inputs, const float *input_scales, const float *scales,
            const float *bias, OUTPUT *output, int output_stride, int part_stride, int rows, int outputs, int steps, int splits, int token_blocks) {
#if HAS_WARP_GROUPS
    extern __shared__ uint4 dynamic[];
    __shared__ u64 barriers[2 * STAGES];
    __shared__ alignas(8) float token_scales[COMPUTING];
    const int warp = threadIdx.x / WARP;
    const u32 unaligned = u32(__cvta_generic_to_shared(dynamic)), memory = (unaligned + 1023) / 1024 * 1024;
    const Ring ring = {u32(__cvta_generic_to_shared(barriers)), memory};
    if (threadIdx.x == 0) ring.begin();
    __syncthreads();
    let_next_start();
    const Division all = {steps, splits, token_blocks, (outputs + OUTPUTS - 1) / OUTPUTS * splits};
    const int pieces = all.units * token_blocks;
    if (warp == COMPUTING / WARP) {
        if (threadIdx.x % WARP == 0) bring_all(ring, weights, inputs, pieces, all);
        return;
    }
    wait_for_previous();
    if (IS_ROUNDED) token_scales[threadIdx.x] = threadIdx.x < rows ? input_scales[threadIdx.x] : 0.0f;
    asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING) : "memory");
    u8 *staged = reinterpret_cast<u8 *>(dynamic) + (memory - unaligned) + STAGES * STAGE_BYTES + warp * STAGED_BYTES;
    RingTurn<STAGES> turn = {0, 0};
#pragma unroll 1
    for (int number = blockIdx.x; number < pieces; number += gridDim.x) {
        const Piece piece(number, all);
        const int first = piece.tile * OUTPUTS + warp * (OUTPUTS / 8), row = first + threadIdx.x % WARP / 4;
        const bool exists = first < outputs; // of a warp's rows all or none do
        const Factors factors(scales, bias, row, row + (PAIRED ? outputs : 8), exists);
        Sums sums;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0.0f;
        multiply_piece(ring, piece, turn, sums);
        OUTPUT *to = output + size_t(piece.split) * part_stride + size_t(piece.token) * output_stride;
        const float *scales_here = token_scales + piece.token;
        if constexpr (IS_FLOAT) {
            if (exists) store_floats(sums, factors, scales_here, reinterpret_cast<float *>(to) + row, output_stride, rows - piece.token);
        } else {
            store_rounded(sums, factors, scales_here, staged, to + first, output_stride, rows - piece.token, exists);
        }
    }
#endif
}
