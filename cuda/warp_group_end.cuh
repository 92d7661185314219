// How linear_warp_group.cu ends a unit: where two blocks share the columns, each sends the other its sums of half of the tokens and adds what
// it gets; then each warp scales and stores its own rows, by way of shared memory, which nobody else needs any more.
//
// While a unit ends, its multiprocessor asks memory for nothing: on an H200 that was 2 to 3 us of each product (of 34 us of E4M3 gates and ups,
// of 19 of `down`). Of barriers of the whole block and of the cluster none is left, and what does not need sums in registers is a loop: 1,500
// instructions that run once are not there when they are wanted. What results are added to is asked for at the beginning.
#if HAS_WARP_GROUPS
// Waits for the threads of the block that multiply.
DEVICE void computing_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING) : "memory"); }

// Waits for those of a group.
DEVICE void group_barrier(int group) { asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); }

// What sums become; in shared memory, for memory is far: the scales of input rows (TOKENS) where they are rounded, then, for each of the unit's
// weight rows, scales and biases.
struct Factors {
    const Operands &operands;
    const float *input_scales, *scales, *bias;
    float *kept;

    // Reads them, and waits for the kernels before in between.
    DEVICE void read(const Unit &unit) const {
        for (int i = threadIdx.x; i < UNIT_ROWS; i += COMPUTING) {
            const int row = unit.row(i);
            const bool exists = row < operands.weight_rows;
            if (IS_ROUNDED) kept[TOKENS + i] = exists ? scales[row] : 0.0f;
            kept[TOKENS + UNIT_ROWS + i] = exists && bias ? bias[row] : 0.0f;
        }
        wait_for_previous();
        if (IS_ROUNDED && threadIdx.x < operands.rows) kept[threadIdx.x] = input_scales[threadIdx.x];
    }

    // Of four neighbouring rows of the unit, in registers: a thread asks for them once, not for each token.
    struct Rows {
        float4 scales, biases;
    };

    DEVICE Rows of(int row) const {
        const float *from = kept + TOKENS + row;
        return Rows{IS_ROUNDED ? *reinterpret_cast<const float4 *>(from) : float4(), *reinterpret_cast<const float4 *>(from + UNIT_ROWS)};
    }

    // Sums of four rows of a token, scaled, with their biases.
    DEVICE void apply(const float4 &sums, const Rows &rows, int token, float (&values)[4]) const {
        const float scale = IS_ROUNDED ? kept[token] : 1.0f;
        values[0] = IS_ROUNDED ? fmaf(sums.x, rows.scales.x * scale, rows.biases.x) : sums.x + rows.biases.x;
        values[1] = IS_ROUNDED ? fmaf(sums.y, rows.scales.y * scale, rows.biases.y) : sums.y + rows.biases.y;
        values[2] = IS_ROUNDED ? fmaf(sums.z, rows.scales.z * scale, rows.biases.z) : sums.z + rows.biases.z;
        values[3] = IS_ROUNDED ? fmaf(sums.w, rows.scales.w * scale, rows.biases.w) : sums.w + rows.biases.w;
    }
};

// Four neighbouring elements.
template <class E> struct alignas(4 * sizeof(E)) Four {
    E values[4];
};

// Of two blocks that share the columns: each has in `received`, behind its ring, what the other sends it, and in `barrier` whether all of it
// is there. What a thread sends is for the same thread: as many tokens, of the same rows. No block ends before it has got everything.
struct Pair {
    static constexpr int TOKENS_EACH = TOKENS / 2, BYTES = TILES * TOKENS_EACH * COMPUTING * 2;
    u32 received, barrier;
    u32 rank;

    DEVICE void begin() const {
        begin_barrier(barrier, 1);
        arrive_expecting(barrier, BYTES);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    DEVICE void send(u32 place, const float (&sums)[4]) const {
        asm volatile("{ .reg .u32 place, barrier; mapa.shared::cluster.u32 place, %0, %2; mapa.shared::cluster.u32 barrier, %1, %2; "
                     "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [place], {%3, %4, %5, %6}, [barrier]; }" ::"r"(place),
                     "r"(barrier), "r"(rank ^ 1), "f"(sums[0]), "f"(sums[1]), "f"(sums[2]), "f"(sums[3])
                     : "memory");
    }

    // Sends the other block's half of the sums, and adds what comes to the own half: of two numbers the order does not matter.
    DEVICE void exchange(const Sums &sums, float (&own)[TILES][TOKENS_EACH / 2]) const {
        const u32 place = received + threadIdx.x * 16;
        await_cluster(); // the other's barrier has begun
#pragma unroll
        for (int i = 0; i < TILES * TOKENS_EACH / 8; i++) {
            const int tile = i / (TOKENS_EACH / 8), first = i % (TOKENS_EACH / 8) * 8, other = first + TOKENS_EACH;
            float sent[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float low = sums[tile][first / PART][first % PART / 2 + j], high = sums[tile][other / PART][other % PART / 2 + j];
                own[tile][first / 2 + j] = rank ? high : low, sent[j] = rank ? low : high;
            }
            send(place + i * (COMPUTING * 16), sent);
        }
        sleep_for_phase(barrier, 0);
#pragma unroll
        for (int i = 0; i < TILES * TOKENS_EACH / 8; i++) {
            const float4 part = load_own(place + i * (COMPUTING * 16));
            float *to = &own[i / (TOKENS_EACH / 8)][i % (TOKENS_EACH / 8) * 4];
            to[0] += part.x, to[1] += part.y, to[2] += part.z, to[3] += part.w;
        }
    }

    // Sixteen bytes of this block's shared memory.
    static DEVICE float4 load_own(u32 place) {
        float4 value;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(place) : "memory");
        return value;
    }

    static DEVICE void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
    static DEVICE void await_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
};

constexpr int SPLIT_BYTES = 256; // of a row: blocks share out its columns in such steps, however long those of the ring are
constexpr int STAGED = 20; // floats of a token of a warp's sixteen rows, and room so that banks differ
constexpr int PLACES = STAGES >= 4 ? 1 : 2, ROOM = WEIGHT_BYTES / PLACES; // warps of a group in a place of the ring, and bytes of each
constexpr int AT_ONCE = 32;                                               // tokens that a warp ends at once

// Asks memory for what ending.read() will read, long before.
template <class Ending> DEVICE void ask_tokens(const Ending &ending, int begin, int end, int left) {
    const int group = threadIdx.x / 128, in_tile = threadIdx.x % 128 / WARP * 16 + threadIdx.x % 4 * 4;
#pragma unroll 1
    for (int tile = 0; tile < TILES / (1 + PAIRED); tile++) {
        const int output = group * GROUP_OUTPUTS + tile * TILE_ROWS + in_tile;
        if (in_tile >= rows_of_tile(tile) || output >= left) continue;
        for (int token = begin + threadIdx.x % WARP / 4; token < end; token += 8) ending.ask(token, output);
    }
}

// Ends COUNT tokens of all tiles, each warp its own rows. ending.read(token, output) gives what else is needed; ending.store(sums, sums of
// the rows that they are combined with, that, what is kept of the rows, token, output) stores. `left`: outputs of the unit that exist.
template <int COUNT, class Ending>
DEVICE void end_tokens(const float (&sums)[TILES][COUNT / 2], float *staged, const Ending &ending, int begin, int rows, int left) {
    constexpr int BYTES = TILES * COUNT * STAGED * 4, TURN = BYTES <= ROOM ? COUNT : BYTES <= 2 * ROOM ? COUNT / 2 : COUNT / 4;
    constexpr int LENGTH = TURN % AT_ONCE == 0 ? AT_ONCE : 16;
    static_assert(TILES * TURN * STAGED * 4 <= ROOM && TURN % LENGTH == 0, "the sums fit");
    const int group = threadIdx.x / 128, warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int turn = 0; turn < COUNT; turn += TURN) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TILES * TURN / 2; i++) {
            const int tile = i / (TURN / 2), sum = i % (TURN / 2), token = sum / 4 * 8 + 2 * t + sum % 2;
            staged[(tile * TURN + token) * STAGED + sum / 2 % 2 * 8 + g] = sums[tile][turn / 2 + sum];
        }
        __syncwarp();
#pragma unroll 1
        for (int part = 0; part < TILES / (1 + PAIRED) * (TURN / LENGTH); part++) {
            const int tile = part / (TURN / LENGTH), from = part % (TURN / LENGTH) * LENGTH, first = begin + turn + from + g;
            const int in_tile = warp * 16 + t * 4, row = tile * TILE_ROWS + in_tile, output = group * GROUP_OUTPUTS + row;
            const int end = in_tile < rows_of_tile(tile) && output < left ? rows : 0;
            if (first >= end) continue;
            typename Ending::Early early[LENGTH / 8];
#pragma unroll
            for (int i = 0; i < LENGTH / 8; i++) {
                if (first + i * 8 < end) early[i] = ending.read(first + i * 8, output);
            }
            const typename Ending::Kept kept = ending.keep(group * ROWS + row);
            const float *place = staged + (tile * TURN + from + g) * STAGED + t * 4;
#pragma unroll
            for (int i = 0; i < LENGTH / 8; i++) {
                const float4 all = *reinterpret_cast<const float4 *>(place + i * 8 * STAGED);
                const float4 others = PAIRED ? *reinterpret_cast<const float4 *>(place + (TURN + i * 8) * STAGED) : float4();
                if (first + i * 8 < end) ending.store(all, others, early[i], kept, first + i * 8, output);
            }
        }
    }
}

// A unit of the product from beginning to end. ending.begin() reads what is needed at the end, and waits for the kernels before in between; it
// is called by the threads that multiply. ending.reads() says whether ending.read() gives anything, ending.ask() asks memory for it. `left`:
// outputs from the unit's first on.
template <class Ending>
DEVICE void multiply_unit(const Operands &all, uint4 *dynamic, const Unit &unit, const Ending &ending, int left, int splits) {
    __shared__ u64 barriers[2 * STAGES * (GROUPS + 1) + 1];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = warp / 4, rank = blockIdx.x % splits;
    const int all_steps = (all.row_bytes + STEP_BYTES - 1) / STEP_BYTES;
    const int per_block = (all.row_bytes + SPLIT_BYTES * splits - 1) / (SPLIT_BYTES * splits) * (SPLIT_BYTES / STEP_BYTES);
    const int begin = rank * per_block, steps = max(min(per_block, all_steps - begin), 0);
    const u32 unaligned = u32(__cvta_generic_to_shared(dynamic)), memory = (unaligned + 1023) / 1024 * 1024;
    const Ring ring = {u32(__cvta_generic_to_shared(barriers)), memory};
    const Pair pair = {memory + STAGES * STAGE_BYTES, ring.barriers + 2 * STAGES * (GROUPS + 1) * 8, u32(rank)};
    if (threadIdx.x == 0) {
        ring.begin();
        if (splits > 1) pair.begin();
    }
    __syncthreads();
    if (splits > 1) Pair::arrive_in_cluster();
    let_next_start();
    if (warp >= COMPUTING / WARP) {
        const int copier_number = warp - COMPUTING / WARP;
        if (copier_number < GROUPS) {
            const Copier<GROUP_ROWS, GROUP_ROWS, true, 1 + PAIRED> copier(all.weight, unit.row(copier_number * GROUP_ROWS), all.weight_rows,
                                                                          all.row_bytes, all.row_bytes, begin * STEP_BYTES, lane,
                                                                          unit.step - GROUP_OUTPUTS);
            copier.copy_all(ring, copier_number, 0, steps, PACE);
        } else {
            constexpr int OWN = TOKENS / INPUT_WARPS;
            const int token = (copier_number - GROUPS) * OWN;
            const Copier<OWN, TOKENS, false> copier(all.input, token, all.rows, all.input_stride, all.row_bytes, begin * STEP_BYTES, lane);
            wait_for_previous();
            copier.copy_all(ring, GROUPS, token * 128, steps, STAGES);
        }
        end_group();
        wait_group<0>();
        if (splits > 1) Pair::await_cluster();
        return;
    }
    ending.begin();
    const int own_tokens = splits > 1 ? Pair::TOKENS_EACH : TOKENS;
    if (ending.reads()) ask_tokens(ending, rank * own_tokens, min((rank + 1) * own_tokens, all.rows), left);
    computing_barrier(); // what is kept is there
    Sums sums = {};
    multiply_steps(ring, group, steps, sums);
    const u32 place = ring.place(warp % 4 / PLACES, group) + warp % PLACES * ROOM;
    float *staged = reinterpret_cast<float *>(reinterpret_cast<u8 *>(dynamic) + (place - unaligned));
    if (splits > 1) {
        float own[TILES][Pair::TOKENS_EACH / 2];
        pair.exchange(sums, own);
        group_barrier(group); // nobody reads the group's weights any more
        end_tokens<Pair::TOKENS_EACH>(own, staged, ending, rank * Pair::TOKENS_EACH, all.rows, left);
    } else {
        float own[TILES][TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TILES * TOKENS / 2; i++) {
            const int tile = i / (TOKENS / 2), sum = i % (TOKENS / 2);
            own[tile][sum] = sums[tile][sum / (PART / 2)][sum % (PART / 2)];
        }
        group_barrier(group);
        end_tokens<TOKENS>(own, staged, ending, 0, all.rows, left);
    }
}
#endif
