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
// Input rows are in shared memory: whole (RESIDENT), or each warp copies its columns behind its weights to the ring.
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
constexpr int BOUND = TOKENS > 8 ? 576 : 768; // threads of a block, so that there are up to 96 or 80 registers
constexpr int EIGHTS = STEP / 8;                  // 16 bytes of an input row each, in a step
constexpr int AT_ONCE = WARP / EIGHTS;            // tokens that a warp copies at once
constexpr int TURNS = TOKENS > 8 ? 1 : 2;         // units whose sums are kept
static_assert(RESIDENT || !NORM, "only resident rows are normalised");
static_assert(TILES == 1 && OUTPUTS * TOKENS <= THREADS, "a thread ends one output of a unit");

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

// Eight input values of a token times the norm's factors, and their squares added up.
DEVICE void normalise(uint4 &values, const float (&factors)[8], float &squares) {
    u32 words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float a = low_bf16(words[i]), b = high_bf16(words[i]);
        squares = fmaf(b, b, fmaf(a, a, squares));
        words[i] = pack_bf16(a * factors[2 * i], b * factors[2 * i + 1]);
    }
    values = make_uint4(words[0], words[1], words[2], words[3]);
}

// A block's shared memory: squares that each warp added up (WARPS, TOKENS), the rows' scales (TOKENS), sums (TURNS, WARPS, 16, stride), the
// rings (WARPS, DEPTH) of a step's weights and, unless RESIDENT, its input (rows, STEP); the RESIDENT input, for each warp
// ceil(steps / WARPS) slots of (rows, STEP).
struct Memory {
    u8 *begin;
    int rows;

    DEVICE float *squares() const { return reinterpret_cast<float *>(begin); }
    DEVICE float *factors() const { return squares() + WARPS * TOKENS; }
    DEVICE int stride() const { return rows | 1; }
    DEVICE float *sums(int turn) const { return factors() + TOKENS + turn * WARPS * 16 * stride(); }
    DEVICE int slot_bytes() const { return Feed<WARPS>::BYTES + (RESIDENT ? 0 : rows * STEP * 2); }
    DEVICE u8 *ring(int warp) const { return reinterpret_cast<u8 *>(sums(TURNS)) + warp * DEPTH * slot_bytes(); }
    DEVICE u8 *input() const { return ring(WARPS); }
};

// Where 8 columns of a token lie in a slot: what four lanes read together is neighbours, and two tokens take different banks.
DEVICE int input_place(int token, int eight) {
    constexpr bool INTERLEAVED_READS = !PACKED && sizeof(WEIGHT) == 1; // a lane reads two neighbouring eights
    const int half = INTERLEAVED_READS ? eight % 2 : eight / 4 % 2, quarter = INTERLEAVED_READS ? eight / 2 % 4 : eight % 4;
    return token * STEP * 2 + eight / 8 * 128 + (half ^ token % 2) * 64 + quarter * 16;
}

// A warp's steps of the input rows in shared memory, (rows, STEP) each.
struct Input {
    const bf16 *begin, *at; // the lane's part of its first row: in the warp's first step, and in the next one that is copied
    int stride, rows, columns, left, lane, t; // left: columns from that step on, less the lane's
    u32 to, from[PARTS][2]; // where in a slot the lane writes, and reads either half of 64 columns

    DEVICE Input(const Product &product, int warp, int lane)
        : stride(product.input_stride), rows(product.rows), columns(product.columns - warp * STEP - lane % EIGHTS * 8), lane(lane), t(lane % 4) {
        begin = product.input + size_t(lane / EIGHTS) * stride + warp * STEP + lane % EIGHTS * 8;
        to = input_place(lane / EIGHTS, lane % EIGHTS);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            // Tokens that do not exist are some other one: nobody uses their sums.
            const int token = min(part * 8 + lane / 4, rows - 1);
            from[part][0] = token * STEP * 2 + token % 2 * 64 + t * 16;
            from[part][1] = from[part][0] ^ 64;
            asm volatile("" : "+r"(from[part][0]), "+r"(from[part][1])); // or they are computed anew in every step
        }
        restart();
    }

    // Goes to the warp's first step.
    DEVICE void restart() { at = begin, left = columns; }

    // Starts copying the next step's columns to a slot; what lies beyond the row becomes zeros, and is not read.
    DEVICE void start(u32 slot) {
        const bf16 *source = at;
        u32 target = slot + to;
#pragma unroll 1
        for (int token = lane / EIGHTS; token < rows; token += AT_ONCE) {
            copy_16_to(target, source, left > 0);
            source += AT_ONCE * size_t(stride);
            target += AT_ONCE * STEP * 2;
        }
        at += WARPS * STEP, left -= WARPS * STEP;
    }

    // Starts copying to the whole ring, a group for each slot, beside the weights that are copied already.
    DEVICE void begin_ring(u32 slot, u32 slot_bytes, int own_steps) {
        int left = own_steps;
#pragma unroll 1
        for (int i = 0; i < DEPTH; i++, slot += slot_bytes) {
            if (left > 0) start(slot);
            if (--left == 0) left = own_steps, restart();
            end_group();
        }
    }

    // The lane's eight columns of each token, of a half of a block of 64 columns in a slot.
    DEVICE void read(u32 slot, int block, int half, uint4 (&values)[PARTS]) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++) values[part] = load_shared(slot + from[part][half] + block * 128);
    }
};

// Brings all columns of the input rows to shared memory, normalised with NORM, by all threads: each has eight columns, of all rows, and then
// the next ones. The norm's factors come from far, so they are asked for before the kernel waits.
struct Residence {
    const Product &product;
    int eights;
    float factors[8];

    DEVICE Residence(const Product &product, int steps) : product(product), eights(steps * EIGHTS) {
        if (!NORM) return;
        if (threadIdx.x * 8 < product.columns) load<8>(product.norm + threadIdx.x * 8, factors);
        for (int column = (threadIdx.x + THREADS) * 8; column < product.columns; column += THREADS * 8) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(product.norm + column));
        }
    }

    DEVICE void fill(const Memory &memory, int steps, float epsilon) {
        const int slot_bytes = product.rows * STEP * 2, slots = (steps + WARPS - 1) / WARPS;
        float squares[TOKENS] = {};
        for (int eight = threadIdx.x; eight < eights; eight += THREADS) {
            const int number = eight / EIGHTS, column = eight * 8;
            u8 *slot = memory.input() + (number % WARPS * slots + number / WARPS) * slot_bytes;
            const bool inside = column < product.columns;
            if (NORM && inside && eight >= THREADS) load<8>(product.norm + column, factors);
#pragma unroll
            for (int token = 0; token < TOKENS; token++) {
                if (token >= product.rows) break;
                uint4 values = make_uint4(0, 0, 0, 0);
                if (inside) values = *reinterpret_cast<const uint4 *>(product.input + token * size_t(product.input_stride) + column);
                if (NORM && inside) normalise(values, factors, squares[token]);
                *reinterpret_cast<uint4 *>(slot + input_place(token, eight % EIGHTS)) = values;
            }
        }
        if (NORM) {
#pragma unroll
            for (int token = 0; token < TOKENS; token++) {
                if (token >= product.rows) break;
                const float sum = warp_sum(squares[token]);
                if (threadIdx.x % WARP == 0) memory.squares()[threadIdx.x / WARP * TOKENS + token] = sum;
            }
        }
        work_barrier();
        const int token = threadIdx.x; // its factor is read behind the barrier at the end of a unit
        if (NORM && token < product.rows) {
            float square = 0.0f;
            for (int warp = 0; warp < WARPS; warp++) square += memory.squares()[warp * TOKENS + token];
            memory.factors()[token] = 1.0f / sqrtf(square / product.columns + epsilon);
        }
    }
};

// Leaves a warp's sums where its team can read them: (16, stride).
DEVICE void publish(const Sums (&sums)[2], float *to, int rows, int stride, int g, int t) {
#pragma unroll
    for (int i = 0; i < PARTS * 4; i++) {
        const int token = i / 4 * 8 + 2 * t + i % 2;
        if (token < rows) to[(i % 4 / 2 * 8 + g) * stride + token] = sums[0].values[0][i / 4][i % 4] + sums[1].values[0][i / 4][i % 4];
    }
}

// What ends an output, besides sums: read early, since it comes from far.
struct Ending {
    float scale, bias;

    DEVICE Ending(const Scale *scales, const float *biases, int row) : scale(1.0f), bias(0.0f) {
        if (!PACKED && sizeof(WEIGHT) == 1 && !GROUPED) scale = to_float(scales[row]);
        if (biases) bias = biases[row];
    }

    // `output` counts within the unit; `second` 1 takes the row that it is combined with.
    DEVICE float operator()(const float *sums, const float *factors, int stride, int output, int second, int token) const {
        const int place = PAIRED ? output / 8 * 16 + second * 8 + output % 8 : output;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += sums[(warp * 16 + place) * stride + token];
        if (NORM) sum *= factors[token];
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

// Runs the units of this block: first_row(unit) is the weight's row that it begins with; begin(unit, thread) reads what the threads need at
// its end, and finish(sums, factors, stride, unit, thread, what begin gave) writes results. `dynamic` is the Memory.
template <class FirstRow, class Begin, class Finish>
DEVICE void stream(const Product &product, uint4 *dynamic, float epsilon, FirstRow first_row, Begin begin, Finish finish) {
    let_next_start();
    if (threadIdx.x >= THREADS) return end_block(false);
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int steps = (product.columns + STEP - 1) / STEP, own_steps = max((steps - warp + WARPS - 1) / WARPS, 0);
    const Memory memory = {reinterpret_cast<u8 *>(dynamic), product.rows};
    const u32 slot_bytes = memory.slot_bytes(), input_bytes = product.rows * STEP * 2;
    const u32 ring = u32(__cvta_generic_to_shared(memory.ring(warp))), ring_end = ring + DEPTH * slot_bytes;
    Ahead<FirstRow> ahead(product, warp, lane, own_steps, first_row);
#pragma unroll 1
    for (u32 slot = ring; slot < ring_end; slot += slot_bytes) ahead.start(slot, nullptr);
    Residence residence(product, steps);
    const Constants constants;
    Input inputs(product, warp, lane);
    wait_for_previous();
    u32 resident = 0;
    if (RESIDENT) {
        residence.fill(memory, steps, epsilon);
        resident = u32(__cvta_generic_to_shared(memory.input())) + warp * ((steps + WARPS - 1) / WARPS) * input_bytes;
    } else {
        inputs.begin_ring(ring + Feed<WARPS>::BYTES, slot_bytes, own_steps);
    }
    u32 slot = ring;
    int turn = 0;
    for (int unit = blockIdx.x; unit < product.units; unit += gridDim.x) {
        const auto early = begin(unit, thread);
        Sums sums[2] = {};
        u32 place = resident;
#pragma unroll 1
        for (int i = own_steps; i > 0; i--) {
            wait_group<DEPTH - 1>();
            __syncwarp();
            Step step;
            ahead.feed.read(slot, step);
            if (!RESIDENT) multiply(inputs, step, slot + Feed<WARPS>::BYTES, constants, sums);
            __syncwarp();
            ahead.start(slot, RESIDENT ? nullptr : &inputs);
            if (RESIDENT) multiply(inputs, step, place, constants, sums);
            place += input_bytes;
            slot = slot + slot_bytes < ring_end ? slot + slot_bytes : ring;
        }
        float *published = memory.sums(turn);
        publish(sums, published + warp * 16 * memory.stride(), product.rows, memory.stride(), lane / 4, lane % 4);
        work_barrier();
        finish(published, memory.factors(), memory.stride(), unit, thread, early);
        if (TURNS == 2) turn ^= 1;
        if (TURNS == 1) work_barrier(); // the sums are read
    }
    end_block(true);
}
