// Attention of many query rows of a sequence over its paged keys and values: prompts, whole or in chunks.
//
// A block takes a tile of 128 packed rows for one key/value head, 32 for each of its warps (16 where heads are wide), and walks over the
// visible pages, some at a time, copied asynchronously to shared memory while the last ones are computed with (FlashAttention-2's order of
// work: Dao, 2023). Pages lie in memory as the matrix instructions want them (kv.cuh), so they are copied and read as they are.
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "attention.cuh"

constexpr int ROW_TILES = HEAD_DIM > 128 ? 1 : 2; // of 16 packed rows, for each warp: every read of keys and values serves them all
constexpr int WARPS = 8 / ROW_TILES;
constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = 128;
#ifndef PAGES
#define PAGES 2 // copied and computed at a time; 4 take registers that two tiles of rows need
#endif
constexpr int STAGES = 2;
constexpr int QUERY_STRIDE = (HEAD_DIM + 63) / 64 * 64; // whole groups of banks
constexpr int EACH = HEAD_DIM / 8 / KEY_UNITS; // registers of a query's operand for one unit

struct Stage {
    u8 keys[PAGES][PAGE_BYTES_OF_KEYS], values[PAGES][PAGE_BYTES_OF_VALUES];
    float key_scales[PAGES][KEY_SCALES * PAGE_TOKENS], value_scales[PAGES][PAGE_TOKENS];
};

struct Source {
    const u8 *keys, *values;
    const float *key_scales, *value_scales;
    const int *table;
    int kv_head, kv_heads, first, end;

    // Starts copying pages `number` to `number + PAGES`; outside of those that are seen it repeats the nearest one, which is masked.
    DEVICE void copy(Stage &stage, int number) const {
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            const size_t index = size_t(table[max(min(number + page, end - 1), first)]) * kv_heads + kv_head;
            for (int i = threadIdx.x * 16; i < PAGE_BYTES_OF_KEYS; i += THREADS * 16) {
                copy_16(stage.keys[page] + i, keys + index * PAGE_BYTES_OF_KEYS + i);
            }
            for (int i = threadIdx.x * 16; i < PAGE_BYTES_OF_VALUES; i += THREADS * 16) {
                copy_16(stage.values[page] + i, values + index * PAGE_BYTES_OF_VALUES + i);
            }
            if (sizeof(KEY_TYPE) == 1 && threadIdx.x < KEY_SCALES * PAGE_TOKENS) {
                copy_4(&stage.key_scales[page][threadIdx.x], key_scales + index * KEY_SCALES * PAGE_TOKENS + threadIdx.x);
            }
            if (sizeof(VALUE_TYPE) == 1 && threadIdx.x < PAGE_TOKENS) {
                copy_4(&stage.value_scales[page][threadIdx.x], value_scales + index * PAGE_TOKENS + threadIdx.x);
            }
        }
        end_group();
    }
};

// Query rows in shared memory, (ROWS, HEAD_DIM), 16 bytes at a time; two rows that are read together take different banks.
struct Queries {
    bf16 *rows;

    DEVICE bf16 *part(int row, int eight) const { return rows + row * QUERY_STRIDE + (eight ^ row % 2 * (sizeof(KEY_TYPE) == 1 ? 1 : 4)) * 8; }

    DEVICE void copy(const bf16 *queries, const Tile &tile, int kv_head, int stride) const {
        for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 8; i += THREADS) {
            const int row = i / (HEAD_DIM / 8), eight = i % (HEAD_DIM / 8), token = row / GROUP, head = kv_head * GROUP + row % GROUP;
            const bool exists = token < tile.rows;
            const bf16 *from = queries + size_t(tile.first_row + (exists ? token : 0)) * stride + head * HEAD_DIM + eight * 8;
            copy_16_cached(part(row, eight), from, exists);
        }
    }

    // A row's operand for one unit of keys, in the order of key_step.
    DEVICE void read(int row, int unit, int t, u32 (&operand)[EACH]) const {
#pragma unroll
        for (int i = 0; i < EACH / 4; i++) {
            const uint4 words = *reinterpret_cast<const uint4 *>(part(row, unit * EACH + t * (EACH / 4) + i));
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const u32 a = word_of(words, 2 * pair), b = word_of(words, 2 * pair + 1);
                operand[4 * i + 2 * pair] = sizeof(KEY_TYPE) == 1 ? __byte_perm(a, b, 0x5410) : a;
                operand[4 * i + 2 * pair + 1] = sizeof(KEY_TYPE) == 1 ? __byte_perm(a, b, 0x7632) : b;
            }
        }
    }
};

typedef float Scores[ROW_TILES][PAGES][2][4]; // of a stage's tokens: for each page, its lower and its upper tokens

// A warp's packed rows: lane (g, t) has parts of rows g and g + 8 of each tile of 16.
struct Warp {
    float greatest[ROW_TILES][2], total[ROW_TILES][2];
    float sums[ROW_TILES][DIM_TILES][2][4]; // of 16 dimensions, those of even and of odd rows of the values' operand
    int first_row, g, t;

    DEVICE void multiply(const Queries &queries, const Stage &stage, Scores &scores) const {
#pragma unroll
        for (int unit = 0; unit < KEY_UNITS; unit++) {
            u32 operands[ROW_TILES][2][EACH];
#pragma unroll
            for (int i = 0; i < ROW_TILES * 2; i++) queries.read(first_row + i * 8 + g, unit, t, operands[i / 2][i % 2]);
#pragma unroll
            for (int i = 0; i < PAGES * 2; i++) {
                const int token = i % 2 ? upper_token(g) : lower_token(g);
                const uint4 words = *reinterpret_cast<const uint4 *>(stage.keys[i / 2] + unit * 1024 + token * 64 + t * 16);
                const float scale = IS_INTEGER<KEY_TYPE> ? stage.key_scales[i / 2][key_scale_place(unit, t, token)] : 1.0f;
#pragma unroll
                for (int step = 0; step < KEY_STEPS; step++) {
                    u32 b0, b1;
                    key_step(words, step, scale, b0, b1);
#pragma unroll
                    for (int tile = 0; tile < ROW_TILES; tile++) {
                        u32(&q)[2][EACH] = operands[tile];
                        mma(scores[tile][i / 2][i % 2], q[0][2 * step], q[1][2 * step], q[0][2 * step + 1], q[1][2 * step + 1], b0, b1);
                    }
                }
            }
        }
    }

    // Finishes scores: the keys' scales, the soft cap, and minus infinity for what a row does not see.
    DEVICE void finish(const Stage &stage, Scores &scores, const Score &score, int begin, int end, bool masked) const {
        if (!SCALED_SCORES && !SOFTCAP && !masked) return;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
            for (int i = 0; i < PAGES * 8; i++) {
                const int page = i / 8, half = i / 4 % 2, column = 2 * t + i % 2;
                const int token = half ? upper_token(column) : lower_token(column), position = begin + page * PAGE_TOKENS + token;
                float &s = scores[tile][page][half][i % 4];
                if (SCALED_SCORES) s *= stage.key_scales[page][token];
                if (SOFTCAP) s = score(s);
                const int row = first_row + tile * 16 + i / 2 % 2 * 8 + g;
                if (masked && (position >= end || !score.visible(position, row))) s = -INFINITE;
            }
        }
    }

    // Turns scores into weights, and shrinks what was summed under a lower greatest score. Scores times `factor` are powers of two.
    DEVICE void weigh(Scores &scores, float factor) {
#pragma unroll
        for (int i = 0; i < ROW_TILES * 2; i++) {
            const int tile = i / 2, row = i % 2;
            float most = -INFINITE, sum = 0.0f;
#pragma unroll
            for (int j = 0; j < PAGES * 4; j++) most = fmaxf(most, scores[tile][j / 4][j / 2 % 2][row * 2 + j % 2]);
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            most = fmaxf(greatest[tile][row], most * factor);
            const float shrink = exp2_fast(greatest[tile][row] - most);
            greatest[tile][row] = most;
#pragma unroll
            for (int j = 0; j < PAGES * 4; j++) {
                float &s = scores[tile][j / 4][j / 2 % 2][row * 2 + j % 2];
                s = exp2_fast(fmaf(s, factor, -most));
                sum += s;
            }
            total[tile][row] = total[tile][row] * shrink + sum;
#pragma unroll
            for (int j = 0; j < DIM_TILES * 4; j++) sums[tile][j / 4][j / 2 % 2][row * 2 + j % 2] *= shrink;
        }
    }

    // A page's weights as an operand; `valid` of the page's tokens exist.
    DEVICE void weights_operand(const Stage &stage, const float (&weights)[2][4], int page, int valid, u32 (&a)[4]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float factors[2] = {1.0f, 1.0f};
            if (sizeof(VALUE_TYPE) == 1) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int token = half ? upper_token(2 * t + i) : lower_token(2 * t + i);
                    factors[i] = token < valid ? stage.value_scales[page][token] : 0.0f;
                }
            }
            a[2 * half] = pack_bf16(weights[half][0] * factors[0], weights[half][1] * factors[1]);
            a[2 * half + 1] = pack_bf16(weights[half][2] * factors[0], weights[half][3] * factors[1]);
        }
    }

    // `valid` of the stage's tokens exist.
    DEVICE void add_values(const Stage &stage, const Scores &weights, int valid) {
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            u32 a[ROW_TILES][4];
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; tile++) weights_operand(stage, weights[tile][page], page, valid - page * PAGE_TOKENS, a[tile]);
#pragma unroll
            for (int unit = 0; unit < VALUE_UNITS; unit++) {
                uint4 words = *reinterpret_cast<const uint4 *>(stage.values[page] + unit * 512 + g * 64 + t * 16);
                if (valid < PAGES * PAGE_TOKENS) blank(words, valid - page * PAGE_TOKENS - 4 * t);
#pragma unroll
                for (int part = 0; part < VALUE_TILES; part++) {
                    u32 first[2], second[2];
                    value_tile(words, part, first, second);
#pragma unroll
                    for (int tile = 0; tile < ROW_TILES; tile++) {
                        float(&sum)[2][4] = sums[tile][unit * VALUE_TILES + part];
                        mma(sum[0], a[tile][0], a[tile][1], a[tile][2], a[tile][3], first[0], first[1]);
                        mma(sum[1], a[tile][0], a[tile][1], a[tile][2], a[tile][3], second[0], second[1]);
                    }
                }
            }
        }
    }

    // Divides by the sums of weights and writes the rows that exist.
    DEVICE void write(const Tile &tile, int kv_head, const float *sinks, bf16 *output, int output_stride) const {
#pragma unroll
        for (int i = 0; i < ROW_TILES * 2; i++) {
            const int row = first_row + i * 8 + g, head = kv_head * GROUP + row % GROUP;
            float all = total[i / 2][i % 2];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            if (row >= tile.rows * GROUP) continue;
            float factor = 1.0f;
            if (sinks) factor = join_sink(sinks[head], greatest[i / 2][i % 2], all);
            factor /= all;
            bf16 *to = output + size_t(tile.first_row + row / GROUP) * output_stride + head * HEAD_DIM;
#pragma unroll
            for (int j = 0; j < DIM_TILES * 2; j++) {
                // Column 2t + column of the two products are two neighbouring dimensions.
                const int dims = j / 2, column = j % 2;
                const float(&sum)[2][4] = sums[i / 2][dims];
                *reinterpret_cast<u32 *>(to + tile_dim(dims, 2 * t + column)) =
                    pack_bf16(sum[0][i % 2 * 2 + column] * factor, sum[1][i % 2 * 2 + column] * factor);
            }
        }
    }
};

// queries, output: (rows, heads * HEAD_DIM), aligned to 16 bytes. All heads of a tile are neighbours: late tiles of a prompt see the most, and
// multiprocessors were idle while the last head's were left. Launch: grid (kv_heads, tiles or more), WARPS warps, ROWS * QUERY_STRIDE *
// 2 bytes and STAGES stages of dynamic shared memory.
BOUNDED_KERNEL(THREADS, 1)
attention_prefill(const bf16 *queries, bf16 *output, const KEY_TYPE *keys, const VALUE_TYPE *values, const float *key_scales,
                  const float *value_scales, const float *sinks, const Tile *tiles, const int *counts, const int *page_table,
                  int query_stride, int output_stride, int page_stride, int kv_heads, int window, float scale, float softcap) {
    extern __shared__ uint4 dynamic[];
    const Queries rows = {reinterpret_cast<bf16 *>(dynamic)};
    Stage *stages = reinterpret_cast<Stage *>(rows.rows + ROWS * QUERY_STRIDE);
    let_next_start();
    wait_for_previous();
    if (int(blockIdx.y) >= counts[1]) return;
    const Tile tile = tiles[blockIdx.y];
    const int kv_head = blockIdx.x;
    const Score score = {scale, softcap, window, tile.first_position};
    const int first = first_visible(tile.first_position, window) / PAGE_TOKENS, end = tile.first_position + tile.rows;
    const int page_end = (end + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const Source source = {reinterpret_cast<const u8 *>(keys), reinterpret_cast<const u8 *>(values), key_scales, value_scales,
                           page_table + size_t(tile.sequence) * page_stride, kv_head, kv_heads, first, page_end};
    rows.copy(queries, tile, kv_head, query_stride);
    const int begin_page = first / PAGES * PAGES; // so that what is added up together does not depend on the tile
    source.copy(stages[0], begin_page);
    Warp own = {};
    own.first_row = threadIdx.x / WARP * ROW_TILES * 16, own.g = threadIdx.x % WARP / 4, own.t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < ROW_TILES * 2; i++) own.greatest[i / 2][i % 2] = LOWEST;
    int turn = 0;
    for (int page = begin_page; page < page_end; page += PAGES, turn ^= 1) {
        const Stage &stage = stages[turn];
        if (page + PAGES < page_end) {
            source.copy(stages[turn ^ 1], page + PAGES);
            wait_group<1>();
        } else {
            wait_group<0>();
        }
        __syncthreads();
        const int begin = page * PAGE_TOKENS, stage_end = begin + PAGES * PAGE_TOKENS;
        const bool masked = stage_end > end || !score.all_visible(begin, stage_end, tile.rows);
        Scores scores = {};
        own.multiply(rows, stage, scores);
        own.finish(stage, scores, score, begin, end, masked);
        own.weigh(scores, SOFTCAP ? 1.0f : scale * LOG2E);
        own.add_values(stage, scores, end - begin);
        __syncthreads();
    }
    own.write(tile, kv_head, sinks, output, output_stride);
}
