// What attention_warp_group.cu computes with: which tiles a block takes, how shared memory is divided, and the warp group that copies.
constexpr int ROWS = 128; // packed rows of a tile
constexpr int GROUPS = ROWS / 64;
constexpr int THREADS = (GROUPS + 1) * 128;
constexpr int TOKENS = HEAD_DIM > 128 ? 64 : 128; // copied and computed at a time
constexpr int PAGES = TOKENS / PAGE_TOKENS;
constexpr int STAGES = HEAD_DIM > 192 ? 2 : 3;
constexpr int QUERY_STAGES = HEAD_DIM > 64 ? 1 : 2; // tiles whose queries are there
constexpr int PARTS = HEAD_DIM > 128 ? 2 : 1; // of the dimensions, for the sums of values
constexpr int PART_DIMS = HEAD_DIM / PARTS;
constexpr int BLOCKS = (HEAD_DIM + 63) / 64; // of dimensions: what a row of 128 bytes of shared memory holds
constexpr int QUERY_BYTES = BLOCKS * ROWS * 128;
constexpr int KEY_BYTES = BLOCKS * TOKENS * 128, VALUE_BYTES = TOKENS / 64 * HEAD_DIM * 128; // of a stage
constexpr int COPIER_REGISTERS = 40, OTHER_REGISTERS = 232;

#if HAS_WARP_GROUPS
static_assert(sizeof(KEY_TYPE) == 2 && sizeof(VALUE_TYPE) == 2 && HEAD_DIM % 32 == 0, "pages of 8-bit types are for attention_prefill.cu");

// What is full, and what nobody reads any more: each stage of queries, of keys and of values.
struct Signals {
    u32 barriers;

    DEVICE void begin() const {
        for (int i = 0; i < QUERY_STAGES + 2 * STAGES; i++) begin_barrier(full(i), 128), begin_barrier(free(i), GROUPS * 4);
        multiply_what_was_copied();
    }

    DEVICE u32 full(int what) const { return barriers + what * 16; }
    DEVICE u32 free(int what) const { return barriers + what * 16 + 8; }

    static DEVICE int queries(int round) { return round % QUERY_STAGES; }
    static DEVICE int keys(int turn) { return QUERY_STAGES + turn % STAGES; }
    static DEVICE int values(int turn) { return QUERY_STAGES + STAGES + turn % STAGES; }
};

// Where a block's parts lie in shared memory, aligned to 1024 bytes: queries (BLOCKS, ROWS, 64 dimensions), keys likewise, (BLOCKS, TOKENS, 64),
// values transposed, (TOKENS / 64, HEAD_DIM, 64 positions); of row n, pieces of 16 bytes are exchanged by n % 8.
struct Places {
    u32 first;

    DEVICE u32 queries(int round) const { return first + round % QUERY_STAGES * QUERY_BYTES; }
    DEVICE u32 keys(int turn) const { return first + QUERY_STAGES * QUERY_BYTES + turn % STAGES * KEY_BYTES; }
    DEVICE u32 values(int turn) const { return keys(0) + STAGES * KEY_BYTES + turn % STAGES * VALUE_BYTES; }
};

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

// Copies 16 bytes past L1, by which attention takes 0.9 of the time.
DEVICE void copy_past(u32 place, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}

// Copies 8 bytes of which so many exist, the others being zeros.
DEVICE void copy_8_to(u32 place, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
}

typedef int Pages[PAGES / 4]; // those of a block that one of the four warps copies, with neighbouring addresses known at compile time

// One of the 128 threads that copy: lanes that write at a time meet different banks.
struct Copier {
    int warp, lane;

    DEVICE void copy_queries(const bf16 *queries, const Work &work, int stride, u32 place) const {
        for (int group = warp; group < ROWS / 8; group += 4) {
            const int row = group * 8 + lane % 8, token = row / GROUP, head = work.kv_head * GROUP + row % GROUP;
            const bool exists = token < work.tile.rows;
            const bf16 *from = queries + size_t(work.tile.first_row + (exists ? token : 0)) * stride + head * HEAD_DIM + lane / 8 * 8;
            const u32 to = place + row * 128 + (lane / 8 ^ lane % 8) * 16;
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 32; i++) copy_16_to((to ^ i % 2 * 64) + i / 2 * (ROWS * 128), from + i * 32, exists);
        }
    }

    // The page of a block that this warp copies as its i-th, or the nearest that some row sees.
    DEVICE int number(const Work &work, int block, int i) const {
        return max(min(block * PAGES + warp + i * 4, (work.end - 1) / PAGE_TOKENS), work.first / PAGE_TOKENS);
    }

    DEVICE void find_pages(const int *table, const Work &work, int block, Pages &pages) const {
#pragma unroll
        for (int i = 0; i < PAGES / 4; i++) pages[i] = table[number(work, block, i)];
    }

    DEVICE void copy_keys(const u8 *keys, const Pages &pages, const Work &work, int kv_heads, u32 place) const {
        keys += lane % 8 * 64 + lane / 8 * 16; // lanes have 8 tokens of the 16, of a unit's four pieces
        place += (warp * 16 + lane % 8) * 128 + (lane / 8 ^ lane % 8) * 16;
#pragma unroll
        for (int page = 0; page < PAGES / 4; page++) {
            const u8 *from = keys + (size_t(pages[page]) * kv_heads + work.kv_head) * PAGE_BYTES_OF_KEYS;
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 16; i++) {
                copy_past((place ^ i / 2 % 2 * 64) + i / 4 * (TOKENS * 128) + i % 2 * 1024 + page * 8192, from + i * 512);
            }
        }
    }

    DEVICE void copy_values(const u8 *values, const Pages &pages, const Work &work, int block, int kv_heads, u32 place) const {
        const int dim = lane % 16 / 2, four = lane / 16 * 2 + lane % 2; // lanes have 8 dimensions and 4 times 4 tokens
        values += dim / 2 * 64 + four * 16 + dim % 2 * 8;
        place += dim * 128 + (warp * 2 + lane / 16 ^ dim) * 16 + lane % 2 * 8;
#pragma unroll
        for (int page = 0; page < PAGES / 4; page++) {
            const u8 *from = values + (size_t(pages[page]) * kv_heads + work.kv_head) * PAGE_BYTES_OF_VALUES;
            const int bytes = min(max((work.end - number(work, block, page) * PAGE_TOKENS - four * 4) * 2, 0), 8); // of tokens that exist
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) copy_8_to(place + page * (HEAD_DIM * 128) + i * 1024, from + i * 256, bytes);
        }
    }
};
#endif
