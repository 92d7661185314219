// The largest logit of each row. Rows are cut into parts for several blocks; whoever ends last tells the result.
#include "common.cuh"

constexpr int THREADS = 256;

// What makes comparing keys compare logits, and among equal ones prefer the lower id. NaN and +inf win against everything.
DEVICE u64 key_of(float value, int id) {
    if (!(value < INFINITE)) return ~0ull;
    const u32 bits = __float_as_uint(value + 0.0f); // -0 becomes +0: the two are equal
    const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return u64(ordered) << 32 | u32(~id);
}

struct Best {
    u64 key;
    u32 arrived, unused;
};

// chosen[row] = the id of the largest logit, the lowest among equals; -1 if the row holds a NaN or +inf, or nothing finite.
// logits (rows, width) float; scratch (rows) is zero before and after. Launch: grid (parts, rows), THREADS threads.
KERNEL argmax(const float *logits, int *chosen, Best *scratch, int stride, int width) {
    __shared__ u64 keys[THREADS / WARP];
    let_next_start();
    wait_for_previous();
    logits += size_t(blockIdx.y) * stride;
    u64 best = 0;
#pragma unroll 8
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < width; i += gridDim.x * THREADS) best = max(best, key_of(logits[i], i));
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, step));
    if (threadIdx.x % WARP == 0) keys[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < THREADS / WARP; i++) best = max(best, keys[i]);
    Best *own = scratch + blockIdx.y;
    atomicMax(&own->key, best);
    __threadfence();
    if (atomicAdd(&own->arrived, 1u) < gridDim.x - 1) return;
    __threadfence();
    best = atomicExch(&own->key, 0ull);
    own->arrived = 0;
    // Minus infinity, and nothing at all, are below every finite number.
    const bool is_finite = best != ~0ull && best >> 32 > u64(0x007fffffu);
    chosen[blockIdx.y] = is_finite ? int(~u32(best)) : -1;
}
