// Attention of few query rows over long paged keys and values, at the speed of reading them once: decoding, and verifying drafts.
//
// Operands are swapped: tokens are the 16 rows of the matrix instruction, packed query rows its 8 columns. Keys and values go from memory
// into registers (kv.cuh says why that works), weights of the softmax cross from one product to the other by a transposing move. A block
// takes one chunk of positions for one key/value head; its warps take pages in turn, and their results are merged in order. If a tile has
// several chunks, the block that finishes last merges them, in ascending order whoever it is.
#ifndef DECODE_BLOCKS
#define DECODE_BLOCKS 2 // for each multiprocessor
#endif
#ifndef DECODE_BARRIER
#define DECODE_BARRIER() __syncthreads() // of the THREADS threads that call attend()
#endif
#include "attention_pages.cuh"
#include "attention_turn.cuh"

namespace decoding {

constexpr int STRIDE = HEAD_DIM + 8;                 // of partial results in shared memory
constexpr int PARTIAL = HEAD_DIM + 4;                // in global memory: the sums, the greatest score, the sum of weights, two of nothing
constexpr int MOST_ROWS = 8;                         // of a sequence that is decoded: DECODE_ROWS in attention.py
constexpr int PREFETCHED = 4;                        // pages of a warp that are brought to L2 before the kernel waits

struct Shared {
    float sums[WARPS][ROWS][STRIDE], greatest[WARPS][ROWS], total[WARPS][ROWS];
    bool is_last;
};

DEVICE void publish(const Running &own, int warp, int g, int t, Shared &shared) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = part * 8 + 2 * t + i;
            float total = own.total[part][i];
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
            if (g == 0) shared.greatest[warp][row] = own.greatest[part][i], shared.total[warp][row] = total;
#pragma unroll
            for (int tile = 0; tile < DIM_TILES; tile++) {
                *reinterpret_cast<float2 *>(&shared.sums[warp][row][tile_dim(tile, g)]) =
                    make_float2(own.sums[part][tile][i], own.sums[part][tile][i + 2]);
            }
        }
    }
}

DEVICE void add_scaled(float4 &sum, float factor, const float4 &values) {
    sum.x = fmaf(factor, values.x, sum.x), sum.y = fmaf(factor, values.y, sum.y);
    sum.z = fmaf(factor, values.z, sum.z), sum.w = fmaf(factor, values.w, sum.w);
}

// What some pages give to four dimensions of a row: sums by weights, the sum of those, and the greatest score that they are relative to.
struct Merged {
    float greatest, total;
    float4 sums;

    DEVICE void write(bf16 *to, float factor) const {
        const u32 first = pack_bf16(sums.x * factor, sums.y * factor), second = pack_bf16(sums.z * factor, sums.w * factor);
        asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(first), "r"(second) : "memory"); // layers_words.cuh says why
    }
};

// What the warps found, merged in their order.
DEVICE Merged merge_warps(const Shared &shared, int row, int dim) {
    Merged all = {LOWEST, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) all.greatest = fmaxf(all.greatest, shared.greatest[warp][row]);
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        const float factor = exp2_fast(shared.greatest[warp][row] - all.greatest);
        all.total = fmaf(factor, shared.total[warp][row], all.total);
        add_scaled(all.sums, factor, *reinterpret_cast<const float4 *>(&shared.sums[warp][row][dim]));
    }
    return all;
}

// Where results go, and where this block's partial ones lie among those of its tile.
struct Result {
    bf16 *output;
    const float *sinks;
    float *partials; // (items, kv_heads, ROWS, PARTIAL)
    int stride, index, kv_head, kv_heads;

    DEVICE float *partial(int item, int row) const { return partials + ((size_t(item) * kv_heads + kv_head) * ROWS + row) * PARTIAL; }

    DEVICE void write(const Item &item, int row, int dim, const Merged &found) const {
        const int head = kv_head * GROUP + row % GROUP;
        float factor = 1.0f, total = found.total;
        if (sinks) factor = join_sink(sinks[head], found.greatest, total);
        factor /= total;
        found.write(output + size_t(item.first_row + row / GROUP) * stride + head * HEAD_DIM + dim, factor);
    }

    // Merges the warps' results: into the output if they are all of them, else into the item's partial result.
    DEVICE void merge_warps(const Item &item, const Shared &shared) const {
        for (int i = threadIdx.x * 4; i < item.rows * GROUP * HEAD_DIM; i += THREADS * 4) {
            const int row = i / HEAD_DIM, dim = i % HEAD_DIM;
            const Merged found = decoding::merge_warps(shared, row, dim);
            if (item.chunks == 1) {
                write(item, row, dim, found);
            } else {
                float *own = partial(index, row);
                *reinterpret_cast<float4 *>(own + dim) = found.sums;
                if (dim == 0) own[HEAD_DIM] = found.greatest, own[HEAD_DIM + 1] = found.total;
            }
        }
    }

    // Merges the results of all chunks into the output, a warp a row: first the greatest score and the sum of weights, then the values.
    DEVICE void merge_chunks(const Item &item) const {
        const int first = index - (item.chunk - item.first_chunk);
        const size_t step = size_t(kv_heads) * ROWS * PARTIAL;
        const int lane = threadIdx.x % WARP;
        for (int row = threadIdx.x / WARP; row < item.rows * GROUP; row += WARPS) {
            const float *begin = partial(first, row);
            float greatest = LOWEST, total = 0.0f;
            for (int chunk = lane; chunk < item.chunks; chunk += WARP) greatest = fmaxf(greatest, __ldcg(begin + chunk * step + HEAD_DIM));
            greatest = warp_max(greatest);
            for (int chunk = lane; chunk < item.chunks; chunk += WARP) {
                const float *one = begin + chunk * step + HEAD_DIM;
                total = fmaf(exp2_fast(__ldcg(one) - greatest), __ldcg(one + 1), total);
            }
            total = warp_sum(total);
            for (int dim = lane * 4; dim < HEAD_DIM; dim += WARP * 4) {
                float4 sums = {};
#pragma unroll 8
                for (int chunk = 0; chunk < item.chunks; chunk++) {
                    const float *one = begin + chunk * step;
                    add_scaled(sums, exp2_fast(__ldcg(one + HEAD_DIM) - greatest), __ldcg(reinterpret_cast<const float4 *>(one + dim)));
                }
                write(item, row, dim, {greatest, total, sums});
            }
        }
    }
};

// A piece whose partial result is written, and which may have been the last of its tile: whoever comes last merges the tile's chunks. The
// answer is asked for at once and looked at when the next piece is done, so that nobody waits for it.
struct Pending {
    Item item;
    Result result;
    int *counter;
    int arrived; // before this one; thread 0 knows
    bool exists;

    // Asks, after a barrier behind the writing of the partial result.
    DEVICE void ask(const Item &own, const Result &own_result, int *counters) {
        exists = own.chunks > 1;
        if (!exists) return;
        item = own, result = own_result;
        counter = counters + size_t(result.index - (item.chunk - item.first_chunk)) * result.kv_heads + result.kv_head;
        if (threadIdx.x > 0) return; // the last one makes the counter 0 again
        asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(arrived) : "l"(counter), "r"(item.chunks - 1) : "memory");
    }

    // Leaves the answer in shared memory, before a barrier.
    DEVICE void tell(Shared &shared) const {
        if (threadIdx.x > 0) return;
        shared.is_last = exists && arrived == item.chunks - 1;
    }

    // Merges if this was the last piece, after that barrier.
    DEVICE void merge(const Shared &shared) const {
        if (!shared.is_last) return;
        __threadfence(); // what others wrote is visible now
        result.merge_chunks(item);
    }
};

// A block's piece of work, and a warp's share of it: pages `number`, `number + WARPS`, ... below `end`.
struct Work {
    Item item;
    Pages pages;
    int index, begin, number, end;
    int first, second; // where the warp's first pages lie
    int fresh, rope_row; // with ROTATES: the position of the sequence's first row in this step, and of Ahead

    DEVICE void take(const Item *items, int work, const int *page_table, int page_stride, int window, const Turning &turning) {
        index = work / pages.kv_heads;
        item = items[index];
        pages.kv_head = work % pages.kv_heads;
        pages.table = page_table + size_t(item.sequence) * page_stride;
        begin = max(item.chunk * item.chunk_pages, first_visible(item.first_position, window) / PAGE_TOKENS);
        end = (item.first_position + item.rows - 1) / PAGE_TOKENS + 1;
        if (item.chunk + 1 < item.first_chunk + item.chunks) end = min(end, (item.chunk + 1) * item.chunk_pages);
        // Pages are dealt to warps by their absolute number, so that a window does not change the order of sums.
        number = begin + (int(threadIdx.x) / WARP - begin % WARPS + WARPS) % WARPS;
        first = pages.entry(number, end), second = pages.entry(number + WARPS, end);
#if ROTATES
        rope_row = Ahead::rope_row(turning, item.first_row, item.rows);
        fresh = item.first_position - (item.first_row - turning.first_row[item.sequence]);
#endif
    }

    DEVICE void read(Page &page) const {
        if (number < end) pages.read_keys(page, pages.part_of(first)), pages.read_values(page, pages.part_of(first));
    }

    // Where the warp's first pages lie, one for each lane.
    DEVICE int entries() const {
        const int lane = pages.g * 4 + pages.t;
        return lane < PREFETCHED ? pages.entry(number + lane * WARPS, end) : 0;
    }

    // Brings them to L2, but for the first one. Otherwise they would come behind the weights that the kernels beside this one copy ahead.
    DEVICE void prefetch(int entries) const {
        const int lane = pages.g * 4 + pages.t;
#pragma unroll
        for (int i = 1; i < PREFETCHED; i++) {
            const size_t part = pages.part_of(__shfl_sync(ALL_LANES, entries, i));
            if (number + i * WARPS >= end) continue;
            for (int at = lane * 128; at < PAGE_BYTES_OF_KEYS; at += WARP * 128) prefetch_line(pages.keys + part * PAGE_BYTES_OF_KEYS + at);
            for (int at = lane * 128; at < PAGE_BYTES_OF_VALUES; at += WARP * 128) prefetch_line(pages.values + part * PAGE_BYTES_OF_VALUES + at);
        }
    }

    // Whether the first page's tokens are all older than this step's: then it may be read before its keys and values are stored. Rows before
    // the item's first one may be of the same sequence.
    DEVICE bool is_old() const {
        return (number + 1) * PAGE_TOKENS <= (ROTATES ? fresh : item.first_position - min(item.first_row, MOST_ROWS - 1));
    }

#if ROTATES
    // Stores the new keys and values of a page's tokens that the item's rows see.
    DEVICE void store_page(int page, const Ahead &ahead, const bf16 *queries, int stride, const Turning &turning) const {
        const int until = min(item.first_position + item.rows, (page + 1) * PAGE_TOKENS), kv_head = pages.kv_head, kv_heads = pages.kv_heads;
#pragma unroll 1
        for (int position = max(fresh, page * PAGE_TOKENS); position < until; position++) {
            const int own = position - item.first_position, row = item.first_row + own;
            const bool is_here = own >= 0; // else of a tile before this one
            const int slot = is_here ? ahead.slots[own] : turning.slots[row];
            if (u32(slot) >= u32(turning.all_slots)) continue;
            const bf16 *there = queries + size_t(row) * stride + (kv_heads * GROUP + kv_head) * HEAD_DIM;
            const bf16 *key = is_here ? ahead.keys[own] : there, *value = is_here ? ahead.values[own] : there + kv_heads * HEAD_DIM;
            const float2 *turn = is_here ? ahead.turns[own] : turning.turn(turning.rope_rows[row]);
            const size_t at = page_index(slot / PAGE_TOKENS, kv_head, kv_heads);
            store_token(key, value, turn, (bf16 *)pages.keys + at, (bf16 *)pages.values + at, slot % PAGE_TOKENS);
        }
    }

    DEVICE void ask_for_turns(Ahead &ahead, const Turning &turning) const { ahead.ask_for_turns(turning, rope_row, item.first_row, item.rows); }
    DEVICE void ask_for_rows(Ahead &ahead, const bf16 *queries, int stride, int kv_heads) const {
        ahead.ask_for_rows(queries, stride, item.first_row, item.rows, pages.kv_head, kv_heads);
    }

    // Rotates queries and stores new keys and values, by all threads between two barriers.
    DEVICE void turn(Ahead &ahead, const bf16 *queries, int stride, const Turning &turning) const {
        ahead.rotate(item.rows);
        if (int(threadIdx.x) / WARP < WARPS - 1) return;
        for (int page = max(begin, fresh / PAGE_TOKENS); page < end; page++) store_page(page, ahead, queries, stride, turning); // two at most
    }
#endif
};

// What one layer's attention reads and writes, as attention_decode.cu says.
struct Call {
    const bf16 *queries;
    bf16 *output;
    const KEY_TYPE *keys;
    const VALUE_TYPE *values;
    const float *key_scales, *value_scales, *sinks;
    const Item *items;
    const int *counts, *page_table;
    float *partials;
    int *counters;
    int query_stride, output_stride, page_stride, kv_heads, window, most_items;
    float scale, softcap;
    Turning turning;
};

// Waits for the kernel before this one, and with ROTATES until what the first piece needs of it is in its place.
DEVICE void begin(const Call &call, const Work &first, bool exists, Ahead &ahead) {
#if ROTATES
    if (exists) first.ask_for_turns(ahead, call.turning);
    wait_for_previous();
    if (exists) first.ask_for_rows(ahead, call.queries, call.query_stride, call.kv_heads);
    end_group();
    wait_group<0>();
    DECODE_BARRIER();
    if (exists) first.turn(ahead, call.queries, call.query_stride, call.turning);
    DECODE_BARRIER();
#else
    wait_for_previous();
#endif
}

// The queries of a piece as the operand that meets the keys.
DEVICE void read_queries(const Call &call, const Work &work, const Ahead &ahead, u32 (&query)[PARTS][HEAD_DIM / 8]) {
    const int g = work.pages.g, t = work.pages.t;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        uint4 words[QUERY_READS];
#if ROTATES
        ahead.query(g, work.item.rows * GROUP, t, words);
#else
        const int row = part * 8 + g, head = work.pages.kv_head * GROUP + row % GROUP;
        const bf16 *from = call.queries + size_t(work.item.first_row + row / GROUP) * call.query_stride + head * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < QUERY_READS; i++) {
            words[i] = row < work.item.rows * GROUP ? *reinterpret_cast<const uint4 *>(from + query_dim(i, t)) : make_uint4(0, 0, 0, 0);
        }
#endif
        query_operand(words, query[part]);
    }
}

// Attends to the pieces of this block, every gridDim.x-th one, once the kernel before this one has ended. THREADS threads call this.
DEVICE void attend(const Call &call, Shared &shared) {
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    Work next = {{}, {reinterpret_cast<const u8 *>(call.keys), reinterpret_cast<const u8 *>(call.values), call.key_scales, call.value_scales,
                      call.page_table, 0, call.kv_heads, g, t, streaming_policy()}, 0, 0, 0, 0, 0, 0, 0, 0};
    const auto take = [&](int work) { next.take(call.items, work, call.page_table, call.page_stride, call.window, call.turning); };
    Page page;
    Pending pending = {};
    int number = blockIdx.x;
    const int work_end = call.counts[0] * call.kv_heads;
    // A block does not wait for the count to know whether it has a piece, unless registers are short: one without rows is none.
    const int first = number / call.kv_heads;
    const bool has_work = HEAD_DIM > 128 ? number < work_end : first < call.most_items && call.items[first].rows > 0;
    if (has_work) {
        take(number);
        const int entries = next.entries();
        if (next.is_old()) next.read(page);
        next.prefetch(entries);
    }
    __shared__ Ahead ahead[2]; // of a piece, and of the next one
    int side = 0;
    begin(call, next, has_work, ahead[side]);
    for (int own_number = number; own_number < work_end; own_number = number) {
        const Work work = next;
        number += gridDim.x;
        if (number < work_end) take(number);
        const int kv_head = work.pages.kv_head;
        const Score score = {call.scale, call.softcap, call.window, work.item.first_position};
        u32 query[PARTS][HEAD_DIM / 8];
        read_queries(call, work, ahead[side], query);
        side ^= 1;
#if ROTATES
        if (number < work_end) {
            next.ask_for_turns(ahead[side], call.turning);
            next.ask_for_rows(ahead[side], call.queries, call.query_stride, call.kv_heads);
        }
        end_group();
#endif
        if ((ROTATES || own_number == int(blockIdx.x)) && !work.is_old()) work.read(page);
        Running own = {};
#pragma unroll
        for (int part = 0; part < PARTS; part++) own.greatest[part][0] = own.greatest[part][1] = LOWEST;
        run_pages(work.pages, query, score, work.item.rows, work.number, work.end, work.second, page, own);
        // The next piece's first page is read while the results of this one are merged.
        if (number < work_end && (!ROTATES || next.is_old())) next.read(page);
        publish(own, warp, g, t, shared);
        if constexpr (ROTATES) wait_group<0>();
        pending.tell(shared);
        DECODE_BARRIER();
        const Result result = {call.output, call.sinks, call.partials, call.output_stride, work.index, kv_head, call.kv_heads};
        result.merge_warps(work.item, shared);
        pending.merge(shared);
#if ROTATES
        if (number < work_end) next.turn(ahead[side], call.queries, call.query_stride, call.turning);
#endif
        DECODE_BARRIER();
        pending.ask(work.item, result, call.counters);
    }
    pending.tell(shared);
    DECODE_BARRIER();
    pending.merge(shared);
}
} // namespace decoding
