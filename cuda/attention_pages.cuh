// How attention_decode.cuh reads pages of keys and values, and what a warp makes of its share of them.
#ifndef DECODE_WARPS
#define DECODE_WARPS 6
#endif

namespace decoding {

constexpr int WARPS = DECODE_WARPS;
constexpr int PARTS = (GROUP + 7) / 8;               // of 8 packed rows
constexpr int ROWS = PARTS * 8;
constexpr int THREADS = WARPS * WARP;

struct Page {
    uint4 keys[KEY_UNITS][2], values[VALUE_UNITS];
    float key_scales[IS_INTEGER<KEY_TYPE> ? KEY_UNITS : 1][2], value_scales[2];
};

struct Running {
    float greatest[PARTS][2], total[PARTS][2], sums[PARTS][DIM_TILES][4];
};

struct Pages {
    const u8 *keys, *values;
    const float *key_scales, *value_scales;
    const int *table;
    int kv_head, kv_heads, g, t;
    u64 policy;

    // Where a page below `end` lies, among all pages and with the head.
    DEVICE int entry(int number, int end) const { return number < end ? table[number] : 0; }
    DEVICE size_t part_of(int entry) const { return size_t(entry) * kv_heads + kv_head; }

    // `index` is the page's part() for the head.
    DEVICE void read_keys(Page &page, size_t index) const {
        const u8 *from = keys + index * PAGE_BYTES_OF_KEYS + t * 16;
#pragma unroll
        for (int unit = 0; unit < KEY_UNITS; unit++) {
            page.keys[unit][0] = load_stream(from + unit * 1024 + lower_token(g) * 64, policy);
            page.keys[unit][1] = load_stream(from + unit * 1024 + upper_token(g) * 64, policy);
        }
        if constexpr (SCALED_SCORES) {
            page.key_scales[0][0] = key_scales[index * PAGE_TOKENS + lower_token(g)];
            page.key_scales[0][1] = key_scales[index * PAGE_TOKENS + upper_token(g)];
        }
        if constexpr (IS_INTEGER<KEY_TYPE>) {
            const float *own = key_scales + index * KEY_SCALES * PAGE_TOKENS;
#pragma unroll
            for (int unit = 0; unit < KEY_UNITS; unit++) {
                page.key_scales[unit][0] = own[key_scale_place(unit, t, lower_token(g))];
                page.key_scales[unit][1] = own[key_scale_place(unit, t, upper_token(g))];
            }
        }
    }

    DEVICE void read_values(Page &page, size_t index) const {
        const u8 *from = values + index * PAGE_BYTES_OF_VALUES + g * 64 + t * 16;
#pragma unroll
        for (int unit = 0; unit < VALUE_UNITS; unit++) page.values[unit] = load_stream(from + unit * 512, policy);
        if constexpr (sizeof(VALUE_TYPE) == 1) {
            page.value_scales[0] = value_scales[index * PAGE_TOKENS + lower_token(g)];
            page.value_scales[1] = value_scales[index * PAGE_TOKENS + upper_token(g)];
        }
    }
};

// Scores of a page's tokens, and from them weights in place; the running greatest scores are raised first.
DEVICE void weigh(const Page &page, const u32 (&query)[PARTS][HEAD_DIM / 8], const Score &score, int begin, bool masked, int g,
                  int t, float (&weights)[PARTS][4], Running &own) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        float(&s)[4] = weights[part];
        s[0] = s[1] = s[2] = s[3] = 0.0f;
#pragma unroll
        for (int unit = 0; unit < KEY_UNITS; unit++) {
#pragma unroll
            for (int step = 0; step < KEY_STEPS; step++) {
                u32 a[4];
                const float(&scales)[2] = page.key_scales[IS_INTEGER<KEY_TYPE> ? unit : 0];
                key_step(page.keys[unit][0], step, scales[0], a[0], a[2]);
                key_step(page.keys[unit][1], step, scales[1], a[1], a[3]);
                const int at = (unit * KEY_STEPS + step) * 2;
                mma(s, a[0], a[1], a[2], a[3], query[part][at], query[part][at + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] = score(SCALED_SCORES ? s[i] * page.key_scales[0][i / 2] : s[i]);
            const int position = begin + (i < 2 ? lower_token(g) : upper_token(g));
            if (masked && !score.visible(position, part * 8 + 2 * t + i % 2)) s[i] = -INFINITE;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float greatest = fmaxf(s[i], s[i + 2]);
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) greatest = fmaxf(greatest, __shfl_xor_sync(ALL_LANES, greatest, step));
            greatest = fmaxf(greatest, own.greatest[part][i]);
            const float shrink = exp2_fast(own.greatest[part][i] - greatest);
            own.greatest[part][i] = greatest;
            s[i] = exp2_fast(s[i] - greatest);
            s[i + 2] = exp2_fast(s[i + 2] - greatest);
            own.total[part][i] = own.total[part][i] * shrink + s[i] + s[i + 2];
#pragma unroll
            for (int tile = 0; tile < DIM_TILES; tile++) own.sums[part][tile][i] *= shrink, own.sums[part][tile][i + 2] *= shrink;
        }
    }
}

DEVICE void add_values(const Page &page, const float (&weights)[PARTS][4], Running &own) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const float(&w)[4] = weights[part];
        const float lower = sizeof(VALUE_TYPE) == 1 ? page.value_scales[0] : 1.0f;
        const float upper = sizeof(VALUE_TYPE) == 1 ? page.value_scales[1] : 1.0f;
        const u32 b0 = transposed(pack_bf16(w[0] * lower, w[1] * lower)), b1 = transposed(pack_bf16(w[2] * upper, w[3] * upper));
#pragma unroll
        for (int unit = 0; unit < VALUE_UNITS; unit++) {
#pragma unroll
            for (int tile = 0; tile < VALUE_TILES; tile++) {
                u32 first[2], second[2];
                value_tile(page.values[unit], tile, first, second);
                mma(own.sums[part][unit * VALUE_TILES + tile], first[0], second[0], first[1], second[1], b0, b1);
            }
        }
    }
}

// Clears what the values of a page hold beyond its `valid` tokens, and their scales.
DEVICE void blank_page(Page &page, int valid, int g, int t) {
#pragma unroll
    for (int unit = 0; unit < VALUE_UNITS; unit++) blank(page.values[unit], valid - 4 * t);
    if (lower_token(g) >= valid) page.value_scales[0] = 0.0f;
    if (upper_token(g) >= valid) page.value_scales[1] = 0.0f;
}

// One warp's share of a chunk: pages `number`, `number + WARPS`, ... below `end`. `entry` is where the second one lies.
DEVICE void run_pages(const Pages &pages, const u32 (&query)[PARTS][HEAD_DIM / 8], const Score &score, int rows, int number, int end,
                      int entry, Page &page, Running &own) {
    for (; number < end; number += WARPS) {
        const int begin = number * PAGE_TOKENS, next = number + WARPS;
        const size_t index = pages.part_of(entry);
        entry = pages.entry(next + WARPS, end); // in time
        float weights[PARTS][4];
        weigh(page, query, score, begin, !score.all_visible(begin, begin + PAGE_TOKENS, rows), pages.g, pages.t, weights, own);
        const int valid = score.first_position + rows - begin;
        if (valid < PAGE_TOKENS) blank_page(page, valid, pages.g, pages.t);
        if (next < end) pages.read_keys(page, index);
        add_values(page, weights, own);
        if (next < end) pages.read_values(page, index);
    }
}
} // namespace decoding
