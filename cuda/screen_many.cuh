// How screen_many.cu multiplies: what a block's weights, digits and scales are, how they come to shared memory, and the products' sums.
#include "screen.cuh"
#include "warp_group.cuh"
#include "weights.cuh"

#ifndef TOKENS
#define TOKENS 64
#endif
#ifndef STAGES
#define STAGES 4
#endif
static_assert(TOKENS == 32 || TOKENS == 64, "digits of all are the columns of one instruction");

constexpr int DIGITS = 2 * TOKENS;                  // first ones of all tokens, then second ones
constexpr int DIGIT_BYTES = DIGITS * BLOCK_COLUMNS; // of 128 columns
constexpr int MOST_DIGITS = 32639;                  // 127 * 256 + 127

// What is known of an input row: s, a power of two; S and E, and the least margin, as multiples of that.
struct Measured {
    float scale, length, error, least;
};

// In which 16 bytes of a row's 128 columns eight of them are, from a multiple of 8 on, once they are in shared memory.
DEVICE int piece_of(int column) { return column / 64 % 2 * 4 + column / 8 % 4; }

constexpr int TEAMS = 2, TILES = 2;                      // warp groups that multiply, and tiles of 64 weight rows of each
constexpr int TEAM_BLOCKS = TILES * 8;                   // of 8 weight rows
constexpr int UNIT_SEGMENTS = TEAMS * TEAM_BLOCKS / 2;   // sixteens of weight rows of a unit, at most
constexpr int TILE_BYTES = 64 * BLOCK_COLUMNS, TEAM_BYTES = TILES * TILE_BYTES;
constexpr int STAGE_BYTES = TEAMS * TEAM_BYTES + DIGIT_BYTES, SCALE_BYTES = TEAMS * TEAM_BLOCKS * 16; // of a stage; scales are behind all stages
constexpr int COMPUTING = TEAMS * 128, THREADS = COMPUTING + 128; // registers are shared out among four warps at a time
constexpr int COPIER_REGISTERS = 40, OTHER_REGISTERS = 232;

#if HAS_WARP_GROUPS
#define INTEGERS(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define INTEGERS_32 INTEGERS(0), INTEGERS(8), INTEGERS(16), INTEGERS(24)
#define INTEGERS_64 INTEGERS_32, INTEGERS(32), INTEGERS(40), INTEGERS(48), INTEGERS(56)

// D (64, N) is, or gains, A (64, 32) * B (32, N), of integers of 8 bits; operands as warp_group_shared.cuh says.
DEVICE void multiply_integers(int (&d)[32], u64 a, u64 b, int adds) {
    asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %34, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, adds; }"
                 : INTEGERS_32
                 : "l"(a), "l"(b), "r"(adds));
}

DEVICE void multiply_integers(int (&d)[64], u64 a, u64 b, int adds) {
    asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %66, 0; wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, adds; }"
                 : INTEGERS_64
                 : "l"(a), "l"(b), "r"(adds));
}

typedef int Products[DIGITS / 2]; // of a thread
typedef float Sums[TILES][TOKENS / 2];

DEVICE void hold_integers(Products &products) {
#pragma unroll
    for (int i = 0; i < DIGITS / 2; i++) asm volatile("" : "+r"(products[i])::"memory");
}

// Starts multiplying a tile's 128 columns by all digits.
DEVICE void start_tile(u32 weights, u32 inputs, Products &products) {
    const u64 a = swizzled(weights), b = swizzled(inputs);
    multiplied_from_here();
#pragma unroll
    for (int i = 0; i < BLOCK_COLUMNS / 32; i++) multiply_integers(products, a + i * 2, b + i * 2, i > 0);
    end_products();
}

// Adds what came of them, for a thread's two weight rows.
DEVICE void add_tile(Products &products, const float (&scales)[2], float (&sums)[TOKENS / 2]) {
    hold_integers(products);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sums[i] = fmaf(float(products[i] * 256 + products[i + TOKENS / 2]), scales[i % 4 / 2], sums[i]);
}

// The ring of stages: of each, whether teams' weights, digits and scales are there, and whether nobody reads it any more.
struct Ring {
    u32 barriers, memory;

    DEVICE void begin() const {
        for (int slot = 0; slot < STAGES; slot++) {
            for (int team = 0; team < TEAMS; team++) begin_barrier(full(slot, team), WARP);
            begin_barrier(full(slot, TEAMS), WARP + 1), begin_barrier(free(slot), COMPUTING / WARP);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // the copy engine sees them
    }

    DEVICE u32 full(int slot, int part) const { return barriers + (slot * (TEAMS + 2) + part) * 8; } // of a team, or behind them digits and scales
    DEVICE u32 free(int slot) const { return full(slot, TEAMS + 1); }
    DEVICE u32 weights(int slot, int team) const { return memory + slot * STAGE_BYTES + team * TEAM_BYTES; }
    DEVICE u32 inputs(int slot) const { return weights(slot, TEAMS); }
    DEVICE u32 scales(int slot) const { return memory + STAGES * STAGE_BYTES + slot * SCALE_BYTES; }
};

// The weight rows of a block, in sixteens, and in how many units they are.
struct Share {
    int begin, count, units;

    DEVICE explicit Share(int weight_rows) {
        const long long segments = (weight_rows + 15) / 16;
        begin = int(segments * blockIdx.x / gridDim.x), count = int(segments * (blockIdx.x + 1) / gridDim.x) - begin;
        units = (count + UNIT_SEGMENTS - 1) / UNIT_SEGMENTS;
    }

    DEVICE int first(int unit) const { return begin + count * unit / units; }
};

// Copies 16 bytes past L1, of what is read once.
DEVICE void copy_streamed(u32 place, const void *from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "l"(policy) : "memory");
}

// Copies all weights of a team, by a warp.
DEVICE void copy_weights(const Ring &ring, const Share &share, const u8 *weight, int blocks, int row_blocks, int team) {
    const int lane = threadIdx.x % WARP, row = lane / 4;
    const u64 policy = streaming_policy();
    const u32 places[2] = {u32(row * 128 + (piece_of(lane % 4 * 8) ^ row) * 16), u32(row * 128 + (piece_of(lane % 4 * 8 + 64) ^ row) * 16)};
    RingTurn<STAGES> turn = {0, 1};
#pragma unroll 1
    for (int unit = 0; unit < share.units; unit++) {
        const int first = share.first(unit) * 2 + team * TEAM_BLOCKS, count = min(min(share.first(unit + 1) * 2, row_blocks) - first, TEAM_BLOCKS);
        const u8 *from = weight + size_t(first) * blocks * BLOCK_BYTES + lane * 16;
#pragma unroll 1
        for (int step = 0; step < blocks; step++, turn.next(), from += BLOCK_BYTES) {
            sleep_for_phase(ring.free(turn.slot), turn.round);
            const u32 to = ring.weights(turn.slot, team);
#pragma unroll
            for (int i = 0; i < TEAM_BLOCKS; i++) {
                const u8 *source = from + size_t(i) * blocks * BLOCK_BYTES;
                if (i >= count) continue;
                copy_streamed(to + i * 1024 + places[0], source, policy);
                copy_streamed(to + i * 1024 + places[1], source + 512, policy);
            }
            arrive_with_copies(ring.full(turn.slot, team));
        }
    }
}

// Copies digits and scales, by a warp.
DEVICE void copy_digits(const Ring &ring, const Share &share, const u8 *digits, const f16 *scales, int blocks, int row_blocks) {
    const int lane = threadIdx.x % WARP;
    const u64 policy = keeping_policy();
    RingTurn<STAGES> turn = {0, 1};
#pragma unroll 1
    for (int unit = 0; unit < share.units; unit++) {
        const int block = share.first(unit) * 2 + lane;
        const f16 *from = scales + size_t(block) * blocks * BLOCK_ROWS;
        const bool exists = block < min(share.first(unit + 1) * 2, row_blocks);
#pragma unroll 1
        for (int step = 0; step < blocks; step++, turn.next(), from += BLOCK_ROWS) {
            sleep_for_phase(ring.free(turn.slot), turn.round);
            if (exists) copy_16_to(ring.scales(turn.slot) + lane * 16, from, true);
            arrive_with_copies(ring.full(turn.slot, TEAMS));
            if (lane > 0) continue;
            arrive_expecting(ring.full(turn.slot, TEAMS), DIGIT_BYTES);
            copy_bulk(ring.inputs(turn.slot), digits + size_t(step) * DIGIT_BYTES, DIGIT_BYTES, ring.full(turn.slot, TEAMS), policy);
        }
    }
}

DEVICE float read_scale(u32 place) {
    u16 bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(place));
    return to_float(f16{bits});
}

// A team's part of a stage, once it is there; and the scales of a thread's weight rows, of the first tile and of the second.
struct Stage {
    u32 weights, inputs;
    float scales[TILES][2];

    DEVICE Stage(const Ring &ring, const RingTurn<STAGES> &turn) {
        const int team = threadIdx.x / 128, row = threadIdx.x % 128 / WARP * 16 + threadIdx.x % WARP / 4;
        sleep_for_phase(ring.full(turn.slot, TEAMS), turn.round);
        sleep_for_phase(ring.full(turn.slot, team), turn.round);
        multiply_what_was_copied();
        weights = ring.weights(turn.slot, team), inputs = ring.inputs(turn.slot);
        const u32 place = ring.scales(turn.slot) + team * (TEAM_BLOCKS * 16) + row * 2;
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) scales[i / 2][i % 2] = read_scale(place + i / 2 * 128 + i % 2 * 16);
    }
};

// Multiplies a team's weight rows of a unit by all rows.
DEVICE void multiply_unit(const Ring &ring, int blocks, RingTurn<STAGES> &turn, Sums &sums) {
    Products products;
#pragma unroll 1
    for (int step = 0; step < blocks; step++, turn.next()) {
        const Stage stage(ring, turn);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            start_tile(stage.weights + tile * TILE_BYTES, stage.inputs, products);
            wait_for_products<0>();
            if (tile == TILES - 1 && threadIdx.x % WARP == 0) arrive(ring.free(turn.slot));
            add_tile(products, stage.scales[tile], sums[tile]);
        }
    }
}

DEVICE void computing_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING) : "memory"); }
#endif
