// The pipeline of the streaming products: a weight matrix times up to TOKENS input rows, at the speed of reading the weights once.
//
// A block takes a unit of 16 weight rows at a time, and then another; its WARPS warps share out the columns in steps, and their sums are
// added in order at the end of each. So a result depends on its input row and the weights alone, not on the other rows. Each warp copies
// its steps of the weights to a ring of its own in shared memory, DEPTH steps ahead, across the ends of units, and waits for nobody. The
// loops are kept short: what does not fit the instruction cache cost half of the speed.
//
// A multiprocessor has 8 of these warps: with 16, in two teams, an H200 read 3.8 TB/s in place of 4.5, whatever was under way.
//
// What decode loses, it loses between kernels: until the last block has ended, and the next kernel's blocks have been launched, have read
// their input and asked for weights, memory idles, 4 us of 13 for a small matrix. So two kernels share a multiprocessor: the next one's
// block is there before this one's ends, with its ring full of weights, which it multiplies while the ring of the kernel after that fills.
// (When the ring was in registers, a block took all of them.) Two blocks of one kernel must not share one: where that once happens, the
// next kernel finds its places elsewhere, and soon every kernel runs on half of the multiprocessors. So launches alternate between blocks
// with more than half of the shared memory, and blocks with more than half of the registers, by warps that do nothing but wait for the end.
//
// A ring is filled a few steps at a time while the kernel waits: asked for at once, 13 MB are a queue in which whatever the kernel before
// this one still reads waits 4 us on an H100 (attention took 10 us in place of 5).
//
// Input rows are in shared memory: whole (RESIDENT), or each warp copies its columns behind its weights to the ring. They are bfloat16
// (stream_input.cuh), or what E4M3 weights and those of 4 bits are multiplied by with the fewest instructions (stream_prepared.cuh): a step of
// a warp may take 500 cycles on an H200, and its instructions wait for each other; so two are multiplied at a time.
//
// NORM 1: input rows, RESIDENT, are root-mean-square normalised, with the factors `norm`. The row's scale is applied to the sums at the
// end, when the sum of squares is known.
#ifndef WARPS
#define WARPS 8
#endif
#ifndef DEPTH
#define DEPTH 2
#endif
#ifndef NORM
#define NORM 0
#endif
#ifndef RESIDENT
#define RESIDENT 0
#endif

constexpr int THREADS = WARPS * WARP;
constexpr int BOUND = PACKED == 4 && TOKENS > (MINIMA ? 1 : 8) ? 384 : 576; // threads of a block: there are up to 168 registers, or 96
constexpr int EIGHTS = STEP / 8;                        // 16 bytes of an input row each, in a step
constexpr int AT_ONCE = WARP / EIGHTS;                  // steps that a warp makes resident at once, or tokens that it copies
constexpr int PACE = Feed<WARPS>::BYTES > 1536 ? 2 : 3; // steps of a warp under way before the kernel may begin
constexpr int TURNS = TOKENS > 8 ? 1 : 2;               // units whose sums are kept
static_assert(RESIDENT || !NORM, "only resident rows are normalised");
static_assert(TILES == 1 && OUTPUTS * TOKENS <= THREADS, "a thread ends one output of a unit");

#include "normed.cuh"
#if PACKED == 4 || IS_E4M3
#include "stream_prepared.cuh"
#endif
#if PACKED == 4
#include "stream_digits.cuh"
#elif IS_E4M3
#include "stream_halves.cuh"
#else
#include "stream_input.cuh"
#endif

// Ends a block: the warps that only take registers wait for those that work.
DEVICE void end_block(bool works) {
    if (blockDim.x == THREADS) return;
    if (works) {
        asm volatile("bar.arrive 1, %0;" ::"r"(blockDim.x) : "memory");
    } else {
        asm volatile("bar.sync 1, %0;" ::"r"(blockDim.x) : "memory");
    }
}

// Waits for the other warps that work.
DEVICE void work_barrier() { asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory"); }

// A block's shared memory: squares that each warp added up (WARPS, TOKENS), sums (TURNS, WARPS, 16, stride), the rings (WARPS, DEPTH) of a
// step's weights and, unless RESIDENT, its input (rows, INPUT_BYTES); the RESIDENT input, for each warp ceil(steps / WARPS) slots of
// (rows, INPUT_BYTES).
struct Memory {
    u8 *begin;
    int rows;

    DEVICE float *squares() const { return reinterpret_cast<float *>(begin); }
    DEVICE int stride() const { return rows | 1; }
    DEVICE float *sums(int turn) const { return squares() + WARPS * TOKENS + turn * WARPS * 16 * stride(); }
    DEVICE int slot_bytes() const { return Feed<WARPS>::BYTES + (RESIDENT ? 0 : rows * INPUT_BYTES); }
    DEVICE u8 *ring(int warp) const { return reinterpret_cast<u8 *>(sums(TURNS)) + warp * DEPTH * slot_bytes(); }
    DEVICE u8 *input() const { return ring(WARPS); }
};

// The input rows of a warp's steps in shared memory, AT_ONCE steps of a row at a time: a turn. A lane has the same eight columns of a step all
// the time. With NORM, rows are normalised before the first product; the norm's factors come from far, so they are asked for before the kernel
// waits. Else they are brought as they are, and if they must be prepared, that is done in place in the block's first unit, each turn before
// it is multiplied, so that the ring is refilled meanwhile.
struct Residence {
    static constexpr int BATCH = NORM ? 2 : 8;

    const Product &product;
    int warp, lane, own_steps, turns;
    u8 *own;                             // the warp's slots
    float factors[NORM ? BATCH : 1][8];  // of the first turns

    DEVICE Residence(const Product &product, int warp, int lane, int own_steps, u8 *own)
        : product(product), warp(warp), lane(lane), own_steps(own_steps), turns((own_steps + AT_ONCE - 1) / AT_ONCE), own(own) {
        if (!NORM) return;
        read_factors(0, factors[0]), read_factors(turns > 1 ? 1 : 0, factors[NORM]);
        for (int turn = 2; turn < turns; turn++) {
            if (column(turn) < product.columns) prefetch_line(product.norm + column(turn));
        }
    }

    // The lane's step of the warp, and its first column.
    DEVICE int step(int turn) const { return turn * AT_ONCE + lane / EIGHTS; }
    DEVICE int column(int turn) const { return (warp + step(turn) * WARPS) * STEP + lane % EIGHTS * 8; }
    DEVICE u8 *slot(int turn) const { return own + step(turn) * product.rows * INPUT_BYTES; }

    DEVICE void read_factors(int turn, float (&to)[8]) const {
        const bool exists = column(turn) < product.columns;
        if (exists) load<8>(product.norm + column(turn), to);
#pragma unroll
        for (int i = 0; i < 8 && !exists; i++) to[i] = 0.0f;
    }

    // Goes from a turn of a token to the next.
    DEVICE void next(int &token, int &turn) const {
        if (++turn == turns) turn = 0, token++;
    }

    // Eight columns of a token; what lies beyond the row becomes zeros.
    DEVICE uint4 read(bool exists, int token, int turn) const {
        uint4 raw = make_uint4(0, 0, 0, 0);
        const bf16 *from = product.input + token * size_t(product.input_stride) + column(turn);
        if (exists && column(turn) < product.columns) raw = *reinterpret_cast<const uint4 *>(from);
        return raw;
    }

    // Brings all rows. What is read is asked for before anything is written.
    DEVICE void bring() const {
        int token = 0, turn = 0, late_token = 0, late_turn = 0; // what is read next, and written next
#pragma unroll 1
        for (int left = product.rows * turns; left > 0; left -= BATCH) {
            uint4 raw[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                if (i >= left) break;
                raw[i] = read(true, token, turn);
                next(token, turn);
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                if (i >= left) break;
                if (step(late_turn) < own_steps) *reinterpret_cast<uint4 *>(slot(late_turn) + input_place(late_token, lane % EIGHTS)) = raw[i];
                next(late_token, late_turn);
            }
        }
    }

    // Brings all rows, normalised, and leaves the squares of each; two turns at a time, so that instructions wait less for each other.
    DEVICE void bring_normalised(const Memory &memory) {
        float *all_squares = memory.squares() + warp * TOKENS, squares = 0.0f;
        if (turns == 0 && lane < TOKENS) all_squares[lane] = 0.0f;
        int token = 0, turn = 0;
#pragma unroll 1
        for (int left = product.rows * turns; left > 0; left -= 2) {
            int second_token = token, second = turn;
            next(second_token, second);
            const uint4 raw[2] = {read(true, token, turn), read(left > 1, second_token, second)};
            if (token > 0 || turn > 0) read_factors(turn, factors[0]), read_factors(second, factors[NORM]);
            float own_squares[2] = {};
            put(raw[0], factors[0], turn, token, true, own_squares[0]);
            put(raw[1], factors[NORM], second, second_token, left > 1, own_squares[1]);
            leave(own_squares[0], turn, token, all_squares, squares);
            if (left > 1) leave(own_squares[1], second, second_token, all_squares, squares);
            token = second_token, turn = second;
            next(token, turn);
        }
    }

    DEVICE void put(const uint4 &raw, const float (&norm)[8], int turn, int token, bool exists, float &squares) const {
        const uint4 all_raw[1] = {raw};
        u8 *const slots[1] = {slot(turn)};
        const bool writes[1] = {exists && step(turn) < own_steps};
        float own_squares[1] = {};
        Input::put<1>(all_raw, reinterpret_cast<const float(&)[1][8]>(norm), slots, product.rows, token, lane % EIGHTS, writes, own_squares);
        squares = own_squares[0];
    }

    // Adds squares of a turn, and leaves those of the whole row.
    DEVICE void leave(float own_squares, int turn, int token, float *all_squares, float &squares) const {
        squares = turn == 0 ? own_squares : squares + own_squares;
        if (turn < turns - 1) return;
        const float sum = warp_sum(squares);
        if (lane == 0) all_squares[token] = sum;
    }

    // Prepares the steps of a turn.
    DEVICE void prepare(int turn) const {
        const bool exists = step(turn) < own_steps;
#pragma unroll 1
        for (int token = 0; token < product.rows; token++) {
            float square = 0.0f;
            uint4 raw = make_uint4(0, 0, 0, 0);
            if (exists) raw = *reinterpret_cast<uint4 *>(slot(turn) + input_place(token, lane % EIGHTS));
            put(raw, factors[0], turn, token, true, square);
        }
        __syncwarp();
    }
};

// What a row's sums are multiplied by after the norm, behind a barrier.
DEVICE float norm_scale(const Memory &memory, int token, int columns, float epsilon) {
    float square = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) square += memory.squares()[warp * TOKENS + token];
    return norm_factor(square, columns, epsilon);
}

// What ends an output, besides sums: read early, since it comes from far.
struct Ending {
    float scale, bias;

    DEVICE Ending(const Scale *scales, const float *biases, int row) : scale(1.0f), bias(0.0f) {
        if (!PACKED && sizeof(WEIGHT) == 1 && !GROUPED) scale = to_float(scales[row]);
        if (biases) bias = biases[row];
    }

    // `output` counts within the unit; `second` 1 takes the row that it is combined with.
    DEVICE float operator()(const float *sums, float factor, int stride, int output, int second, int token) const {
        const int place = PAIRED ? output / 8 * 16 + second * 8 + output % 8 : output;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += sums[(warp * 16 + place) * stride + token];
        if (NORM) sum *= factor;
        return fmaf(sum, scale, bias);
    }
};

// A warp's copies to its ring, ahead of what it multiplies.
template <class FirstRow> struct Ahead {
    Feed<WARPS> feed;
    FirstRow first_row;
    int units, unit_step, own_steps, unit, left; // steps of the warp in a unit; the unit that is copied, and how many steps of it

    DEVICE Ahead(const Product &product, int warp, int lane, int own_steps, FirstRow first_row)
        : feed(product, warp, lane), first_row(first_row), units(product.units), unit_step(gridDim.x), own_steps(own_steps),
          unit(own_steps > 0 ? blockIdx.x : product.units), left(own_steps) {
        feed.move(first_row(blockIdx.x));
    }

    // Starts copying the next step to a slot, and its input too, if any, and goes on, maybe to the next unit.
    DEVICE void start(u32 slot, Input *inputs) {
        if (unit < units) {
            feed.start(slot);
            if (inputs) inputs->start(slot + Feed<WARPS>::BYTES);
            if (--left == 0) {
                unit += unit_step, left = own_steps;
                if (unit < units) feed.move(first_row(unit));
                if (inputs) inputs->restart();
            }
        }
        end_group();
    }
};

// Starts copying input rows to the whole ring, a group for each slot, beside the weights that are copied already.
DEVICE void begin_inputs(Input &inputs, u32 slot, u32 slot_bytes, int own_steps) {
    int left = own_steps;
#pragma unroll 1
    for (int i = 0; i < DEPTH; i++, slot += slot_bytes) {
        if (left > 0) inputs.start(slot);
        if (--left == 0) left = own_steps, inputs.restart();
        end_group();
    }
}

// What a warp reads: its ring, and the resident input, by addresses in shared memory.
struct Places {
    u32 ring, ring_end, slot, slot_bytes, resident, input_bytes;

    DEVICE void next() { slot = slot + slot_bytes < ring_end ? slot + slot_bytes : ring; }
};

// Multiplies the warp's steps of a unit; with FIRST, the resident input is prepared on the way.
template <bool FIRST, class Copies>
DEVICE void multiply_steps(int own_steps, Copies &ahead, Input &inputs, const Residence &residence, Places &places, Accumulator &sums) {
    u32 place = places.resident;
    int i = 0;
#pragma unroll 1
    for (; DEPTH > 1 && i + 1 < own_steps; i += 2) { // two at a time, so that instructions wait less for each other
        wait_group<DEPTH - 2 + (DEPTH == 1)>();
        __syncwarp();
        const u32 first = places.slot;
        places.next();
        const u32 second = places.slot;
        places.next();
        Step steps[2];
        ahead.feed.read(first, steps[0]);
        ahead.feed.read(second, steps[1]);
        if (!RESIDENT) {
            multiply(inputs, steps[0], first + Feed<WARPS>::BYTES, sums);
            multiply(inputs, steps[1], second + Feed<WARPS>::BYTES, sums);
        }
        __syncwarp();
        ahead.start(first, RESIDENT ? nullptr : &inputs);
        ahead.start(second, RESIDENT ? nullptr : &inputs);
        if (FIRST && i % AT_ONCE == 0) residence.prepare(i / AT_ONCE);
        if (!RESIDENT) continue;
        multiply(inputs, steps[0], place, sums);
        multiply(inputs, steps[1], place + places.input_bytes, sums);
        place += 2 * places.input_bytes;
    }
#pragma unroll 1
    for (; i < own_steps; i++) {
        wait_group<DEPTH - 1>();
        __syncwarp();
        Step step;
        ahead.feed.read(places.slot, step);
        if (!RESIDENT) multiply(inputs, step, places.slot + Feed<WARPS>::BYTES, sums);
        __syncwarp();
        ahead.start(places.slot, RESIDENT ? nullptr : &inputs);
        if (FIRST && i % AT_ONCE == 0) residence.prepare(i / AT_ONCE);
        if (RESIDENT) multiply(inputs, step, place, sums);
        place += places.input_bytes;
        places.next();
    }
}

// Runs the units of this block: first_row(unit) is the weight's row that it begins with; begin(unit, thread) reads what the threads need at
// its end, and finish(sums, factor, stride, unit, thread, what begin gave) writes results. `dynamic` is the Memory.
template <class FirstRow, class Begin, class Finish>
DEVICE void stream(const Product &product, uint4 *dynamic, float epsilon, FirstRow first_row, Begin begin, Finish finish) {
    let_next_start();
    if (threadIdx.x >= THREADS) return end_block(false);
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int steps = (product.columns + STEP - 1) / STEP, own_steps = max((steps - warp + WARPS - 1) / WARPS, 0);
    const Memory memory = {reinterpret_cast<u8 *>(dynamic), product.rows};
    const u32 ring = u32(__cvta_generic_to_shared(memory.ring(warp)));
    Places places = {ring, ring + DEPTH * memory.slot_bytes(), ring, u32(memory.slot_bytes()), 0, u32(product.rows * INPUT_BYTES)};
    Ahead<FirstRow> ahead(product, warp, lane, own_steps, first_row);
#pragma unroll 1
    for (u32 slot = ring; slot < places.ring_end; slot += places.slot_bytes) {
        wait_group<PACE - 1>();
        ahead.start(slot, nullptr);
    }
    u8 *own_input = memory.input() + warp * ((steps + WARPS - 1) / WARPS) * places.input_bytes;
    Residence residence(product, warp, lane, own_steps, own_input);
    Input inputs(product, warp, lane);
    wait_for_previous();
    if (RESIDENT) {
        places.resident = u32(__cvta_generic_to_shared(own_input));
        if (NORM) {
            residence.bring_normalised(memory);
        } else {
            residence.bring();
        }
        __syncwarp();
    } else {
        begin_inputs(inputs, ring + Feed<WARPS>::BYTES, places.slot_bytes, own_steps);
    }
    float factor = 1.0f;
    int turn = 0;
    for (int unit = blockIdx.x; unit < product.units; unit += gridDim.x) {
        const auto early = begin(unit, thread);
        Accumulator sums = {};
        const bool is_first = unit == blockIdx.x;
        if (RESIDENT && IS_PREPARED && !NORM && is_first) {
            multiply_steps<true>(own_steps, ahead, inputs, residence, places, sums);
        } else {
            multiply_steps<false>(own_steps, ahead, inputs, residence, places, sums);
        }
        float *published = memory.sums(turn);
        publish(sums, published + warp * 16 * memory.stride(), product.rows, memory.stride(), lane / 4, lane % 4);
        work_barrier();
        if (NORM && is_first && thread / OUTPUTS < product.rows) {
            factor = norm_scale(memory, thread / OUTPUTS, product.columns, epsilon);
        }
        finish(published, factor, memory.stride(), unit, thread, early);
        if (TURNS == 2) turn ^= 1;
        if (TURNS == 1) work_barrier(); // the sums are read
    }
    end_block(true);
}
