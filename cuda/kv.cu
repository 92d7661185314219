// Storing keys and values in pages, alone or fused with what precedes it: normalisation of query and key heads, and rotation.
// A warp per head and row. A row whose slot is negative stores nothing.
#include "common.cuh"
#include "kv.cuh"
#include "rope.cuh"

constexpr int WARPS = 4;

// Stores one head that lies in shared memory; a warp does it. `scales` is used by 8-bit types only, one for each SIZE dimensions.
template <class E, int SIZE, class Offset>
DEVICE void store_head(const float *values, E *pages, float *scales, int slot, int kv_head, int kv_heads, int lane, Offset offset) {
    constexpr int groups = (HEAD_DIM + SIZE - 1) / SIZE;
    E *page = pages + page_index(slot / PAGE_TOKENS, kv_head, kv_heads);
#pragma unroll
    for (int group = 0; group < groups; group++) {
        const int first = group * SIZE + lane, end = min(HEAD_DIM, (group + 1) * SIZE);
        float factor = 1.0f;
        if constexpr (sizeof(E) == 1) {
            float greatest = 0.0f;
            for (int i = first; i < end; i += WARP) greatest = fmaxf(greatest, fabsf(values[i]));
            greatest = warp_max(greatest);
            factor = greatest > 0.0f ? GREATEST<E> / greatest : 0.0f;
            if (lane == 0) scales[scale_index(slot, kv_head, kv_heads, groups, group)] = greatest / GREATEST<E>;
        }
        for (int i = first; i < end; i += WARP) page[offset(slot % PAGE_TOKENS, i)] = from_float<E>(values[i] * factor);
    }
}

DEVICE void store_key(const float *values, KEY_TYPE *pages, float *scales, int slot, int kv_head, int kv_heads, int lane) {
    store_head<KEY_TYPE, KEY_GROUP>(values, pages, scales, slot, kv_head, kv_heads, lane, key_offset<KEY_TYPE>);
}

DEVICE void store_value(const float *values, VALUE_TYPE *pages, float *scales, int slot, int kv_head, int kv_heads, int lane) {
    store_head<VALUE_TYPE, HEAD_DIM>(values, pages, scales, slot, kv_head, kv_heads, lane, value_offset<VALUE_TYPE>);
}

DEVICE void read_head(const T *from, float *values, int lane) {
    for (int i = lane; i < HEAD_DIM; i += WARP) values[i] = to_float(from[i]);
    __syncwarp();
}

// keys and values are (rows, kv_heads * HEAD_DIM). Launch: grid (ceil(2 * kv_heads / WARPS), rows), WARPS warps.
KERNEL write_kv(const T *keys, const T *values, KEY_TYPE *key_pages, VALUE_TYPE *value_pages, float *key_scales,
                float *value_scales, const int *slots, int key_stride, int value_stride, int kv_heads, int all_slots) {
    __shared__ float memory[WARPS][HEAD_DIM];
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int slot = slots[blockIdx.y];
    if (head >= 2 * kv_heads || u32(slot) >= u32(all_slots)) return;
    float *own = memory[threadIdx.x / WARP];
    const int kv_head = head % kv_heads;
    if (head < kv_heads) {
        read_head(keys + size_t(blockIdx.y) * key_stride + kv_head * HEAD_DIM, own, lane);
        store_key(own, key_pages, key_scales, slot, kv_head, kv_heads, lane);
    } else {
        read_head(values + size_t(blockIdx.y) * value_stride + kv_head * HEAD_DIM, own, lane);
        store_value(own, value_pages, value_scales, slot, kv_head, kv_heads, lane);
    }
}

// Root-mean-square normalisation of a head in shared memory, rounded to T as if it had been stored between.
DEVICE void normalise_head(float *values, const float *weight, float epsilon, int lane) {
    float square = 0.0f;
    for (int i = lane; i < HEAD_DIM; i += WARP) square = fmaf(values[i], values[i], square);
    const float scale = 1.0f / sqrtf(warp_sum(square) / HEAD_DIM + epsilon);
    for (int i = lane; i < HEAD_DIM; i += WARP) values[i] = to_float(from_float<T>(values[i] * scale * weight[i]));
    __syncwarp();
}

// Query heads: norm, rotation, in place. Key heads: norm, rotation, store. Value heads: store. qkv is (rows, (heads + 2 * kv_heads) *
// HEAD_DIM), queries first, then keys, then values. Norm weights (HEAD_DIM) may be null, and so may the table. Keys in qkv stay as they are.
// Launch: grid (ceil((heads + 2 * kv_heads) / WARPS), rows), WARPS warps.
KERNEL rope_write_kv(T *qkv, const float2 *table, const int *rope_rows, const float *query_norm, const float *key_norm,
                     KEY_TYPE *key_pages, VALUE_TYPE *value_pages, float *key_scales, float *value_scales, const int *slots,
                     int stride, int heads, int kv_heads, int pairs, int all_slots, float epsilon) {
    __shared__ float memory[WARPS][HEAD_DIM];
    __shared__ float turned[WARPS][HEAD_DIM];
    let_next_start();
    wait_for_previous();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head = blockIdx.x * WARPS + warp;
    if (head >= heads + 2 * kv_heads) return;
    const int slot = slots[blockIdx.y];
    T *from = qkv + size_t(blockIdx.y) * stride + head * HEAD_DIM;
    float *own = memory[warp];
    read_head(from, own, lane);
    if (head >= heads + kv_heads) {
        const int kv_head = head - heads - kv_heads;
        if (u32(slot) < u32(all_slots)) store_value(own, value_pages, value_scales, slot, kv_head, kv_heads, lane);
        return;
    }
    const bool is_query = head < heads;
    const float *weight = is_query ? query_norm : key_norm;
    if (weight) normalise_head(own, weight, epsilon, lane);
    const float2 *turn = table + (table ? size_t(rope_rows[blockIdx.y]) * pairs : 0);
    for (int i = lane; i < HEAD_DIM; i += WARP) {
        turned[warp][i] = table ? to_float(from_float<T>(rotated(own, turn, pairs, i))) : own[i];
    }
    __syncwarp();
    if (is_query) {
        for (int i = lane; i < HEAD_DIM; i += WARP) from[i] = from_float<T>(turned[warp][i]);
    } else if (u32(slot) < u32(all_slots)) {
        store_key(turned[warp], key_pages, key_scales, slot, head - heads, kv_heads, lane);
    }
}
