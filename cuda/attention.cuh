// What the fast attention kernels share: the work lists, and how pages become operands of matrix instructions.
//
// GROUP query heads share a key/value head. A tile packs tokens and those heads into rows: row r is token r / GROUP, head r % GROUP of the
// group, so keys and values are read once for all of them.
#ifndef GROUP
#define GROUP 1
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif
#ifndef CHUNK_PAGES
#define CHUNK_PAGES 32
#endif

constexpr float LOWEST = -1e30f; // a greatest score of nothing: differences to it stay finite
constexpr float LOG2E = 1.44269504f;

// One piece of decode attention: a few query rows of a sequence against one chunk of its positions, `chunk_pages` pages or, the last one,
// what is left. The chunks of a tile are neighbours.
struct Item {
    int first_row, rows, first_position, sequence;
    int chunk, first_chunk, chunks, chunk_pages;
};

// Query rows of a sequence, for the prefill kernel.
struct Tile {
    int first_row, rows, first_position, sequence;
};

// Sixteen tokens take part as the rows of a matrix of 8 and another 8: lane g's row of the first and its row of the second. So that four
// neighbouring tokens are what lane t needs of the values, in the order in which its type comes out of a register.
DEVICE int lower_token(int g) { return sizeof(VALUE_TYPE) == 1 ? g / 2 * 4 + g % 2 * 2 : g / 2 * 4 + g % 2; }
DEVICE int upper_token(int g) { return lower_token(g) + (sizeof(VALUE_TYPE) == 1 ? 1 : 2); }

constexpr int KEY_UNITS = HEAD_DIM * sizeof(KEY_TYPE) / 64;     // reads of 16 bytes for a token's dimensions, by four lanes
constexpr int VALUE_UNITS = HEAD_DIM * sizeof(VALUE_TYPE) / 32; // reads of 16 bytes for a page's values, by a warp
constexpr int KEY_STEPS = 4 / sizeof(KEY_TYPE);                 // matrix instructions that a read of keys feeds
constexpr int VALUE_TILES = 2 / sizeof(VALUE_TYPE);             // tiles of 16 dimensions in a read of values
constexpr int DIM_TILES = HEAD_DIM / 16;
constexpr int PAGE_BYTES_OF_KEYS = PAGE_TOKENS * HEAD_DIM * sizeof(KEY_TYPE);
constexpr int PAGE_BYTES_OF_VALUES = PAGE_TOKENS * HEAD_DIM * sizeof(VALUE_TYPE);

// Whether scores are to be multiplied by the keys' scales; scales of integers are part of the operand.
constexpr bool SCALED_SCORES = sizeof(KEY_TYPE) == 1 && !IS_INTEGER<KEY_TYPE>;

// Where the scale of a read of integers is, among the scales of a page's part: lane t's 16 dimensions of a unit share one.
DEVICE int key_scale_place(int unit, int t, int token) { return (unit * 2 + t / 2) * PAGE_TOKENS + token; }

// The keys of step `step` of a read: two registers of neighbouring pairs of dimensions. Only integers are multiplied by the scale.
DEVICE void key_step(const uint4 &words, int step, float scale, u32 &first, u32 &second) {
    if constexpr (IS_INTEGER<KEY_TYPE>) {
        expand_integers(word_of(words, step), scale, first, second);
    } else if constexpr (sizeof(KEY_TYPE) == 1) {
        expand_e4m3(word_of(words, step), first, second);
    } else {
        first = word_of(words, 2 * step), second = word_of(words, 2 * step + 1);
    }
}

// The values of tile `tile` of a read: for two dimensions, the tokens of the first and of the second 8 rows.
DEVICE void value_tile(const uint4 &words, int tile, u32 (&first)[2], u32 (&second)[2]) {
    if constexpr (IS_INTEGER<VALUE_TYPE>) {
        expand_integers(word_of(words, 2 * tile), 1.0f, first[0], first[1]);
        expand_integers(word_of(words, 2 * tile + 1), 1.0f, second[0], second[1]);
    } else if constexpr (sizeof(VALUE_TYPE) == 1) {
        expand_e4m3(word_of(words, 2 * tile), first[0], first[1]);
        expand_e4m3(word_of(words, 2 * tile + 1), second[0], second[1]);
    } else {
        first[0] = words.x, first[1] = words.y, second[0] = words.z, second[1] = words.w;
    }
}

// Clears the values of all but the first `valid` of a read's four tokens: what lies in slots that hold no token yet may be anything.
DEVICE void blank(uint4 &words, int valid) {
    u32 first, second; // masks of the words' tokens
    if constexpr (sizeof(VALUE_TYPE) == 1) {
        first = second = valid >= 4 ? ALL_LANES : valid <= 0 ? 0 : (1u << 8 * valid) - 1;
    } else {
        first = valid >= 2 ? ALL_LANES : valid == 1 ? 0xffffu : 0;
        second = valid >= 4 ? ALL_LANES : valid == 3 ? 0xffffu : 0;
    }
    words.x &= first, words.y &= second, words.z &= first, words.w &= second;
}

// The dimension of row g of a tile of 16; row g + 8 is the next one.
DEVICE int tile_dim(int tile, int g) {
    return sizeof(VALUE_TYPE) == 1 ? tile / 2 * 32 + g * 4 + tile % 2 * 2 : tile * 16 + g * 2;
}

constexpr int QUERY_READS = HEAD_DIM / 32; // of 16 bytes, that a lane needs of a query row

// The first dimension of a read: units of keys, and the lane's parts of those.
DEVICE int query_dim(int read, int t) {
    constexpr int parts = QUERY_READS / KEY_UNITS;
    return read / parts * SPAN<KEY_TYPE> + t * (SPAN<KEY_TYPE> / 4) + read % parts * 8;
}

// Part of a query row as the operand that meets the keys: for each step two registers, in the order of key_step.
DEVICE void query_operand(const uint4 (&words)[QUERY_READS], u32 (&operand)[HEAD_DIM / 8]) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i += 2) {
        const u32 a = word_of(words[i / 4], i % 4), b = word_of(words[i / 4], i % 4 + 1);
        operand[i] = sizeof(KEY_TYPE) == 1 ? __byte_perm(a, b, 0x5410) : a;
        operand[i + 1] = sizeof(KEY_TYPE) == 1 ? __byte_perm(a, b, 0x7632) : b;
    }
}

// What a product of query and key becomes before the softmax, in powers of two.
struct Score {
    float scale, softcap;
    int window, first_position;

    DEVICE float operator()(float product) const {
        if constexpr (SOFTCAP) return softcap * tanhf(product * scale / softcap) * LOG2E;
        return product * (scale * LOG2E);
    }

    DEVICE bool visible(int position, int row) const {
        const int own = first_position + row / GROUP;
        return position <= own && (window == 0 || position > own - window);
    }

    // Whether every row of `rows` tokens sees all positions from `begin` to `end`.
    DEVICE bool all_visible(int begin, int end, int rows) const {
        return end - 1 <= first_position && (window == 0 || begin > first_position + rows - 1 - window);
    }
};

// A sum of weights and a factor of the values, once a score that has no value (a sink) has joined in. Scores are powers of two.
DEVICE float join_sink(float sink, float greatest, float &total) {
    const float most = fmaxf(greatest, sink * LOG2E), factor = exp2_fast(greatest - most);
    total = total * factor + exp2_fast(sink * LOG2E - most);
    return factor;
}

DEVICE int first_visible(int position, int window) { return window > 0 ? max(0, position + 1 - window) : 0; }
