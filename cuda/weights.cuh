// Weight matrices of any type, read plainly, as floats; and how packed ones lie in memory.
//
// WEIGHT is the element type. PACKED weights are integers of so many bits (4 or 8), WEIGHT_GROUP columns of a row (32 or 128) with one
// half-precision scale, and with MINIMA one half-precision minimum: a weight is scale * integer + minimum, where integers of 4 bits are
// codes less 8 without minima, and codes with them.
//
// A packed matrix is in blocks of 8 rows and 128 columns, row blocks outside; what is missing at the edges has the scale 0. In a block,
// lane 4 * g + t of a warp holds, for row g, columns 8t to 8t + 7 of each 32: one word of 4-bit codes for each 32, 16 bytes in all; or
// two words of 8-bit integers, 16 bytes for each 64 columns, those of the first 64 of all lanes before the others. Of the eight columns
// of a word of nibbles, column j is at bit 16 * (j % 2) + 4 * (j / 2); of the four of a word of bytes, at bit 16 * (j % 2) + 8 * (j / 2):
// masks then leave neighbours in the halves of a word. Scales and minima are (row blocks, column blocks, 8, 128 / WEIGHT_GROUP).
//
// With STEPS, as in the K-quants, a group's scale is two signed bytes instead, each plus 128, that count in a row's and block's half-precision
// units, (row blocks, column blocks, 8, 2) in the place of minima: the first counts scales. With MINIMA the second counts what is taken off,
// in the second unit; with HALVES it is the scale of the second 16 columns.

#ifndef WEIGHT
#define WEIGHT bf16
#endif
#ifndef PACKED
#define PACKED 0
#endif
#ifndef WEIGHT_GROUP
#define WEIGHT_GROUP 32
#endif
#ifndef MINIMA
#define MINIMA 0
#endif
#ifndef STEPS
#define STEPS 0
#endif
#ifndef HALVES
#define HALVES 0
#endif

// Whether weights are E4M3, for the preprocessor.
#define IS_TYPE_e4m3 1
#define JOINED(a, b) a##b
#define IS_TYPE(type) JOINED(IS_TYPE_, type)
#define IS_E4M3 IS_TYPE(WEIGHT)

// Whether weights are fewer bits than what they are multiplied as: packed, or 8-bit floats with scales.
constexpr bool CODED = PACKED || sizeof(WEIGHT) == 1;

constexpr int BLOCK_ROWS = 8, BLOCK_COLUMNS = 128;
constexpr int BLOCK_BYTES = BLOCK_ROWS * BLOCK_COLUMNS * PACKED / 8;
constexpr int GROUPS = BLOCK_COLUMNS / WEIGHT_GROUP; // of a row of a block

#if PACKED
typedef f16 Scale;
#else
typedef float Scale;
#endif

// Where eight columns of a row are in a packed matrix, in bytes.
DEVICE size_t packed_offset(size_t block, int row, int column) {
    const int lane = row % BLOCK_ROWS * 4 + column / 8 % 4;
    if (PACKED == 4) return block * BLOCK_BYTES + lane * 16 + column / 32 % 4 * 4;
    return block * BLOCK_BYTES + column / 64 % 2 * 512 + lane * 16 + column / 32 % 2 * 8;
}

static_assert(!HALVES || (STEPS && !MINIMA && PACKED == 8), "halves of groups have steps of their own, of 8-bit integers");

// A byte of a word (number `byte`), less 128: an integer in the mantissa of 2^23 is a float at once.
DEVICE float step_of(u32 word, int byte) { return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + byte)) - 8388736.0f; }

// The integers of eight columns. One that is put into the mantissa of 128 (4 bits: of a bfloat16 number) or of 2^23 (8 bits) is a float
// at once; conversions of integers are slow.
DEVICE void unpack(const u32 *words, float (&integers)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (PACKED == 4) {
            const u32 pair = (words[0] >> (4 * i) & 0x000f000fu) | 0x43004300u;
            integers[2 * i] = low_bf16(pair) - (MINIMA ? 128.0f : 136.0f);
            integers[2 * i + 1] = high_bf16(pair) - (MINIMA ? 128.0f : 136.0f);
        } else {
            const u32 word = words[i / 2] ^ 0x80808080u;
            integers[2 * i] = step_of(word, i % 2);
            integers[2 * i + 1] = step_of(word, 2 + i % 2);
        }
    }
}

DEVICE u32 bits_of(f16 number) { return number.bits; }
DEVICE u32 bits_of(float number) { return __float_as_uint(number); }

// Eight columns of a row as they lie in memory.
struct Eight {
    u32 words[2], scale, minimum; // or steps and units
};

// A matrix (rows, columns); scales are (rows, ceil(columns / group)) for 8-bit types that are not packed, else as above, or null.
struct Matrix {
    const WEIGHT *weight;
    const Scale *scales, *minima;
    int columns, group;

    // Reads eight columns of a row of weights in few bits, from a multiple of 8 on, which share a scale.
    DEVICE Eight fetch(size_t row, int column) const {
        if constexpr (!PACKED) {
            const uint2 words = *reinterpret_cast<const uint2 *>(weight + row * columns + column);
            return {{words.x, words.y}, bits_of(scales[row * ((columns + group - 1) / group) + column / group]), 0};
        }
        const size_t block = row / BLOCK_ROWS * ((columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS) + column / BLOCK_COLUMNS;
        const u32 *words = reinterpret_cast<const u32 *>(weight + packed_offset(block, row % BLOCK_ROWS, column));
        const size_t own = block * BLOCK_ROWS + row % BLOCK_ROWS, place = own * GROUPS + column % BLOCK_COLUMNS / WEIGHT_GROUP;
        Eight eight = {{words[0], PACKED == 8 ? words[1] : 0}, bits_of(scales[place]), 0};
        if (STEPS) eight.minimum = reinterpret_cast<const u32 *>(minima)[own];
        if (MINIMA && !STEPS) eight.minimum = bits_of(minima[place]);
        return eight;
    }

    // What they stand for.
    DEVICE static void decode(const Eight &eight, int column, float (&values)[8]) {
        if constexpr (!PACKED) {
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] = to_float(e4m3{u8(eight.words[i / 4] >> (i % 4 * 8))}) * __uint_as_float(eight.scale);
            return;
        }
        float scale = to_float(f16{u16(eight.scale)}), minimum = to_float(f16{u16(eight.minimum)});
        if (STEPS) {
            scale = minimum * step_of(eight.scale, HALVES ? column / 16 % 2 : 0);
            minimum = MINIMA ? -to_float(f16{u16(eight.minimum >> 16)}) * step_of(eight.scale, 1) : 0.0f;
        }
        unpack(eight.words, values);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = fmaf(scale, values[i], minimum);
    }

    // V neighbouring columns of a row, 1 or 8, from a multiple of V on.
    template <int V> DEVICE void row(size_t row, int column, float (&values)[V]) const {
        if constexpr (PACKED) {
            float all[8];
            decode(fetch(row, column), column, all);
#pragma unroll
            for (int i = 0; i < V; i++) values[i] = all[V == 8 ? i : column % 8];
        } else {
            load<V>(weight + row * columns + column, values);
            if (sizeof(WEIGHT) > 1) return;
            const float factor = to_float(scales[row * ((columns + group - 1) / group) + column / group]);
#pragma unroll
            for (int j = 0; j < V; j++) values[j] *= factor;
        }
    }
};
