// All layers of a step of one or two rows in one kernel: products, attention, and what surrounds them. With weights of 4 bits, and beyond
// compute capability 9.0, the same bits as from linear_rope.cu, attention_decode.cu and linear_stream.cu one by one; on that, other weights are
// multiplied by warp groups (layers_group.cuh), which add in another order, the same for a row whether there is a second one or not.
//
// Between kernels memory idles: the next one's ring of weights is full long before, and its first units wait for the row. Here one block a
// multiprocessor stays for the whole stack. Two warps copy weights, by the copy engine, and go on with the next product at once, as far as a
// ring of 180 KB reaches; eight multiply, and six of them attend; two end units, so that nobody waits for scales, residuals and angles. A
// block's part of an operation is told to all by a count in memory, which the next operation waits for: 0.3 us.
//
// On an H200 a layer of one row takes, by the tokens a second of whole models (before: as kernels one by one) 63 us (70.4) of 8B E4M3, 44 (49.6)
// of 8B with 4 bits, 216 (224.7) of 70B E4M3. With 4 bits a boundary costs less since rows are brought two steps at a time and two rounds
// are under way, not seven, while an operation is copied that waits for other blocks: a release waits for all that the multiprocessor copies
// (1.2 to 3.8 us on an H100). Of E4M3 the same was faster on an H100 (8B 75.8 for 84.7 us, 70B 289 for 295) and slower on an H200 (by 3 % and 7 %), so
// it does neither (gpu-h200-layer-kernel-*.json). Most of that was the loop in which the copying warps waited for rounds: without it, the layers
// alone took 65.1 us in place of 66.9 and 216 in place of 230 on an H200. Multiplied by warp groups they take 62.8 where they took 64.3, and 207.2
// for 212.1. Weights of bfloat16 gain nothing by one kernel, even so (1B: 37.4 us, one by one 37.5): they run one by one.
//
// Where the rest goes, of 8B E4M3 on an H200 at 65.4 us, where one instruction copied half a round (stamps, and parts left out): without waiting for other blocks and attention 52.8, and
// without multiplying too 52.2; without attention 60.7; if nobody waited until what a block has written is visible to the others, which must
// be, 60.8: that takes 1.7 to 2.4 us at each end of an operation.
//
// What limits it: integer instructions (masks, choices, shifts, E4M3 to half) take a scheduler two cycles each, half of all that there are, and
// two warps of a scheduler wait for each other's chains the other half. So what is computed anew in every step costs (KEEPS), and choices are
// products. Without copies and boundaries a layer of 8B took 29.6 us with 4 bits and 33 of E4M3, before these were spared. What brought
// nothing: the next rounds in registers before these are multiplied (57 for 52.8 us), the row's digits in registers through a product (spilled),
// four rounds at once, sums handed over while the next weights are read (48.8 for 47.5), keys asked for before the softmax, shorter chunks of
// attention. Sixteen warps (two teams) would have 96 registers each, too few for attention: 91 and 70 us on an H200. Copies of 16 bytes by four
// warps reached 3.2 TB/s in place of 4.
//
// All blocks must run at once: the launch is cooperative, and the driver refuses it where they cannot (layers.py then runs the operations
// one by one). A barrier of blocks is a release of what the block has written and an acquire by one thread.
#define PAIRED 1
#define NORM 1
#define RESIDENT 1
#define KEEPS 1
#ifndef DECODE_WARPS
#define DECODE_WARPS 6
#endif
#define DECODE_BARRIER() asm volatile("bar.sync 3, %0;" ::"n"(DECODE_WARPS *WARP) : "memory")
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "attention.cuh"
#include "attention_decode.cuh"
#include "activation.cuh"
#include "linear_product.cuh"
#include "linear_stream.cuh"
#include "rotated.cuh"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !PACKED && TOKENS <= 2
#define BY_GROUPS 1 // weights are multiplied by warp groups
#include "warp_group.cuh"
#include "warp_group_shared.cuh"
#else
#define BY_GROUPS 0
#endif

constexpr int COPIERS = 2, FINISHERS = 2, TURNS_AHEAD = 4; // warps; units whose sums are kept
constexpr int ALL_WARPS = WARPS + COPIERS + FINISHERS;
constexpr int WORKING_REGISTERS = 208, OTHER_REGISTERS = 88; // of a thread; the kernel begins with 168
constexpr int PACED = PACKED == 4 ? 7 : 4;           // rounds under way
constexpr int SLOW = PACKED == 4 ? 2 : PACED;        // the same while an operation is copied that waits for other blocks
constexpr int ROUNDS_TOGETHER = PACKED == 4 ? 2 : 1; // rounds that a warp multiplies at once
constexpr int TURNS_TOGETHER = PACKED == 4 ? 2 : 1;  // steps of the input that it prepares at once

#include "layers.cuh"
#include "layers_copy.cuh"
#include "layers_end.cuh"

template <int COUNT> DEVICE void more_registers() {
#if __CUDA_ARCH__ >= 900
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

template <int COUNT> DEVICE void fewer_registers() {
#if __CUDA_ARCH__ >= 900
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// The input rows of a warp's steps in shared memory, as linear_stream.cuh has them, AT_ONCE steps of a row at a time: a turn. Rows are
// normalised, or multiplied by ones, which changes nothing.
struct Bringing {
    static constexpr int BATCH = 8, FACTORS = 2; // turns that are asked for together; whose factors are there before the kernel waits
    const Product &product;
    int warp, lane, own_steps, turns;
    u8 *own;
    float factors[FACTORS][8];

    DEVICE Bringing(const Product &product, int warp, int lane, int own_steps, u8 *own)
        : product(product), warp(warp), lane(lane), own_steps(own_steps), turns((own_steps + AT_ONCE - 1) / AT_ONCE), own(own) {
#pragma unroll
        for (int i = 0; i < FACTORS; i++) read_factors(i, factors[i]);
        for (int turn = FACTORS; turn < turns && product.norm; turn++) {
            if (column(turn) < product.columns) prefetch_line(product.norm + column(turn));
        }
    }

    DEVICE int step(int turn) const { return turn * AT_ONCE + lane / EIGHTS; }
    DEVICE int column(int turn) const { return (warp + step(turn) * WARPS) * STEP + lane % EIGHTS * 8; }

    DEVICE void read_factors(int turn, float (&to)[8]) const {
        const bool exists = product.norm && turn < turns && column(turn) < product.columns;
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = 1.0f;
        if (exists) load<8>(product.norm + column(turn), to);
    }

    // Eight columns; what lies beyond the row becomes zeros. Other multiprocessors wrote them, so L1 must not be asked.
    DEVICE uint4 read(const bf16 *row, int turn) const {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (turn < turns && column(turn) < product.columns) raw = __ldcg(reinterpret_cast<const uint4 *>(row + column(turn)));
        return raw;
    }

    // Prepares COUNT turns of a token, and adds up their squares; the last ones need not exist.
    template <int COUNT>
    DEVICE void put(const uint4 (&raw)[COUNT], const float (&norm)[COUNT][8], int turn, int token, float (&squares)[COUNT]) const {
        u8 *slots[COUNT];
        bool writes[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++) slots[i] = own + step(turn + i) * product.rows * INPUT_BYTES, writes[i] = step(turn + i) < own_steps;
        Input::put<COUNT>(raw, norm, slots, product.rows, token, lane % EIGHTS, writes, squares);
    }

    // Brings turns of a token, up to BATCH from `base` on, and adds up their squares.
    DEVICE void bring_batch(const bf16 *row, int token, int base, float &squares) const {
        uint4 raw[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) raw[i] = read(row, base + i);
        if (TURNS_TOGETHER == 1) {
            bring_each(raw, token, base, squares);
        } else {
            bring_pairs(raw, token, base, squares);
        }
    }

    // One turn after the other, without a loop.
    DEVICE void bring_each(const uint4 (&raw)[BATCH], int token, int base, float &squares) const {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (base + i >= turns) break;
            const uint4 own_raw[1] = {raw[i]};
            float norm[1][8], own_squares[1] = {};
            if (i < FACTORS && base == 0) {
#pragma unroll
                for (int k = 0; k < 8; k++) norm[0][k] = factors[i < FACTORS ? i : 0][k];
            } else {
                read_factors(base + i, norm[0]);
            }
            put<1>(own_raw, norm, base + i, token, own_squares);
            squares = base + i == 0 ? own_squares[0] : squares + own_squares[0];
        }
    }

    // Two turns at a time, in a loop that is short: what does not fit the instruction cache is slow.
    DEVICE void bring_pairs(uint4 (&raw)[BATCH], int token, int base, float &squares) const {
        float norm[2][8];
#pragma unroll
        for (int i = 0; i < 16; i++) norm[i / 8][i % 8] = factors[i / 8][i % 8];
        if (product.norm && base > 0) read_factors(base, norm[0]), read_factors(base + 1, norm[1]);
        const int end = min(turns, base + BATCH);
#pragma unroll 1
        for (int turn = base; turn < end; turn += 2) {
            const uint4 pair[2] = {raw[0], raw[1]};
            float own_squares[2] = {};
            put<2>(pair, norm, turn, token, own_squares);
            squares = (turn == 0 ? own_squares[0] : squares + own_squares[0]) + own_squares[1];
#pragma unroll
            for (int i = 0; i + 2 < BATCH; i++) raw[i] = raw[i + 2];
            if (product.norm && turn + 2 < end) read_factors(turn + 2, norm[0]), read_factors(turn + 3, norm[1]);
        }
    }

    // Brings all rows, and leaves the squares of each.
    DEVICE void bring(float *all_squares) const {
        if (turns == 0 && lane < TOKENS) all_squares[lane] = 0.0f;
#pragma unroll 1
        for (int token = 0; token < product.rows && turns > 0; token++) {
            const bf16 *row = product.input + token * size_t(product.input_stride);
            float squares = 0.0f;
#pragma unroll 1
            for (int base = 0; base < turns; base += BATCH) bring_batch(row, token, base, squares);
            squares = warp_sum(squares);
            if (lane == 0) all_squares[token] = squares;
        }
        __syncwarp();
    }
};

// Waits until the operations before this one have ended everywhere: all warps that multiply.
DEVICE void wait_for_operation(const Launch &launch, const Operation &own, int number) {
    if (number == 0) wait_for_previous();
    if (number > 0 && threadIdx.x == 0) launch.grid.wait(own), launch.handover.pass(number);
    work_barrier();
}

// Multiplies a warp's steps of COUNT rounds.
template <int COUNT>
DEVICE void multiply_rounds(const Round &round, const Input &input, const Ring &ring, Place &place, u32 &resident, u32 input_bytes, int lane,
                            Accumulator &sums) {
    Step steps[COUNT];
    u32 empty[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        rest_for_phase(ring.full(place), place.parity);
        round.read(ring.slot(place), steps[i]);
        empty[i] = ring.empty(place);
        place.next(ring.slots);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (lane == 0) arrive(empty[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) multiply(input, steps[i], resident + i * input_bytes, sums);
    resident += COUNT * input_bytes;
}

// Multiplies a warp's steps of a unit; the last of its rounds may have none for this warp.
DEVICE void multiply_unit(const Round &round, const Input &input, const Ring &ring, Place &place, int own_steps, bool is_idle, u32 resident,
                          u32 input_bytes, int lane, Accumulator &sums) {
#pragma unroll 1
    for (; own_steps >= ROUNDS_TOGETHER; own_steps -= ROUNDS_TOGETHER) {
        multiply_rounds<ROUNDS_TOGETHER>(round, input, ring, place, resident, input_bytes, lane, sums);
    }
#pragma unroll 1
    for (; ROUNDS_TOGETHER > 1 && own_steps > 0; own_steps--) multiply_rounds<1>(round, input, ring, place, resident, input_bytes, lane, sums);
    if (!is_idle) return;
    rest_for_phase(ring.full(place), place.parity);
    if (lane == 0) arrive(ring.empty(place));
    place.next(ring.slots);
}

DEVICE void attend(const Operation &own, const Launch &launch, const Pieces &pieces, int number) {
    const decoding::Call call = {own.input, own.output, own.keys, own.values, nullptr, nullptr, nullptr, pieces.items, pieces.counts,
                                 pieces.page_table, pieces.partials, pieces.counters, own.input_stride, own.output_stride, pieces.page_stride,
                                 launch.inputs.kv_heads, 0, pieces.scale, pieces.softcap};
    decoding::attend(call, *reinterpret_cast<decoding::Shared *>(launch.room.input()), [&] { wait_for_operation(launch, own, number); });
    DECODE_BARRIER();
    if (threadIdx.x == 0) launch.grid.arrive();
}

DEVICE void attend_or_wait(const Operation &own, const Launch &launch, const Pieces &pieces, int number, int warp) {
    if (warp < DECODE_WARPS) {
        attend(own, launch, pieces, number);
    } else {
        wait_for_operation(launch, own, number);
    }
}

// A multiplying warp; six of them attend, too.
DEVICE void multiply_all(Program program, const Launch &launch, const Pieces &pieces, int warp, int lane) {
    const Room &room = launch.room;
    const int rows = launch.inputs.rows;
    const Product nothing = {nullptr, nullptr, nullptr, nullptr, nullptr, 0, rows, 0, 0, 0, 0};
    const Round round(warp, lane);
    const Input input(nothing, warp, lane);
    const u32 step_bytes = rows * INPUT_BYTES;
    Place place = {0, 0};
    Turn turn = {0};
    for (int number = 0; number < program.count; number++) {
        const Operation &own = program.take(number);
        if (own.kind == ATTEND) {
            attend_or_wait(own, launch, pieces, number, warp);
            continue;
        }
        const Product product = product_of(own, rows);
        const int steps = steps_of(own), own_steps = max((steps - warp + WARPS - 1) / WARPS, 0), rounds = (steps + WARPS - 1) / WARPS;
        u8 *own_input = room.input() + warp * rounds * step_bytes;
        const Bringing bringing(product, warp, lane, own_steps, own_input);
        wait_for_operation(launch, own, number);
        bringing.bring(room.squares() + warp * TOKENS);
        const u32 resident = u32(__cvta_generic_to_shared(own_input));
        const int units = own.units;
#pragma unroll 1
        for (int unit = first_unit(own); unit < units; unit += gridDim.x, turn.unit++) {
            Accumulator sums = {};
            multiply_unit(round, input, launch.ring, place, own_steps, own_steps < rounds, resident, step_bytes, lane, sums);
            rest_for_phase(launch.handover.empty(turn), turn.parity() ^ 1);
            publish(sums, room.sums(turn.slot()) + warp * 16 * SUM_STRIDE, rows, SUM_STRIDE, lane / 4, lane % 4);
            arrive(launch.handover.full(turn));
        }
    }
}

#include "layers_group.cuh"

// operations: (count) records; count must be of whole layers, the first of them begins with queries, keys and values. rope_rows, slots: (rows);
// items, counts, page_table, partials, piece_counters: as attention_decode.cu; counters: two words that are 0 before and after. Launch:
// cooperative, as many blocks as multiprocessors, ALL_WARPS warps; dynamic shared memory: RING_AT, ring_slots rounds, and the longest input or
// decoding::Shared. rows: 1 or 2; columns are a multiple of a step.
BOUNDED_KERNEL(ALL_WARPS *WARP, 1)
layers(const Operation *operations, const int *rope_rows, const int *slots, const Item *items, const int *counts, const int *page_table,
       float *partials, int *piece_counters, u32 *counters, int count, int rows, int heads, int kv_heads, int all_slots, int page_stride,
       int ring_slots, float scale, float softcap) {
    extern __shared__ uint4 dynamic[];
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const Room room = {reinterpret_cast<u8 *>(dynamic), ring_slots};
    const u32 base = u32(__cvta_generic_to_shared(dynamic));
    const Launch launch = {room,
                           {base + RING_AT, base + RING_BARRIERS_AT, ring_slots},
                           {base + SUM_BARRIERS_AT},
                           {counters},
                           {rope_rows, slots, rows, heads, kv_heads, all_slots}};
    launch.ring.begin_barriers(thread, ALL_WARPS * WARP);
    if (thread == 0) launch.handover.begin();
    __syncthreads();
    const Program program(operations, count, room.operation(warp), lane);
    const Pieces pieces = {items, counts, page_table, partials, piece_counters, page_stride, scale, softcap};
    if (warp < WARPS) {
        more_registers<WORKING_REGISTERS>();
#if BY_GROUPS
        multiply_by_groups(program, launch, pieces, warp, lane);
#else
        multiply_all(program, launch, pieces, warp, lane);
#endif
    } else {
        fewer_registers<OTHER_REGISTERS>();
        if (warp < WARPS + COPIERS) {
            copy_weights(program, launch.ring, launch.handover, pieces, rows, kv_heads, warp - WARPS, lane);
        } else {
            finish_units(program, launch, warp - WARPS - COPIERS, lane);
        }
    }
    // Whoever comes last, of the warps that wait for others or are waited for, leaves the counts as they were.
    if ((warp > 0 && warp < WARPS + COPIERS) || lane > 0) return;
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counters + 1) : "memory");
    if (before == gridDim.x * (1 + FINISHERS) - 1) counters[0] = 0, counters[1] = 0;
}
