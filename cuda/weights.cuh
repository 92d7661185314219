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

// A matrix (rows, columns); scales are (rows, ceil(columns / group)) for 8-bit types that are not packed, else as above, or null.
struct Matrix {
    const WEIGHT *weight;
    const Scale *scales, *minima;
    int columns, group;

    // V neighbouring columns of a row, 1 or 8, from a multiple of V on.
    template <int V> DEVICE void row(size_t row, int column, float (&values)[V]) const {
        if constexpr (PACKED) {
            const size_t block = row / BLOCK_ROWS * ((columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS) + column / BLOCK_COLUMNS;
            const u32 *words = reinterpret_cast<const u32 *>(weight + packed_offset(block, row % BLOCK_ROWS, column));
            const size_t place = (block * BLOCK_ROWS + row % BLOCK_ROWS) * GROUPS + column % BLOCK_COLUMNS / WEIGHT_GROUP;
            const float scale = to_float(scales[place]), minimum = MINIMA ? to_float(minima[place]) : 0.0f;
#pragma unroll
            for (int i = 0; i < V; i++) {
                const int j = V == 8 ? i : column % 8;
                const int integer = PACKED == 4 ? int(words[0] >> (16 * (j % 2) + 4 * (j / 2)) & 15) - (MINIMA ? 0 : 8)
                                                : int(static_cast<signed char>(words[j / 4] >> (16 * (j % 2) + 8 * (j / 2 % 2))));
                values[i] = fmaf(scale, float(integer), minimum);
            }
        } else {
            load<V>(weight + row * columns + column, values);
            if (sizeof(WEIGHT) > 1) return;
            const float factor = to_float(scales[row * ((columns + group - 1) / group) + column / group]);
#pragma unroll
            for (int j = 0; j < V; j++) values[j] *= factor;
        }
    }
};
