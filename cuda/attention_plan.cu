// The work lists of attention, made on the device once per step and window, so that a captured graph follows the lengths.
//
// Sequences with at most `decode_rows` rows are decoded: tiles of `tile_tokens` rows, each against chunks of pages that are aligned to
// position 0. As long as there is little to read, chunks have CHUNK_PAGES pages, so that all blocks have some. Every piece costs a block
// some microseconds in which it reads little; so where there is more, chunks are larger, and a short last one is part of the one before it
// (on an H200, 14 to 20 % of the time of 64 to 256 sequences of 640 to 2,000 tokens). There, too, what is left for a last round of the
// blocks that is no full one is cut smaller. The last bits of a row thus depend on how much its company reads; with `deterministic=True`
// nothing is decoded. The others are cut into tiles for the prefill kernel, those that see most first. Everything after this kernel may
// read the lists (and the step's inputs) without waiting, since it does not let its successor start early.
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "attention.cuh"

constexpr int THREADS = 512;
constexpr int PIECES = 4; // a block has at least so many chunks before they are made larger: few pieces cannot be shared out evenly
constexpr int MOST_DOUBLINGS = 3;
constexpr int LEAST_PAGES = 8; // of a piece of the last round

// How sequences are cut.
struct Cut {
    int tile_tokens, window, chunk_tokens;
    bool merged; // a last chunk of half a chunk or less belongs to the one before it
};

// Rows of a sequence in this step: the first one, how many, and the first one's position.
struct Sequence {
    int begin, rows, position;

    DEVICE int tiles(int tokens) const { return (rows + tokens - 1) / tokens; }
    DEVICE int visible(int window) const { return rows > 0 ? position + rows - first_visible(position, window) : 0; }
};

struct Sequences {
    const int *first_row, *positions;
    int count, decode_rows;
    Sequence own; // of this thread; where there are more sequences than threads, others are read again

    DEVICE Sequence read(int number) const {
        if (number >= count) return Sequence{};
        const int begin = first_row[number], rows = first_row[number + 1] - begin;
        return Sequence{begin, rows, rows > 0 ? positions[begin] : 0};
    }

    DEVICE Sequence operator[](int number) const { return number == threadIdx.x ? own : read(number); }
    DEVICE bool is_decoded(const Sequence &sequence) const { return sequence.rows > 0 && sequence.rows <= decode_rows; }
};

struct Shares {
    int tiles, first_chunk, chunks;

    DEVICE int items() const { return tiles * chunks; }
};

// What a sequence of some rows needs; chunks are those of its last tile, a bound for all.
DEVICE Shares shares(const Sequence &sequence, const Cut &cut) {
    const int first = first_visible(sequence.position, cut.window) / cut.chunk_tokens;
    const int end = sequence.position + sequence.rows, last = (end - 1) / cut.chunk_tokens;
    const bool short_last = cut.merged && last > first && end - last * cut.chunk_tokens <= cut.chunk_tokens / 2;
    return Shares{sequence.tiles(cut.tile_tokens), first, last - first + 1 - short_last};
}

// What is left for the last round of the blocks, if it would be half of them or less: sequences from item `first` on, each piece of which
// becomes `parts`. (On an H200, 40 sequences of 640 tokens, of which 33 are a round, take 30 us so, and 33 uncut; reading takes 23.)
struct LastRound {
    int first, parts;

    DEVICE LastRound(int items, int readers, int most_items) : first(items / readers * readers), parts(0) {
        const int left = items - first;
        if (first > 0 && left > 0) parts = readers / left;
        if (items + left * parts > most_items) parts = 0;
    }

    DEVICE bool exists() const { return parts > 1; }

    // The cut of a sequence in it.
    DEVICE Cut cut(Cut whole, const Sequence &sequence, int chunks) const {
        const int pages = (sequence.visible(whole.window) + chunks * parts * PAGE_TOKENS - 1) / (chunks * parts * PAGE_TOKENS);
        whole.chunk_tokens = max(pages, LEAST_PAGES) * PAGE_TOKENS;
        return whole;
    }
};

// Sums of `value` over this thread and those before it.
DEVICE int running_sum(int value, int *memory) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += before;
    }
    if (lane == WARP - 1) memory[warp] = value;
    __syncthreads();
    for (int i = 0; i < warp; i++) value += memory[i];
    __syncthreads();
    return value;
}

// Cuts for so many tokens that each block reads.
DEVICE Cut cut_of(int tokens, int tile_tokens, int window) {
    Cut cut = {tile_tokens, window, CHUNK_PAGES * PAGE_TOKENS, tokens >= CHUNK_PAGES * PAGE_TOKENS * 3 / 2};
    for (int i = 0; i < MOST_DOUBLINGS && tokens >= PIECES * cut.chunk_tokens; i++) cut.chunk_tokens *= 2;
    return cut;
}

// What is written.
struct Lists {
    Item *items;
    Tile *tiles;
    int most_items, most_tiles, decode_tokens, prefill_tokens;

    // Writes a decoded sequence's pieces, by a warp.
    DEVICE void decode(const Sequence &sequence, int number, const Cut &cut, int start) const {
        const Shares part = shares(sequence, cut);
        for (int i = threadIdx.x % WARP; i < part.items() && start + i < most_items; i += WARP) {
            const int skipped = i / part.chunks * decode_tokens, chunk = part.first_chunk + i % part.chunks;
            items[start + i] = Item{sequence.begin + skipped, min(decode_tokens, sequence.rows - skipped), sequence.position + skipped,
                                    number, chunk, part.first_chunk, part.chunks, cut.chunk_tokens / PAGE_TOKENS};
        }
    }

    // Writes another one's tiles.
    DEVICE void prefill(const Sequence &sequence, int number, int start) const {
        const int count = sequence.tiles(prefill_tokens);
        for (int i = threadIdx.x % WARP; i < count && start + i < most_tiles; i += WARP) {
            const int skipped = (count - 1 - i) * prefill_tokens, rows = min(prefill_tokens, sequence.rows - skipped);
            tiles[start + i] = Tile{sequence.begin + skipped, rows, sequence.position + skipped, number};
        }
    }
};

// counts is (2): items and tiles. `readers`: blocks of the decode kernel for each key/value head. Launch: one block of THREADS threads.
KERNEL attention_plan(const int *first_row, const int *positions, Item *items, Tile *tiles, int *counts, int sequences,
                      int decode_rows, int decode_tokens, int prefill_tokens, int window, int most_items, int most_tiles, int readers) {
    __shared__ int memory[THREADS / WARP], starts[THREADS][2], chunk_tokens[THREADS], all_tokens, whole_items;
    __shared__ Sequence those[THREADS];
    wait_for_previous();
    const Lists lists = {items, tiles, most_items, most_tiles, decode_tokens, prefill_tokens};
    Sequences all = {first_row, positions, sequences, decode_rows};
    all.own = all.read(threadIdx.x);
    if (threadIdx.x == 0) all_tokens = 0, whole_items = 0;
    __syncthreads();
    for (int number = threadIdx.x; number < sequences; number += THREADS) {
        const Sequence sequence = all[number];
        if (all.is_decoded(sequence)) atomicAdd(&all_tokens, sequence.tiles(decode_tokens) * sequence.visible(window));
    }
    __syncthreads();
    const Cut cut = cut_of(all_tokens / readers, decode_tokens, window);
    // As long as little is read, nothing depends on how many sequences there are.
    for (int number = threadIdx.x; cut.merged && number < sequences; number += THREADS) {
        const Sequence sequence = all[number];
        if (all.is_decoded(sequence)) atomicAdd(&whole_items, shares(sequence, cut).items());
    }
    __syncthreads();
    const LastRound last_round(whole_items, readers, most_items);
    int all_items = 0, all_tiles = 0, whole_before = 0;
    for (int base = 0; base < sequences; base += THREADS) {
        const Sequence own = those[threadIdx.x] = all[base + threadIdx.x];
        const bool is_decoded = all.is_decoded(own);
        const int tile_count = is_decoded ? 0 : own.tiles(prefill_tokens);
        const Shares whole = is_decoded ? shares(own, cut) : Shares{};
        int item_count = whole.items();
        chunk_tokens[threadIdx.x] = cut.chunk_tokens;
        if (last_round.exists()) {
            const int end = whole_before + running_sum(item_count, memory);
            if (item_count > 0 && end - item_count >= last_round.first) {
                const Cut fine = last_round.cut(cut, own, whole.chunks);
                chunk_tokens[threadIdx.x] = fine.chunk_tokens;
                item_count = shares(own, fine).items();
            }
            if (threadIdx.x == THREADS - 1) memory[0] = end;
            __syncthreads();
            whole_before = memory[0];
            __syncthreads();
        }
        const int item_end = all_items + running_sum(item_count, memory), tile_end = all_tiles + running_sum(tile_count, memory);
        starts[threadIdx.x][0] = item_end - item_count;
        starts[threadIdx.x][1] = tile_end - tile_count;
        if (threadIdx.x == THREADS - 1) memory[0] = item_end, memory[1] = tile_end;
        __syncthreads();
        all_items = memory[0], all_tiles = memory[1];
        for (int index = threadIdx.x / WARP; index < THREADS && base + index < sequences; index += THREADS / WARP) {
            Cut fine = cut;
            fine.chunk_tokens = chunk_tokens[index];
            if (all.is_decoded(those[index])) lists.decode(those[index], base + index, fine, starts[index][0]);
            else lists.prefill(those[index], base + index, starts[index][1]);
        }
        __syncthreads();
    }
    // Blocks look at their first piece before they know how many there are.
    for (int i = min(all_items, most_items) + threadIdx.x; i < min(readers + 1, most_items); i += THREADS) items[i].rows = 0;
    if (threadIdx.x == 0) counts[0] = min(all_items, most_items), counts[1] = min(all_tiles, most_tiles);
}
