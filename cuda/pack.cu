// Weights into the packed layout of weights.cuh: from blocks as a file holds them, or from numbers that are rounded on the way, exactly as
// the CPU rounds them (rust/kernels/src/quant/fit.rs). Sixteen threads have a group of WEIGHT_GROUP columns; each has every sixteenth.
//
// FORMAT is what the source holds: 0 numbers of the type T; 1 Q8_0, 2 Q4_0, 3 Q4_1, 4 INT4_G128, 5 Q4_K, 6 Q5_K and 7 Q6_K blocks.
#include "common.cuh"
#include "weights.cuh"

#ifndef FORMAT
#define FORMAT 0
#endif
#define NUMBERS 0
#define Q8_0 1
#define Q4_0 2
#define Q4_1 3
#define INT4_G128 4
#define Q4_K 5
#define Q5_K 6
#define Q6_K 7
static_assert(STEPS == (FORMAT >= Q4_K), "K-quants have steps");

constexpr int SHARERS = 16, PER_THREAD = WEIGHT_GROUP / SHARERS;
constexpr int ZERO = PACKED == 4 && !MINIMA ? 8 : 0; // the code of 0
constexpr float MOST = 65504.0f;                     // beyond it, not even a scale reaches

#if FORMAT == NUMBERS
typedef T Source;
#else
typedef u8 Source;
#endif

// What a thread has of a group: codes (of 8 bits: integers) of columns lane + 16 * i.
struct PackedPart {
    int codes[PER_THREAD];
    f16 scale, minimum; // or steps, and
    u32 units;
};

DEVICE float share(float value, int step) { return __shfl_xor_sync(ALL_LANES, value, step, SHARERS); }

// The sum over the group's threads, in the order of the CPU's lanes.
DEVICE float group_sum(float value) {
#pragma unroll
    for (int step = SHARERS / 2; step > 0; step /= 2) value = __fadd_rn(value, share(value, step));
    return value;
}

// The nearest integer from -8 to 7.
DEVICE float nearest_nibble(float value) {
    const float low = value < -8.0f ? -8.0f : value, bounded = low > 7.0f ? 7.0f : low;
    return __fsub_rn(__fadd_rn(bounded, 12582912.0f), 12582912.0f);
}

// The best scale of the integers that `inverse` makes, and by how much it lowers the sum of squares.
DEVICE float2 least_squares(const float (&values)[PER_THREAD], float inverse) {
    float products = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const float integer = nearest_nibble(__fmul_rn(values[i], inverse));
        products = __fadd_rn(products, __fmul_rn(values[i], integer));
        squares = __fadd_rn(squares, __fmul_rn(integer, integer));
    }
    products = group_sum(products), squares = group_sum(squares);
    if (!(squares > 0.0f)) return make_float2(0.0f, 0.0f);
    return make_float2(__fdiv_rn(products, squares), __fdiv_rn(__fmul_rn(products, products), squares));
}

// The value of greatest magnitude, the first among equals.
DEVICE float greatest_of(const float (&values)[PER_THREAD], int lane) {
    float most = 0.0f;
    int place = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        if (fabsf(values[i]) > fabsf(most)) most = values[i], place = i * SHARERS + lane;
    }
#pragma unroll
    for (int step = SHARERS / 2; step > 0; step /= 2) {
        const float other = share(most, step);
        const int there = __shfl_xor_sync(ALL_LANES, place, step, SHARERS);
        const bool before = fabsf(other) == fabsf(most) && there < place;
        if (fabsf(other) > fabsf(most) || before) most = other, place = there;
    }
    return most;
}

DEVICE PackedPart rounded_to_nibbles(const float (&values)[PER_THREAD], int lane) {
    PackedPart part = {};
    const float greatest = greatest_of(values, lane);
    float best = __fdiv_rn(greatest, -8.0f), best_gain = 0.0f;
    for (int eighths = 56; eighths < 92; eighths++) {
        const float2 found = least_squares(values, __fdiv_rn(__fdiv_rn(float(eighths), -8.0f), greatest));
        if (found.y > best_gain) best = found.x, best_gain = found.y;
    }
    for (int again = 0; again < 2; again++) best = least_squares(values, __fdiv_rn(1.0f, best)).x;
    // A group of zeros went along for nothing: the threads of a warp shuffle together.
    if (greatest != 0.0f) part.scale = from_float<f16>(best < -MOST ? -MOST : best > MOST ? MOST : best);
    const float scale = to_float(part.scale), inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) part.codes[i] = int(nearest_nibble(__fmul_rn(values[i], inverse))) + 8;
    return part;
}

DEVICE PackedPart rounded_to_bytes(const float (&values)[PER_THREAD], int lane) {
    PackedPart part;
    const float scale = __fdiv_rn(fabsf(greatest_of(values, lane)), 127.0f), inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale);
    part.scale = from_float<f16>(scale);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) part.codes[i] = int(roundf(__fmul_rn(values[i], inverse)));
    return part;
}

DEVICE f16 half_at(const u8 *bytes) { return f16{u16(bytes[0] | bytes[1] << 8)}; }

DEVICE u32 word_at(const u8 *bytes) { return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | u32(bytes[3]) << 24; }

// Two steps as their place holds them.
DEVICE f16 both(int first, int second) { return f16{u16(first + 128 | (second + 128) << 8)}; }

// Group `index` of a block of 256 weights (rust/kernels/src/quant/q4_k.rs, q5_k.rs, q6_k.rs).
DEVICE PackedPart read_k_quant(const u8 *block, int index, int lane) {
    PackedPart part = {};
    if (FORMAT == Q6_K) {
        const u8 *nibbles = block + index / 4 * 64 + index % 2 * 32, *high = block + 128 + index / 4 * 32;
        const signed char *steps = reinterpret_cast<const signed char *>(block) + 192 + 2 * index;
        part.scale = both(steps[0], steps[1]);
        part.units = half_at(block + 208).bits;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            const int at = lane + i * SHARERS, low = nibbles[at] >> (index % 4 / 2 * 4) & 15;
            part.codes[i] = (low | (high[at] >> (2 * (index % 4)) & 3) << 4) - 32;
        }
        return part;
    }
    // Six bits each: the first four scales and minima fill those of their bytes, the others are in what those leave and in halves.
    const u8 *bytes = block + 4, *nibbles = block + (FORMAT == Q5_K ? 48 : 16) + index / 2 * 32;
    const int at = index % 4;
    int step = bytes[at] & 63, drop = bytes[4 + at] & 63;
    if (index >= 4) step = (bytes[8 + at] & 15) | bytes[at] >> 6 << 4, drop = bytes[8 + at] >> 4 | bytes[4 + at] >> 6 << 4;
    part.scale = both(step, drop);
    part.units = word_at(block);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        part.codes[i] = nibbles[lane + i * SHARERS] >> (4 * (index % 2)) & 15;
        if (FORMAT == Q5_K) part.codes[i] |= (block[16 + lane + i * SHARERS] >> index & 1) << 4;
    }
    return part;
}

// The part of a group whose first column is `column`; `row` begins with the row.
DEVICE PackedPart read_part(const Source *row, int column, int lane, int *refused) {
    const int group = column / WEIGHT_GROUP;
    PackedPart part = {};
    if constexpr (FORMAT == NUMBERS) {
        float values[PER_THREAD];
        bool fits = true;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            values[i] = to_float(row[column + i * SHARERS + lane]);
            fits = fits && fabsf(values[i]) <= MOST;
        }
        if (!fits) *refused = 1;
        return PACKED == 4 ? rounded_to_nibbles(values, lane) : rounded_to_bytes(values, lane);
    } else if constexpr (STEPS) {
        const int bytes = FORMAT == Q4_K ? 144 : FORMAT == Q5_K ? 176 : 210;
        return read_k_quant(reinterpret_cast<const u8 *>(row) + group / 8 * bytes, group % 8, lane);
    } else if constexpr (FORMAT == Q8_0) {
        const u8 *block = reinterpret_cast<const u8 *>(row) + group * 34;
        part.scale = half_at(block);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) part.codes[i] = int(reinterpret_cast<const signed char *>(block)[2 + i * SHARERS + lane]);
    } else if constexpr (FORMAT == INT4_G128) {
        const u8 *block = reinterpret_cast<const u8 *>(row) + group * 66;
        part.scale = half_at(block);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) part.codes[i] = block[2 + (i * SHARERS + lane) / 2] >> (4 * (lane % 2)) & 15;
    } else {
        const int before = FORMAT == Q4_1 ? 4 : 2;
        const u8 *block = reinterpret_cast<const u8 *>(row) + group * (before + 16);
        part.scale = half_at(block);
        if (FORMAT == Q4_1) part.minimum = half_at(block + 2);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) part.codes[i] = block[before + lane] >> (4 * i) & 15;
    }
    return part;
}

// Packs rows from a multiple of 8 of a matrix on; `source` is those rows, row_bytes apart. What exceeds half precision sets `refused`.
// Launch: grid (column blocks, row blocks), 8 * GROUPS * 16 threads.
KERNEL pack(const u8 *source, u8 *packed, f16 *scales, f16 *minima, int *refused, int rows, int columns, int row_bytes) {
    __shared__ u8 codes[BLOCK_ROWS][BLOCK_COLUMNS];
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % SHARERS, group = threadIdx.x / SHARERS % GROUPS, row = threadIdx.x / SHARERS / GROUPS;
    const int matrix_row = blockIdx.y * BLOCK_ROWS + row, column = blockIdx.x * BLOCK_COLUMNS + group * WEIGHT_GROUP;
    const size_t block = size_t(blockIdx.y) * gridDim.x + blockIdx.x;
    // Sixteen threads are always of one mind, but not a whole warp: so all shuffle, with what the first row has.
    const bool exists = matrix_row < rows && column < columns;
    const Source *from = reinterpret_cast<const Source *>(source + size_t(exists ? matrix_row : 0) * row_bytes);
    const PackedPart part = read_part(from, exists ? column : 0, lane, refused);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) codes[row][group * WEIGHT_GROUP + i * SHARERS + lane] = u8(exists ? part.codes[i] : ZERO);
    if (lane == 0) {
        const size_t place = (block * BLOCK_ROWS + row) * GROUPS + group;
        scales[place] = exists ? part.scale : f16{0};
        if (STEPS && group == 0) reinterpret_cast<u32 *>(minima)[block * BLOCK_ROWS + row] = exists ? part.units : 0;
        if (MINIMA && !STEPS) minima[place] = exists ? part.minimum : f16{0};
    }
    __syncthreads();
    constexpr int PER_WORD = 32 / PACKED;
    for (int i = threadIdx.x; i < BLOCK_BYTES / 4; i += blockDim.x) {
        const int own_row = i * PER_WORD / BLOCK_COLUMNS, first = i * PER_WORD % BLOCK_COLUMNS;
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < PER_WORD; j++) word |= u32(codes[own_row][first + j]) << (16 * (j % 2) + PACKED * (j / 2));
        *reinterpret_cast<u32 *>(packed + packed_offset(block, own_row, first) + first % 8 * PACKED / 8) = word;
    }
}
