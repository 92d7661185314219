// All layers of a step of one or two rows in one kernel: products, attention, and what surrounds them. With weights of 4 bits, and beyond
// compute capability 9.0, the same products, bit for bit, as from linear_rope.cu and linear_stream.cu one by one; on that, other weights are
// multiplied by warp groups (layers_group.cuh), which add in another order, the same for a row whether there is a second one or not. Attention
// to more than a page a warp adds in another order than attention_decode.cu (layers_parts.cuh).
//
// Between kernels memory idles: the next one's ring of weights is full long before, and its first units wait for the row. Here one block a
// multiprocessor stays for the whole stack. Two warps copy weights, by the copy engine, and go on with the next product at once, as far as a
// ring of 180 KB reaches; eight multiply, and six of them attend; two end units, so that nobody waits for scales, residuals and angles.
// Blocks hand rows over in words that prove themselves, without a barrier or a fence (layers_words.cuh).
//
// On an H200 a layer of one row after 400 tokens takes, in us: as kernels one by one; with a count of blocks that was released; and so:
//   8B E4M3 70.8, 62.9, 61.0; 70B E4M3 224.6, 207.7, 199.0; 8B of 4 bits 51.3, 45.4, 41.6; 1B bfloat16 37.0, 37.4, 36.2; 8B bfloat16 109.4,
//   108.8, 105.2 (in whole models 274 tokens a second either way); 1B E4M3 31.7, not measured, 26.6; 1B of 4 bits 26.4, not measured, 22.5.
// A release waited for all that the multiprocessor copied, 1.7 to 2.4 us, which is why of 4 bits no more than two rounds were under way
// meanwhile; now four are as good as seven. Copying alone takes 52.2 of 8B E4M3.
//
// Since then a block knows its first piece of attention before the layers begin, and two warps that do not attend store new keys and values while
// the others read queries. Same call, H200, us of a layer: 8B of 4 bits 41.7, 40.6; 8B E4M3 60.6, 58.6; 1B bfloat16 36.2, 35.2.
//
// Then attention was divided among blocks (layers_parts.cuh): 8B of 4 bits 40.6, 38.9, and with scales of 128 columns 39.8, 37.9; 8B E4M3
// 58.9, 57.4; 70B E4M3 201.2, 199.8 (in another call 198.5 both); 1B bfloat16 35.4, 34.6. And a round of 4 bits became two steps of a warp, so
// that it waits once and arrives once for both, and half as many copies are twice as long: 38.9, 37.1, and with scales of 128 columns 38.1,
// 35.5. Of those, three and four under way take 37.4 and 38.8: whatever others read waits behind them.
//
// What brought nothing since: bringing more to L2 while the ring is full (39.9 for 38.9; waiting in a loop that can do it is 0.4 of that);
// running what comes next on nothing while the row is waited for, in case its instructions are not at hand (40 to 44 for 38.9); asking for
// attention's row later or by one lane; four turns of the input at once; the count beside the words, as a hint when to read them (8B the
// same, 70B 206 for 202); reading the first of them alone, or with rests in between; three, six or eight rounds under way; two pages of a
// warp's attention in registers or in shared memory, so that one comes while the other is multiplied (8B 61.3, 4 bits 44.4, as the ring is
// smaller); scores in two chains; rounds of 2,048 bytes of 8 rows for one warp group, every other one (1B bfloat16 37.1, 70B 199.2; with a
// ring of 11 it hung).
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
// one by one).
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
constexpr int STEPS_OF_WARP = PACKED == 4 ? 2 : 1, ROUND_STEPS = STEPS_OF_WARP * WARPS; // of a round: of a warp, which multiplies them at once
constexpr int PACED = PACKED == 4 ? 2 : 4;                                              // rounds under way
constexpr int TURNS_TOGETHER = PACKED == 4 ? 2 : 1;                                     // steps of the input that a warp prepares at once

#include "layers_words.cuh"
#include "layers.cuh"
#include "layers_parts.cuh"
#include "layers_copy.cuh"
#include "layers_end.cuh"
#include "layers_attend.cuh"

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
    const Incoming &incoming;
    int warp, lane, own_steps, turns;
    u8 *own;
    float factors[FACTORS][8];

    DEVICE Bringing(const Product &product, const Incoming &incoming, int warp, int lane, int own_steps, u8 *own)
        : product(product), incoming(incoming), warp(warp), lane(lane), own_steps(own_steps), turns((own_steps + AT_ONCE - 1) / AT_ONCE),
          own(own) {
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

    // Eight columns; what lies beyond the row becomes zeros.
    DEVICE uint4 read(const bf16 *row, int turn) const {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row && turn < turns && column(turn) < product.columns) raw = load_words(row + column(turn));
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
        read_words(raw, incoming.wait, [&](int i) { return read(row, base + i); });
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

    // Brings all rows, and leaves the squares of each where there is a norm: a product without may begin before the finishing warps have read
    // those of the one before it.
    DEVICE void bring(float *all_squares) const {
        if (turns == 0 && lane < TOKENS && product.norm) all_squares[lane] = 0.0f;
#pragma unroll 1
        for (int token = 0; token < product.rows && turns > 0; token++) {
            const bf16 *row = incoming.row(token);
            float squares = 0.0f;
#pragma unroll 1
            for (int base = 0; base < turns; base += BATCH) bring_batch(row, token, base, squares);
            if (!product.norm) continue;
            squares = warp_sum(squares);
            if (lane == 0) all_squares[token] = squares;
        }
        __syncwarp();
    }
};

// Leaves a warp's sums to those who end the unit: of one row, those of quarters, which they add up in the same order.
DEVICE void leave(Accumulator &sums, float *to, int rows, int stride, int g, int t) {
#if QUARTERED
    to[g * stride + t] = sums.quarters[0][0][0], to[(g + 8) * stride + t] = sums.quarters[0][0][2];
#else
    publish(sums, to, rows, stride, g, t);
#endif
}

// Multiplies COUNT steps of a warp in a round.
template <int COUNT>
DEVICE void multiply_round(const Round &round, const Input &input, const Ring &ring, Place &place, u32 resident, u32 input_bytes, int lane,
                           Accumulator &sums) {
    Step steps[COUNT];
    rest_for_phase(ring.full(place), place.parity);
#pragma unroll
    for (int i = 0; i < COUNT; i++) round.read(ring.slot(place), i, steps[i]);
    __syncwarp();
    if (lane == 0) arrive(ring.empty(place));
    place.next(ring.slots);
#pragma unroll
    for (int i = 0; i < COUNT; i++) multiply(input, steps[i], resident + i * input_bytes, sums);
}

// Multiplies a warp's steps of a unit; the last of its rounds may have fewer for this warp, or none.
DEVICE void multiply_unit(const Round &round, const Input &input, const Ring &ring, Place &place, int own_steps, bool is_idle, u32 resident,
                          u32 input_bytes, int lane, Accumulator &sums) {
#pragma unroll 1
    for (; own_steps >= STEPS_OF_WARP; own_steps -= STEPS_OF_WARP) {
        multiply_round<STEPS_OF_WARP>(round, input, ring, place, resident, input_bytes, lane, sums);
        resident += STEPS_OF_WARP * input_bytes;
    }
    if (STEPS_OF_WARP > 1 && own_steps > 0) multiply_round<1>(round, input, ring, place, resident, input_bytes, lane, sums);
    if (!is_idle) return;
    rest_for_phase(ring.full(place), place.parity);
    if (lane == 0) arrive(ring.empty(place));
    place.next(ring.slots);
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
    wait_for_previous();
    const Handed handed = launch.find();
    find_first(launch, pieces, warp, lane);
    for (int number = 0; number < program.count; number++) {
        const Operation &own = program.take(number);
        if (own.kind == ATTEND) attend_or_help(own, launch, handed, pieces, handed.launch * program.count + number, warp, lane);
        if (own.kind == ATTEND || first_unit(own) >= own.units) continue;
        const Incoming incoming(own, handed);
        const Product product = product_of(own, rows);
        const int steps = steps_of(own), own_steps = max((steps - warp + WARPS - 1) / WARPS, 0), most_steps = (steps + WARPS - 1) / WARPS;
        const bool is_idle = (own_steps + STEPS_OF_WARP - 1) / STEPS_OF_WARP < (steps + ROUND_STEPS - 1) / ROUND_STEPS;
        u8 *own_input = room.input() + warp * most_steps * step_bytes;
        const Bringing bringing(product, incoming, warp, lane, own_steps, own_input);
        work_barrier(); // nobody needs the input of the operation before this one
        bringing.bring(room.squares() + warp * TOKENS);
        const u32 resident = u32(__cvta_generic_to_shared(own_input));
        const int units = own.units;
#pragma unroll 1
        for (int unit = first_unit(own); unit < units; unit += gridDim.x, turn.unit++) {
            Accumulator sums = {};
            multiply_unit(round, input, launch.ring, place, own_steps, is_idle, resident, step_bytes, lane, sums);
            rest_for_phase(launch.handover.empty(turn), turn.parity() ^ 1);
            leave(sums, room.sums(turn.slot()) + warp * 16 * SUM_STRIDE, rows, SUM_STRIDE, lane / 4, lane % 4);
            arrive(launch.handover.full(turn));
        }
    }
}

#include "layers_group.cuh"

// operations: (count) records; count must be of whole layers, the first of them begins with queries, keys and values. rope_rows, slots: (rows);
// items, counts, page_table, partials, piece_counters: as attention_decode.cu; counters: which set of words is next, and a count that is 0
// before and after; words: two sets of set_bytes each, the next one full of NOT_THERE, as it is left. Launch: cooperative, as many blocks as
// multiprocessors, ALL_WARPS warps; dynamic shared memory: RING_AT, ring_slots rounds, and the longest input or decoding::Shared. rows: 1 or 2;
// columns are a multiple of a step.
BOUNDED_KERNEL(ALL_WARPS *WARP, 1)
layers(const Operation *operations, const int *rope_rows, const int *slots, const Item *items, const int *counts, const int *page_table,
       u32 *counters, u8 *words, int set_bytes, int count, int rows, int heads, int kv_heads,
       int all_slots, int page_stride, int ring_slots, float scale, float softcap) {
    extern __shared__ uint4 dynamic[];
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const Room room = {reinterpret_cast<u8 *>(dynamic), ring_slots};
    const u32 base = u32(__cvta_generic_to_shared(dynamic));
    const Launch launch = {room,
                           {base + RING_AT, base + RING_BARRIERS_AT, ring_slots},
                           {base + SUM_BARRIERS_AT},
                           {words, counters, u32(set_bytes)},
                           {rope_rows, slots, rows, heads, kv_heads, all_slots}};
    launch.ring.begin_barriers(thread, ALL_WARPS * WARP);
    if (thread == 0) launch.handover.begin();
    __syncthreads();
    const Program program(operations, count, room.operation(warp), lane);
    const Pieces pieces = {items, counts, page_table, page_stride, scale, softcap};
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
            copy_weights(program, launch.ring, pieces, rows, kv_heads, warp - WARPS, lane);
        } else {
            finish_units(program, launch, warp - WARPS - COPIERS, lane);
        }
    }
    // Whoever comes last, of the warps that read which set is used, or wait for those that do, tells the next launch.
    if ((warp > 0 && warp < WARPS + COPIERS) || lane > 0) return;
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counters + 1) : "memory");
    if (before == gridDim.x * (1 + FINISHERS) - 1) counters[0]++, counters[1] = 0;
}
