// Attention of few query rows over long paged keys and values: attention_decode.cuh says how.
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "attention.cuh"
#include "attention_decode.cuh"

using namespace decoding;

// queries, output: (rows, heads * HEAD_DIM), queries aligned to 16 bytes, output to 8. partials: (items, kv_heads, ROWS, PARTIAL) floats;
// counters: (items, kv_heads) ints that are 0 before and after. Launch: any grid, WARPS warps.
BOUNDED_KERNEL(THREADS, PARTS == 1 && HEAD_DIM <= 128 ? DECODE_BLOCKS : 1)
attention_decode(const bf16 *queries, bf16 *output, const KEY_TYPE *keys, const VALUE_TYPE *values, const float *key_scales,
                 const float *value_scales, const float *sinks, const Item *items, const int *counts, const int *page_table,
                 float *partials, int *counters, int query_stride, int output_stride, int page_stride, int kv_heads, int window, int most_items,
                 float scale, float softcap, const float2 *table, const int *rope_rows, const int *slots, const int *first_row,
                 int all_slots) {
    __shared__ Shared shared;
    let_next_start();
    const Call call = {queries, output, keys, values, key_scales, value_scales, sinks, items, counts, page_table, partials, counters,
                       query_stride, output_stride, page_stride, kv_heads, window, most_items, scale, softcap,
                       {table, rope_rows, slots, first_row, all_slots}};
    attend(call, shared);
}
