// A weight matrix in E4M3 times 17 to 128 input rows that are rounded to E4M3, at the speed of reading the weights once, on the matrix
// instructions of warp groups (compute capability 9.0): decoding of many sequences.
//
// Weight rows are the rows of the instructions' first operand, 64 of them, and tokens the columns of the second: so few tokens waste
// nothing. A block has GROUPS warp groups with TILES such tiles each, which share the input rows, for each group a warp that copies its
// weights, and two that copy input rows, through a ring of STAGES in shared memory of SPAN columns each. Weights are asked for before the
// kernel waits for those before it. Where there are fewer blocks than multiprocessors, columns are split among the blocks of a cluster, which
// add their sums through their shared memory, each for its part of the tokens, in order. A row's result depends on no other row.
//
// The matrix instructions keep few digits of a long sum (3.5e-4 of the result are lost after 256 columns, 2.2e-4 after 128): after each 128
// columns theirs is added to one in float. That costs no time.
//
// The ring is nearly all of a multiprocessor's memory, but PACE stages of it are asked for at a time: what rounds the input rows meanwhile
// waits behind what memory has been asked for. With half of it, and so two kernels on a multiprocessor as in linear_stream.cuh, a
// layer took 10 % more time, and as much when blocks that end asked the L2 cache for the next product's weights. That blocks begin at
// different columns changed nothing.
#include "common.cuh"
#include "warp_group.cuh"
#include "warp_group_bytes.cuh"

#ifndef TOKENS
#define TOKENS 64
#endif
#ifndef GROUPS
#define GROUPS 2
#endif
#ifndef TILES
#define TILES 1
#endif
#ifndef SPAN
#define SPAN 128
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef PACE
#define PACE STAGES
#endif
#ifndef OUTPUT
#define OUTPUT T
#endif
static_assert(TOKENS % 32 == 0 && TOKENS <= 128 && (SPAN == 128 || SPAN == 256), "as the operands lie in shared memory");

constexpr int GROUP_ROWS = TILES * 64; // weight rows of a warp group
constexpr int UNIT_ROWS = GROUPS * GROUP_ROWS;
constexpr int COMPUTING = GROUPS * 128; // threads that multiply
constexpr int INPUT_WARPS = 2;          // that copy input rows
constexpr int THREADS = COMPUTING + (GROUPS + INPUT_WARPS) * WARP;
constexpr int PARTS = TOKENS <= 64 ? 1 : TOKENS * TILES > 192 ? 4 : 2, PART = TOKENS / PARTS; // of tokens, one instruction's each
constexpr int WEIGHT_BYTES = GROUP_ROWS * SPAN, INPUT_BYTES = TOKENS * SPAN; // of a stage: a group's weights, and all groups' input
constexpr int STAGE_BYTES = GROUPS * WEIGHT_BYTES + INPUT_BYTES;
constexpr int STRIDE = UNIT_ROWS + 4; // of the sums of a token

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

// Copies 16 bytes past L1, or clears them; of the bytes beside them, those that are asked for next come to the L2 cache.
DEVICE void copy_past(u32 place, const void *from, bool exists) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// What a warp copies: COUNT rows, SPAN columns at a time, of (SPAN / 128, ALL, 128) with the pieces of 16 bytes of row n exchanged by n % 8.
// Rows and columns that do not exist become zeros.
template <int COUNT, int ALL> struct Copier {
    static constexpr int PIECES = SPAN / 16, AT_ONCE = WARP / PIECES, TIMES = 8 / AT_ONCE; // of a row; rows at once; for 8 rows
    const u8 *from; // the lane's piece of its first row
    size_t step;    // bytes to its next row
    int rows;       // that exist, from its first one on
    int columns;    // from its piece on
    u32 places[TIMES];

    DEVICE Copier(const u8 *matrix, int first, int rows, int columns, int begin, int lane)
        : step(size_t(AT_ONCE) * columns), rows(rows - first - lane / PIECES), columns(columns - begin - lane % PIECES * 16) {
        from = matrix + size_t(first + lane / PIECES) * columns + begin + lane % PIECES * 16;
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            const int row = i * AT_ONCE + lane / PIECES, piece = lane % PIECES;
            places[i] = piece / 8 * (ALL * 128) + row * 128 + (piece % 8 ^ row) * 16;
        }
    }

    DEVICE void copy(u32 slot, int step_number) const {
        const u8 *source = from + step_number * SPAN;
        const bool exists = step_number * SPAN < columns;
#pragma unroll 4
        for (int row = 0; row < COUNT; row += 8) {
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                copy_past(slot + places[i] + row * 128, source, exists && row + i * AT_ONCE < rows);
                source += step;
            }
        }
    }

    // Copies all steps through the ring, at most PACE of them at a time.
    DEVICE void copy_all(const Ring &ring, int group, u32 offset, int steps) const {
        RingTurn<STAGES> turn = {0, 1}, before = {0, 0};
#pragma unroll 1
        for (int i = 0; i < steps; i++, turn.next()) {
            if (i >= PACE) sleep_for_phase(ring.full(before.slot, group), before.round), before.next();
            sleep_for_phase(ring.free(turn.slot, group), turn.round);
            copy(ring.place(turn.slot, group) + offset, i);
            arrive_with_copies(ring.full(turn.slot, group));
        }
    }
};

typedef float Sums[TILES][PARTS][PART / 2]; // of a thread, as warp_group.cuh says

constexpr bool IN_TURNS = TILES * PARTS == 1; // products of one half of a step are added while those of the other are made
constexpr int CHUNK = IN_TURNS ? SPAN / 2 : 128; // columns whose products are summed by the matrix instructions
constexpr int CHUNKS = SPAN / CHUNK, UNITS = TILES * PARTS * CHUNKS;
static_assert(CHUNK <= 128, "longer sums lose digits");
typedef float Products[IN_TURNS ? 2 : 1][PART / 2];

// Starts making the products of a part of a step.
DEVICE void start_unit(u32 weights, u32 inputs, int unit, float (&products)[PART / 2]) {
    const int chunk = unit % CHUNKS, part = unit / CHUNKS % PARTS, tile = unit / CHUNKS / PARTS;
    const u64 a = swizzled(weights + tile * (64 * 128)), b = swizzled(inputs + part * (PART * 128));
    multiplied_from_here();
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++) {
        const int number = chunk * (CHUNK / 32) + i, block = number / 4, column = number % 4 * 2;
        multiply_bytes(products, a + block * (GROUP_ROWS * 8) + column, b + block * (TOKENS * 8) + column, i > 0);
    }
    end_products();
}

DEVICE void add_unit(int unit, float (&products)[PART / 2], Sums &sums) {
    hold(products);
    const int part = unit / CHUNKS % PARTS, tile = unit / CHUNKS / PARTS;
#pragma unroll
    for (int i = 0; i < PART / 2; i++) sums[tile][part][i] += products[i];
}

// Multiplies all steps of a group.
DEVICE void multiply_steps(const Ring &ring, int group, int steps, Sums &sums) {
    const bool tells = threadIdx.x % WARP == 0;
    RingTurn<STAGES> turn = {0, 0};
#pragma unroll 1
    for (int i = 0; i < steps; i++, turn.next()) {
        Products products;
        sleep_for_phase(ring.full(turn.slot, GROUPS), turn.round);
        sleep_for_phase(ring.full(turn.slot, group), turn.round);
        multiply_what_was_copied();
        const u32 weights = ring.place(turn.slot, group), inputs = ring.place(turn.slot, GROUPS);
        if constexpr (IN_TURNS) {
            start_unit(weights, inputs, 0, products[0]);
            start_unit(weights, inputs, 1, products[1]);
            wait_for_products<1>();
            add_unit(0, products[0], sums);
            wait_for_products<0>();
        } else {
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                if (unit > 0) add_unit(unit - 1, products[0], sums);
                start_unit(weights, inputs, unit, products[0]);
                wait_for_products<0>();
            }
        }
        if (tells) arrive(ring.free(turn.slot, group)), arrive(ring.free(turn.slot, GROUPS));
        add_unit(UNITS - 1, products[IN_TURNS], sums);
    }
}

// Waits for the threads of the block that multiply, and those of the whole cluster if there is one.
DEVICE void computing_barrier(bool is_alone) {
    if (is_alone) {
        asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING) : "memory");
    } else {
        cluster_barrier(false);
    }
}

// Leaves a group's sums in (TOKENS, STRIDE).
DEVICE void publish(const Sums &sums, float *place) {
    const int warp = threadIdx.x / WARP % 4, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < TILES * TOKENS / 2; i++) {
        const int tile = i / (TOKENS / 2), part = i % (TOKENS / 2) / (PART / 2), sum = i % (PART / 2);
        const int token = part * PART + sum / 4 * 8 + 2 * t + sum % 2, row = tile * 64 + warp * 16 + sum / 2 % 2 * 8 + g;
        place[token * STRIDE + row] = sums[tile][part][sum];
    }
}

// Four neighbouring outputs.
struct alignas(4 * sizeof(OUTPUT)) Four {
    OUTPUT values[4];
};

// What ends a product; in shared memory, for memory is far: the scales of input rows (TOKENS), then of weight rows, then biases (UNIT_ROWS).
struct Ending {
    float *factors;
    OUTPUT *output;
    int stride;
    float alpha, beta;

    // Reads what the unit's outputs need, by the threads that multiply.
    DEVICE void read(const float *input_scales, const float *scales, const float *bias, int rows, int row, int weight_rows) const {
        for (int i = threadIdx.x; i < UNIT_ROWS; i += COMPUTING) {
            const bool exists = row + i < weight_rows;
            factors[TOKENS + i] = exists ? scales[row + i] : 0.0f;
            factors[TOKENS + UNIT_ROWS + i] = exists && bias ? bias[row + i] : 0.0f;
        }
        wait_for_previous();
        if (threadIdx.x < rows) factors[threadIdx.x] = input_scales[threadIdx.x];
    }

    DEVICE void store(const float4 &sums, const Four &before, int token, int four, OUTPUT *to) const {
        const float all[4] = {sums.x, sums.y, sums.z, sums.w}, *own = factors + TOKENS + four;
        Four result;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float value = fmaf(all[j], own[j] * factors[token], own[UNIT_ROWS + j]) * alpha;
            result.values[j] = from_float<OUTPUT>(beta != 0.0f ? fmaf(beta, to_float(before.values[j]), value) : value);
        }
        *reinterpret_cast<Four *>(to) = result;
    }
};

// Adds the sums of the cluster's blocks, each for its part of the tokens, and ends the outputs of `unit`: several at once, since what is
// read comes from far.
DEVICE void end_unit(u32 place, const Ending &ending, int rows, int weight_rows, int unit, int rank, int splits) {
    constexpr int FOURS = UNIT_ROWS / 4, TOGETHER = COMPUTING / FOURS, TIMES = 4; // tokens of all threads together, and of a thread
    static_assert(COMPUTING % FOURS == 0, "a thread has the same outputs of all its tokens");
    const int four = threadIdx.x % FOURS * 4, column = unit * UNIT_ROWS + four, end = rows * (rank + 1) / splits;
    if (column >= weight_rows) return;
    for (int first = rows * rank / splits + threadIdx.x / FOURS; first < end; first += TIMES * TOGETHER) {
        float4 sums[TIMES] = {};
        Four before[TIMES] = {};
        OUTPUT *to = ending.output + size_t(first) * ending.stride + column;
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            const bool exists = ending.beta != 0.0f && first + i * TOGETHER < end;
            if (exists) before[i] = *reinterpret_cast<const Four *>(to + size_t(i * TOGETHER) * ending.stride);
        }
#pragma unroll 2
        for (int block = 0; block < splits; block++) {
            float4 parts[TIMES];
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                const int token = min(first + i * TOGETHER, end - 1);
                parts[i] = load_of_block(place + (token * STRIDE + four) * 4, block);
            }
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                sums[i].x += parts[i].x, sums[i].y += parts[i].y, sums[i].z += parts[i].z, sums[i].w += parts[i].w;
            }
        }
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            const int token = first + i * TOGETHER;
            if (token < end) ending.store(sums[i], before[i], token, four, to + size_t(i * TOGETHER) * ending.stride);
        }
    }
}
#endif

// output = alpha * (input * weight^T + bias) + beta * output; input (rows, columns), rows up to TOKENS, and weight (weight_rows, columns), both
// contiguous and aligned to 16 bytes, weight_rows and columns multiples of 16; input_scales (rows), scales (weight_rows), bias likewise or
// null; output aligned to four elements, its stride too. Launch: for each UNIT_ROWS weight rows `splits` blocks, which are a cluster,
// THREADS threads; 1024 bytes of dynamic shared memory to align it, and STAGES * STAGE_BYTES, or TOKENS * STRIDE * 4 if that is more.
BOUNDED_KERNEL(THREADS, 1)
linear_rounded(const e4m3 *input, const float *input_scales, const e4m3 *weight, const float *scales, const float *bias, OUTPUT *output,
               int output_stride, int rows, int weight_rows, int columns, int splits, float alpha, float beta) {
#if HAS_WARP_GROUPS
    extern __shared__ uint4 dynamic[];
    __shared__ u64 barriers[2 * STAGES * (GROUPS + 1)];
    __shared__ float factors[TOKENS + 2 * UNIT_ROWS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int rank = blockIdx.x % splits, unit = blockIdx.x / splits;
    const int all_steps = (columns + SPAN - 1) / SPAN, per_block = (all_steps + splits - 1) / splits;
    const int begin = rank * per_block, steps = max(min(per_block, all_steps - begin), 0);
    const u32 unaligned = u32(__cvta_generic_to_shared(dynamic)), memory = (unaligned + 1023) / 1024 * 1024;
    const Ring ring = {u32(__cvta_generic_to_shared(barriers)), memory};
    if (threadIdx.x == 0) ring.begin();
    __syncthreads();
    let_next_start();
    if (warp >= COMPUTING / WARP) {
        const int group = warp - COMPUTING / WARP;
        if (group < GROUPS) {
            const u8 *matrix = reinterpret_cast<const u8 *>(weight);
            Copier<GROUP_ROWS, GROUP_ROWS> copier(matrix, unit * UNIT_ROWS + group * GROUP_ROWS, weight_rows, columns, begin * SPAN, lane);
            copier.copy_all(ring, group, 0, steps);
        } else {
            constexpr int OWN = TOKENS / INPUT_WARPS;
            const int token = (group - GROUPS) * OWN;
            Copier<OWN, TOKENS> copier(reinterpret_cast<const u8 *>(input), token, rows, columns, begin * SPAN, lane);
            wait_for_previous();
            copier.copy_all(ring, GROUPS, token * 128, steps);
        }
        end_group();
        wait_group<0>();
        return;
    }
    const Ending ending = {factors, output, output_stride, alpha, beta};
    ending.read(input_scales, scales, bias, rows, unit * UNIT_ROWS, weight_rows);
    Sums sums = {};
    multiply_steps(ring, warp / 4, steps, sums);
    computing_barrier(true); // nobody reads the ring any more
    publish(sums, reinterpret_cast<float *>(reinterpret_cast<u8 *>(dynamic) + (memory - unaligned)) + warp / 4 * GROUP_ROWS);
    computing_barrier(splits == 1);
    end_unit(memory, ending, rows, weight_rows, unit, rank, splits);
    if (splits > 1) computing_barrier(false); // the others still read what is here
#endif
}
