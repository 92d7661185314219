// How screen_many.cu ends a unit: sums become bounds of logits.
#if HAS_WARP_GROUPS
#define NO_BOUND __int_as_float(0x7fffffff)

constexpr int OWN = TOKENS / 4, LEFT = OWN / 8; // tokens whose sums a thread has, and those whose greatest it has in the end

// By how much logits of a token may be wrong, as a multiple of s. No number, or infinite, where nothing is known.
DEVICE float margin_of(const float2 &bounds, const Measured &row) { return fmaf(bounds.y, row.error, fmaf(bounds.x, row.length, row.least)); }

// The token of number i of those that a thread has sums of.
DEVICE int token_of(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Of COUNT numbers of this lane and of the one STEP from it each gets the half, the greater ones.
// IS_STRICT: what is no number is the greatest; else it is passed over.
template <bool IS_STRICT, int STEP, int COUNT> DEVICE void share_half(float (&values)[OWN]) {
    const bool is_upper = threadIdx.x & STEP;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
        const float kept = is_upper ? values[i + COUNT / 2] : values[i], sent = is_upper ? values[i] : values[i + COUNT / 2];
        const float other = __shfl_xor_sync(ALL_LANES, sent, STEP);
        values[i] = IS_STRICT ? greater_or_none(kept, other) : fmaxf(kept, other);
    }
}

// Of eight lanes' numbers for the same OWN tokens the greatest: each gets those of LEFT tokens, one after the other.
template <bool IS_STRICT> DEVICE void share_greatest(float (&values)[OWN]) {
    share_half<IS_STRICT, 16, OWN>(values);
    share_half<IS_STRICT, 8, OWN / 2>(values);
    share_half<IS_STRICT, 4, OWN / 4>(values);
}

// Where what is known of logits goes.
struct Place {
    float *uppers, *greatest;
    Found *found;
    int stride, rows, weight_rows;
};

// A warp's first segment of a unit; that of the second tile is 4 behind it.
DEVICE int own_segment() { return threadIdx.x / 128 * (TEAM_BLOCKS / 2) + threadIdx.x % 128 / WARP; }

// Bounds of a thread's weight rows, which it needs at a unit's end and asks for at the beginning.
struct Bounds {
    float2 values[TILES][2];

    DEVICE Bounds(const float *all, int weight_rows, int first, int last) {
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            const int segment = first + own_segment() + i / 2 * 4, row = segment * 16 + i % 2 * 8 + threadIdx.x % WARP / 4;
            const bool exists = segment < last && row < weight_rows;
            values[i / 2][i % 2].x = exists ? all[row] : NO_BOUND, values[i / 2][i % 2].y = exists ? all[weight_rows + row] : NO_BOUND;
        }
    }
};

// Ends a unit of segments (sixteens) from `first` to `last`: lower bounds of the rows' greatest become known, to all, and what each segment has at
// most; and of segments that can reach the bounds that are known, what each logit is at most. Instructions that run once in a while are slow: so
// each number takes six.
DEVICE void end_unit(const Sums &sums, const Measured *rows_here, u32 *lower, const Bounds &bounds, const Place &place, int first, int last) {
    const int g = threadIdx.x % WARP / 4, segments = (place.weight_rows + 15) / 16;
    first += own_segment();
    u32 known[LEFT] = {};
#pragma unroll
    for (int i = 0; i < LEFT; i++) {
        const int token = token_of(g * LEFT + i);
        if (token < place.rows) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(known[i]) : "l"(&place.found[token].lower) : "memory");
    }
    float least[OWN], most[TILES][OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const Measured row = rows_here[token_of(i)];
        least[i] = most[0][i] = most[1][i] = -INFINITE;
#pragma unroll
        for (int j = 0; j < 2 * TILES; j++) {
            const float sum = sums[j / 2][i / 2 * 4 + j % 2 * 2 + i % 2], margin = margin_of(bounds.values[j / 2][j % 2], row);
            least[i] = fmaxf(least[i], sum - margin), most[j / 2][i] = greater_or_none(most[j / 2][i], sum + margin);
        }
    }
    share_greatest<false>(least);
    share_greatest<true>(most[0]);
    share_greatest<true>(most[1]);
    u32 stored[TILES][LEFT]; // by lanes
#pragma unroll
    for (int i = 0; i < LEFT; i++) {
        const int token = token_of(g * LEFT + i);
        const float scale = rows_here[token].scale;
        const u32 here = ordered(least[i] * scale), before = atomicMax(&lower[token], max(here, known[i]));
        if (here > max(before, known[i]) && token < place.rows) atomicMax(&place.found[token].lower, here);
        const float reached = disordered(max(max(here, before), known[i]));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const int segment = first + tile * 4;
            const float upper = most[tile][i] * scale;
            const bool exists = token < place.rows && segment < last;
            if (exists) place.greatest[size_t(token) * segments + segment] = upper;
            stored[tile][i] = __ballot_sync(ALL_LANES, exists && !(upper < reached));
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        if ((stored[tile][0] | stored[tile][LEFT - 1]) == 0) continue;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (!(stored[tile][i % LEFT] >> (i / LEFT * 4 + threadIdx.x % 4) & 1)) continue;
            const Measured row = rows_here[token_of(i)];
            float *to = place.uppers + size_t(token_of(i)) * place.stride;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int weight_row = (first + tile * 4) * 16 + half * 8 + g;
                const float upper = sums[tile][i / 2 * 4 + half * 2 + i % 2] + margin_of(bounds.values[tile][half], row);
                if (weight_row < place.weight_rows) to[weight_row] = upper * row.scale;
            }
        }
    }
}
#endif
