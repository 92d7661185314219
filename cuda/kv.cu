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

// ---- the same for pages of bfloat16 and rotation of halves, in vectors: what a prompt's time goes to otherwise

#if !defined(INFER_F32) && !INTERLEAVED
constexpr int LANES = HEAD_DIM >= 64 && HEAD_DIM <= 512 && (HEAD_DIM & HEAD_DIM - 1) == 0 ? HEAD_DIM / 16 : 32; // of a head: 8 values of either half
constexpr int HEADS = WARP / LANES; // of a warp at a time

DEVICE void normalise_values(float (&values)[8], const float *weight, float scale) {
    float factors[8];
    load<8>(weight, factors);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = to_float(from_float<T>(values[i] * scale * factors[i]));
}

// Root-mean-square normalisation of a head that LANES lanes hold, rounded to T as if it had been stored between.
DEVICE void normalise_halves(float (&first)[8], float (&second)[8], const float *weight, float epsilon, int lane) {
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) square = fmaf(first[i], first[i], fmaf(second[i], second[i], square));
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) square += __shfl_xor_sync(ALL_LANES, square, step);
    const float scale = 1.0f / sqrtf(square / HEAD_DIM + epsilon);
    normalise_values(first, weight + lane * 8, scale);
    normalise_values(second, weight + HEAD_DIM / 2 + lane * 8, scale);
}

// Whether rows from that of `row` whose slot is a multiple of 4 fill it and the next three.
DEVICE bool fills_four(const int *slots, int row, int slot, int rows) {
    const int begin = row - slot % 4;
    if (begin < 0 || begin + 4 > rows) return false;
    bool result = true;
#pragma unroll
    for (int i = 0; i < 4; i++) result = result && slots[begin + i] == slot - slot % 4 + i;
    return result;
}

// Stores four dimensions of a value head, of one row or of four whose slots are neighbours.
template <int COUNT> DEVICE void store_values(const T *from, VALUE_TYPE *page, int stride, int token, int dim) {
    uint2 words[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) words[i] = *reinterpret_cast<const uint2 *>(from + size_t(i) * stride);
    if constexpr (COUNT == 4) {
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            u32 own[4];
#pragma unroll
            for (int i = 0; i < 4; i++) own[i] = pair ? words[i].y : words[i].x;
            const uint4 four = make_uint4(__byte_perm(own[0], own[1], 0x5410), __byte_perm(own[2], own[3], 0x5410),
                                          __byte_perm(own[0], own[1], 0x7632), __byte_perm(own[2], own[3], 0x7632));
            *reinterpret_cast<uint4 *>(page + value_offset<VALUE_TYPE>(token, dim + 2 * pair)) = four;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u16 bits = u16((i < 2 ? words[0].x : words[0].y) >> 16 * (i % 2));
            page[value_offset<VALUE_TYPE>(token, dim + i)] = VALUE_TYPE{bits};
        }
    }
}

// Waits for the kernels before, and stores a part of a row's values; each of four rows whose slots are neighbours stores a quarter of them all.
DEVICE void store_row(const T *values, VALUE_TYPE *pages, const int *slots, int stride, int row, int rows, int kv_heads, int all_slots, int part,
                      int parts) {
    const int slot = slots[row], lane = threadIdx.x % WARP;
    if (u32(slot) >= u32(all_slots)) return;
    const bool is_four = fills_four(slots, row, slot, rows);
    wait_for_previous();
    const int quarter = slot % 4, step = is_four ? 4 * parts : parts; // of pieces of 128 dimensions
    const T *from = values + size_t(is_four ? row - quarter : row) * stride;
    for (int piece = is_four ? part * 4 + quarter : part; piece * 128 < kv_heads * HEAD_DIM; piece += step) {
        const int i = piece * 128 + lane * 4;
        if (i >= kv_heads * HEAD_DIM) continue;
        VALUE_TYPE *page = pages + page_index(slot / PAGE_TOKENS, i / HEAD_DIM, kv_heads);
        if (is_four) {
            store_values<4>(from + i, page, stride, slot % PAGE_TOKENS - quarter, i % HEAD_DIM);
        } else {
            store_values<1>(from + i, page, stride, slot % PAGE_TOKENS, i % HEAD_DIM);
        }
    }
}

// As rope_write_kv, of rows and weights that are aligned to 16 bytes, with HEAD_DIM / 2 pairs in the table: a block has 4 rows, a warp one of
// them, queries and keys or values. What no kernel of a layer writes is read before the wait: at 64 rows that is 0.4 of 3.7 us. Launch: grid (parts
// of queries and keys, and others of values, ceil(rows / WARPS)), WARPS warps.
KERNEL rope_write_halves(T *qkv, const float2 *table, const int *rope_rows, const float *query_norm, const float *key_norm,
                         KEY_TYPE *key_pages, VALUE_TYPE *value_pages, const int *slots, int stride, int rows, int heads, int kv_heads,
                         int all_slots, float epsilon, int parts) {
    let_next_start();
    if constexpr (ORDERED<KEY_TYPE> && ORDERED<VALUE_TYPE> && sizeof(KEY_TYPE) == 2 && sizeof(VALUE_TYPE) == 2) {
        const int row = blockIdx.y * WARPS + threadIdx.x / WARP, lane = threadIdx.x % LANES;
        if (row >= rows) return;
        if (int(blockIdx.x) >= parts) {
            store_row(qkv + size_t(heads + kv_heads) * HEAD_DIM, value_pages, slots, stride, row, rows, kv_heads, all_slots, blockIdx.x - parts,
                      gridDim.x - parts);
            return;
        }
        HalfTurn turn;
        const int slot = slots[row];
        turn.read(table + size_t(rope_rows[row]) * (HEAD_DIM / 2), lane);
        wait_for_previous();
        for (int group = blockIdx.x; group * HEADS < heads + kv_heads; group += parts) {
            const int head = group * HEADS + threadIdx.x % WARP / LANES;
            const bool exists = head < heads + kv_heads, is_query = head < heads;
            T *from = qkv + size_t(row) * stride + (exists ? head : 0) * HEAD_DIM + lane * 8;
            float first[8], second[8];
            load<8>(from, first);
            load<8>(from + HEAD_DIM / 2, second);
            if (query_norm) normalise_halves(first, second, is_query ? query_norm : key_norm, epsilon, lane);
            turn.rotate(first, second);
            if (is_query) {
                store<8>(from, first);
                store<8>(from + HEAD_DIM / 2, second);
            } else if (exists && u32(slot) < u32(all_slots)) {
                KEY_TYPE *page = key_pages + page_index(slot / PAGE_TOKENS, head - heads, kv_heads);
                store<8>(page + key_offset<KEY_TYPE>(slot % PAGE_TOKENS, lane * 8), first);
                store<8>(page + key_offset<KEY_TYPE>(slot % PAGE_TOKENS, HEAD_DIM / 2 + lane * 8), second);
            }
        }
    }
}
#endif
