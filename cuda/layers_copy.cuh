// How cuda/layers.cu brings weights to shared memory: by the copy engine, a round at a time, through a ring.

// A round: STEPS_OF_WARP steps of each multiplying warp, 16 rows of the weight, as the copy engine brings it to shared memory: for packed
// weights, of each 8 rows, words, scales and minima, where neighbouring steps are neighbours in memory; for others, 16 stretches of 1,024
// bytes.
#if PACKED
struct Round {
    static constexpr int WORDS = ROUND_STEPS * BLOCK_BYTES, SCALES = ROUND_STEPS * 16 * GROUPS;
    static constexpr int OTHERS = STEPS || MINIMA ? ROUND_STEPS * 16 * PER_ROW : 0;
    static constexpr int BYTES = 2 * (WORDS + SCALES + OTHERS), COPIES = OTHERS ? 6 : 4; // of both halves
    u32 words, scales, minima; // where a lane reads

    DEVICE Round(int warp, int lane) {
        const int g = lane / 4;
        words = warp * BLOCK_BYTES + lane * 16;
        scales = 2 * WORDS + warp * 16 * GROUPS + g * (GROUPS * 2) + (OWN_GROUP ? lane % 4 * 2 : 0);
        minima = 2 * (WORDS + SCALES) + warp * 16 * PER_ROW + g * (PER_ROW * 2) + (OWN_GROUP && !STEPS ? lane % 4 * 2 : 0);
        asm volatile("" : "+r"(words), "+r"(scales), "+r"(minima)); // or they are computed anew in every step
    }

    // The warp's step of this number.
    DEVICE void read(u32 slot, int number, Step &step) const {
        number *= WARPS;
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) step.words[0][half][i] = load_shared(slot + words + half * WORDS + i * 512 + number * BLOCK_BYTES);
            Feed<WARPS>::read_row(slot + scales + half * SCALES + number * (16 * GROUPS), step.scales[0][half]);
            const u32 own = slot + minima + half * OTHERS + number * (16 * PER_ROW);
            if (MINIMA && !STEPS) Feed<WARPS>::read_row(own, step.minima[0][half]);
            if (STEPS) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(step.units[0][half]) : "r"(own));
        }
    }
};

// A lane's way through a unit: one of the COPIES.
struct Way {
    const u8 *at;
    u32 to, step_bytes; // in a slot; of a step

    DEVICE void move(const Product &product, int first, int steps, int lane) {
        const int last = (product.weight_rows - 1) / BLOCK_ROWS, part = lane / 2, half = lane % 2;
        const size_t block = min((first + half * product.second) / BLOCK_ROWS, last);
        const u8 *const parts[] = {product.weight, reinterpret_cast<const u8 *>(product.scales), reinterpret_cast<const u8 *>(product.minima)};
        step_bytes = part == 0 ? BLOCK_BYTES : 16 * (part == 1 ? GROUPS : PER_ROW);
        to = part == 0 ? half * Round::WORDS : part == 1 ? 2 * Round::WORDS + half * Round::SCALES
                                                         : 2 * (Round::WORDS + Round::SCALES) + half * Round::OTHERS;
        at = (part == 0 ? parts[0] : part == 1 ? parts[1] : parts[2]) + block * steps * step_bytes;
    }
};
constexpr int STEP_COPIED = Round::BYTES / ROUND_STEPS; // bytes
#else
struct Round {
    // Rows are apart so that the lanes that read at once take different banks; warp groups read them as they lie.
    static constexpr int PAIR = BY_GROUPS ? 2048 : 2112, SECOND = BY_GROUPS ? 1024 : 1088, BYTES = 8 * PAIR, COPIES = 16;
    u32 from;

    DEVICE Round(int warp, int lane) : from(lane / 8 * PAIR + lane / 4 % 2 * SECOND + warp * 128 + lane % 4 * 16) {
        asm volatile("" : "+r"(from)); // or it is computed anew in every step
    }

    DEVICE void read(u32 slot, int, Step &step) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) step.words[0][half][i] = load_shared(slot + from + half * (4 * PAIR) + i * 64);
        }
    }
};

struct Way {
    static constexpr u32 step_bytes = 128;
    const u8 *at;
    u32 to;

    DEVICE void move(const Product &product, int first, int steps, int lane) {
        const int row = min(first + lane / 8 % 2 * product.second + lane % 8, product.weight_rows - 1);
        at = reinterpret_cast<const u8 *>(product.weight) + size_t(row) * steps * step_bytes;
        to = lane / 2 * Round::PAIR + lane % 2 * Round::SECOND;
    }
};
constexpr int STEP_COPIED = 16 * 128;
static_assert(!GROUPED, "scales of groups of E4M3 weights are not copied");
#endif

// The ring: slots of a round each, and for each a barrier that says whether it is full, and one that says whether it is empty.
struct Ring {
    u32 begin, barriers;
    int slots;

    DEVICE u32 slot(const Place &place) const { return begin + place.slot * Round::BYTES; }
    DEVICE u32 full(const Place &place) const { return barriers + place.slot * 16; }
    DEVICE u32 empty(const Place &place) const { return full(place) + 8; }

    DEVICE void begin_barriers(int thread, int threads) const {
        for (int i = thread; i < slots; i += threads) begin_barrier(barriers + i * 16, 1), begin_barrier(barriers + i * 16 + 8, WARPS);
    }
};

// Brings what a unit's end needs of weights to L2: it comes from far.
DEVICE void prefetch_ends(const Operation &own, const Division &division, int unit, int lane) {
    const int row = min(division.first_row(unit) + (lane % 2) * division.second, own.weight_rows - 1);
    if (lane < 2 && !PACKED && sizeof(WEIGHT) == 1) prefetch_line(own.scales + row);
    if (lane < 2 && own.bias) prefetch_line(own.bias + row);
}

// The pages of the block's first part of attention, one a lane, as far as there are so many lanes. They are the same in all layers.
struct FirstPages {
    int count = 0, entry = 0, kv_head = 0;

    DEVICE FirstPages() {}

    DEVICE FirstPages(const Pieces &pieces, int kv_heads, int lane) {
        const Portions parts(pieces, kv_heads);
        if (int(blockIdx.x) >= parts.all()) return;
        const Portion part = parts[blockIdx.x];
        kv_head = part.kv_head, count = min(part.end - part.begin, WARP);
        if (lane < count) entry = pieces.table(part)[part.begin + lane];
    }

    // Brings them to L2: they would come behind the weights otherwise.
    DEVICE void prefetch(const Operation &own, int kv_heads, int lane) const {
        for (int page = 0; page < count; page++) {
            const size_t index = size_t(__shfl_sync(ALL_LANES, entry, page)) * kv_heads + kv_head;
            const u8 *keys = reinterpret_cast<const u8 *>(own.keys) + index * PAGE_BYTES_OF_KEYS;
            const u8 *values = reinterpret_cast<const u8 *>(own.values) + index * PAGE_BYTES_OF_VALUES;
            for (int at = lane * 128; at < PAGE_BYTES_OF_KEYS; at += WARP * 128) prefetch_line(keys + at);
            for (int at = lane * 128; at < PAGE_BYTES_OF_VALUES; at += WARP * 128) prefetch_line(values + at);
        }
    }
};

// A copying warp, of COPIERS: its part of all rounds of all products, as soon as there is room and no more than PACED rounds are under way:
// asked for at once, the whole ring would be a queue in which whatever others read waits.
DEVICE void copy_weights(Program program, const Ring &ring, const Pieces &pieces, int rows, int kv_heads, int copier, int lane) {
    const u64 policy = streaming_policy();
    Place place = {0, 0}, behind = {0, 0};
    int started = 0;
    FirstPages pages;
    for (int number = 0; number < program.count; number++) {
        const Operation &own = program.take(number);
        if (own.kind == ATTEND) {
            if (copier == 0) continue;
            if (number == 1) {
                wait_for_previous();
                pages = FirstPages(pieces, kv_heads, lane);
            }
            pages.prefetch(own, kv_heads, lane);
            continue;
        }
        const Division division(own);
        const Product product = product_of(own, rows);
        const int steps = steps_of(own), units = own.units;
        Way way;
#pragma unroll 1
        for (int unit = first_unit(own); unit < units; unit += gridDim.x) {
            way.move(product, division.first_row(unit), steps, copier * (Round::COPIES / COPIERS) + lane);
            if (copier > 0) prefetch_ends(own, division, unit, lane);
#pragma unroll 1
            for (int step = 0; step < steps; step += ROUND_STEPS) {
                const int count = min(steps - step, ROUND_STEPS);
                if (started == PACED) { // a loop would cost 70B of E4M3 6 % of its time
                    rest_for_phase(ring.full(behind), behind.parity);
                    behind.next(ring.slots);
                } else {
                    started++;
                }
                rest_for_phase(ring.empty(place), place.parity ^ 1);
#if __CUDA_ARCH__ >= 900
                if (copier == 0 && lane == 0) arrive_expecting(ring.full(place), count * STEP_COPIED);
                __syncwarp();
                if (lane < Round::COPIES / COPIERS) copy_bulk(ring.slot(place) + way.to, way.at, count * way.step_bytes, ring.full(place), policy);
#endif
                way.at += ROUND_STEPS * way.step_bytes;
                place.next(ring.slots);
            }
        }
    }
    for (; started > 0; started--) { // a block must not end before its copies
        rest_for_phase(ring.full(behind), behind.parity);
        behind.next(ring.slots);
    }
}
