// How cuda/layers.cu attends: with the queries, keys and values that the operation before hands over, a block a part (layers_parts.cuh). The
// warps that do not attend store new keys and values, and merge parts.

static_assert(WARPS > DECODE_WARPS && HEAD_DIM % 32 == 0, "a warp that helps");
static_assert(decoding::PARTS == 1 && sizeof(KEY_TYPE) == 2 && sizeof(VALUE_TYPE) == 2, "as _can_run in layers.py sees to");

// Finds what a warp needs to know of attention.
DEVICE void find_first(const Launch &launch, const Pieces &pieces, int warp, int lane) {
    const Inputs &inputs = launch.inputs;
    const Portions parts(pieces, inputs.kv_heads);
    First first = {parts[blockIdx.x], parts.all(), -1, -1, {}, {}};
#pragma unroll
    for (int row = 0; row < MOST_ROWS; row++) {
        const int slot = row < inputs.rows ? inputs.slots[row] : -1;
        first.of_rows[row] = parts.of_row(row), first.slots[row] = u32(slot) < u32(inputs.all_slots) ? slot : -1;
    }
    if (int(blockIdx.x) < first.all && warp < DECODE_WARPS) {
        const int last = first.part.last_of(warp);
        first.entry = pieces.entry(first.part, last), first.before = pieces.entry(first.part, last - DECODE_WARPS);
    }
    if (lane == 0) launch.room.first(warp) = first;
    __syncwarp();
}

struct Attention {
    static constexpr int SLICE = 32; // dimensions that a warp merges
    const Operation &own;
    const Launch &launch;
    const Pieces &pieces;
    const First &first;
    const bf16 *rows; // queries, keys and values of all heads
    bf16 *output;
    Exchange exchange;

    DEVICE const bf16 *keys_of(int row, int kv_head) const {
        return rows + size_t(row) * own.input_stride + (launch.inputs.heads + kv_head) * HEAD_DIM;
    }
    DEVICE const bf16 *values_of(int row, int kv_head) const { return keys_of(row, kv_head) + launch.inputs.kv_heads * HEAD_DIM; }

    // Puts this step's new keys and values into what was read of a page, which may be from before they were stored, or after. Meanwhile
    // `others` are waited for, too, which `read_other` asks for again: one after the other would take as many ways to L2 and back.
    template <class Read>
    DEVICE void renew(decoding::Page &page, int entry, int kv_head, int g, int t, uint4 (&others)[QUERY_READS], Read read_other) const {
#pragma unroll 1
        for (int row = 0; row < launch.inputs.rows; row++) {
            const int slot = first.slots[row], place = slot % PAGE_TOKENS;
            if (slot < 0 || slot / PAGE_TOKENS != entry) continue;
            const bf16 *keys = keys_of(row, kv_head) + query_dim(0, t), *values = values_of(row, kv_head) + tile_dim(0, g);
            const bool is_lower = lower_token(g) == place, is_upper = upper_token(g) == place;
            const u32 none = is_lower || is_upper ? NOT_THERE : 0;
            uint4 words[KEY_UNITS];
            u32 pairs[VALUE_UNITS];
#pragma unroll
            for (int i = 0; i < KEY_UNITS; i++) words[i] = make_uint4(none, none, none, none);
#pragma unroll
            for (int i = 0; i < VALUE_UNITS; i++) pairs[i] = NOT_THERE;
            bool misses;
            do {
                misses = false;
#pragma unroll
                for (int i = 0; i < KEY_UNITS; i++) {
                    if (!are_there(words[i])) words[i] = load_words(keys + i * 32), misses = true;
                }
#pragma unroll
                for (int i = 0; i < VALUE_UNITS; i++) {
                    if (pairs[i] == NOT_THERE) pairs[i] = load_word(values + i * 16), misses = true;
                }
#pragma unroll
                for (int i = 0; i < QUERY_READS; i++) {
                    if (!are_there(others[i])) others[i] = read_other(i), misses = true;
                }
            } while (misses);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < KEY_UNITS; i++) {
                if (is_lower) page.keys[i][0] = words[i];
                if (is_upper) page.keys[i][1] = words[i];
            }
            renew_values(page, pairs, t == place / 4 ? place % 4 : -1);
        }
    }

    // Puts pairs of neighbouring dimensions of a token in the place of one of a lane's four, or of none.
    DEVICE static void renew_values(decoding::Page &page, const u32 (&pairs)[VALUE_UNITS], int token) {
        const u32 same = 0x3210, first = token % 2 ? 0x5410 : 0x3254, second = token % 2 ? 0x7610 : 0x3276; // of a pair
        const bool is_early = token >= 0 && token < 2, is_late = token >= 2;
#pragma unroll
        for (int i = 0; i < VALUE_UNITS; i++) {
            uint4 &own = page.values[i];
            own.x = __byte_perm(own.x, pairs[i], is_early ? first : same), own.z = __byte_perm(own.z, pairs[i], is_early ? second : same);
            own.y = __byte_perm(own.y, pairs[i], is_late ? first : same), own.w = __byte_perm(own.w, pairs[i], is_late ? second : same);
        }
    }

    // A warp's share of a part, from its last page on.
    DEVICE void run(const Portion &part, const decoding::Pages &pages, int number, int entry, int before, decoding::Page &page,
                    decoding::Running &found) const {
        const int g = pages.g, t = pages.t, rows_of_tile = part.tile.rows;
        const bf16 *from = rows + size_t(part.tile.first_row + g / GROUP) * own.input_stride + (part.kv_head * GROUP + g % GROUP) * HEAD_DIM;
        const auto read = [&](int i) { return g < rows_of_tile * GROUP ? load_words(from + query_dim(i, t)) : make_uint4(0, 0, 0, 0); };
        uint4 words[QUERY_READS];
#pragma unroll
        for (int i = 0; i < QUERY_READS; i++) words[i] = read(i);
        renew(page, entry, part.kv_head, g, t, words, read);
        wait_for_words(words, read);
        u32 query[1][HEAD_DIM / 8];
        query_operand(words, query[0]);
        const Score score = {pieces.scale, pieces.softcap, 0, part.tile.first_position};
        for (; number >= part.begin; number -= DECODE_WARPS) {
            const int begin = number * PAGE_TOKENS, valid = part.tile.first_position + rows_of_tile - begin;
            const size_t index = pages.part_of(before);
            const bool goes_on = before >= 0;
            float weights[1][4];
            before = pieces.entry(part, number - 2 * DECODE_WARPS); // in time
            weigh(page, query, score, begin, !score.all_visible(begin, begin + PAGE_TOKENS, rows_of_tile), g, t, weights, found);
            if (valid < PAGE_TOKENS) blank_page(page, valid, g, t);
            if (goes_on) pages.read_keys(page, index);
            add_values(page, weights, found);
            if (goes_on) pages.read_values(page, index);
        }
    }

    // Merges what the block's warps found: into the output, if that is all, or for whoever merges parts.
    DEVICE void merge(const Portion &part, const decoding::Shared &shared) const {
        for (int i = threadIdx.x * 4; i < part.tile.rows * GROUP * HEAD_DIM; i += decoding::THREADS * 4) {
            const int packed = i / HEAD_DIM, dim = i % HEAD_DIM, row = part.tile.first_row + packed / GROUP, head = packed % GROUP;
            const decoding::Merged found = decoding::merge_warps(shared, packed, dim);
            if (part.count == 1) {
                write(row, part.kv_head * GROUP + head, dim, found);
            } else {
                exchange.put(exchange.at(part.kv_head, part.number, row, head), dim, found);
            }
        }
    }

    DEVICE void write(int row, int head, int dim, const decoding::Merged &found) const {
        found.write(output + size_t(row) * own.output_stride + head * HEAD_DIM + dim, 1.0f / found.total);
    }

    // Attends to the block's parts.
    DEVICE void attend(decoding::Shared &shared, int warp, int g, int t) const {
        decoding::Pages pages = {reinterpret_cast<const u8 *>(own.keys), reinterpret_cast<const u8 *>(own.values), nullptr, nullptr, nullptr, 0,
                                 launch.inputs.kv_heads, g, t, streaming_policy()};
        for (int number = blockIdx.x; number < first.all; number += gridDim.x) {
            const bool is_first = number == int(blockIdx.x);
            Portion part = first.part;
            int entry = first.entry, before = first.before;
            if (!is_first) part = Portions(pieces, launch.inputs.kv_heads)[number];
            const int last = part.last_of(warp);
            if (!is_first) entry = pieces.entry(part, last), before = pieces.entry(part, last - DECODE_WARPS);
            pages.kv_head = part.kv_head;
            decoding::Page page;
            decoding::Running found = {};
            found.greatest[0][0] = found.greatest[0][1] = LOWEST;
            if (entry >= 0) pages.read_keys(page, pages.part_of(entry)), pages.read_values(page, pages.part_of(entry));
            if (is_first) work_barrier(); // nobody needs the input of the operation before this one
            run(part, pages, last, entry, before, page, found);
            decoding::publish(found, warp, g, t, shared);
            DECODE_BARRIER();
            merge(part, shared);
            if (number + int(gridDim.x) < first.all) DECODE_BARRIER();
        }
    }

    // Merges what parts found of SLICE dimensions of a row's head, by a warp: of every fourth part by eight lanes, then of those.
    DEVICE void collect(int row, int head, int slice, int lane) const {
        const int count = first.of_rows[row], dim = slice * SLICE + lane % 8 * 4;
        if (count < 2) return;
        Words words[MOST_PARTS / 4] = {exchange.tag, exchange.tag, exchange.tag, exchange.tag};
        const auto read = [&](int i) {
            const int part = i * 4 + lane / 8;
            if (part < count) words[i].read(exchange.at(head / GROUP, part, row, head % GROUP), dim);
        };
#pragma unroll
        for (int i = 0; i < MOST_PARTS / 4; i++) read(i);
        bool misses;
        do {
            misses = false;
#pragma unroll
            for (int i = 0; i < MOST_PARTS / 4; i++) {
                if (!words[i].are_there(exchange.tag)) read(i), misses = true;
            }
        } while (misses);
        __syncwarp();
        decoding::Merged found = merged(words);
        join_lanes(found, 8), join_lanes(found, 16);
        if (lane < 8) write(row, head, dim, found);
    }

    // Stores a row's new keys and values of a head, by a warp.
    DEVICE void store(int row, int kv_head, int lane) const {
        constexpr int EIGHTS_OF_HEAD = HEAD_DIM / 8;
        const int slot = first.slots[row], place = slot % PAGE_TOKENS;
        if (slot < 0) return;
        const size_t page = page_index(slot / PAGE_TOKENS, kv_head, launch.inputs.kv_heads);
        for (int i = lane; i < 2 * EIGHTS_OF_HEAD; i += WARP) {
            const bool is_value = i >= EIGHTS_OF_HEAD;
            const int dim = i % EIGHTS_OF_HEAD * 8;
            const bf16 *from = (is_value ? values_of(row, kv_head) : keys_of(row, kv_head)) + dim;
            uint4 words;
            do {
                words = load_words(from);
            } while (!are_there(words));
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const bf16 one = {u16(word_of(words, k / 2) >> k % 2 * 16)};
                if (is_value) {
                    own.values[page + value_offset<VALUE_TYPE>(place, dim + k)] = one;
                } else {
                    own.keys[page + key_offset<KEY_TYPE>(place, dim + k)] = one;
                }
            }
        }
    }

    // What a warp that does not attend does, the last blocks first: they have no parts where there are few.
    DEVICE void help(int warp, int lane) const {
        constexpr int SLICES = HEAD_DIM / SLICE;
        const Inputs &inputs = launch.inputs;
        const int helpers = gridDim.x * (WARPS - DECODE_WARPS), helper = warp * gridDim.x + blockIdx.x, heads = inputs.heads * SLICES;
        if (int(blockIdx.x) < first.all) work_barrier();
        for (int job = helper; job < inputs.rows * inputs.kv_heads; job += helpers) {
            store(job / inputs.kv_heads, job % inputs.kv_heads, lane);
        }
        for (int job = helpers - 1 - helper; job < inputs.rows * heads; job += helpers) {
            collect(job / heads, job % heads / SLICES, job % SLICES, lane);
        }
    }
};

// Attention, by all warps that multiply.
DEVICE void attend_or_help(const Operation &own, const Launch &launch, const Handed &handed, const Pieces &pieces, u32 tag, int warp,
                           int lane) {
    const Exchange exchange = {launch.sets.exchange(), tag, most_parts(launch.inputs.kv_heads)};
    const bf16 *rows = handed.at(own.input, false);
    const Attention attention = {own, launch, pieces, launch.room.first(warp), rows, handed.at(own.output, false), exchange};
    if (warp < DECODE_WARPS) {
        attention.attend(*reinterpret_cast<decoding::Shared *>(launch.room.input()), warp, lane / 4, lane % 4);
    } else {
        attention.help(warp - DECODE_WARPS, lane);
    }
}
