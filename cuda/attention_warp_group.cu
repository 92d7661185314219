// Attention of many query rows of a sequence over its paged keys and values, on the matrix instructions of warp groups (compute capability
// 9.0): as attention_prefill.cu, for bfloat16 keys and values.
//
// A block stays on its multiprocessor and takes one tile for a key/value head after the other. Its first warp group only copies: pages are
// gathered into STAGES blocks of TOKENS positions, aligned to position 0, in the order that the matrix instructions want, while the other
// groups, each with 64 packed rows, compute. Scores of a block are multiplied while the values of the block before are summed up and the
// softmax's instructions run beside both (the order of work of FlashAttention-3: Shah et al., 2024).
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "attention.cuh"
#include "warp_group.cuh"

constexpr int ROWS = 128; // packed rows of a tile
constexpr int GROUPS = ROWS / 64;
constexpr int THREADS = (GROUPS + 1) * 128;
constexpr int TOKENS = HEAD_DIM > 128 ? 64 : 128; // copied and computed at a time
constexpr int PAGES = TOKENS / PAGE_TOKENS;
constexpr int STAGES = 2;
constexpr int PARTS = HEAD_DIM > 128 ? 2 : 1; // of the dimensions, for the sums of values
constexpr int PART_DIMS = HEAD_DIM / PARTS;
constexpr int QUERY_BYTES = ROWS * HEAD_DIM * 2;
constexpr int STAGE_BYTES = TOKENS * HEAD_DIM * 2; // of keys, or of values
constexpr int COPIER_REGISTERS = 40, OTHER_REGISTERS = 232;

#if HAS_WARP_GROUPS
static_assert(sizeof(KEY_TYPE) == 2 && sizeof(VALUE_TYPE) == 2 && HEAD_DIM % 32 == 0, "pages of 8-bit types are for attention_prefill.cu");

// What is full, and what nobody reads any more: the queries, and each stage of keys and of values.
struct Signals {
    u32 barriers;

    DEVICE void begin() const {
        for (int i = 0; i < 1 + 2 * STAGES; i++) begin_barrier(full(i), 128), begin_barrier(free(i), GROUPS * 4);
        multiply_what_was_copied();
    }

    DEVICE u32 full(int what) const { return barriers + what * 16; }
    DEVICE u32 free(int what) const { return barriers + what * 16 + 8; }

    static DEVICE int queries() { return 0; }
    static DEVICE int keys(int turn) { return 1 + turn % STAGES; }
    static DEVICE int values(int turn) { return 1 + STAGES + turn % STAGES; }
};

// Where a block's parts lie in shared memory: queries in tiles of 8 rows and 8 dimensions (dimensions / 8, ROWS / 8, 8, 8), keys likewise,
// (dimensions / 8, TOKENS / 8, 8, 8), values transposed, (TOKENS / 8, dimensions / 8, 8, 8).
struct Places {
    u32 queries;

    DEVICE u32 keys(int turn) const { return queries + QUERY_BYTES + turn % STAGES * STAGE_BYTES; }
    DEVICE u32 values(int turn) const { return keys(turn) + STAGES * STAGE_BYTES; }
};

// The groups take turns in starting products, so that one multiplies while the other weighs scores: barriers of their own in hardware.
DEVICE void wait_for_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
DEVICE void give_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(1 + group) : "memory"); }

// A tile for one key/value head, and which blocks of positions it sees.
struct Work {
    Tile tile;
    int kv_head, first, end, first_block, end_block; // positions, and blocks of them

    // The work of this block in a round, longest first and to and fro; whether there is any.
    DEVICE bool find(int round, const Tile *tiles, int count, int kv_heads, int window) {
        const int blocks = gridDim.x, own = round % 2 ? blocks - 1 - blockIdx.x : blockIdx.x, index = round * blocks + own;
        if (index >= count * kv_heads) return false;
        tile = tiles[index / kv_heads], kv_head = index % kv_heads;
        first = first_visible(tile.first_position, window), end = tile.first_position + tile.rows;
        first_block = first / TOKENS, end_block = (end + TOKENS - 1) / TOKENS;
        return true;
    }
};

// Copies 8 bytes of which so many exist, the others being zeros.
DEVICE void copy_8_to(u32 place, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
}

// One of the 128 threads that copy: eight lanes write 128 neighbouring bytes of shared memory.
struct Copier {
    int warp, lane;

    DEVICE void copy_queries(const bf16 *queries, const Work &work, int stride, u32 place) const {
        for (int group = warp; group < ROWS / 8; group += 4) {
            const int row = group * 8 + lane % 8, token = row / GROUP, head = work.kv_head * GROUP + row % GROUP;
            const bool exists = token < work.tile.rows;
            const bf16 *from = queries + size_t(work.tile.first_row + (exists ? token : 0)) * stride + head * HEAD_DIM + lane / 8 * 8;
            const u32 to = place + lane / 8 * (ROWS * 16) + row * 16;
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 32; i++) copy_16_to(to + i * (4 * ROWS * 16), from + i * 32, exists);
        }
    }

    // The pages of a block; where no row sees one, the nearest that is seen in its place.
    DEVICE void find_pages(const int *table, const Work &work, int block, int (&numbers)[PAGES], int (&pages)[PAGES]) const {
        const int least = work.first / PAGE_TOKENS, most = (work.end - 1) / PAGE_TOKENS;
#pragma unroll
        for (int i = 0; i < PAGES; i++) {
            numbers[i] = max(min(block * PAGES + i, most), least);
            pages[i] = table[numbers[i]];
        }
    }

    DEVICE void copy_keys(const u8 *keys, const int (&pages)[PAGES], const Work &work, int kv_heads, u32 place) const {
        const int half = warp % 2, unit = warp / 2; // lanes have 8 tokens of the 16, of a unit's four pieces
        keys += unit * 1024 + half * 512 + lane % 8 * 64 + lane / 8 * 16;
        place += (unit * 4 + lane / 8) * (TOKENS * 16) + half * 128 + lane % 8 * 16;
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            const u8 *from = keys + (size_t(pages[page]) * kv_heads + work.kv_head) * PAGE_BYTES_OF_KEYS;
#pragma unroll
            for (int i = 0; i < (HEAD_DIM + 63) / 64; i++) {
                if (HEAD_DIM % 64 == 0 || unit + 2 * i < HEAD_DIM / 32) {
                    copy_16_to(place + page * 256 + i * (8 * TOKENS * 16), from + i * 2048, true);
                }
            }
        }
    }

    DEVICE void copy_values(const u8 *values, const int (&numbers)[PAGES], const int (&pages)[PAGES], const Work &work, int kv_heads,
                            u32 place) const {
        const int dim = lane % 16 / 2, four = lane / 16 * 2 + lane % 2; // lanes have 8 dimensions and 4 times 4 tokens
        values += warp * 256 + dim / 2 * 64 + four * 16 + dim % 2 * 8;
        place += warp * 128 + lane / 16 * (HEAD_DIM * 16) + dim * 16 + lane % 2 * 8;
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            const u8 *from = values + (size_t(pages[page]) * kv_heads + work.kv_head) * PAGE_BYTES_OF_VALUES;
            const int bytes = min(max((work.end - numbers[page] * PAGE_TOKENS - four * 4) * 2, 0), 8); // of tokens that exist
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 32; i++) copy_8_to(place + page * (2 * HEAD_DIM * 16) + i * 512, from + i * 1024, bytes);
        }
    }
};

typedef float Scores[TOKENS / 2];        // of two rows, in fours: two neighbouring positions of either
typedef u32 Operands[TOKENS / 16][4];    // weights of 16 positions each
typedef float Sums[PARTS][PART_DIMS / 2]; // likewise of dimensions

// A thread's part of 64 packed rows: rows g and g + 8 of its warp's 16.
struct Rows {
    float greatest[2], total[2];
    int first_row, t; // packed row of this thread, the other is 8 more

    // Sets what a row does not see to minus infinity, and applies the soft cap.
    DEVICE void finish(Scores &scores, const Score &score, int begin, bool masked) const {
        if (SOFTCAP) {
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) scores[i] = score(scores[i]);
        }
        if (!masked) return;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const int own = score.first_position + (first_row + row * 8) / GROUP - begin - 2 * t; // the last one seen
            const int before = score.window ? own - score.window : -TOKENS;
#pragma unroll
            for (int i = 0; i < TOKENS / 4; i++) {
                const int column = i / 2 * 8 + i % 2;
                float &s = scores[i / 2 * 4 + row * 2 + i % 2];
                if (column > own || column <= before) s = -INFINITE;
            }
        }
    }

    // Turns scores into weights; what was summed under a lower greatest score is to be multiplied by `shrink`.
    DEVICE void weigh(Scores &scores, float factor, float (&shrink)[2]) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float most = -INFINITE, sum = 0.0f;
#pragma unroll
            for (int i = 0; i < TOKENS / 4; i++) most = fmaxf(most, scores[i / 2 * 4 + row * 2 + i % 2]);
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            most = fmaxf(greatest[row], most * factor);
            shrink[row] = exp2_fast(greatest[row] - most);
            greatest[row] = most;
#pragma unroll
            for (int i = 0; i < TOKENS / 4; i++) {
                float &s = scores[i / 2 * 4 + row * 2 + i % 2];
                s = exp2_fast(fmaf(s, factor, -most));
                sum += s;
            }
            total[row] = total[row] * shrink[row] + sum;
        }
    }

    // Divides by the sums of weights and writes the rows that exist.
    DEVICE void write(const Work &work, const Sums &sums, const float *sinks, bf16 *output, int stride) const {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float all = total[row];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            const int packed = first_row + row * 8, head = work.kv_head * GROUP + packed % GROUP;
            if (packed >= work.tile.rows * GROUP) continue;
            float factor = 1.0f;
            if (sinks) factor = join_sink(sinks[head], greatest[row], all);
            factor /= all;
            bf16 *to = output + size_t(work.tile.first_row + packed / GROUP) * stride + head * HEAD_DIM + 2 * t;
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) {
                const float *sum = &sums[i * 8 / PART_DIMS][i % (PART_DIMS / 8) * 4 + row * 2];
                *reinterpret_cast<u32 *>(to + i * 8) = pack_bf16(sum[0] * factor, sum[1] * factor);
            }
        }
    }
};

DEVICE void multiply_keys(u32 queries, u32 keys, Scores &scores) {
    const u64 a = tiled(queries, ROWS * 16), b = tiled(keys, TOKENS * 16);
    multiplied_from_here();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) multiply_shared(scores, a + i * (2 * ROWS), b + i * (2 * TOKENS), i > 0);
    end_products();
}

DEVICE void add_values(const Operands &weights, u32 values, Sums &sums) {
    const u64 b = tiled(values, HEAD_DIM * 16);
    multiplied_from_here();
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) multiply_described(sums[part], weights[i], b + i * (2 * HEAD_DIM) + part * PART_DIMS);
    }
    end_products();
}

DEVICE void pack_weights(const Scores &scores, Operands &weights) {
#pragma unroll
    for (int i = 0; i < TOKENS / 4; i++) weights[i / 4][i % 4] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
}

DEVICE void shrink_sums(Sums &sums, const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) sums[i / (PART_DIMS / 2)][i % (PART_DIMS / 2)] *= shrink[i / 2 % 2];
}

DEVICE void hold_sums(Sums &sums) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) hold(sums[part]);
}

// What a launch is given, and where its parts lie.
struct Call {
    const bf16 *queries;
    bf16 *output;
    const u8 *keys, *values;
    const float *sinks;
    const Tile *tiles;
    const int *page_table;
    int count, query_stride, output_stride, page_stride, kv_heads, window; // count: of tiles
    float scale, softcap;
    Signals signals;
    Places places;

    DEVICE bool find(Work &work, int round) const { return work.find(round, tiles, count, kv_heads, window); }
};

// The part of the warp group that copies.
DEVICE void copy_all(const Call &call, const Copier &copier) {
    const Signals &signals = call.signals;
    const Places &places = call.places;
    Work work;
    int turn = 0; // of the stages
    for (int round = 0; call.find(work, round); round++) {
        const int *table = call.page_table + size_t(work.tile.sequence) * call.page_stride;
        for (int block = work.first_block; block < work.end_block; block++, turn++) {
            int numbers[PAGES], pages[PAGES];
            copier.find_pages(table, work, block, numbers, pages);
            const u32 parity = turn / STAGES % 2 ^ 1;
            sleep_for_phase(signals.free(signals.keys(turn)), parity);
            copier.copy_keys(call.keys, pages, work, call.kv_heads, places.keys(turn));
            arrive_with_copies(signals.full(signals.keys(turn)));
            if (block == work.first_block) {
                sleep_for_phase(signals.free(signals.queries()), round % 2 ^ 1);
                copier.copy_queries(call.queries, work, call.query_stride, places.queries);
                arrive_with_copies(signals.full(signals.queries()));
            }
            sleep_for_phase(signals.free(signals.values(turn)), parity);
            copier.copy_values(call.values, numbers, pages, work, call.kv_heads, places.values(turn));
            arrive_with_copies(signals.full(signals.values(turn)));
        }
    }
    end_group();
    wait_group<0>();
}

// Starts adding the values of a stage's block, once they are there.
DEVICE void start_values(const Call &call, const Operands &weights, int turn, Sums &sums) {
    sleep_for_phase(call.signals.full(call.signals.values(turn)), turn / STAGES % 2);
    multiply_what_was_copied();
    add_values(weights, call.places.values(turn), sums);
}

// The part of the warp group that has 64 packed rows.
DEVICE void compute_all(const Call &call, int group, int warp, int lane) {
    const Signals &signals = call.signals;
    const float factor = SOFTCAP ? 1.0f : call.scale * LOG2E;
    Work work;
    Rows rows;
    rows.first_row = group * 64 + warp * 16 + lane / 4, rows.t = lane % 4;
    Scores scores = {};
    Operands weights;
    int turn = 0;
    if (group == 1) give_turn(0);
    for (int round = 0; call.find(work, round); round++) {
        const Score score = {call.scale, call.softcap, call.window, work.tile.first_position};
        Sums sums = {};
        float shrink[2];
        rows.greatest[0] = rows.greatest[1] = LOWEST, rows.total[0] = rows.total[1] = 0.0f;
        sleep_for_phase(signals.full(signals.queries()), round % 2);
        for (int block = work.first_block; block < work.end_block; block++, turn++) {
            const bool is_first = block == work.first_block;
            sleep_for_phase(signals.full(signals.keys(turn)), turn / STAGES % 2);
            multiply_what_was_copied();
            wait_for_turn(group);
            multiply_keys(call.places.queries + group * 1024, call.places.keys(turn), scores);
            if (is_first) {
                give_turn(group ^ 1);
                wait_for_products<0>();
            } else {
                start_values(call, weights, turn - 1, sums);
                give_turn(group ^ 1);
                wait_for_products<1>();
            }
            hold(scores);
            if (lane == 0) arrive(signals.free(signals.keys(turn)));
            if (lane == 0 && block + 1 == work.end_block) arrive(signals.free(signals.queries()));
            const int begin = block * TOKENS;
            rows.finish(scores, score, begin, !score.all_visible(begin, begin + TOKENS, work.tile.rows));
            rows.weigh(scores, factor, shrink);
            wait_for_products<0>();
            hold_sums(sums);
            if (lane == 0 && !is_first) arrive(signals.free(signals.values(turn - 1)));
            shrink_sums(sums, shrink);
            pack_weights(scores, weights);
        }
        start_values(call, weights, turn - 1, sums);
        wait_for_products<0>();
        hold_sums(sums);
        if (lane == 0) arrive(signals.free(signals.values(turn - 1)));
        rows.write(work, sums, call.sinks, call.output, call.output_stride);
    }
}
#endif

// queries, output: (rows, heads * HEAD_DIM), aligned to 16 bytes. Launch: as many blocks as multiprocessors or fewer, THREADS threads,
// QUERY_BYTES + 2 * STAGES * STAGE_BYTES of dynamic shared memory.
BOUNDED_KERNEL(THREADS, 1)
attention_warp_group(const bf16 *queries, bf16 *output, const KEY_TYPE *keys, const VALUE_TYPE *values, const float *sinks,
                     const Tile *tiles, const int *counts, const int *page_table, int query_stride, int output_stride, int page_stride,
                     int kv_heads, int window, float scale, float softcap) {
#if HAS_WARP_GROUPS
    extern __shared__ uint4 dynamic[];
    __shared__ u64 barriers[2 + 4 * STAGES];
    const Signals signals = {u32(__cvta_generic_to_shared(barriers))};
    const Places places = {u32(__cvta_generic_to_shared(dynamic))};
    if (threadIdx.x == 0) signals.begin();
    __syncthreads();
    let_next_start();
    wait_for_previous();
    const Call call = {queries, output, reinterpret_cast<const u8 *>(keys), reinterpret_cast<const u8 *>(values), sinks, tiles, page_table,
                       counts[1], query_stride, output_stride, page_stride, kv_heads, window, scale, softcap, signals, places};
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (warp < 4) {
        leave_registers<COPIER_REGISTERS>();
        copy_all(call, Copier{warp, lane});
    } else {
        take_registers<OTHER_REGISTERS>();
        compute_all(call, warp / 4 - 1, warp % 4, lane);
    }
#endif
}
