// The pipeline of the streaming products: a weight matrix times up to TOKENS input rows, at the speed of reading the weights once.
//
// A block takes TILES tiles of 16 weight rows at a time, and then the next ones; its warps share out the columns in steps, and their sums
// are added in order at the end of each. So a result depends on its input row and the weights alone, not on the other rows. Weights go
// from memory straight into the registers of the matrix instructions, 16 bytes a lane, DEPTH steps ahead, across the ends of tiles; the
// first steps are read before the kernel waits for its predecessor, so memory never idles between kernels. Each warp copies its columns of
// the input rows (and the norm's factors) to a ring in shared memory, as many steps ahead: read directly, their latency in every step held
// up the weights. The loops are kept short: what does not fit the instruction cache cost half of the speed.
//
// NORM 1: input rows are root-mean-square normalised, with the factors `norm`. The row's scale is applied to the sums at the end, when
// the sum of squares is known.
#include "weights.cuh"

#ifndef TOKENS
#define TOKENS 8
#endif
#ifndef TILES
#define TILES 1
#endif
#ifndef DEPTH
#define DEPTH (4 / TILES)
#endif
#ifndef NORM
#define NORM 0
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef GROUPED
#define GROUPED 0 // 1: 8-bit weights have a scale for each row and STEP columns, not one for the row
#endif
#ifndef PAIRED
#define PAIRED 0 // 1: the second 8 rows of a tile are not the next ones but those that are combined with the first (gates, rotation)
#endif

constexpr int PARTS = TOKENS / 8;           // of 8 tokens, the width of one matrix instruction
constexpr int ROWS = PAIRED ? 8 : 16;       // neighbouring weight rows of a tile
constexpr int OUTPUTS = ROWS * TILES;       // of a unit

// The sums of one warp, and what they need at the end.
struct Sums {
    float values[TILES][PARTS][4];
    float squares[PARTS];
};

// What one launch multiplies, and where a unit of work (TILES tiles) finds its rows of the weight.
struct Product {
    const bf16 *input;
    const WEIGHT *weight;
    const Scale *scales, *minima;
    const float *norm;
    int input_stride, rows, weight_rows, columns;
    int units, second; // units in all; from a row to the one that it is combined with
};

#if PACKED
#include "stream_packed.cuh"
#else
#include "stream_plain.cuh"
#endif
constexpr int EIGHTS = STEP / 8;                                    // 16 bytes of an input row each, in a step
constexpr int RING = TOKENS * STEP > 1024 ? DEPTH / 2 : DEPTH;      // steps of input that are under way
constexpr int SLOT = TOKENS * STEP * 2 + NORM * STEP * 4;           // bytes of a step in the ring

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

// A warp's ring of input rows: RING steps of (TOKENS, STEP) and of the norm's STEP factors. Rows that do not exist stay zero.
struct Input {
    const bf16 *from; // the lane's part of its first row
    const float *norm;
    u8 *ring;
    u32 to; // where the lane's part goes, an address in shared memory
    int stride, rows, columns, lane, g, t;

    // Where 8 columns of a token lie in a slot: what four lanes read together is neighbours, and two tokens take different banks.
    DEVICE static int place(int token, int eight) {
        constexpr bool INTERLEAVED_READS = !PACKED && sizeof(WEIGHT) == 1; // a lane reads two neighbouring eights
        const int half = INTERLEAVED_READS ? eight % 2 : eight / 4 % 2, quarter = INTERLEAVED_READS ? eight / 2 % 4 : eight % 4;
        return token * STEP * 2 + eight / 8 * 128 + (half ^ token % 2) * 64 + quarter * 16;
    }

    DEVICE void clear() const {
        for (int i = rows * STEP * 2 + lane * 16; i < TOKENS * STEP * 2; i += WARP * 16) {
            for (int turn = 0; turn < RING; turn++) *reinterpret_cast<uint4 *>(ring + turn * SLOT + i) = make_uint4(0, 0, 0, 0);
        }
    }

    // Starts copying a step's columns; what lies beyond the row becomes zeros, and is not read.
    DEVICE void copy(int number, int turn) const {
        const bool inside = number * STEP + lane % EIGHTS * 8 < columns;
        const bf16 *source = from + number * STEP;
        u32 target = to + turn * SLOT;
#pragma unroll 1
        for (int token = lane / EIGHTS; token < rows; token += WARP / EIGHTS) {
            copy_16_to(target, source, inside);
            source += WARP / EIGHTS * size_t(stride);
            target += WARP / EIGHTS * STEP * 2;
        }
        if (NORM && lane < STEP / 4) {
            const int at = number * STEP + lane * 4;
            copy_16_cached(ring + turn * SLOT + TOKENS * STEP * 2 + lane * 16, norm + (at < columns ? at : 0), at < columns);
        }
        end_group();
    }

    // The lane's eight columns of each token in a slot, normalised; their squares are added up.
    DEVICE void read(int turn, int eight, uint4 (&values)[PARTS], Sums &sums) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            values[part] = *reinterpret_cast<const uint4 *>(ring + turn * SLOT + place(part * 8 + g, eight));
            if (NORM) {
                const float *factors = reinterpret_cast<const float *>(ring + turn * SLOT + TOKENS * STEP * 2) + eight * 8;
                normalise(values[part], factors, sums.squares[part]);
            }
        }
    }
};

struct alignas(16) Shared {
    float sums[WARPS][TILES * 16][TOKENS + 1], squares[WARPS][TOKENS];
};

// Leaves a warp's sums where all can read them.
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
        if (NORM) {
            float square = sums.squares[part];
            square += __shfl_xor_sync(ALL_LANES, square, 1);
            square += __shfl_xor_sync(ALL_LANES, square, 2);
            if (t == 0) shared.squares[warp][part * 8 + g] = square;
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
    DEVICE float operator()(const Shared &shared, int output, int second, int token, int row) const {
        const int place = PAIRED ? output / 8 * 16 + second * 8 + output % 8 : output;
        float sum = 0.0f, square = 0.0f;
        for (int warp = 0; warp < WARPS; warp++) sum += shared.sums[warp][place][token];
        if (NORM) {
            for (int warp = 0; warp < WARPS; warp++) square += shared.squares[warp][token];
            sum *= 1.0f / sqrtf(square / columns + epsilon);
        }
        if (!PACKED && sizeof(WEIGHT) == 1 && !GROUPED) sum *= to_float(scales[row]);
        return bias ? sum + bias[row] : sum;
    }
};

// Runs this block's units: first_row(unit) is the weight's row that the first tile begins with, finish(shared, unit) takes the sums of all
// warps, by all threads. `dynamic` is two of Shared and the warps' rings: WARPS * RING * SLOT bytes.
template <class FirstRow, class Finish>
DEVICE void stream(const Product &product, uint4 *dynamic, FirstRow first_row, Finish finish) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int steps = (product.columns + STEP - 1) / STEP;
    Shared *memory = reinterpret_cast<Shared *>(dynamic); // two, taken in turns
    Reader read = {product, g, t, streaming_policy()};
    const Constants constants;
    int unit = blockIdx.x;
    read.move(first_row(unit));
    Step ring[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) read(ring[i], warp + i * WARPS);
    let_next_start();
    u8 *own = reinterpret_cast<u8 *>(memory + 2) + warp * RING * SLOT;
    const bf16 *from = product.input + size_t(lane / EIGHTS) * product.input_stride + lane % EIGHTS * 8;
    u32 to = u32(__cvta_generic_to_shared(own + Input::place(lane / EIGHTS, lane % EIGHTS)));
    asm volatile("" : "+l"(from), "+r"(to)); // or they are computed anew in every step
    const Input inputs = {from, product.norm, own, to, product.input_stride,
                          product.rows, product.columns, lane, g, t};
    inputs.clear();
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < RING; i++) inputs.copy(warp + i * WARPS, i);
    for (int turn = 0; unit < product.units; turn ^= 1) {
        Sums sums = {};
        const int next_unit = unit + gridDim.x;
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
                wait_group<RING - 1>();
                __syncwarp();
                if (base + i * WARPS < steps) multiply(inputs, ring[i], i % RING, constants, sums);
                read(ring[i], next + i * WARPS);
                __syncwarp();
                // Every unit has the same input, so what comes RING steps later may be the next one's.
                inputs.copy(i + RING < DEPTH ? base + (i + RING) * WARPS : next + (i + RING - DEPTH) * WARPS, i % RING);
            }
        }
        publish(sums, warp, g, t, memory[turn]);
        __syncthreads();
        finish(memory[turn], unit);
        unit = next_unit;
    }
}
