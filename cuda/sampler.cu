// From a row of logits to a token: the largest, or one drawn with the CPU's random numbers (rust/engine/src/random.rs, sampler.rs).
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

// Rows are cut into parts for several blocks; whoever ends last tells the result.
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

constexpr int SAMPLE_THREADS = 1024; // also the logits of a tile
constexpr int MOST_TILES = 512;

// A number in [0, 1) with 53 random bits, from Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) keyed by (seed, position).
DEVICE double uniform(u64 seed, u64 position) {
    u32 state[4] = {u32(position), u32(position >> 32), 0, 0}, key0 = u32(seed), key1 = u32(seed >> 32);
    for (int i = 0; i < 10; i++) {
        const u64 first = u64(0xd2511f53u) * state[0], second = u64(0xcd9e8d57u) * state[2];
        const u32 next[4] = {u32(second >> 32) ^ state[1] ^ key0, u32(second), u32(first >> 32) ^ state[3] ^ key1, u32(first)};
        for (int j = 0; j < 4; j++) state[j] = next[j];
        key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
    return double((u64(state[1]) << 32 | state[0]) >> 11) * 0x1p-53;
}

DEVICE double warp_sum(double value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// Sums of `value` over this lane and those before it.
DEVICE double running_sum(double value) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const double before = __shfl_up_sync(ALL_LANES, value, step);
        if (int(threadIdx.x % WARP) >= step) value += before;
    }
    return value;
}

struct Draw {
    u64 best[WARP];
    double masses[MOST_TILES], warps[WARP], left;
    int tile, first, last;
};

// A row's weights: exp((logit - largest) / temperature), 0 below `least`.
struct Weights {
    const float *logits;
    float largest, inverse, least;
    int width;

    DEVICE float operator()(int id) const {
        if (id >= width) return 0.0f;
        const float weight = expf((logits[id] - largest) * inverse);
        return weight >= least ? weight : 0.0f;
    }
};

// Finds the tile of 1024 weights in which `draw` of all mass is reached, and how much of it is left there. By the first warp.
DEVICE void find_tile(Draw &draw, int tiles, double share) {
    const int lane = threadIdx.x, each = (tiles + WARP - 1) / WARP, begin = min(lane * each, tiles), end = min(begin + each, tiles);
    double own = 0.0;
    for (int tile = begin; tile < end; tile++) own += draw.masses[tile];
    const double until = running_sum(own), total = __shfl_sync(ALL_LANES, until, WARP - 1), wanted = share * total;
    // The last lane that holds mass takes what rounding leaves over.
    const u32 reached = __ballot_sync(ALL_LANES, own > 0.0 && until > wanted), holding = __ballot_sync(ALL_LANES, own > 0.0);
    const int chosen = reached ? __ffs(reached) - 1 : WARP - 1 - __clz(holding);
    if (lane != chosen) return;
    double left = wanted - (until - own);
    int tile = begin, last = begin;
    for (; tile < end; tile++) {
        if (draw.masses[tile] > 0.0) last = tile;
        if (draw.masses[tile] > left) break;
        left -= draw.masses[tile];
    }
    draw.tile = tile < end ? tile : last;
    draw.left = tile < end ? left : draw.masses[last];
}

// chosen[row] = a token drawn in proportion to exp(logit / temperature), of those that weigh at least min_p times the likeliest; or the
// first of the largest where inverse_temperatures[row] is 0; or -1 as argmax. All arrays but logits are (rows). Width up to
// MOST_TILES * SAMPLE_THREADS. Launch: grid (rows), SAMPLE_THREADS threads.
KERNEL sample(const float *logits, const float *inverse_temperatures, const float *min_ps, const u64 *seeds, const u64 *positions,
              int *chosen, int stride, int width) {
    __shared__ Draw draw;
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    logits += size_t(row) * stride;
    u64 best = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < width; i += SAMPLE_THREADS) best = max(best, key_of(logits[i], i));
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, step));
    if (lane == 0) draw.best[warp] = best;
    if (threadIdx.x == 0) draw.first = width, draw.last = -1;
    __syncthreads();
    for (int i = 0; i < WARP; i++) best = max(best, draw.best[i]);
    const bool is_finite = best != ~0ull && best >> 32 > u64(0x007fffffu);
    const float inverse = inverse_temperatures[row];
    if (!is_finite || inverse == 0.0f) {
        if (threadIdx.x == 0) chosen[row] = is_finite ? int(~u32(best)) : -1;
        return;
    }
    const float min_p = min_ps[row];
    const Weights weights = {logits, logits[~u32(best)], inverse, min_p > 0.0f ? fmaxf(min_p, 0x1p-126f) : 0.0f, width};
    const int tiles = (width + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    for (int tile = warp; tile < tiles; tile += WARP) {
        double mass = 0.0;
#pragma unroll 8
        for (int i = 0; i < SAMPLE_THREADS / WARP; i++) mass += weights(tile * SAMPLE_THREADS + i * WARP + lane);
        mass = warp_sum(mass);
        if (lane == 0) draw.masses[tile] = mass;
    }
    __syncthreads();
    if (warp == 0) find_tile(draw, tiles, uniform(seeds[row], positions[row]));
    __syncthreads();
    const int id = draw.tile * SAMPLE_THREADS + threadIdx.x;
    const double weight = weights(id);
    double until = running_sum(weight);
    if (lane == WARP - 1) draw.warps[warp] = until;
    __syncthreads();
    for (int i = 0; i < warp; i++) until += draw.warps[i];
    if (weight > 0.0) {
        if (until > draw.left) atomicMin(&draw.first, id);
        atomicMax(&draw.last, id);
    }
    __syncthreads();
    if (threadIdx.x == 0) chosen[row] = draw.first < width ? draw.first : draw.last;
}
