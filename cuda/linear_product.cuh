// What the streaming products share: how many rows and tokens a warp has, its sums, and what it reads of a weight.
#include "weights.cuh"

#ifndef TOKENS
#define TOKENS 8
#endif
#ifndef TILES
#define TILES 1
#endif
#ifndef GROUPED
#define GROUPED 0 // 1: 8-bit weights have a scale for each row and STEP columns, not one for the row
#endif
#ifndef PAIRED
#define PAIRED 0 // 1: the second 8 rows of a tile are not the next ones but those that are combined with the first (gates, rotation)
#endif

constexpr int PARTS = (TOKENS + 7) / 8; // of 8 tokens, the width of one matrix instruction
constexpr int ROWS = PAIRED ? 8 : 16; // neighbouring weight rows of a tile
constexpr int OUTPUTS = ROWS * TILES; // of a unit

// The sums of one warp.
struct Sums {
    float values[TILES][PARTS][4];
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
