// The work lists of attention, made on the device once per step and window, so that a captured graph follows the lengths.
//
// Sequences with at most `decode_rows` rows are decoded: tiles of `tile_tokens` rows, each against chunks of CHUNK_PAGES pages that are
// aligned to position 0, so a row's result does not depend on its company. The others are cut into tiles for the prefill kernel, those
// that see most first. Everything after this kernel may read the lists (and the step's inputs) without waiting, since it does not let
// its successor start early.
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "attention.cuh"

constexpr int THREADS = 512;

struct Shares {
    int rows, position, tiles, first_chunk, chunks;

    DEVICE int items() const { return tiles * chunks; }
};

// What a sequence needs; chunks are those of its last tile, a bound for all.
DEVICE Shares shares(const int *first_row, const int *positions, int sequence, int sequences, int tile_tokens, int window) {
    if (sequence >= sequences) return Shares{};
    const int begin = first_row[sequence], rows = first_row[sequence + 1] - begin;
    if (rows <= 0) return Shares{};
    const int position = positions[begin], tokens = CHUNK_PAGES * PAGE_TOKENS;
    const int first = first_visible(position, window) / tokens, last = (position + rows - 1) / tokens;
    return Shares{rows, position, (rows + tile_tokens - 1) / tile_tokens, first, last - first + 1};
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

// counts is (2): items and tiles. Launch: one block of THREADS threads.
KERNEL attention_plan(const int *first_row, const int *positions, Item *items, Tile *tiles, int *counts, int sequences,
                      int decode_rows, int decode_tokens, int prefill_tokens, int window, int most_items, int most_tiles) {
    __shared__ int memory[THREADS], starts[THREADS][2];
    wait_for_previous();
    int all_items = 0, all_tiles = 0;
    for (int base = 0; base < sequences; base += THREADS) {
        const int own = base + threadIdx.x;
        const Shares decoded = shares(first_row, positions, own, sequences, decode_tokens, window);
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
            const Shares part = shares(first_row, positions, sequence, sequences, decode_tokens, window);
            if (part.rows <= decode_rows) {
                for (int i = threadIdx.x % WARP; i < part.items(); i += WARP) {
                    const int skipped = i / part.chunks * decode_tokens, chunk = part.first_chunk + i % part.chunks;
                    if (starts[index][0] + i >= most_items) break;
                    items[starts[index][0] + i] = Item{begin + skipped, min(decode_tokens, part.rows - skipped), part.position + skipped,
                                                       sequence, chunk, part.first_chunk, part.chunks, 0};
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
