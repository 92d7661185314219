// Attention of many query rows of a sequence over its paged keys and values: prompts, whole or in chunks.
//
// A block takes a tile of 128 packed rows for one key/value head, 16 for each of its warps, and walks over the visible pages, four at a time,
// copied asynchronously to shared memory while the last four are computed with (FlashAttention-2's order of work: Dao, 2023). Pages lie
// in memory as the matrix instructions want them (kv.cuh), so they are copied and read as they are.
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "attention.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int PAGES = HEAD_DIM > 128 ? 2 : 4; // copied and computed at a time
constexpr int STAGES = 2;

struct Stage {
    u8 keys[PAGES][PAGE_BYTES_OF_KEYS], values[PAGES][PAGE_BYTES_OF_VALUES];
    float key_scales[PAGES][PAGE_TOKENS], value_scales[PAGES][PAGE_TOKENS];
};

struct Source {
    const u8 *keys, *values;
    const float *key_scales, *value_scales;
    const int *table;
    int kv_head, kv_heads, end;

    // Starts copying pages `number` to `number + PAGES`; beyond the end it repeats the last one, which is masked.
    DEVICE void copy(Stage &stage, int number) const {
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            const size_t index = size_t(table[min(number + page, end - 1)]) * kv_heads + kv_head;
            for (int i = threadIdx.x * 16; i < PAGE_BYTES_OF_KEYS; i += THREADS * 16) {
                copy_16(stage.keys[page] + i, keys + index * PAGE_BYTES_OF_KEYS + i);
            }
            for (int i = threadIdx.x * 16; i < PAGE_BYTES_OF_VALUES; i += THREADS * 16) {
                copy_16(stage.values[page] + i, values + index * PAGE_BYTES_OF_VALUES + i);
            }
            if (threadIdx.x < PAGE_TOKENS) {
                const size_t at = index * PAGE_TOKENS + threadIdx.x;
                if (sizeof(KEY_TYPE) == 1) copy_4(&stage.key_scales[page][threadIdx.x], key_scales + at);
                if (sizeof(VALUE_TYPE) == 1) copy_4(&stage.value_scales[page][threadIdx.x], value_scales + at);
            }
        }
        end_group();
    }
};

// A warp's 16 packed rows: lane (g, t) has parts of rows g and g + 8.
struct Warp {
    u32 query[2][HEAD_DIM / 8];
    float greatest[2], total[2], sums[DIM_TILES][2][4]; // of a tile of 16 dimensions, those of even and of odd rows of the values' operand
    int first_row, g, t;

    // Scores of a stage's tokens: for each page and each half of its tokens.
    DEVICE void multiply(const Stage &stage, float (&scores)[PAGES][2][4]) const {
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float(&s)[4] = scores[page][half];
                s[0] = s[1] = s[2] = s[3] = 0.0f;
                const int token = half ? upper_token(g) : lower_token(g);
#pragma unroll
                for (int unit = 0; unit < KEY_UNITS; unit++) {
                    const uint4 words = *reinterpret_cast<const uint4 *>(stage.keys[page] + unit * 1024 + token * 64 + t * 16);
#pragma unroll
                    for (int step = 0; step < KEY_STEPS; step++) {
                        u32 b0, b1;
                        key_step(words, step, b0, b1);
                        const int at = (unit * KEY_STEPS + step) * 2;
                        mma(s, query[0][at], query[1][at], query[0][at + 1], query[1][at + 1], b0, b1);
                    }
                }
            }
        }
    }

    // Turns scores into weights, and shrinks what was summed under a lower greatest score.
    DEVICE void weigh(const Stage &stage, float (&scores)[PAGES][2][4], const Score &score, int begin, int end, bool masked) {
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = 2 * t + i % 2, token = half ? upper_token(column) : lower_token(column);
                    float &s = scores[page][half][i];
                    s = score(sizeof(KEY_TYPE) == 1 ? s * stage.key_scales[page][token] : s);
                    const int position = begin + page * PAGE_TOKENS + token;
                    if (masked && (position >= end || !score.visible(position, first_row + g + i / 2 * 8))) s = -INFINITE;
                }
            }
        }
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float most = greatest[row], sum = 0.0f;
#pragma unroll
            for (int i = 0; i < PAGES * 4; i++) most = fmaxf(most, scores[i / 4][i / 2 % 2][row * 2 + i % 2]);
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            const float shrink = exp2_fast(greatest[row] - most);
            greatest[row] = most;
#pragma unroll
            for (int i = 0; i < PAGES * 4; i++) {
                float &s = scores[i / 4][i / 2 % 2][row * 2 + i % 2];
                s = exp2_fast(s - most);
                sum += s;
            }
            total[row] = total[row] * shrink + sum;
#pragma unroll
            for (int i = 0; i < DIM_TILES * 4; i++) sums[i / 4][i / 2 % 2][row * 2 + i % 2] *= shrink;
        }
    }

    // `valid` of the stage's tokens exist.
    DEVICE void add_values(const Stage &stage, const float (&weights)[PAGES][2][4], int valid) {
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            u32 a[4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float(&w)[4] = weights[page][half];
                float factors[2] = {1.0f, 1.0f};
                if (sizeof(VALUE_TYPE) == 1) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int token = half ? upper_token(2 * t + i) : lower_token(2 * t + i);
                        factors[i] = page * PAGE_TOKENS + token < valid ? stage.value_scales[page][token] : 0.0f;
                    }
                }
                a[2 * half] = pack_bf16(w[0] * factors[0], w[1] * factors[1]);
                a[2 * half + 1] = pack_bf16(w[2] * factors[0], w[3] * factors[1]);
            }
#pragma unroll
            for (int unit = 0; unit < VALUE_UNITS; unit++) {
                uint4 words = *reinterpret_cast<const uint4 *>(stage.values[page] + unit * 512 + g * 64 + t * 16);
                if (valid < PAGES * PAGE_TOKENS) blank(words, valid - page * PAGE_TOKENS - 4 * t);
#pragma unroll
                for (int tile = 0; tile < VALUE_TILES; tile++) {
                    u32 first[2], second[2];
                    value_tile(words, tile, first, second);
                    mma(sums[unit * VALUE_TILES + tile][0], a[0], a[1], a[2], a[3], first[0], first[1]);
                    mma(sums[unit * VALUE_TILES + tile][1], a[0], a[1], a[2], a[3], second[0], second[1]);
                }
            }
        }
    }

    // Divides by the sums of weights and writes the rows that exist.
    DEVICE void write(const Tile &tile, int kv_head, const float *sinks, bf16 *output, int output_stride) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + half * 8 + g, head = kv_head * GROUP + row % GROUP;
            float all = total[half];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            if (row >= tile.rows * GROUP) continue;
            float factor = 1.0f;
            if (sinks) factor = join_sink(sinks[head], greatest[half], all);
            factor /= all;
            bf16 *to = output + size_t(tile.first_row + row / GROUP) * output_stride + head * HEAD_DIM;
#pragma unroll
            for (int i = 0; i < DIM_TILES; i++) {
#pragma unroll
                for (int column = 0; column < 2; column++) {
                    // Column 2t + column of the two products are two neighbouring dimensions.
                    *reinterpret_cast<u32 *>(to + tile_dim(i, 2 * t + column)) =
                        pack_bf16(sums[i][0][half * 2 + column] * factor, sums[i][1][half * 2 + column] * factor);
                }
            }
        }
    }
};

// queries, output: (rows, heads * HEAD_DIM), aligned to 16 bytes. Launch: grid (tiles or more, kv_heads), WARPS warps, STAGES stages of
// dynamic shared memory.
BOUNDED_KERNEL(THREADS, 1)
attention_prefill(const bf16 *queries, bf16 *output, const KEY_TYPE *keys, const VALUE_TYPE *values, const float *key_scales,
                      const float *value_scales, const float *sinks, const Tile *tiles, const int *counts, const int *page_table,
                      int query_stride, int output_stride, int page_stride, int kv_heads, int window, float scale, float softcap) {
    extern __shared__ uint4 dynamic[];
    Stage *stages = reinterpret_cast<Stage *>(dynamic);
    let_next_start();
    if (int(blockIdx.x) >= counts[1]) {
        wait_for_previous();
        return;
    }
    const Tile tile = tiles[blockIdx.x];
    const int kv_head = blockIdx.y, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const Score score = {scale, softcap, window, tile.first_position};
    const int first = first_visible(tile.first_position, window) / PAGE_TOKENS, end = tile.first_position + tile.rows;
    const int page_end = (end + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const Source source = {reinterpret_cast<const u8 *>(keys), reinterpret_cast<const u8 *>(values), key_scales, value_scales,
                           page_table + size_t(tile.sequence) * page_stride, kv_head, kv_heads, page_end};
    wait_for_previous();
    source.copy(stages[0], first);
    Warp own = {};
    own.first_row = threadIdx.x / WARP * 16, own.g = g, own.t = t;
    own.greatest[0] = own.greatest[1] = LOWEST;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own.first_row + half * 8 + g, head = kv_head * GROUP + row % GROUP;
        query_operand(queries + size_t(tile.first_row + row / GROUP) * query_stride + head * HEAD_DIM, t, row < tile.rows * GROUP,
                      own.query[half]);
    }
    int turn = 0;
    for (int page = first; page < page_end; page += PAGES, turn++) {
        const Stage &stage = stages[turn % STAGES];
        if (page + PAGES < page_end) {
            source.copy(stages[(turn + 1) % STAGES], page + PAGES);
            wait_group<1>();
        } else {
            wait_group<0>();
        }
        __syncthreads();
        const int begin = page * PAGE_TOKENS, stage_end = begin + PAGES * PAGE_TOKENS;
        const bool masked = stage_end > end || !score.all_visible(begin, stage_end, tile.rows);
        float scores[PAGES][2][4];
        own.multiply(stage, scores);
        own.weigh(stage, scores, score, begin, end, masked);
        own.add_values(stage, scores, end - begin);
        __syncthreads();
    }
    own.write(tile, kv_head, sinks, output, output_stride);
}
