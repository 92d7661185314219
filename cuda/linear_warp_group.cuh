// A weight matrix times 17 to 128 input rows, both in bfloat16 or both in E4M3, at the speed of reading the weights once, on the matrix
// instructions of warp groups (compute capability 9.0): decoding of many sequences.
//
// Weight rows are the rows of the instructions' first operand, 64 of them, and tokens the columns of the second: so few tokens waste
// nothing. A block has GROUPS warp groups with TILES such tiles each, which share the input rows, for each group a warp that copies its
// weights, and two that copy input rows, through a ring of STAGES in shared memory of STEP_BYTES bytes of each row. Weights are asked for before the
// kernel waits for those before it. Where there are fewer blocks than multiprocessors, columns are split among the blocks of a cluster, which
// add their sums through their shared memory, each for its part of the tokens, in order. A row's result depends on no other row.
//
// On E4M3 the matrix instructions keep few digits of a long sum (3.5e-4 of the result are lost after 256 columns, 2.2e-4 after 128): after
// each 128 columns theirs is added to one in float. That costs no time. Sums of bfloat16 stay where they are.
//
// The ring is nearly all of a multiprocessor's memory, but it is filled PACE stages at a time: what makes the input rows meanwhile waits behind
// what memory has been asked for. With half of it, and so two kernels on a multiprocessor as in linear_stream.cuh, a
// layer took 10 % more time, and as much when blocks that end asked the L2 cache for the next product's weights. That blocks begin at
// different columns changed nothing. Rotating and storing queries, keys and values at the end of their product took a layer as much time
// as a kernel of its own, beside which the blocks of attention can start. Two groups of warps that take the steps of a block of 64 weight
// rows in turn, and four warps that copy input rows, took more time; with two that copy a group's weights, products hung. One warp that makes a
// block's sums visible to its cluster in the place of all, and E4M3 products of one tile that are added while those of the other are made,
// changed nothing.
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
#ifndef TILES
#define TILES 1
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
#define PAIRED 0 // 1: the weight rows of the second group are not the next ones but those that are combined with the first group's
#endif
static_assert(TOKENS % 32 == 0 && TOKENS <= 128 && (STEP_BYTES == 128 || STEP_BYTES == 256), "as the operands lie in shared memory");

constexpr bool IS_ROUNDED = sizeof(WEIGHT) == 1;
constexpr int GROUP_ROWS = TILES * 64; // weight rows of a warp group
constexpr int UNIT_ROWS = GROUPS * GROUP_ROWS;
constexpr int COMPUTING = GROUPS * 128; // threads that multiply
constexpr int INPUT_WARPS = 2;          // that copy input rows
constexpr int THREADS = COMPUTING + (GROUPS + INPUT_WARPS) * WARP;
constexpr int PARTS = TOKENS <= 64 ? 1 : TOKENS * TILES > 192 ? 4 : 2, PART = TOKENS / PARTS; // of tokens, one instruction's each
constexpr int WEIGHT_BYTES = GROUP_ROWS * STEP_BYTES, INPUT_BYTES = TOKENS * STEP_BYTES; // of a stage: a group's weights, and all groups' input
constexpr int STAGE_BYTES = GROUPS * WEIGHT_BYTES + INPUT_BYTES;
constexpr int STRIDE = UNIT_ROWS + 4; // of the sums of a token
constexpr int UNIT_OUTPUTS = PAIRED ? GROUP_ROWS : UNIT_ROWS;
static_assert(!PAIRED || GROUPS == 2, "rows of one group are combined with those of the other");

// What is multiplied; sizes of rows in bytes.
struct Operands {
    const u8 *input, *weight;
    int input_stride, rows, weight_rows, row_bytes;
};

// The weight rows of a block: those of a group are neighbours.
struct Unit {
    int first, step; // from a group's first row to that of the next

    DEVICE int row(int i) const { return first + i / GROUP_ROWS * step + i % GROUP_ROWS; }
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

// Copies 16 bytes past L1, or clears them; of the bytes beside them, those that are asked for next come to the L2 cache.
DEVICE void copy_past(u32 place, const void *from, bool exists) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// What a warp copies: COUNT rows, STEP_BYTES at a time, of (STEP_BYTES / 128, ALL, 128) with the pieces of 16 bytes of row n exchanged by n % 8.
// Rows and bytes that do not exist become zeros.
template <int COUNT, int ALL> struct Copier {
    static constexpr int PIECES = STEP_BYTES / 16, AT_ONCE = WARP / PIECES, TIMES = 8 / AT_ONCE; // of a row; rows at once; for 8 rows
    const u8 *from; // the lane's piece of its first row
    size_t step;    // bytes to its next row
    int rows;       // that exist, from its first one on
    int bytes;      // from its piece on
    u32 places[TIMES];

    DEVICE Copier(const u8 *matrix, int first, int rows, size_t stride, int row_bytes, int begin, int lane)
        : step(AT_ONCE * stride), rows(rows - first - lane / PIECES), bytes(row_bytes - begin - lane % PIECES * 16) {
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
#pragma unroll 4
        for (int row = 0; row < COUNT; row += 8) {
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                copy_past(slot + places[i] + row * 128, source, exists && row + i * AT_ONCE < rows);
                source += step;
            }
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
    const u64 a = swizzled(weights + tile * (64 * 128)), b = swizzled(inputs + part * (PART * 128));
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

// Waits for the threads of the block that multiply, and those of the whole cluster if there is one.
DEVICE void computing_barrier(bool is_alone) {
    if (is_alone) {
        asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING) : "memory");
    } else {
        cluster_barrier(false);
    }
}

// Waits until the cluster's other blocks have read what is in this one's memory. What a thread has read, it has added by now, and nothing needs
// to become visible; so nobody waits for stores to arrive, which took half a microsecond.
DEVICE void leave_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Sixteen bytes of this block's shared memory.
DEVICE float4 load_own(u32 place) {
    float4 value;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(place) : "memory");
    return value;
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

// What sums become; in shared memory, for memory is far: the scales of input rows (TOKENS) where they are rounded, then, for each of the unit's
// weight rows, scales and biases.
struct Factors {
    const Operands &operands;
    const float *input_scales, *scales, *bias;
    float *kept;

    // Reads them, and waits for the kernels before in between.
    DEVICE void read(const Unit &unit) const {
        for (int i = threadIdx.x; i < UNIT_ROWS; i += COMPUTING) {
            const int row = unit.row(i);
            const bool exists = row < operands.weight_rows;
            if (IS_ROUNDED) kept[TOKENS + i] = exists ? scales[row] : 0.0f;
            kept[TOKENS + UNIT_ROWS + i] = exists && bias ? bias[row] : 0.0f;
        }
        wait_for_previous();
        if (IS_ROUNDED && threadIdx.x < operands.rows) kept[threadIdx.x] = input_scales[threadIdx.x];
    }

    // Of four neighbouring rows of the unit, in registers: a thread asks for them once, not for each token.
    struct Rows {
        float4 scales, biases;
    };

    DEVICE Rows of(int row) const {
        const float *from = kept + TOKENS + row;
        return Rows{IS_ROUNDED ? *reinterpret_cast<const float4 *>(from) : float4(), *reinterpret_cast<const float4 *>(from + UNIT_ROWS)};
    }

    // Sums of four rows of a token, scaled, with their biases.
    DEVICE void apply(const float4 &sums, const Rows &rows, int token, float (&values)[4]) const {
        const float scale = IS_ROUNDED ? kept[token] : 1.0f;
        values[0] = IS_ROUNDED ? fmaf(sums.x, rows.scales.x * scale, rows.biases.x) : sums.x + rows.biases.x;
        values[1] = IS_ROUNDED ? fmaf(sums.y, rows.scales.y * scale, rows.biases.y) : sums.y + rows.biases.y;
        values[2] = IS_ROUNDED ? fmaf(sums.z, rows.scales.z * scale, rows.biases.z) : sums.z + rows.biases.z;
        values[3] = IS_ROUNDED ? fmaf(sums.w, rows.scales.w * scale, rows.biases.w) : sums.w + rows.biases.w;
    }
};

// Four neighbouring elements.
template <class E> struct alignas(4 * sizeof(E)) Four {
    E values[4];
};

// Four neighbouring sums of a token over the blocks of the cluster, in order.
DEVICE void add_fours(const float4 &part, float4 &sums) { sums.x += part.x, sums.y += part.y, sums.z += part.z, sums.w += part.w; }

// What a thread ends: four neighbouring outputs of the unit, of some tokens.
constexpr int FOURS = UNIT_OUTPUTS / 4, TOGETHER = COMPUTING / FOURS; // tokens of all threads at once
constexpr int TIMES = PAIRED ? 2 : 4;                                 // and of one thread
static_assert(COMPUTING % FOURS == 0, "a thread has the same outputs of all its tokens");

DEVICE int output_of_thread() { return threadIdx.x % FOURS * 4; }

// Adds the sums of the cluster's blocks, each for its part of the tokens, several tokens at once, since what is read comes from far, and ends
// them: ending.read(token, output) gives what else is needed, and is asked before the sums are there; ending.store(sums, sums of the rows
// that they are combined with, that, token, output) stores. `exists`: whether the thread's outputs do.
template <class Ending>
DEVICE void end_unit(const Sums &sums, float *own, u32 place, const Ending &ending, int rows, bool exists, int rank, int splits) {
    const int output = output_of_thread(), begin = rows * rank / splits + threadIdx.x / FOURS, end = exists ? rows * (rank + 1) / splits : 0;
    typename Ending::Early early[TIMES];
    const auto read = [&](int first) {
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            if (first + i * TOGETHER < end) early[i] = ending.read(first + i * TOGETHER, output);
        }
    };
    read(begin);
    computing_barrier(true); // nobody reads the ring any more, and what is kept is there
    const typename Ending::Kept kept = ending.keep(output);
    publish(sums, own);
    computing_barrier(splits == 1);
#pragma unroll 1
    for (int first = begin; first < end; first += TIMES * TOGETHER) {
        float4 all[TIMES] = {}, others[TIMES] = {};
        if (first > begin) read(first);
#pragma unroll 2
        for (int block = 0; block < splits; block++) {
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                const u32 from = place + (min(first + i * TOGETHER, end - 1) * STRIDE + output) * 4;
                add_fours(splits == 1 ? load_own(from) : load_of_block(from, block), all[i]);
                if (PAIRED) add_fours(splits == 1 ? load_own(from + GROUP_ROWS * 4) : load_of_block(from + GROUP_ROWS * 4, block), others[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < TIMES; i++) {
            if (first + i * TOGETHER < end) ending.store(all[i], others[i], early[i], kept, first + i * TOGETHER, output);
        }
    }
    if (splits > 1) leave_cluster();
}

// A unit of the product from beginning to end. ending.begin() reads what is needed at the end, and waits for the kernels before in between; it
// is called by the threads that multiply.
template <class Ending>
DEVICE void multiply_unit(const Operands &all, uint4 *dynamic, const Unit &unit, const Ending &ending, bool exists, int splits) {
    __shared__ u64 barriers[2 * STAGES * (GROUPS + 1)];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rank = blockIdx.x % splits;
    const int all_steps = (all.row_bytes + STEP_BYTES - 1) / STEP_BYTES, per_block = (all_steps + splits - 1) / splits;
    const int begin = rank * per_block, steps = max(min(per_block, all_steps - begin), 0);
    const u32 unaligned = u32(__cvta_generic_to_shared(dynamic)), memory = (unaligned + 1023) / 1024 * 1024;
    const Ring ring = {u32(__cvta_generic_to_shared(barriers)), memory};
    if (threadIdx.x == 0) ring.begin();
    __syncthreads();
    let_next_start();
    if (warp >= COMPUTING / WARP) {
        const int copier_number = warp - COMPUTING / WARP;
        if (copier_number < GROUPS) {
            const int first = unit.row(copier_number * GROUP_ROWS);
            Copier<GROUP_ROWS, GROUP_ROWS> copier(all.weight, first, all.weight_rows, all.row_bytes, all.row_bytes, begin * STEP_BYTES, lane);
            copier.copy_all(ring, copier_number, 0, steps, PACE);
        } else {
            constexpr int OWN = TOKENS / INPUT_WARPS;
            const int token = (copier_number - GROUPS) * OWN;
            Copier<OWN, TOKENS> copier(all.input, token, all.rows, all.input_stride, all.row_bytes, begin * STEP_BYTES, lane);
            wait_for_previous();
            copier.copy_all(ring, GROUPS, token * 128, steps, STAGES);
        }
        end_group();
        wait_group<0>();
        return;
    }
    ending.begin();
    Sums sums = {};
    multiply_steps(ring, warp / 4, steps, sums);
    float *own = reinterpret_cast<float *>(reinterpret_cast<u8 *>(dynamic) + (memory - unaligned)) + warp / 4 * GROUP_ROWS;
    end_unit(sums, own, memory, ending, all.rows, exists, rank, splits);
}
#endif
