// The pipeline of the streaming products for weights of 4 bits: as linear_stream.cuh, but with 16 warps on a multiprocessor, and the ring of
// weights in registers. A block takes all of them, so no block of the next kernel begins beside it. Even so a layer of Llama 8B takes 57 us
// on an H200; with the ring in shared memory and 8 warps, sharing the multiprocessor, it took 67 to 72, for reasons that were not found.
//
// WARPS warps are a team, and a block has the TEAMS that fill a multiprocessor. A team takes 16 weight rows at a time, and then the next
// ones. Weights go from memory straight into the registers of the matrix instructions, 16 bytes a lane, DEPTH steps ahead, across the ends
// of units; the first steps are read before the kernel waits for its predecessor.
//
// Input rows are in shared memory: whole, for all teams, where that is large enough (RESIDENT); else each warp copies its columns to a ring
// of its own, RING steps ahead.
#ifndef DEPTH
#define DEPTH (4 / TILES)
#endif
#ifndef NORM
#define NORM 0
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef RESIDENT
#define RESIDENT 0
#endif
#ifndef RING
#define RING 2 // steps of input that are under way, where it is not resident: 1, 2 or 4, up to DEPTH
#endif

constexpr int TEAMS = 16 / WARPS, THREADS = TEAMS * WARPS * WARP, BOUND = THREADS;
constexpr int EIGHTS = STEP / 8;                               // 16 bytes of an input row each, in a step
constexpr int AT_ONCE = WARP / EIGHTS;                         // tokens that a warp copies at once
constexpr int SLOT = TOKENS * STEP * 2;                        // bytes of a step in the ring
static_assert(DEPTH % RING == 0, "a step's slot follows from its place in the ring of weights");
static_assert(RESIDENT || !NORM, "only resident rows are normalised");

// Whether sums start from -136 times the inputs' sum: where that is known before, as in groups that are one quarter of a step.
constexpr bool FROM_TOTAL = PACKED == 4 && !MINIMA && GROUPS == 4;

// Sums of a group of columns: of each half where those have scales of their own.
typedef float GroupSums[1 + HALVES][TILES][PARTS][4];

// Adds the sums of a group, times its scales.
DEVICE void add_group(const Step &step, int group, const GroupSums &sums, const float (&totals)[PARTS][4], Sums &all) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float scales[2], seconds[2];
#pragma unroll
        for (int half = 0; half < 2; half++) factors_of(step, tile, half, group, scales[half], seconds[half]);
#pragma unroll
        for (int i = 0; i < PARTS * 4; i++) {
            const float total = totals[i / 4][i % 4];
            float sum = sums[0][tile][i / 4][i % 4], &to = all.values[tile][i / 4][i % 4];
            if (PACKED == 4 && !FROM_TOTAL) sum = MINIMA ? fmaf(-128.0f, total, sum) : sum + total;
            to = fmaf(scales[i % 4 / 2], sum, to);
            if (HALVES) to = fmaf(seconds[i % 4 / 2], sums[HALVES][tile][i / 4][i % 4], to);
            if (MINIMA) to = fmaf(seconds[i % 4 / 2], total, to);
        }
    }
}

// Multiplies a step's weights by the input in a slot of the ring.
template <class Input> DEVICE void multiply(const Input &input, const Step &step, int slot, const Constants &constants, Sums &all) {
    GroupSums sums;
    float totals[PARTS][4];
    const u32(&one)[4] = constants.total;
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
        uint4 values[PARTS];
        input.read(slot, quarter * 4 + input.t, values);
        const bool is_first = quarter % (4 / GROUPS) == 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const uint4 &b = values[part];
            if (is_first) clear(totals[part]);
            if (HAS_TOTAL) {
                mma(totals[part], one[0], one[1], one[2], one[3], b.x, b.y);
                mma(totals[part], one[0], one[1], one[2], one[3], b.z, b.w);
            }
#pragma unroll
            for (int tile = 0; tile < TILES && is_first; tile++) {
                for (int half = 0; half <= HALVES; half++) clear(sums[half][tile][part]);
                for (int i = 0; i < 4 && FROM_TOTAL; i++) sums[0][tile][part][i] = totals[part][i];
            }
        }
#pragma unroll
        for (int quad = 0; quad < 2; quad++) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                u32 a[4];
                unpack(step.words[tile][0], quarter, quad, constants, a[0], a[2]);
                unpack(step.words[tile][1], quarter, quad, constants, a[1], a[3]);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    const u32 b0 = word_of(values[part], 2 * quad), b1 = word_of(values[part], 2 * quad + 1);
                    if (!HALVES) mma(sums[0][tile][part], a[0], a[1], a[2], a[3], b0, b1);
                    for (int half = 0; half < 2 * HALVES; half++) { // lanes 0 and 1 of four have the first 16 columns
                        const bool is_own = input.t / 2 == half;
                        mma(sums[half][tile][part], a[0], a[1], a[2], a[3], is_own ? b0 : 0, is_own ? b1 : 0);
                    }
                }
            }
        }
        if (quarter % (4 / GROUPS) == 4 / GROUPS - 1) add_group(step, quarter / (4 / GROUPS), sums, totals, all);
    }
}

// Eight input values of a token times the norm's factors, and their squares added up.
DEVICE void normalise(uint4 &values, const float *factors, float &squares) {
    float f[8];
    load<8>(factors, f);
    u32 words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float a = low_bf16(words[i]), b = high_bf16(words[i]);
        squares = fmaf(b, b, fmaf(a, a, squares));
        words[i] = pack_bf16(a * f[2 * i], b * f[2 * i + 1]);
    }
    values = make_uint4(words[0], words[1], words[2], words[3]);
}

// A warp's steps of the input rows in shared memory, (rows, STEP) each.
struct Input {
    const bf16 *from; // the lane's part of its first row
    u8 *slots;
    u32 to; // where the lane's part goes, an address in shared memory
    int stride, rows, columns, lane, g, t;

    // Where 8 columns of a token lie in a slot: what four lanes read together is neighbours, and two tokens take different banks.
    DEVICE static int place(int token, int eight) {
        constexpr bool INTERLEAVED_READS = !PACKED && sizeof(WEIGHT) == 1; // a lane reads two neighbouring eights
        const int half = INTERLEAVED_READS ? eight % 2 : eight / 4 % 2, quarter = INTERLEAVED_READS ? eight / 2 % 4 : eight % 4;
        return token * STEP * 2 + eight / 8 * 128 + (half ^ token % 2) * 64 + quarter * 16;
    }

    // Starts copying a step's columns to a slot; what lies beyond the row becomes zeros, and is not read.
    DEVICE void copy(int number, int slot) const {
        const bool inside = number * STEP + lane % EIGHTS * 8 < columns;
        const bf16 *source = from + number * STEP;
        u32 target = to + slot;
#pragma unroll 1
        for (int token = lane / EIGHTS; token < rows; token += AT_ONCE) {
            copy_16_to(target, source, inside);
            source += AT_ONCE * size_t(stride);
            target += AT_ONCE * STEP * 2;
        }
    }

    // Normalises what this lane copied to a slot, and adds up the squares of each of its tokens.
    DEVICE void normalise_own(int number, int slot, const float *norm, float (&squares)[TOKENS / AT_ONCE]) const {
        const int column = number * STEP + lane % EIGHTS * 8;
        if (column >= columns) return;
#pragma unroll
        for (int i = 0; i < TOKENS / AT_ONCE; i++) {
            const int token = lane / EIGHTS + i * AT_ONCE;
            if (token >= rows) return;
            uint4 *values = reinterpret_cast<uint4 *>(slots + slot + place(token, lane % EIGHTS));
            normalise(*values, norm + column, squares[i]);
        }
    }

    // The lane's eight columns of each token in a slot. Tokens that do not exist are some other one: nobody uses their sums.
    DEVICE void read(int slot, int eight, uint4 (&values)[PARTS]) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            values[part] = *reinterpret_cast<const uint4 *>(slots + slot + place(min(part * 8 + g, rows - 1), eight));
        }
    }
};

// Sums of all warps of a team: (warps, weight rows of a unit, tokens).
struct alignas(16) Shared {
    float sums[WARPS][TILES * 16][TOKENS + 1];
};

// Squares of a token that each warp added up.
typedef float Squares[TEAMS * WARPS][TOKENS];

// Leaves a warp's sums where its team can read them.
DEVICE void publish(const Sums &sums, int warp, int g, int t, Shared &shared) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                shared.sums[warp][tile * 16 + i / 2 * 8 + g][part * 8 + 2 * t + i % 2] = sums.values[tile][part][i];
            }
        }
    }
}

// What ends a product: the norm's scale, the weights' scale, the bias. `row` is the weight's.
struct Ending {
    const float *bias;
    const Scale *scales;
    int columns;
    float epsilon;

    // `output` counts within the unit; `second` 1 takes the row that it is combined with.
    DEVICE float operator()(const Shared &shared, const Squares &squares, int output, int second, int token, int row) const {
        const int place = PAIRED ? output / 8 * 16 + second * 8 + output % 8 : output;
        float sum = 0.0f, square = 0.0f;
        for (int warp = 0; warp < WARPS; warp++) sum += shared.sums[warp][place][token];
        if (NORM) {
            for (int warp = 0; warp < TEAMS * WARPS; warp++) square += squares[warp][token];
            sum *= 1.0f / sqrtf(square / columns + epsilon);
        }
        if (!PACKED && sizeof(WEIGHT) == 1 && !GROUPED) sum *= to_float(scales[row]);
        return bias ? sum + bias[row] : sum;
    }
};

// Brings all columns of the input rows to shared memory, normalised with NORM, by all warps of all teams.
DEVICE void make_resident(const Input &inputs, int warp, int team, int steps, const float *norm, Squares &squares) {
    const int slot_bytes = inputs.rows * STEP * 2;
    for (int number = warp + team * WARPS, slot = team; number < steps; number += TEAMS * WARPS, slot += TEAMS) {
        inputs.copy(number, slot * slot_bytes);
    }
    end_group();
    wait_group<0>();
    if (NORM) {
        float sums[TOKENS / AT_ONCE] = {};
        for (int number = warp + team * WARPS, slot = team; number < steps; number += TEAMS * WARPS, slot += TEAMS) {
            inputs.normalise_own(number, slot * slot_bytes, norm, sums);
        }
#pragma unroll
        for (int i = 0; i < TOKENS / AT_ONCE; i++) {
#pragma unroll
            for (int step = EIGHTS / 2; step > 0; step /= 2) sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], step);
            if (inputs.lane % EIGHTS == 0) squares[team * WARPS + warp][inputs.lane / EIGHTS + i * AT_ONCE] = sums[i];
        }
    }
    __syncthreads();
}

// A warp's part of the input, with its slots from `memory` on.
DEVICE Input input_of(const Product &product, u8 *memory, int warp, int team, int lane) {
    const int steps = (product.columns + STEP - 1) / STEP;
    u8 *own = memory + (team * WARPS + warp) * RING * SLOT;
    if (RESIDENT) own = memory + warp * ((steps + WARPS - 1) / WARPS) * product.rows * STEP * 2;
    const bf16 *from = product.input + size_t(lane / EIGHTS) * product.input_stride + lane % EIGHTS * 8;
    u32 to = u32(__cvta_generic_to_shared(own + Input::place(lane / EIGHTS, lane % EIGHTS)));
    asm volatile("" : "+l"(from), "+r"(to)); // or they are computed anew in every step
    return {from, own, to, product.input_stride, product.rows, product.columns, lane, lane / 4, lane % 4};
}

// Waits for the other warps of a team.
DEVICE void team_barrier(int team) { asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(WARPS * WARP) : "memory"); }

// Runs the units of this block's teams: first_row(unit) is the weight's row that the first tile begins with; finish(shared, squares, unit,
// thread) takes the sums of all warps, by all threads of the team. `dynamic` is the squares, two of Shared for each team, and the input:
// RESIDENT ceil(steps / WARPS) slots of (rows, STEP) for each warp of a team, else RING slots of (TOKENS, STEP) for each of all warps.
template <class FirstRow, class Finish>
DEVICE void stream(const Product &product, uint4 *dynamic, FirstRow first_row, Finish finish) {
    const int warp = threadIdx.x / WARP % WARPS, team = threadIdx.x / WARP / WARPS, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int steps = (product.columns + STEP - 1) / STEP;
    Squares &squares = *reinterpret_cast<Squares *>(dynamic);
    Shared *memory = reinterpret_cast<Shared *>(&squares + 1) + team * 2; // taken in turns
    Reader read = {product, g, t, streaming_policy()};
    const Constants constants;
    int unit = blockIdx.x + team * gridDim.x;
    read.move(first_row(unit));
    Step ring[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) read(ring[i], unit < product.units ? warp + i * WARPS : steps);
    let_next_start();
    const int slot_bytes = RESIDENT ? product.rows * STEP * 2 : SLOT;
    const Input inputs = input_of(product, reinterpret_cast<u8 *>(reinterpret_cast<Shared *>(&squares + 1) + TEAMS * 2), warp, team, lane);
    wait_for_previous();
    if (RESIDENT) {
        make_resident(inputs, warp, team, steps, product.norm, squares);
    } else {
#pragma unroll 1
        for (int i = 0; i < RING; i++) inputs.copy(warp + i * WARPS, i * SLOT), end_group();
    }
    for (int turn = 0; unit < product.units; turn ^= 1) {
        Sums sums = {};
        const int next_unit = unit + TEAMS * gridDim.x;
        int slot = 0;
#pragma unroll 1
        for (int base = warp; base - warp < steps; base += DEPTH * WARPS) {
            int next = base + DEPTH * WARPS;
            if (next - warp >= steps) {
                // The rows of the next unit; beyond the last, nothing is read.
                next = next_unit < product.units ? warp : steps;
                if (next_unit < product.units) read.move(first_row(next_unit));
            }
#pragma unroll
            for (int i = 0; i < DEPTH; i++) {
                if (!RESIDENT) {
                    wait_group<RING - 1>();
                    __syncwarp();
                    slot = i % RING * SLOT;
                }
                if (base + i * WARPS < steps) multiply(inputs, ring[i], slot, constants, sums);
                read(ring[i], next + i * WARPS);
                if (RESIDENT) {
                    slot += slot_bytes;
                } else {
                    __syncwarp();
                    // Every unit has the same input, so what comes RING steps later may be the next one's.
                    inputs.copy(i + RING < DEPTH ? base + (i + RING) * WARPS : next + (i + RING - DEPTH) * WARPS, slot);
                    end_group();
                }
            }
        }
        publish(sums, warp, g, t, memory[turn]);
        team_barrier(team);
        finish(memory[turn], squares, unit, int(threadIdx.x) % (WARPS * WARP));
        unit = next_unit;
    }
}
