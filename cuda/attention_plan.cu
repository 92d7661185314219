// The work lists of attention, made on the device once per step and window, so that a captured graph follows the lengths.
//
// Sequences with at most `decode_rows` rows are decoded: tiles of `tile_tokens` rows, each against chunks of pages that are aligned to
// position 0. As long as there is little to read, chunks have CHUNK_PAGES pages, so that all blocks have some. Every piece costs a block
// some microseconds in which it reads little; so where there is more, chunks are larger, and a short last one is part of the one before it
// (on an H200, 14 to 20 % of the time of 64 to 256 sequences of 640 to 2,000 tokens). The last bits of a row thus depend on how much its
// company reads; with `deterministic=True` nothing is decoded. The others are cut into tiles for the prefill kernel, those that see most
// first. Everything after this kernel may read the lists (and the step's inputs) without waiting, since it does not let its successor
// start early.
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "attention.cuh"

constexpr int THREADS = 512;
constexpr int PIECES = 4; // a block has at least so many chunks before they are made larger: few pieces cannot be shared out evenly
constexpr int MOST_DOUBLINGS = 3;

// How sequences are cut.
struct Cut {
    int tile_tokens, window, chunk_tokens;
    bool merged; // a last chunk of half a chunk or less belongs to the one before it
};

struct Shares {
    int rows, position, tiles, first_chunk, chunks;

    DEVICE int items() const { return tiles * chunks; }
};

// What a sequence needs; chunks are those of its last tile, a bound for all.
DEVICE Shares shares(const int *first_row, const int *positions, int sequence, int sequences, const Cut &cut) {
    if (sequence >= sequences) return Shares{};
    const int begin = first_row[sequence], rows = first_row[sequence + 1] - begin;
    if (rows <= 0) return Shares{};
    const int position = positions[begin], first = first_visible(position, cut.window) / cut.chunk_tokens;
    const int end = position + rows, last = (end - 1) / cut.chunk_tokens;
    const bool short_last = cut.merged && last > first && end - last * cut.chunk_tokens <= cut.chunk_tokens / 2;
    return Shares{rows, position, (rows + cut.tile_tokens - 1) / cut.tile_tokens, first, last - first + 1 - short_last};
}

// Sums of `value` over this thread and those before it.
DEVICE int running_sum(int value, int *memory) {
    memory[threadIdx.x] = value;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {
        const int before = threadIdx.x >= step ? memory[threadIdx.x - step] : 0;
        __syncthreads();
        memory[threadIdx.x] += before;
        __syncthreads();
    }
    const int result = memory[threadIdx.x];
    __syncthreads();
    return result;
}

// Cuts for so many tokens that each block reads.
DEVICE Cut cut_of(int tokens, int tile_tokens, int window) {
    Cut cut = {tile_tokens, window, CHUNK_PAGES * PAGE_TOKENS, tokens >= CHUNK_PAGES * PAGE_TOKENS * 3 / 2};
    for (int i = 0; i < MOST_DOUBLINGS && tokens >= PIECES * cut.chunk_tokens; i++) cut.chunk_tokens *= 2;
    return cut;
}

// counts is (2): items and tiles. `readers`: blocks of the decode kernel for each key/value head. Launch: one block of THREADS threads.
KERNEL attention_plan(const int *first_row, const int *positions, Item *items, Tile *tiles, int *counts, int sequences,
                      int decode_rows, int decode_tokens, int prefill_tokens, int window, int most_items, int most_tiles, int readers) {
    __shared__ int memory[THREADS], starts[THREADS][2], all_tokens;
    wait_for_previous();
    if (threadIdx.x == 0) all_tokens = 0;
    __syncthreads();
    for (int sequence = threadIdx.x; sequence < sequences; sequence += THREADS) {
        const int begin = first_row[sequence], rows = first_row[sequence + 1] - begin;
        if (rows <= 0 || rows > decode_rows) continue;
        const int position = positions[begin], tokens = position + rows - first_visible(position, window);
        atomicAdd(&all_tokens, (rows + decode_tokens - 1) / decode_tokens * tokens);
    }
    __syncthreads();
    const Cut cut = cut_of(all_tokens / readers, decode_tokens, window);
    int all_items = 0, all_tiles = 0;
    for (int base = 0; base < sequences; base += THREADS) {
        const int own = base + threadIdx.x;
        const Shares decoded = shares(first_row, positions, own, sequences, cut);
        const bool is_decoded = decoded.rows <= decode_rows;
        const int tile_count = is_decoded ? 0 : (decoded.rows + prefill_tokens - 1) / prefill_tokens;
        const int item_count = is_decoded ? decoded.items() : 0;
        const int item_end = all_items + running_sum(item_count, memory), tile_end = all_tiles + running_sum(tile_count, memory);
        starts[threadIdx.x][0] = item_end - item_count;
        starts[threadIdx.x][1] = tile_end - tile_count;
        if (threadIdx.x == THREADS - 1) memory[0] = item_end, memory[1] = tile_end;
        __syncthreads();
        all_items = memory[0], all_tiles = memory[1];
        for (int index = threadIdx.x / WARP; index < THREADS && base + index < sequences; index += THREADS / WARP) {
            const int sequence = base + index, begin = first_row[sequence];
            const Shares part = shares(first_row, positions, sequence, sequences, cut);
            if (part.rows <= decode_rows) {
                for (int i = threadIdx.x % WARP; i < part.items(); i += WARP) {
                    const int skipped = i / part.chunks * decode_tokens, chunk = part.first_chunk + i % part.chunks;
                    if (starts[index][0] + i >= most_items) break;
                    items[starts[index][0] + i] = Item{begin + skipped, min(decode_tokens, part.rows - skipped), part.position + skipped,
                                                       sequence, chunk, part.first_chunk, part.chunks, cut.chunk_tokens / PAGE_TOKENS};
                }
            } else {
                const int count = (part.rows + prefill_tokens - 1) / prefill_tokens;
                for (int i = threadIdx.x % WARP; i < count; i += WARP) {
                    const int skipped = (count - 1 - i) * prefill_tokens;
                    if (starts[index][1] + i >= most_tiles) break;
                    tiles[starts[index][1] + i] =
                        Tile{begin + skipped, min(prefill_tokens, part.rows - skipped), part.position + skipped, sequence};
                }
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) counts[0] = min(all_items, most_items), counts[1] = min(all_tiles, most_tiles);
}
