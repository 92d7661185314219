// A weight matrix times 17 to 128 input rows, both in bfloat16 or both in E4M3, at the speed of reading the weights once, on the matrix
// instructions of warp groups (compute capability 9.0): decoding of many sequences.
//
// Weight rows are the rows of the instructions' first operand, 64 of them, and tokens the columns of the second: so few tokens waste
// nothing. A block has GROUPS warp groups with TILES such tiles each, which share the input rows, for each group a warp that copies its
// weights, and two that copy input rows, through a ring of STAGES in shared memory of STEP_BYTES bytes of each row. Weights are asked for before the
// kernel waits for those before it. A group's ROWS need not be whole tiles, so that there is a block for nearly every multiprocessor: 28,672
// rows are 128 blocks of 224 in place of 112 of 256 (3 to 4 % less time on an H200), 10,240 are 128 of 80 in place of 80 of 128 (10 %). Where blocks
// are still few, two share the columns and exchange their sums (warp_group_end.cuh). A row's result depends on no other row.
//
// On E4M3 the matrix instructions keep few digits of a long sum (3.5e-4 of the result are lost after 256 columns, 2.2e-4 after 128): after
// each 128 columns theirs is added to one in float. That costs no time. Sums of bfloat16 stay where they are.
//
// The ring is nearly all of a multiprocessor's memory, but it is filled PACE stages at a time: what makes the input rows meanwhile waits behind
// what memory has been asked for. With half of it, and so two kernels on a multiprocessor as in linear_stream.cuh, a
// layer took 10 % more time, and as much when blocks that end asked the L2 cache for the next product's weights. That blocks begin at
// different columns changed nothing. Rotating and storing queries, keys and values at the end of their product took a layer as much time
// as a kernel of its own, beside which the blocks of attention can start. Two groups of warps that take the steps of a block of 64 weight
// rows in turn, and four warps that copy input rows, took more time; with two that copy a group's weights, products hung. E4M3 products of one
// tile that are added while those of the other are made changed nothing. Nor, on an H200, did blocks that stay and take one unit after the
// other, by a counter or in turn (33.7 us for 34.2 of E4M3 gates and ups, 125 for 123 of Llama 70B's; in 128 rows 34 and 127), one more stage,
// or larger steps; blocks of four in a cluster took longer, for there are only 30 such clusters. Without its end the kernel took 30 us of 32.5,
// without multiplying 31.4, without input rows as long: what is left is the gap between two kernels.
#include "mma.cuh"
#include "warp_group.cuh"
#include "warp_group_shared.cuh"

#ifndef WEIGHT
#define WEIGHT e4m3
#endif
#ifndef TOKENS
#define TOKENS 64
#endif
#ifndef GROUPS
#define GROUPS 2
#endif
#ifndef ROWS
#define ROWS 64 // weight rows of a group, a multiple of 8: of its last tile, which may be cut, what lies behind them is multiplied in vain
#endif
#ifndef STEP_BYTES
#define STEP_BYTES 128
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef PACE
#define PACE STAGES
#endif
#ifndef PAIRED
#define PAIRED 0 // 1: a group has two tiles, whose rows are not neighbours: those of the second are combined with those of the first
#endif
static_assert(TOKENS % 32 == 0 && TOKENS <= 128 && (STEP_BYTES == 128 || STEP_BYTES == 256), "as the operands lie in shared memory");

constexpr bool IS_ROUNDED = sizeof(WEIGHT) == 1;
constexpr int GROUP_ROWS = ROWS, TILES = PAIRED ? 2 : (ROWS + 63) / 64; // weight rows of a warp group, and tiles of them
constexpr int TILE_ROWS = PAIRED ? ROWS / 2 : 64;                       // from a tile to the next; the last one may have fewer
constexpr int GROUP_OUTPUTS = PAIRED ? ROWS / 2 : ROWS;
constexpr int UNIT_ROWS = GROUPS * GROUP_ROWS;
constexpr int COMPUTING = GROUPS * 128; // threads that multiply
constexpr int INPUT_WARPS = 2;          // that copy input rows
constexpr int THREADS = COMPUTING + (GROUPS + INPUT_WARPS) * WARP;
constexpr int PARTS = TOKENS <= 64 ? 1 : TOKENS * TILES > 192 ? 4 : 2, PART = TOKENS / PARTS; // of tokens, one instruction's each
constexpr int WEIGHT_BYTES = GROUP_ROWS * STEP_BYTES, INPUT_BYTES = TOKENS * STEP_BYTES; // of a stage: a group's weights, and all groups' input
constexpr int STAGE_BYTES = GROUPS * WEIGHT_BYTES + INPUT_BYTES;
constexpr int UNIT_OUTPUTS = GROUPS * GROUP_OUTPUTS;
static_assert(TILE_ROWS <= 64 && TILE_ROWS % 8 == 0 && ROWS % 8 == 0 && (!PAIRED || ROWS > 64), "tiles begin at a multiple of 1024 bytes");
static_assert((TILES * 64 - ROWS) * 128 <= TOKENS * STEP_BYTES, "what is multiplied in vain lies in the ring, too");

// Rows of a tile.
DEVICE constexpr int rows_of_tile(int tile) { return ROWS - tile * TILE_ROWS < TILE_ROWS ? ROWS - tile * TILE_ROWS : TILE_ROWS; }

// What is multiplied; sizes of rows in bytes.
struct Operands {
    const u8 *input, *weight;
    int input_stride, rows, weight_rows, row_bytes;
};

// The weight rows of a block: a group's are neighbours, or each half of them.
struct Unit {
    int first, step; // to the other half, where rows are PAIRED

    DEVICE int row(int i) const {
        return PAIRED ? first + i / ROWS * GROUP_OUTPUTS + i % GROUP_OUTPUTS + i % ROWS / GROUP_OUTPUTS * step : first + i;
    }
};

#if HAS_WARP_GROUPS
// The ring of stages: of each, which weights and input rows are there, and which nobody reads any more.
struct Ring {
    u32 barriers, memory;

    DEVICE void begin() const {
        for (int slot = 0; slot < STAGES; slot++) {
            for (int group = 0; group < GROUPS; group++) begin_barrier(full(slot, group), WARP), begin_barrier(free(slot, group), 4);
            begin_barrier(full(slot, GROUPS), INPUT_WARPS * WARP), begin_barrier(free(slot, GROUPS), 4 * GROUPS);
        }
    }

    // Of a group's weights, or behind those the input rows.
    DEVICE u32 full(int slot, int group) const { return barriers + (slot * (GROUPS + 1) + group) * 16; }
    DEVICE u32 free(int slot, int group) const { return full(slot, group) + 8; }
    DEVICE u32 place(int slot, int group) const { return memory + slot * STAGE_BYTES + group * WEIGHT_BYTES; }
};

// Copies 16 bytes past L1, or clears them; of the bytes beside them, those that are asked for next come to the L2 cache. What IS_STREAMED is
// the first to leave it: weights are read once, but what the kernels of a layer hand on would go to memory and come back.
template <bool IS_STREAMED> DEVICE void copy_past(u32 place, const void *from, bool exists) {
    if (IS_STREAMED) {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(place), "l"(from),
                     "r"(exists ? 16 : 0), "l"(streaming_policy())
                     : "memory");
    } else {
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(exists ? 16 : 0) : "memory");
    }
}

// What a warp copies: COUNT rows, STEP_BYTES at a time, of (STEP_BYTES / 128, ALL, 128) with the pieces of 16 bytes of row n exchanged by n % 8.
// Rows and bytes that do not exist become zeros.
template <int COUNT, int ALL, bool IS_STREAMED, int HALVES = 1> struct Copier {
    static constexpr int PIECES = STEP_BYTES / 16, AT_ONCE = WARP / PIECES, TIMES = 8 / AT_ONCE; // of a row; rows at once; for 8 rows
    const u8 *from; // the lane's piece of its first row
    size_t step;    // bytes to its next row
    int rows;       // that exist, from its first one on
    int bytes;      // from its piece on
    int gap;        // rows that are left out between the halves
    u32 places[TIMES];

    DEVICE Copier(const u8 *matrix, int first, int rows, size_t stride, int row_bytes, int begin, int lane, int gap = 0)
        : step(AT_ONCE * stride), rows(rows - first - lane / PIECES), bytes(row_bytes - begin - lane % PIECES * 16), gap(gap) {
        from = matrix + (first + lane / PIECES) * stride + begin + lane % PIECES * 16;
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            const int row = i * AT_ONCE + lane / PIECES, piece = lane % PIECES;
            places[i] = piece / 8 * (ALL * 128) + row * 128 + (piece % 8 ^ row) * 16;
        }
    }

    DEVICE void copy(u32 slot, int step_number) const {
        const u8 *source = from + step_number * STEP_BYTES;
        const bool exists = step_number * STEP_BYTES < bytes;
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
#pragma unroll 4
            for (int row = half * (COUNT / HALVES); row < (half + 1) * (COUNT / HALVES); row += 8) {
#pragma unroll
                for (int i = 0; i < TIMES; i++) {
                    copy_past<IS_STREAMED>(slot + places[i] + row * 128, source, exists && row + i * AT_ONCE + half * gap < rows);
                    source += step;
                }
            }
            source += gap * (step / AT_ONCE);
        }
    }

    // Copies all steps through the ring, which is first filled `pace` of them at a time.
    DEVICE void copy_all(const Ring &ring, int group, u32 offset, int steps, int pace) const {
        RingTurn<STAGES> turn = {0, 1};
#pragma unroll 1
        for (int i = 0; i < steps; i++, turn.next()) {
            if (i >= pace && i < STAGES) sleep_for_phase(ring.full(i - pace, group), 0);
            sleep_for_phase(ring.free(turn.slot, group), turn.round);
            copy(ring.place(turn.slot, group) + offset, i);
            arrive_with_copies(ring.full(turn.slot, group));
        }
    }
};

typedef float Sums[TILES][PARTS][PART / 2]; // of a thread, as warp_group.cuh says

constexpr bool IN_TURNS = TILES * PARTS == 1; // products of one half of a step are added while those of the other are made
constexpr int CHUNK = !IS_ROUNDED ? STEP_BYTES : IN_TURNS ? STEP_BYTES / 2 : 128; // bytes whose products are summed by the matrix instructions
constexpr int CHUNKS = STEP_BYTES / CHUNK, UNITS = TILES * PARTS * CHUNKS;
static_assert(!IS_ROUNDED || CHUNK <= 128, "longer sums lose digits");
typedef float Products[IN_TURNS ? 2 : 1][PART / 2];

// Starts making the products of a part of a step, to replace what is there or to be added to it.
DEVICE void start_unit(u32 weights, u32 inputs, int unit, float (&products)[PART / 2], bool adds) {
    const int chunk = unit % CHUNKS, part = unit / CHUNKS % PARTS, tile = unit / CHUNKS / PARTS;
    const u64 a = swizzled(weights + tile * (TILE_ROWS * 128)), b = swizzled(inputs + part * (PART * 128));
    multiplied_from_here();
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++) {
        const int number = chunk * (CHUNK / 32) + i, block = number / 4, column = number % 4 * 2;
        GroupProduct<WEIGHT>::multiply(products, a + block * (GROUP_ROWS * 8) + column, b + block * (TOKENS * 8) + column, adds || i > 0);
    }
}

DEVICE void add_unit(int unit, float (&products)[PART / 2], Sums &sums) {
    hold(products);
    const int part = unit / CHUNKS % PARTS, tile = unit / CHUNKS / PARTS;
#pragma unroll
    for (int i = 0; i < PART / 2; i++) sums[tile][part][i] += products[i];
}

// Multiplies a step of E4M3, and tells that its place is free.
DEVICE void multiply_rounded(const Ring &ring, int group, int slot, bool tells, Sums &sums) {
    Products products;
    const u32 weights = ring.place(slot, group), inputs = ring.place(slot, GROUPS);
    if constexpr (IN_TURNS) {
        start_unit(weights, inputs, 0, products[0], false);
        end_products();
        start_unit(weights, inputs, 1, products[1], false);
        end_products();
        wait_for_products<1>();
        add_unit(0, products[0], sums);
        wait_for_products<0>();
    } else {
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            if (unit > 0) add_unit(unit - 1, products[0], sums);
            start_unit(weights, inputs, unit, products[0], false);
            end_products();
            wait_for_products<0>();
        }
    }
    if (tells) arrive(ring.free(slot, group)), arrive(ring.free(slot, GROUPS));
    add_unit(UNITS - 1, products[IN_TURNS], sums);
}

// Multiplies all steps of a group.
DEVICE void multiply_steps(const Ring &ring, int group, int steps, Sums &sums) {
    const bool tells = threadIdx.x % WARP == 0;
    RingTurn<STAGES> turn = {0, 0};
    int before = 0; // the slot of the step before
#pragma unroll
    for (int unit = 0; unit < TILES * PARTS; unit++) hold(sums[unit / PARTS][unit % PARTS]);
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        sleep_for_phase(ring.full(turn.slot, GROUPS), turn.round);
        sleep_for_phase(ring.full(turn.slot, group), turn.round);
        multiply_what_was_copied();
        if constexpr (IS_ROUNDED) {
            multiply_rounded(ring, group, turn.slot, tells, sums);
        } else {
            const u32 weights = ring.place(turn.slot, group), inputs = ring.place(turn.slot, GROUPS);
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) start_unit(weights, inputs, unit, sums[unit / PARTS][unit % PARTS], true);
            end_products();
            wait_for_products<1>(); // those of the step before are made
            if (tells && i > 0) arrive(ring.free(before, group)), arrive(ring.free(before, GROUPS));
            before = turn.slot;
        }
        turn.next();
    }
    if constexpr (!IS_ROUNDED) {
        wait_for_products<0>();
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) hold(sums[unit / PARTS][unit % PARTS]);
    }
}
#endif
