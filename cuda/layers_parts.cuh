// How cuda/layers.cu divides attention among blocks, and hands over what each of them finds.
//
// After some hundred tokens attention takes as long as a warp's pages one after the other: with a block for each key/value head 4.2 us of 8,
// on an H200, for five pages a warp. So many pages are divided into as many parts as there are blocks for, until a warp has one, which it reads
// before the queries are there. Who merges the parts of a row's head waits for words that prove themselves: 64 bits, a number and a tag of
// the launch and the operation. So the words are the same ones in all layers, and need no clearing; that nobody overwrites them too early is
// as in layers_words.cuh: who writes again depends on what was read. After 400 tokens of 8B, from the end of queries, keys and values: 1.8 us
// until a block has the queries, 0.5 for a page, 0.5 for merging the warps, 1.4 until the parts are handed over, 0.6 for merging those, and
// 1.3 until all blocks have the row.

constexpr int MOST_ROWS = 2, MOST_PARTS = 16; // rows of a step; parts of a tile's pages
constexpr int WHOLE_PAGES = 4 * DECODE_WARPS; // that are not divided: handing over takes as long as three pages of a warp

DEVICE int most_parts(int kv_heads) { return max(1, min(MOST_PARTS, int(gridDim.x) / kv_heads)); } // as in layers.py

// Some of the pages that a tile's rows see, for one key/value head.
struct Portion {
    Tile tile;
    int kv_head, number, count; // of so many parts
    int begin, end;             // pages

    // The last page of a warp's share, every DECODE_WARPS-th one. Warps go from there to the first: what is new is in the last ones.
    DEVICE int last_of(int warp) const { return end - 1 - (end - 1 - begin - warp + DECODE_WARPS) % DECODE_WARPS; }
};

// What attention needs beside an operation.
struct Pieces {
    const Item *items;
    const int *counts, *page_table;
    int page_stride;
    float scale, softcap;

    DEVICE const int *table(const Portion &part) const { return page_table + size_t(part.tile.sequence) * page_stride; }

    // Where a page of a part lies, or -1 if it is before the part.
    DEVICE int entry(const Portion &part, int page) const { return page >= part.begin ? table(part)[page] : -1; }
};

// The rows that attend together, and the parts of the pages that they see: how many depends on the tile's own length alone.
struct Divided {
    Tile tile;
    int count, pages, all_pages; // parts, pages of each, and of all

    DEVICE Divided() : tile{}, count(0), pages(0), all_pages(0) {}

    DEVICE Divided(const Item &item, int kv_heads) : tile{item.first_row, item.rows, item.first_position, item.sequence} {
        const int most = DECODE_WARPS * most_parts(kv_heads);
        all_pages = (item.first_position + item.rows - 1) / PAGE_TOKENS + 1;
        pages = all_pages <= WHOLE_PAGES ? all_pages : (all_pages + most - 1) / most * DECODE_WARPS;
        count = (all_pages + pages - 1) / pages;
    }

    DEVICE Portion part(int number, int kv_head) const {
        return {tile, kv_head, number, count, number * pages, min((number + 1) * pages, all_pages)};
    }

    // The parts of a row's pages, if it is in this tile.
    DEVICE int of_row(int row) const { return row >= tile.first_row && row < tile.first_row + tile.rows ? count : 0; }
};

// All parts of a step of two tiles at most.
struct Portions {
    Divided first, second;
    int kv_heads;

    DEVICE Portions(const Pieces &pieces, int kv_heads) : kv_heads(kv_heads) {
        const int items = pieces.counts[0];
        if (items == 0) return;
        const Item item = pieces.items[0];
        first = Divided(item, kv_heads);
        if (item.chunks < items) second = Divided(pieces.items[item.chunks], kv_heads);
    }

    DEVICE int all() const { return (first.count + second.count) * kv_heads; }

    DEVICE Portion operator[](int number) const {
        const int own = number / kv_heads;
        return own < first.count ? first.part(own, number % kv_heads) : second.part(own - first.count, number % kv_heads);
    }

    DEVICE int of_row(int row) const { return first.of_row(row) + second.of_row(row); }
};

// What a warp knows of attention before the layers begin: its block's first part, where the last two pages of its share lie, how many parts
// there are in all and of each row's tile, and where each row's new keys and values are stored, or -1.
struct First {
    Portion part;
    int all, entry, before, of_rows[MOST_ROWS], slots[MOST_ROWS];
};
constexpr int FIRST_BYTES = 64;
static_assert(sizeof(First) == FIRST_BYTES, "as in layers.py");

DEVICE u64 with_tag(float number, u32 tag) { return u64(tag) << 32 | __float_as_uint(number); }
DEVICE float number_of(u64 word) { return __uint_as_float(u32(word)); }

// What parts found of each row's heads, (kv_heads, most_parts, MOST_ROWS, GROUP, 2 + HEAD_DIM) words: the greatest score, the sum of weights,
// and sums.
struct Exchange {
    u64 *begin;
    u32 tag;
    int most;

    DEVICE u64 *at(int kv_head, int part, int row, int head) const {
        return begin + (((size_t(kv_head) * most + part) * MOST_ROWS + row) * GROUP + head) * (2 + HEAD_DIM);
    }

    DEVICE void put(u64 *to, float first, float second) const {
        asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(with_tag(first, tag)), "l"(with_tag(second, tag))
                     : "memory");
    }

    DEVICE void put(u64 *to, int dim, const decoding::Merged &found) const {
        if (dim == 0) put(to, found.greatest, found.total);
        put(to + 2 + dim, found.sums.x, found.sums.y), put(to + 4 + dim, found.sums.z, found.sums.w);
    }
};

// The words of a part's head that a lane merges, four sums.
struct Words {
    u64 all[6];

    DEVICE Words(u32 tag) { // of nothing
        all[0] = with_tag(LOWEST, tag);
#pragma unroll
        for (int i = 1; i < 6; i++) all[i] = with_tag(0.0f, tag);
    }

    DEVICE void read(const u64 *from, int dim) {
#pragma unroll
        for (int i = 0; i < 6; i += 2) {
            const u64 *pair = i > 0 ? from + i + dim : from;
            asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(all[i]), "=l"(all[i + 1]) : "l"(pair));
        }
    }

    DEVICE decoding::Merged found() const {
        const float4 sums = make_float4(number_of(all[2]), number_of(all[3]), number_of(all[4]), number_of(all[5]));
        return {number_of(all[0]), number_of(all[1]), sums};
    }

    DEVICE bool are_there(u32 tag) const {
        u32 others = 0;
#pragma unroll
        for (int i = 0; i < 6; i++) others |= u32(all[i] >> 32) ^ tag;
        return others == 0;
    }
};

// What a lane's words are together, in their order.
template <int COUNT> DEVICE decoding::Merged merged(const Words (&words)[COUNT]) {
    decoding::Merged all = {LOWEST, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll
    for (int i = 0; i < COUNT; i++) all.greatest = fmaxf(all.greatest, words[i].found().greatest);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const decoding::Merged found = words[i].found();
        const float factor = exp2_fast(found.greatest - all.greatest);
        all.total = fmaf(factor, found.total, all.total);
        decoding::add_scaled(all.sums, factor, found.sums);
    }
    return all;
}

// Joins what lanes have that are `step` apart.
DEVICE void join_lanes(decoding::Merged &own, int step) {
    const auto of_other = [&](float value) { return __shfl_xor_sync(ALL_LANES, value, step); };
    const float greatest = fmaxf(own.greatest, of_other(own.greatest)), factor = exp2_fast(own.greatest - greatest);
    const auto join = [&](float &value) { value *= factor, value += of_other(value); };
    own.greatest = greatest;
    join(own.total), join(own.sums.x), join(own.sums.y), join(own.sums.z), join(own.sums.w);
}
