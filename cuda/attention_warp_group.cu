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

#include "attention_copier.cuh"

#if HAS_WARP_GROUPS
// The groups take turns in starting products, so that one multiplies while the other weighs scores: barriers of their own in hardware.
DEVICE void wait_for_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
DEVICE void give_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(1 + group) : "memory"); }

// Where a tile's results go.
struct Output {
    bf16 *rows;
    const float *sinks;
    int first_row, count, kv_head, stride;
};

typedef float Scores[TOKENS / 2];        // of two rows, in fours: two neighbouring positions of either
typedef u32 Operands[TOKENS / 16][4];    // weights of 16 positions each
typedef float Sums[PARTS][PART_DIMS / 2]; // likewise of dimensions

// A thread's part of 64 packed rows: rows g and g + 8 of its warp's 16.
struct Rows {
    int first_row, t; // packed row of this thread, the other is 8 more
    float greatest[2], total[2];

    DEVICE void begin() { greatest[0] = greatest[1] = LOWEST, total[0] = total[1] = 0.0f; }

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
    DEVICE void write(const Output &output, const Sums &sums) const {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float all = total[row];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            const int packed = first_row + row * 8, head = output.kv_head * GROUP + packed % GROUP;
            if (packed >= output.count * GROUP) continue;
            float factor = 1.0f;
            if (output.sinks) factor = join_sink(output.sinks[head], greatest[row], all);
            factor /= all;
            bf16 *to = output.rows + size_t(output.first_row + packed / GROUP) * output.stride + head * HEAD_DIM + 2 * t;
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) {
                const float *sum = &sums[i * 8 / PART_DIMS][i % (PART_DIMS / 8) * 4 + row * 2];
                *reinterpret_cast<u32 *>(to + i * 8) = pack_bf16(sum[0] * factor, sum[1] * factor);
            }
        }
    }
};

DEVICE void multiply_keys(u32 queries, u32 keys, Scores &scores) {
    const u64 a = swizzled(queries), b = swizzled(keys);
    multiplied_from_here();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) {
        multiply_shared(scores, a + i / 4 * (ROWS * 8) + i % 4 * 2, b + i / 4 * (TOKENS * 8) + i % 4 * 2, i > 0);
    }
    end_products();
}

DEVICE void add_values(const Operands &weights, u32 values, Sums &sums) {
    const u64 b = swizzled(values);
    multiplied_from_here();
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            multiply_described(sums[part], weights[i], b + i / 4 * (HEAD_DIM * 8) + i % 4 * 2 + part * (PART_DIMS * 8));
        }
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

DEVICE void clear_sums(Sums &sums) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) sums[i / (PART_DIMS / 2)][i % (PART_DIMS / 2)] = 0.0f;
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
    DEVICE Output output_of(const Work &work) const {
        return Output{output, sinks, work.tile.first_row, work.tile.rows, work.kv_head, output_stride};
    }
};

// The part of the warp group that copies.
DEVICE void copy_all(const Call &call, const Copier &copier) {
    const Signals &signals = call.signals;
    const Places &places = call.places;
    Work work;
    int turn = 0; // of the stages
    for (int round = 0; call.find(work, round); round++) {
        const int *table = call.page_table + size_t(work.tile.sequence) * call.page_stride;
        Pages pages, next;
        copier.find_pages(table, work, work.first_block, pages);
        for (int block = work.first_block; block < work.end_block; block++, turn++) {
            const u32 parity = turn / STAGES % 2 ^ 1;
            copier.find_pages(table, work, block + 1, next);
            sleep_for_phase(signals.free(signals.keys(turn)), parity);
            copier.copy_keys(call.keys, pages, work, call.kv_heads, places.keys(turn));
            arrive_with_copies(signals.full(signals.keys(turn)));
            if (block == work.first_block) {
                sleep_for_phase(signals.free(signals.queries(round)), round / QUERY_STAGES % 2 ^ 1);
                copier.copy_queries(call.queries, work, call.query_stride, places.queries(round));
                arrive_with_copies(signals.full(signals.queries(round)));
            }
            sleep_for_phase(signals.free(signals.values(turn)), parity);
            copier.copy_values(call.values, pages, work, block, call.kv_heads, places.values(turn));
            arrive_with_copies(signals.full(signals.values(turn)));
#pragma unroll
            for (int i = 0; i < PAGES / 4; i++) pages[i] = next[i];
        }
    }
    end_group();
    wait_group<0>();
}

// One of the warp groups that have 64 packed rows each. Blocks follow each other without a break where a tile ends: its last values are
// added while the next tile's first scores are weighed, and then it is written.
struct Computer {
    const Call &call;
    int group, lane;
    Work work;
    Rows rows;
    int round, turn, block; // of tiles, of stages, and of positions

    // Starts multiplying the block's keys, when it is this group's turn.
    DEVICE void start_scores(Scores &scores) const {
        const Signals &signals = call.signals;
        if (block == work.first_block) sleep_for_phase(signals.full(signals.queries(round)), round / QUERY_STAGES % 2);
        sleep_for_phase(signals.full(signals.keys(turn)), turn / STAGES % 2);
        multiply_what_was_copied();
        wait_for_turn(group);
        multiply_keys(call.places.queries(round) + group * (64 * 128), call.places.keys(turn), scores);
    }

    // Starts adding the values of the block before.
    DEVICE void start_values(const Operands &weights, Sums &sums) const {
        const Signals &signals = call.signals;
        sleep_for_phase(signals.full(signals.values(turn - 1)), (turn - 1) / STAGES % 2);
        multiply_what_was_copied();
        add_values(weights, call.places.values(turn - 1), sums);
    }

    // Makes weights of scores that are there.
    DEVICE void weigh(Scores &scores, float (&shrink)[2]) {
        const Signals &signals = call.signals;
        if (lane == 0) arrive(signals.free(signals.keys(turn)));
        if (lane == 0 && block + 1 == work.end_block) arrive(signals.free(signals.queries(round)));
        const Score score = {call.scale, call.softcap, call.window, work.tile.first_position};
        const int begin = block * TOKENS;
        rows.finish(scores, score, begin, !score.all_visible(begin, begin + TOKENS, work.tile.rows));
        rows.weigh(scores, SOFTCAP ? 1.0f : call.scale * LOG2E, shrink);
    }

    // Multiplies the block's keys, adds the values of the block before, and makes weights of the scores meanwhile.
    DEVICE void advance(Scores &scores, const Operands &weights, Sums &sums, float (&shrink)[2]) {
        turn++;
        start_scores(scores);
        start_values(weights, sums);
        give_turn((group + 1) % GROUPS);
        wait_for_products<1>();
        hold(scores);
        weigh(scores, shrink);
        wait_for_products<0>();
        hold_sums(sums);
        if (lane == 0) arrive(call.signals.free(call.signals.values(turn - 1)));
    }

    DEVICE void compute() {
        Scores scores = {};
        Operands weights;
        Sums sums = {};
        float shrink[2];
        if (!call.find(work, 0)) return;
        if (group == GROUPS - 1) give_turn(0);
        block = work.first_block;
        rows.begin();
        start_scores(scores);
        give_turn((group + 1) % GROUPS);
        wait_for_products<0>();
        hold(scores);
        weigh(scores, shrink);
        pack_weights(scores, weights);
        while (true) {
            for (block++; block < work.end_block; block++) {
                advance(scores, weights, sums, shrink);
                shrink_sums(sums, shrink);
                pack_weights(scores, weights);
            }
            const Output output = call.output_of(work);
            if (!call.find(work, ++round)) break;
            const Rows before = rows;
            rows.begin();
            block = work.first_block;
            advance(scores, weights, sums, shrink);
            before.write(output, sums);
            clear_sums(sums);
            pack_weights(scores, weights);
        }
        turn++;
        start_values(weights, sums);
        wait_for_products<0>();
        hold_sums(sums);
        rows.write(call.output_of(work), sums);
    }
};
#endif

// queries, output: (rows, heads * HEAD_DIM), aligned to 16 bytes. Launch: as many blocks as multiprocessors or fewer, THREADS threads,
// 1024 + QUERY_STAGES * QUERY_BYTES + STAGES * (KEY_BYTES + VALUE_BYTES) of dynamic shared memory.
BOUNDED_KERNEL(THREADS, 1)
attention_warp_group(const bf16 *queries, bf16 *output, const KEY_TYPE *keys, const VALUE_TYPE *values, const float *sinks,
                     const Tile *tiles, const int *counts, const int *page_table, int query_stride, int output_stride, int page_stride,
                     int kv_heads, int window, float scale, float softcap) {
#if HAS_WARP_GROUPS
    extern __shared__ uint4 dynamic[];
    __shared__ u64 barriers[2 * QUERY_STAGES + 4 * STAGES];
    const Signals signals = {u32(__cvta_generic_to_shared(barriers))};
    const Places places = {(u32(__cvta_generic_to_shared(dynamic)) + 1023) / 1024 * 1024};
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
        Computer computer = {call, warp / 4 - 1, lane};
        computer.rows.first_row = (warp - 4) * 16 + lane / 4, computer.rows.t = lane % 4;
        computer.compute();
    }
#endif
}
