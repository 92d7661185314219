// Attention of query rows over paged keys and values, the plain way: any type, head width, window, soft cap and sink, in float.
// The oracle of the fast kernels (attention_decode.cu, attention_prefill.cu), and what runs where those do not apply.
#include "common.cuh"
#include "kv.cuh"

#ifndef WARPS
#define WARPS 8
#endif
constexpr int PER_LANE = (HEAD_DIM + WARP - 1) / WARP;

// The running result of an online softmax (Milakov and Gimelshein, 2018): the greatest score, the sum of weights, the weighted sum of values.
struct Running {
    float greatest, total, sums[PER_LANE];
};

DEVICE void merge(Running &into, const Running &more) {
    const float greatest = fmaxf(into.greatest, more.greatest);
    const float a = into.greatest == -INFINITE ? 0.0f : expf(into.greatest - greatest);
    const float b = more.greatest == -INFINITE ? 0.0f : expf(more.greatest - greatest);
    into.greatest = greatest;
    into.total = into.total * a + more.total * b;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) into.sums[i] = into.sums[i] * a + more.sums[i] * b;
}

// One head of a token, by a warp. `offset` gives a dimension's place in the page; SIZE dimensions share a scale.
template <int SIZE, class E, class Offset>
DEVICE void read(const E *pages, const float *scales, int slot, int kv_head, int kv_heads, int lane, Offset offset,
                 float (&values)[PER_LANE]) {
    constexpr int groups = (HEAD_DIM + SIZE - 1) / SIZE;
    const E *page = pages + page_index(slot / PAGE_TOKENS, kv_head, kv_heads);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int column = lane + i * WARP;
        values[i] = 0.0f;
        if (column >= HEAD_DIM) continue;
        const float scale = sizeof(E) == 1 ? scales[scale_index(slot, kv_head, kv_heads, groups, column / SIZE)] : 1.0f;
        values[i] = scale * to_float(page[offset(slot % PAGE_TOKENS, column)]);
    }
}

// output[row, head] = softmax(scale * query . keys) * values over the visible positions of the row's sequence. Rows with a negative
// row_sequence are left as they are. window 0 and softcap 0 mean none. sinks (heads) may be null: a score that has no value.
// Launch: grid (heads, rows), WARPS warps.
KERNEL attention(const T *queries, T *output, const KEY_TYPE *keys, const VALUE_TYPE *values, const float *key_scales,
                 const float *value_scales, const float *sinks, const int *positions, const int *row_sequence,
                 const int *page_table, int query_stride, int output_stride, int page_stride, int heads, int kv_heads, int window,
                 float scale, float softcap) {
    __shared__ Running partial[WARPS][WARP];
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int sequence = row_sequence[row], position = positions[row], kv_head = head / (heads / kv_heads);
    if (sequence < 0) return;
    float query[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int column = lane + i * WARP;
        query[i] = column < HEAD_DIM ? to_float(queries[size_t(row) * query_stride + head * HEAD_DIM + column]) : 0.0f;
    }
    Running own = {-INFINITE, 0.0f, {}};
    const int first = window > 0 ? max(0, position + 1 - window) : 0;
    for (int j = first / WARPS * WARPS + warp; j <= position; j += WARPS) {
        if (j < first) continue;
        const int page = page_table[size_t(sequence) * page_stride + j / PAGE_TOKENS];
        const int slot = page * PAGE_TOKENS + j % PAGE_TOKENS;
        float key[PER_LANE], dot = 0.0f;
        read<KEY_GROUP>(keys, key_scales, slot, kv_head, kv_heads, lane, key_offset<KEY_TYPE>, key);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) dot = fmaf(query[i], key[i], dot);
        float score = warp_sum(dot) * scale;
        if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
        Running one = {score, 1.0f, {}};
        read<HEAD_DIM>(values, value_scales, slot, kv_head, kv_heads, lane, value_offset<VALUE_TYPE>, one.sums);
        merge(own, one);
    }
    partial[warp][lane] = own;
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < WARPS; other++) merge(own, partial[other][lane]);
    if (sinks) merge(own, Running{sinks[head], 1.0f, {}});
    for (int i = 0; i < PER_LANE; i++) {
        const int column = lane + i * WARP;
        if (column < HEAD_DIM) output[size_t(row) * output_stride + head * HEAD_DIM + column] = from_float<T>(own.sums[i] / own.total);
    }
}
