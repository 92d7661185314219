// From a row of logits to a token: the largest, or one drawn with the CPU's random numbers (rust/engine/src/random.rs, sampler.rs).
#include "draw.cuh"
#include "select.cuh"

constexpr int ARGMAX_THREADS = 256;

struct Best {
    u64 key;
    u32 arrived, unused;
};

// The greatest key among some of a thread's logits. Comparing floats tells whether there is anything to do: hardly ever, after the first
// ones. (Making a key of each logit took an H100 76 us for 256 rows of 128,256; this takes 49, where reading them takes 42.)
struct Greatest {
    u64 key = 0;
    float value = -INFINITE;

    DEVICE void take(float logit, int id) {
        if (logit <= value) return; // not of a NaN; of equals the first one counts
        key = max(key, logit_key(logit, id));
        value = key == NO_NUMBER ? INFINITE : logit;
    }

    DEVICE void take(const float4 &four, int id) {
        if (four.x <= value && four.y <= value && four.z <= value && four.w <= value) return;
        take(four.x, id), take(four.y, id + 1), take(four.z, id + 2), take(four.w, id + 3);
    }
};

constexpr int ARGMAX_FOURS = 8; // that a thread reads at once

// Rows are cut into parts for several blocks; whoever ends last tells the result.
// chosen[row] = the id of the largest logit, the lowest among equals; -1 if the row holds a NaN or +inf, or nothing finite.
// logits (rows, width) float; scratch (rows) is zero before and after. Launch: grid (parts, rows), ARGMAX_THREADS threads.
KERNEL argmax(const float *logits, int *chosen, Best *scratch, int stride, int width) {
    __shared__ u64 keys[ARGMAX_THREADS / WARP];
    let_next_start();
    wait_for_previous();
    logits += size_t(blockIdx.y) * stride;
    Greatest own;
    const int fours = reinterpret_cast<u64>(logits) % 16 == 0 ? width / 4 : 0, threads = gridDim.x * ARGMAX_THREADS;
    const int thread = blockIdx.x * ARGMAX_THREADS + threadIdx.x;
    for (int begin = thread; begin < fours; begin += ARGMAX_FOURS * threads) {
        float4 values[ARGMAX_FOURS];
#pragma unroll
        for (int i = 0; i < ARGMAX_FOURS; i++) {
            const int at = begin + i * threads;
            values[i] = make_float4(-INFINITE, -INFINITE, -INFINITE, -INFINITE);
            if (at < fours) values[i] = __ldcs(reinterpret_cast<const float4 *>(logits) + at);
        }
#pragma unroll
        for (int i = 0; i < ARGMAX_FOURS; i++) own.take(values[i], (begin + i * threads) * 4);
    }
    for (int i = fours * 4 + thread; i < width; i += threads) own.take(logits[i], i);
    u64 best = own.key;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, step));
    if (threadIdx.x % WARP == 0) keys[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < ARGMAX_THREADS / WARP; i++) best = max(best, keys[i]);
    Best *row = scratch + blockIdx.y;
    atomicMax(&row->key, best);
    __threadfence();
    if (atomicAdd(&row->arrived, 1u) < gridDim.x - 1) return;
    __threadfence();
    best = atomicExch(&row->key, 0ull);
    row->arrived = 0;
    chosen[blockIdx.y] = is_finite(best) ? id_of(best) : -1;
}

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

// ---- changes of single logits

DEVICE float changed(float logit, float bias, u32 seen, const Draw &draw) {
    if (!(logit < INFINITE)) return logit; // it fails the row, whatever is done to it
    logit = __fadd_rn(logit, bias);
    if (seen & 1) logit = logit > 0.0f ? __fdiv_rn(logit, draw.repetition) : __fmul_rn(logit, draw.repetition);
    if (seen < 2) return logit;
    return __fsub_rn(logit, __fadd_rn(__fmul_rn(draw.frequency, float(seen >> 1)), draw.presence));
}

// Applies biases, bans and penalties, and keeps what was there. `latest` is (rows). Launch: grid (rows), 256 threads.
KERNEL change(float *logits, const Draw *draws, Change *changes, Latest *latest, const int *chosen, int stride) {
    __shared__ int found;
    let_next_start();
    wait_for_previous();
    const Draw draw = draws[blockIdx.x];
    const int token = draw.uncounted < 0 ? -1 : chosen[draw.uncounted];
    logits += size_t(blockIdx.x) * stride;
    if (threadIdx.x == 0) found = 0, latest[blockIdx.x].token = -1;
    __syncthreads();
    for (int i = threadIdx.x; i < draw.changes; i += blockDim.x) {
        Change &own = changes[draw.first_change + i];
        const bool is_latest = own.token == token;
        if (is_latest) found = 1;
        own.saved = logits[own.token];
        logits[own.token] = changed(own.saved, own.bias, is_latest ? (own.seen | 1) + 2 : own.seen, draw);
    }
    __syncthreads();
    if (threadIdx.x == 0 && token >= 0 && !found) {
        latest[blockIdx.x] = {token, logits[token]};
        logits[token] = changed(logits[token], 0.0f, 3, draw);
    }
}

// ---- drawing

// A row's tokens by their weights: exp((logit - largest) / temperature), 0 for what is forbidden or below `least`.
struct Weights {
    static constexpr int BITS = 30 + ID_BITS; // no weight is more than 1
    const float *logits;
    const u32 *allowed;
    float largest, inverse, least;
    int width;

    DEVICE float weight(int id) const {
        if (allowed && !(allowed[id / 32] >> (id % 32) & 1)) return 0.0f;
        const float weight = exp_exact(__fmul_rn(__fsub_rn(logits[id], largest), inverse));
        return weight >= least ? weight : 0.0f;
    }

    DEVICE u64 operator()(int id) const {
        const float own = weight(id);
        return own > 0.0f ? key_of(__float_as_uint(own), id) : 0;
    }
};

// Finds the tile of THREADS tokens in which `share` of all mass is reached, and how much of it is left there. By the first warp.
DEVICE void find_tile(Work &work, const double *masses, int tiles, double share) {
    const int lane = threadIdx.x, each = (tiles + WARP - 1) / WARP, begin = min(lane * each, tiles), end = min(begin + each, tiles);
    double own = 0.0;
    for (int tile = begin; tile < end; tile++) own += masses[tile];
    const double until = running_sum(own), total = __shfl_sync(ALL_LANES, until, WARP - 1), wanted = share * total;
    // The last lane that holds mass takes what rounding leaves over.
    const u32 reached = __ballot_sync(ALL_LANES, own > 0.0 && until > wanted), holding = __ballot_sync(ALL_LANES, own > 0.0);
    const int chosen = reached ? __ffs(reached) - 1 : WARP - 1 - __clz(holding);
    if (lane != chosen) return;
    double left = wanted - (until - own);
    int tile = begin, last = begin;
    for (; tile < end; tile++) {
        if (masses[tile] > 0.0) last = tile;
        if (masses[tile] > left) break;
        left -= masses[tile];
    }
    work.digit = tile < end ? tile : last;
    work.left = tile < end ? left : masses[last];
}

// Draws from all tokens with keys of at least `least`.
DEVICE int draw_from_all(const Weights &weights, Work &work, u64 least, double share) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, tiles = (weights.width + THREADS - 1) / THREADS;
    double *masses = reinterpret_cast<double *>(work.list);
    const auto weight = [&](int id) {
        if (id >= weights.width) return 0.0f;
        const float own = weights.weight(id);
        return own > 0.0f && key_of(__float_as_uint(own), id) >= least ? own : 0.0f;
    };
    __syncthreads();
    for (int tile = warp; tile < tiles; tile += WARPS) {
        double mass = 0.0;
#pragma unroll 8
        for (int i = 0; i < THREADS / WARP; i++) mass += weight(tile * THREADS + i * WARP + lane);
        mass = warp_sum(mass);
        if (lane == 0) masses[tile] = mass;
    }
    __syncthreads();
    if (warp == 0) find_tile(work, masses, tiles, share);
    __syncthreads();
    const int first = work.digit * THREADS;
    const double left = work.left, own = weight(first + threadIdx.x);
    double total;
    const double until = block_running_sum(own, work, total);
    const int place = block_first(own > 0.0 && until > left, work);
    if (place < THREADS) return first + place;
    // Rounding can leave a crumb after the last weight.
    return first + THREADS - 1 - block_first(weight(first + THREADS - 1 - threadIdx.x) > 0.0f, work);
}

// Draws from few tokens, of which the best `cut.wanted` by number, or by mass, are kept.
DEVICE int draw_from_few(const Weights &weights, Work &work, const Cut &cut, bool by_mass, double top_p, double share) {
    gather(weights, work, cut.least, cut.kept);
    const int place = threadIdx.x;
    const u64 own = place < cut.kept ? work.ranked[place] : 0;
    const bool counted = own && (by_mass || place < cut.wanted);
    const double weight = counted ? __uint_as_float(likelihood_of(own)) : 0.0f;
    double total;
    const double until = block_running_sum(weight, work, total);
    const double wanted = by_mass ? cut.wanted : top_p * total;
    const bool kept = counted && (until - weight < wanted || !by_mass && top_p >= 1.0);
    const u64 entry = u64(id_of(own)) << 32 | likelihood_of(own);
    work.list[place] = kept ? entry : ~0ull;
    const int count = __syncthreads_count(kept);
    if (kept) {
        int rank = 0;
        for (int i = 0; i < cut.kept; i++) rank += work.list[i] < entry;
        work.ranked[rank] = entry;
    }
    __syncthreads();
    const double mass = place < count ? __uint_as_float(u32(work.ranked[place])) : 0.0f;
    const double reached = block_running_sum(mass, work, total);
    const int chosen = block_first(place < count && reached > share * total, work);
    return int(work.ranked[chosen < THREADS ? chosen : count - 1] >> 32);
}

// chosen[row] = the first of the largest where the inverse temperature is 0; else a token drawn in proportion to exp(logit / temperature)
// of those that min_p, top_k and top_p leave, in this order; -1 if the row holds a NaN or +inf; -2 if nothing is left. Width up to
// THREADS * THREADS / 2. Launch: grid (rows), THREADS threads.
BOUNDED_KERNEL(THREADS, 1) sample(const float *logits, const Draw *draws, const u32 *words, int *chosen, int stride, int width) {
    __shared__ Work work;
    let_next_start();
    wait_for_previous();
    const Draw draw = draws[blockIdx.x];
    const u32 *allowed = draw.allowed < 0 ? nullptr : words + draw.allowed;
    logits += size_t(blockIdx.x) * stride;
    u64 best = 0;
#pragma unroll 8
    for (int id = threadIdx.x; id < width; id += THREADS) {
        const u64 key = logit_key(logits[id], id);
        const bool may = key == NO_NUMBER || !allowed || allowed[id / 32] >> (id % 32) & 1;
        if (may) best = max(best, key);
    }
    best = block_max(best, work);
    int token = id_of(best);
    if (!is_finite(best)) {
        token = best == NO_NUMBER ? -1 : -2;
    } else if (draw.inverse_temperature != 0.0f) {
        const float least = fmaxf(draw.min_p, 0x1p-126f);
        const Weights weights = {logits, allowed, logits[token], draw.inverse_temperature, least, width};
        const double share = uniform(draw.seed, draw.position);
        Cut cut = {1, 0.0, 0, false};
        if (draw.top_k > 0) cut = select<false>(weights, work, 1, draw.top_k);
        const bool by_mass = draw.top_p < 1.0 && !cut.few;
        if (by_mass) cut = select<true>(weights, work, cut.least, draw.top_p);
        token = cut.few ? draw_from_few(weights, work, cut, by_mass, draw.top_p, share)
                        : draw_from_all(weights, work, cut.least, share);
    }
    if (threadIdx.x == 0) chosen[blockIdx.x] = token;
}
