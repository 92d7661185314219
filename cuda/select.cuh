// Finding the most likely of many tokens without sorting them, and telling how likely they are: what drawing and log-probabilities share.
//
// A token's place in the order of likelihood is its key: a number that grows with its likelihood, and among equals with lower ids; no
// two tokens have the same. `select` cuts the range of keys in steps: counts (or sums, exactly, in integers) the keys of each of up to 1024
// parts of the range, and goes on with the part in which the cut falls. One block of THREADS threads works on a row.
#pragma once
#include "common.cuh"
#include "keys.cuh"

constexpr int THREADS = 1024; // also the tokens that are held in shared memory once so few are left, and the parts of a range
constexpr int WARPS = THREADS / WARP;

// e to a power of at most 0: the very bits of `exp` in rust/engine/src/vector.rs, so no operation may be fused.
DEVICE float exp_exact(float x) {
    const float round = 12582912.0f;
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504f), round);
    const float n = __fsub_rn(shifted, round);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    float series = __fadd_rn(__fmul_rn(r, 1.0f / 5040.0f), 1.0f / 720.0f);
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 120.0f);
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 24.0f);
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 6.0f);
    series = __fadd_rn(__fmul_rn(series, r), 0.5f);
    series = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(series, r), r), r), 1.0f);
    const u32 exponent = __float_as_uint(shifted) - __float_as_uint(round) + 127;
    return x < -87.0f ? 0.0f : __fmul_rn(series, __uint_as_float(exponent << 23));
}

// Shared memory of a block.
struct Work {
    double sums[WARPS];
    u64 best[WARPS];
    u64 list[THREADS], ranked[THREADS];
    u32 counts[THREADS], low[THREADS], high[THREADS];
    double left;
    int first, digit, above, here;
};

// Sums of `value` over this lane and those before it.
DEVICE double running_sum(double value) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const double before = __shfl_up_sync(ALL_LANES, value, step);
        if (int(threadIdx.x % WARP) >= step) value += before;
    }
    return value;
}

// The sum of `value` over this thread and those before it, and over all; in one fixed order.
DEVICE double block_running_sum(double value, Work &work, double &total) {
    const int warp = threadIdx.x / WARP;
    double until = running_sum(value);
    __syncthreads(); // the sums may still be read from the last time
    if (threadIdx.x % WARP == WARP - 1) work.sums[warp] = until;
    __syncthreads();
    total = 0.0;
    for (int i = 0; i < WARPS; i++) {
        if (i == warp) until += total;
        total += work.sums[i];
    }
    return until;
}

DEVICE u64 block_max(u64 value, Work &work) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(ALL_LANES, value, step));
    __syncthreads();
    if (threadIdx.x % WARP == 0) work.best[threadIdx.x / WARP] = value;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) value = max(value, work.best[i]);
    return value;
}

// The first thread of those that say yes; THREADS for none.
DEVICE int block_first(bool yes, Work &work) {
    __syncthreads();
    if (threadIdx.x == 0) work.first = THREADS;
    __syncthreads();
    if (yes) atomicMin(&work.first, int(threadIdx.x));
    __syncthreads();
    return work.first;
}

// What `select` found: the `kept` tokens with keys of at least `least`. Unless `few`, they are exactly the wanted ones; otherwise at most
// THREADS, the wanted ones among them, and `wanted` says how many of the best, or how much mass.
struct Cut {
    u64 least;
    double wanted;
    int kept;
    bool few;
};

constexpr int PART_BITS = 10; // of a key that tell its part of a range; kinds of keys have Keys::BITS bits

// The mass of a part's keys, whose likelihoods are floats of this part's one exponent.
DEVICE double mass_of(const Work &work, int part, u64 first_key) {
    const u64 exponent = likelihood_of(first_key) >> 23;
    const double unit = __longlong_as_double((long long)(exponent - 150 + 1023) << 52);
    return (double(work.high[part]) * 4096.0 + double(work.low[part])) * unit;
}

// Counts the keys of at least `floor` in each part of the range that begins with `prefix`.
template <bool MASS, class Keys>
DEVICE void count_parts(const Keys &keys, Work &work, u64 floor, u64 prefix, int shift, int bits) {
    __syncthreads();
    work.counts[threadIdx.x] = work.low[threadIdx.x] = work.high[threadIdx.x] = 0;
    __syncthreads();
    for (int id = threadIdx.x; id < keys.width; id += THREADS) {
        const u64 key = keys(id);
        if (key < floor || key >> (shift + bits) != prefix) continue;
        const int part = int(key >> shift) & ((1 << bits) - 1);
        atomicAdd(work.counts + part, 1u);
        if (MASS) {
            const u32 fraction = (likelihood_of(key) & 0x7fffffu) | 0x800000u;
            atomicAdd(work.low + part, fraction & 4095u);
            atomicAdd(work.high + part, fraction >> 12);
        }
    }
    __syncthreads();
}

// The `amount` most likely keys of at least `floor` (which is more than 0), or the fewest that have this share of their mass.
template <bool MASS, class Keys> DEVICE Cut select(const Keys &keys, Work &work, u64 floor, double amount) {
    Cut cut = {floor, amount, 0, false};
    u64 prefix = 0;
    double left = amount;
    int above = 0;
    for (int rest = Keys::BITS; rest > 0; rest = max(rest - PART_BITS, 0)) {
        const int shift = max(rest - PART_BITS, 0), bits = rest - shift;
        count_parts<MASS>(keys, work, floor, prefix, shift, bits);
        const int part = THREADS - 1 - threadIdx.x; // the largest keys first
        const int count = part < 1 << bits ? work.counts[part] : 0;
        const u64 first_key = (prefix << bits | u32(part)) << shift;
        double value = count, total, all;
        const double counted = block_running_sum(count, work, all);
        if (MASS) value = count ? mass_of(work, part, first_key) : 0.0;
        const double until = block_running_sum(value, work, total);
        if (rest == Keys::BITS) {
            cut.kept = int(all);
            if (MASS) cut.wanted = left = amount * total;
        }
        const int chosen = block_first(count > 0 && until >= left, work);
        if (chosen == THREADS) return cut; // all are wanted, but for rounding
        if (threadIdx.x == chosen) {
            work.digit = part, work.above = above + int(counted) - count, work.here = count;
            work.left = left - (until - value);
        }
        __syncthreads();
        prefix = prefix << bits | u32(work.digit), above = work.above, left = work.left;
        cut.least = max(floor, prefix << shift), cut.kept = above + work.here;
        const bool whole = MASS ? shift == 0 : left == double(work.here);
        cut.few = !whole && cut.kept <= THREADS;
        if (whole || cut.few) return cut;
    }
    return cut;
}

// Puts the `count` keys of at least `least` into shared memory, the largest first.
template <class Keys> DEVICE void gather(const Keys &keys, Work &work, u64 least, int count) {
    __syncthreads();
    if (threadIdx.x == 0) work.here = 0;
    __syncthreads();
    for (int id = threadIdx.x; id < keys.width; id += THREADS) {
        const u64 key = keys(id);
        if (key >= least) work.list[atomicAdd(&work.here, 1)] = key;
    }
    __syncthreads();
    if (int(threadIdx.x) < count) {
        const u64 own = work.list[threadIdx.x];
        int rank = 0;
        for (int i = 0; i < count; i++) rank += work.list[i] > own;
        work.ranked[rank] = own;
    }
    __syncthreads();
}
