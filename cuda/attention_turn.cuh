// Rotation of queries and keys, and storing of new keys and values, by decode attention itself (ROTATES 1): the product's kernel is then the one
// before this one. What is needed of a piece comes to shared memory while the piece before it is attended to; among streaming pages, a read
// of anything else takes microseconds. Queries are rotated there, and new keys and values stored, before a barrier that comes before both are read.
//
// A layer's microseconds with rope_write_halves (kv.cu) before attention and without, after 640 tokens: on an H200 8B in E4M3, 64 rows 122.8 and
// 121.1, 8B in bfloat16, 256 rows 365.5 and 362.3; on an H100 70B in E4M3, 64 rows 378.8 and 375.7, 256 rows 649.7 and 640.9. Without rotation and
// storing at all it would be 371 and 633. Reading queries, keys, values and the table from memory when they are needed gives half of that.
#ifndef ROTATES
#define ROTATES 0
#endif
#include "rope.cuh"

namespace decoding {

// What is needed for that, beside queries that are followed by keys and values of their row. Null and 0 without ROTATES.
struct Turning {
    const float2 *table;                      // (table rows, HEAD_DIM / 2) of (cosine, sine)
    const int *rope_rows, *slots, *first_row; // of each row, and of sequences
    int all_slots;

    DEVICE const float2 *turn(int rope_row) const { return table + size_t(rope_row) * (HEAD_DIM / 2); }
};

#if ROTATES
static_assert(PARTS == 1 && KEY_UNITS == QUERY_READS && QUERY_READS % 2 == 0 && !INTERLEAVED, "dimensions that pair are one lane's");
static_assert(sizeof(KEY_TYPE) == 2 && sizeof(VALUE_TYPE) == 2, "types without scales");

constexpr int TOKENS = 8 / GROUP;         // of a tile: decode_tokens in attention.py
constexpr int TURN_PIECES = HEAD_DIM / 4; // of 16 bytes, of a row of the table

// What a piece needs before its pages: of each token a row of the table, query rows, the key and the value.
struct alignas(16) Ahead {
    float2 turns[TOKENS][HEAD_DIM / 2];
    bf16 queries[TOKENS][GROUP][HEAD_DIM], keys[TOKENS][HEAD_DIM], values[TOKENS][HEAD_DIM];
    int slots[TOKENS];

    // What the first row of the table that a thread asks for depends on, so that it can be read in time.
    DEVICE static int rope_row(const Turning &turning, int first_row, int rows) {
        const int token = threadIdx.x / TURN_PIECES;
        return token < rows ? turning.rope_rows[first_row + token] : 0;
    }

    // Asks for rows of the table, and slots, by all threads.
    DEVICE void ask_for_turns(const Turning &turning, int rope_row, int first_row, int rows) {
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * TURN_PIECES; i += THREADS) {
            const int token = i / TURN_PIECES, piece = i % TURN_PIECES;
            if (i >= THREADS) rope_row = turning.rope_rows[first_row + token];
            copy_16(&turns[token][piece * 2], turning.turn(rope_row) + piece * 2);
        }
        if (threadIdx.x < rows) copy_4(&slots[threadIdx.x], turning.slots + first_row + threadIdx.x);
    }

    // Asks for the others, which the kernel before this one writes.
    DEVICE void ask_for_rows(const bf16 *rows, int stride, int first_row, int count, int kv_head, int kv_heads) {
        constexpr int PIECES = HEAD_DIM / 8, HEADS = GROUP + 2;
#pragma unroll 1
        for (int i = threadIdx.x; i < count * HEADS * PIECES; i += THREADS) {
            const int token = i / (HEADS * PIECES), head = i / PIECES % HEADS, dim = i % PIECES * 8;
            const int of_row = head < GROUP ? kv_head * GROUP + head : kv_heads * (GROUP + head - GROUP) + kv_head;
            bf16 *to = head < GROUP ? queries[token][head] : head == GROUP ? keys[token] : values[token];
            copy_16(to + dim, rows + size_t(first_row + token) * stride + of_row * HEAD_DIM + dim);
        }
    }

    // Rotates the query rows in their places, by all threads.
    DEVICE void rotate(int rows) {
        constexpr int PARTS_OF_HEAD = HEAD_DIM / 16;
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * GROUP * PARTS_OF_HEAD; i += THREADS) {
            const int row = i / PARTS_OF_HEAD, part = i % PARTS_OF_HEAD;
            bf16 *from = queries[row / GROUP][row % GROUP] + part * 8;
            HalfTurn turn;
            float first[8], second[8];
            turn.read(turns[row / GROUP], part);
            load<8>(from, first);
            load<8>(from + HEAD_DIM / 2, second);
            turn.rotate(first, second);
            store<8>(from, first);
            store<8>(from + HEAD_DIM / 2, second);
        }
    }

    // A lane's part of a query row, or zeros.
    DEVICE void query(int row, int rows, int t, uint4 (&words)[QUERY_READS]) const {
        const bf16 *from = queries[row / GROUP][row % GROUP];
#pragma unroll
        for (int i = 0; i < QUERY_READS; i++) {
            words[i] = row < rows ? *reinterpret_cast<const uint4 *>(from + query_dim(i, t)) : make_uint4(0, 0, 0, 0);
        }
    }
};

// Stores a token's key, rotated, and value of one head at their places in its page's parts, by a warp.
DEVICE void store_token(const bf16 *key, const bf16 *value, const float2 *turn, bf16 *keys, bf16 *values, int place) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int dim = lane; dim < HEAD_DIM / 2; dim += WARP) {
        const float2 angle = turn[dim];
        const float a = to_float(key[dim]), b = to_float(key[dim + HEAD_DIM / 2]);
        keys[key_offset<bf16>(place, dim)] = from_float<bf16>(a * angle.x - b * angle.y);
        keys[key_offset<bf16>(place, dim + HEAD_DIM / 2)] = from_float<bf16>(b * angle.x + a * angle.y);
    }
#pragma unroll
    for (int dim = lane; dim < HEAD_DIM; dim += WARP) values[value_offset<bf16>(place, dim)] = value[dim];
}
#else
struct Ahead {};
#endif
} // namespace decoding
