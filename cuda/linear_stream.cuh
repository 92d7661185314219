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
#ifndef WEIGHT
#define WEIGHT bf16
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
constexpr int STEP = 128 / sizeof(WEIGHT);  // columns
constexpr int LOADS = 2;                    // of 16 bytes, for each lane and row of a step
constexpr int RUN = STEP / LOADS / 4;      // columns of one such load
constexpr int EIGHTS = STEP / 8;            // 16 bytes of an input row each, in a step
constexpr int SLOT = TOKENS * STEP * 2 + NORM * STEP * 4; // bytes of a step in the ring

constexpr int ROWS = PAIRED ? 8 : 16;       // neighbouring weight rows of a tile
constexpr int OUTPUTS = ROWS * TILES;       // of a unit

struct Step {
    uint4 words[TILES][2][LOADS];
    float scales[TILES][2]; // of GROUPED weights
};

// The sums of one warp, and what they need at the end.
struct Sums {
    float values[TILES][PARTS][4];
    float squares[PARTS];
};

// Four neighbouring columns' worth of the first operand, in the order in which expand() gives weights.
DEVICE void operand(u32 word0, u32 word1, u32 &b0, u32 &b1) {
    if constexpr (sizeof(WEIGHT) == 1) {
        b0 = __byte_perm(word0, word1, 0x5410);
        b1 = __byte_perm(word0, word1, 0x7632);
    } else {
        b0 = word0, b1 = word1;
    }
}

// The weights of four columns (number `quad` of a load), for rows g and g + 8.
DEVICE void expand(const uint4 &upper, const uint4 &lower, int quad, u32 (&a)[4]) {
    if constexpr (sizeof(WEIGHT) == 1) {
        expand_e4m3(word_of(upper, quad), a[0], a[2]);
        expand_e4m3(word_of(lower, quad), a[1], a[3]);
    } else {
        a[0] = word_of(upper, 2 * quad), a[2] = word_of(upper, 2 * quad + 1);
        a[1] = word_of(lower, 2 * quad), a[3] = word_of(lower, 2 * quad + 1);
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

struct Reader {
    const u8 *rows[TILES][2]; // the lane's rows of the weight
    const float *scales[TILES][2]; // and of its scales
    int columns, t;
    u64 policy;

    // Points at the rows of another unit; `second` is how far the rows are that a tile's first 8 rows are combined with.
    DEVICE void move(const WEIGHT *weight, const float *all_scales, int first, int second, int weight_rows, int g) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = min(first + tile * ROWS + half * (PAIRED ? second : 8) + g, weight_rows - 1);
                rows[tile][half] = reinterpret_cast<const u8 *>(weight + size_t(row) * columns) + t * 16;
                if (GROUPED) scales[tile][half] = all_scales + size_t(row) * ((columns + STEP - 1) / STEP);
            }
        }
    }

    DEVICE void operator()(Step &step, int number) const {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int column = number * STEP + i * (STEP / LOADS);
            const bool inside = column + t * RUN < columns;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    step.words[tile][half][i] = make_uint4(0, 0, 0, 0);
                    if (GROUPED && i == 0) step.scales[tile][half] = number * STEP < columns ? __ldg(scales[tile][half] + number) : 0.0f;
                    if (inside) step.words[tile][half][i] = load_stream(rows[tile][half] + column * int(sizeof(WEIGHT)), policy);
                }
            }
        }
    }
};

// A warp's ring of input rows: DEPTH steps of (TOKENS, STEP) and of the norm's STEP factors. Rows that do not exist stay zero.
struct Input {
    const bf16 *from; // the lane's part of its first row
    const float *norm;
    u8 *ring, *to; // where the lane's part goes
    int stride, rows, columns, lane, g, t;

    // Where 8 columns of a token lie in a slot: what four lanes read together is neighbours, and two tokens take different banks.
    DEVICE static int place(int token, int eight) {
        const int load = sizeof(WEIGHT) == 1 ? eight / 8 : 0, half = sizeof(WEIGHT) == 1 ? eight % 2 : eight / 4;
        const int quarter = sizeof(WEIGHT) == 1 ? eight / 2 % 4 : eight % 4;
        return token * STEP * 2 + load * 128 + (half ^ token % 2) * 64 + quarter * 16;
    }

    DEVICE void clear() const {
        for (int i = rows * STEP * 2 + lane * 16; i < TOKENS * STEP * 2; i += WARP * 16) {
            for (int turn = 0; turn < DEPTH; turn++) *reinterpret_cast<uint4 *>(ring + turn * SLOT + i) = make_uint4(0, 0, 0, 0);
        }
    }

    // Starts copying a step's columns; what lies beyond the row becomes zeros.
    DEVICE void copy(int number, int turn) const {
        const int column = number * STEP + lane % EIGHTS * 8;
        const bool inside = column < columns;
        const bf16 *source = from + (inside ? number * STEP : 0);
#pragma unroll 1
        for (int token = lane / EIGHTS, i = 0; token < rows; token += WARP / EIGHTS, i++) {
            copy_16_cached(to + turn * SLOT + i * (WARP / EIGHTS) * STEP * 2, source, inside);
            source += WARP / EIGHTS * size_t(stride);
        }
        if (NORM && lane < STEP / 4) {
            const int at = number * STEP + lane * 4;
            copy_16_cached(ring + turn * SLOT + TOKENS * STEP * 2 + lane * 16, norm + (at < columns ? at : 0), at < columns);
        }
        end_group();
    }

    // Multiplies a step's weights.
    DEVICE void multiply(const Step &step, int turn, Sums &all) const {
        Sums sums = {}; // of this step, where it has a scale of its own
        if (!GROUPED) sums = all;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
#pragma unroll
            for (int part_of_span = 0; part_of_span < RUN / 8; part_of_span++) {
                const int eight = i * (EIGHTS / LOADS) + t * (RUN / 8) + part_of_span;
                uint4 values[PARTS];
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    values[part] = *reinterpret_cast<const uint4 *>(ring + turn * SLOT + place(part * 8 + g, eight));
                    if (NORM) {
                        const float *factors = reinterpret_cast<const float *>(ring + turn * SLOT + TOKENS * STEP * 2) + eight * 8;
                        normalise(values[part], factors, sums.squares[part]);
                    }
                }
#pragma unroll
                for (int quad = 0; quad < 2; quad++) {
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        u32 a[4];
                        expand(step.words[tile][0][i], step.words[tile][1][i], part_of_span * 2 + quad, a);
#pragma unroll
                        for (int part = 0; part < PARTS; part++) {
                            u32 b0, b1;
                            operand(word_of(values[part], 2 * quad), word_of(values[part], 2 * quad + 1), b0, b1);
                            mma(sums.values[tile][part], a[0], a[1], a[2], a[3], b0, b1);
                        }
                    }
                }
            }
        }
        if (!GROUPED) {
            all = sums;
            return;
        }
#pragma unroll
        for (int i = 0; i < TILES * PARTS * 4; i++) {
            const int tile = i / (PARTS * 4), part = i / 4 % PARTS;
            float &sum = all.values[tile][part][i % 4];
            sum = fmaf(step.scales[tile][i % 4 / 2], sums.values[tile][part][i % 4], sum);
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) all.squares[part] += sums.squares[part];
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
    const float *bias, *scales;
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
        if (sizeof(WEIGHT) == 1 && !GROUPED) sum *= scales[row];
        return bias ? sum + bias[row] : sum;
    }
};

// What one launch multiplies, and where a unit of work (TILES tiles) finds its rows of the weight.
struct Product {
    const bf16 *input;
    const WEIGHT *weight;
    const float *scales, *norm;
    int input_stride, rows, weight_rows, columns;
    int units, second; // units in all; from a row to the one that it is combined with
};

// Runs this block's units: first_row(unit) is the weight's row that the first tile begins with, finish(shared, unit) takes the sums of all
// warps, by all threads. `dynamic` is two of Shared and the warps' rings: WARPS * DEPTH * SLOT bytes.
template <class FirstRow, class Finish>
DEVICE void stream(const Product &product, uint4 *dynamic, FirstRow first_row, Finish finish) {
    const auto [input, weight, scales, norm, input_stride, rows, weight_rows, columns, units, second] = product;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int steps = (columns + STEP - 1) / STEP;
    Shared *memory = reinterpret_cast<Shared *>(dynamic); // two, taken in turns
    Reader read = {{}, {}, columns, t, streaming_policy()};
    int unit = blockIdx.x;
    read.move(weight, scales, first_row(unit), second, weight_rows, g);
    Step ring[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) read(ring[i], warp + i * WARPS);
    let_next_start();
    u8 *own = reinterpret_cast<u8 *>(memory + 2) + warp * DEPTH * SLOT;
    const Input inputs = {input + size_t(lane / EIGHTS) * input_stride + lane % EIGHTS * 8, norm, own,
                          own + Input::place(lane / EIGHTS, lane % EIGHTS), input_stride, rows, columns, lane, g, t};
    inputs.clear();
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < DEPTH; i++) inputs.copy(warp + i * WARPS, i);
    for (int turn = 0; unit < units; turn ^= 1) {
        Sums sums = {};
        const int next_unit = unit + gridDim.x;
#pragma unroll 1
        for (int base = warp; base - warp < steps; base += DEPTH * WARPS) {
            int next = base + DEPTH * WARPS;
            if (next - warp >= steps) {
                // The rows of the next unit; beyond the last, nothing is read.
                next = next_unit < units ? warp : steps;
                if (next_unit < units) read.move(weight, scales, first_row(next_unit), second, weight_rows, g);
            }
#pragma unroll
            for (int i = 0; i < DEPTH; i++) {
                wait_group<DEPTH - 1>();
                __syncwarp();
                if (base + i * WARPS < steps) inputs.multiply(ring[i], i, sums);
                read(ring[i], next + i * WARPS);
                __syncwarp();
                inputs.copy(next + i * WARPS, i);
            }
        }
        publish(sums, warp, g, t, memory[turn]);
        __syncthreads();
        finish(memory[turn], unit);
        unit = next_unit;
    }
}
