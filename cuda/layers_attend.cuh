// How cuda/layers.cu attends: with the queries, keys and values that the operation before hands over.

// Where in a page of a piece a row's token is stored, and in which; whether it is.
DEVICE bool find_slot(const Inputs &inputs, const decoding::Work &work, int row, int &slot) {
    const int position = work.item.first_position + row - work.item.first_row, page = position / PAGE_TOKENS;
    if (row >= work.item.first_row + work.item.rows || position < 0 || page < work.begin || page >= work.end) return false;
    slot = inputs.slots[row];
    return u32(slot) < u32(inputs.all_slots) && slot == work.pages.table[page] * PAGE_TOKENS + position % PAGE_TOKENS;
}

// Finds a warp's first piece, and the slot of the row whose new keys and values it stores.
DEVICE void find_first(const Launch &launch, const Pieces &pieces, int warp, int lane) {
    const int kv_heads = launch.inputs.kv_heads;
    First first = {{}, 0, 0, 0, 0, 0, pieces.counts[0] * kv_heads, -1, nullptr};
    if (int(blockIdx.x) < first.work_end) {
        decoding::Work work = {{}, {nullptr, nullptr, nullptr, nullptr, nullptr, 0, kv_heads, 0, 0, 0}, 0, 0, 0, 0, 0, 0};
        work.take(pieces.items, blockIdx.x, pieces.page_table, pieces.page_stride, 0);
        int slot;
        const bool stores = warp >= DECODE_WARPS && warp - DECODE_WARPS < launch.inputs.rows;
        if (stores && find_slot(launch.inputs, work, warp - DECODE_WARPS, slot)) first.slot = slot;
        first.item = work.item, first.begin = work.begin, first.number = work.number, first.end = work.end;
        first.entry = work.first, first.second = work.second, first.table = work.pages.table;
    }
    if (lane == 0) launch.room.first(warp) = first;
    __syncwarp();
}
static_assert(WARPS - DECODE_WARPS >= MOST_ROWS, "a warp for each row that does not attend");

// How attention finds this step's queries, keys and values: QKV hands them over. Who attends to a chunk stores the new ones of its pages.
struct Fresh {
    const Operation &own;
    const Launch &launch;
    const bf16 *rows; // queries, keys and values of all heads

    // The block's first piece is the same in all layers.
    DEVICE int first(const decoding::Call &, decoding::Work &work) const {
        const First &first = launch.room.first(threadIdx.x / WARP);
        if (int(blockIdx.x) < first.work_end) first.take(work, launch.inputs.kv_heads);
        return first.work_end;
    }

    DEVICE void begin() const { work_barrier(); }
    DEVICE void first_is_prepared() const { asm volatile("bar.sync 4, %0;" ::"n"(THREADS) : "memory"); }

    // Stores a row's new keys and values, if they are in the first piece: warps that do not attend do that, while the others read queries.
    DEVICE void prepare_first(const First &first, int row, int lane) const {
        if (first.slot >= 0) store(blockIdx.x % launch.inputs.kv_heads, first.slot, row, lane);
        asm volatile("bar.arrive 4, %0;" ::"n"(THREADS) : "memory");
    }

    DEVICE uint4 read(const bf16 *from) const { return load_words(from); }
    template <class Read> DEVICE void check(uint4 (&words)[QUERY_READS], Read read) const { wait_for_words(words, read); }

    // Stores what is new in a piece's pages: a warp a row.
    DEVICE void prepare(const decoding::Work &work) const {
        const Inputs &inputs = launch.inputs;
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        bool stores = false;
        for (int row = 0; row < inputs.rows; row++) {
            int slot;
            if (!find_slot(inputs, work, row, slot)) continue;
            stores = true;
            if (warp == row) store(work.pages.kv_head, slot, row, lane);
        }
        if (stores) DECODE_BARRIER();
    }

    DEVICE void store(int kv_head, int slot, int row, int lane) const {
        constexpr int EIGHTS_OF_HEAD = HEAD_DIM / 8;
        const int kv_heads = launch.inputs.kv_heads, head = launch.inputs.heads + kv_head;
        const size_t page = page_index(slot / PAGE_TOKENS, kv_head, kv_heads);
        const bf16 *from = rows + size_t(row) * own.input_stride + head * HEAD_DIM;
        for (int i = lane; i < 2 * EIGHTS_OF_HEAD; i += WARP) {
            const bool is_value = i >= EIGHTS_OF_HEAD;
            const int dim = i % EIGHTS_OF_HEAD * 8, place = slot % PAGE_TOKENS;
            uint4 words;
            do {
                words = load_words(from + (is_value ? kv_heads * HEAD_DIM : 0) + dim);
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
};

DEVICE void attend_or_wait(const Operation &own, const Launch &launch, const Handed &handed, const Pieces &pieces, int warp) {
    const Fresh fresh = {own, launch, handed.at(own.input, false)};
    if (warp >= DECODE_WARPS) {
        fresh.begin();
        const First &first = launch.room.first(warp);
        if (int(blockIdx.x) < first.work_end) fresh.prepare_first(first, warp - DECODE_WARPS, threadIdx.x % WARP);
        return;
    }
    const decoding::Call call = {fresh.rows, handed.at(own.output, false), own.keys, own.values, nullptr, nullptr, nullptr, pieces.items,
                                 pieces.counts, pieces.page_table, pieces.partials, pieces.counters, own.input_stride, own.output_stride,
                                 pieces.page_stride, launch.inputs.kv_heads, 0, pieces.scale, pieces.softcap};
    decoding::attend(call, *reinterpret_cast<decoding::Shared *>(launch.room.input()), fresh);
}
