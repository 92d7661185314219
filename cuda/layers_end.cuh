// How cuda/layers.cu ends units of products, and tells the other blocks.

// The step, as far as products need it.
struct Inputs {
    const int *rope_rows, *slots;
    int rows, heads, kv_heads, all_slots;
};

#define QUARTERED (PACKED == 4 && TOKENS == 1) // a warp leaves sums of quarters, which those who end a unit add up
constexpr int SUM_STRIDE = QUARTERED ? 4 : 3, MOST_SLOTS = 64; // sums of a step's rows are apart by so many

// Where things are in a block's shared memory, as far as that is known before: squares that each warp added up (WARPS, TOKENS), sums
// (TURNS_AHEAD, WARPS, 16, SUM_STRIDE), each warp's two operations, what it knows of attention, barriers of the sums and of the ring; then the
// ring, and behind it the input, or what the warps of attention found.
constexpr int SUMS_AT = WARPS * TOKENS * 4, OPERATIONS_AT = SUMS_AT + TURNS_AHEAD * WARPS * 16 * SUM_STRIDE * 4;
constexpr int FIRSTS_AT = OPERATIONS_AT + ALL_WARPS * 2 * 128;
constexpr int SUM_BARRIERS_AT = FIRSTS_AT + WARPS * FIRST_BYTES, RING_BARRIERS_AT = SUM_BARRIERS_AT + TURNS_AHEAD * 16;
constexpr int RING_AT = (RING_BARRIERS_AT + MOST_SLOTS * 16 + 127) / 128 * 128; // else copies of E4M3 weights take a tenth longer

struct Room {
    u8 *begin;
    int slots;

    DEVICE float *squares() const { return reinterpret_cast<float *>(begin); }
    DEVICE float *sums(int turn) const { return reinterpret_cast<float *>(begin + SUMS_AT) + turn * (WARPS * 16 * SUM_STRIDE); }
    DEVICE Operation *operation(int warp) const { return reinterpret_cast<Operation *>(begin + OPERATIONS_AT) + 2 * warp; }
    DEVICE First &first(int warp) const { return *reinterpret_cast<First *>(begin + FIRSTS_AT + warp * FIRST_BYTES); }
    DEVICE u8 *input() const { return begin + RING_AT + slots * Round::BYTES; }
};

// What a thread needs at the end of its output, or its two.
struct Last {
    float scales[2], biases[2];
    float2 angle;
    float before;
    int rope_row;
};

// How an operation ends.
struct End {
    const Operation &own;
    const Inputs &inputs;
    const Handed &handed;
    Division division;
    int thread, each, token, place;

    DEVICE End(const Operation &own, const Inputs &inputs, const Handed &handed, int thread)
        : own(own), inputs(inputs), handed(handed), division(own), thread(thread), each(own.kind == ADDED ? 16 : 8), token(thread / each),
          place(thread % each) {}

    DEVICE bool works() const { return token < inputs.rows; }

    DEVICE void begin(int unit, Last &last) const {
        if (!works()) return;
        const int column = min(division.first_row(unit) + place, own.weight_rows - 1);
        const Ending first(own.scales, own.bias, column), second(own.scales, own.bias, own.kind == ADDED ? column : column + division.second);
        last.scales[0] = first.scale, last.biases[0] = first.bias, last.scales[1] = second.scale, last.biases[1] = second.bias;
        last.before = 0.0f;
        if (own.kind == ADDED) last.before = before(column);
        if (own.kind == QKV && unit / UNITS_OF_HEAD < inputs.heads + inputs.kv_heads) {
            last.angle = own.table[size_t(last.rope_row) * HALF + column % HEAD_DIM];
        }
    }

    // What the result of a column is added to.
    DEVICE float before(int column) const {
        const bool is_plain = own.flags & PLAIN_BEFORE;
        const bf16 *at = handed.at(own.before, is_plain) + size_t(token) * own.before_stride + column / 2 * 2;
        u32 word;
        do {
            word = load_word(at);
        } while (word == NOT_THERE && !is_plain);
        return column % 2 ? high_bf16(word) : low_bf16(word);
    }

    // The sum of all warps for one of the 16 rows of the unit, the first of a pair or the second.
    DEVICE float sum_of(const float *sums, float factor, int stride, int row, const Last &last, int second) const {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < (BY_GROUPS ? 1 : WARPS); warp++) {
            const float *own = sums + (warp * 16 + row) * stride;
            if (QUARTERED) {
                const float4 quarters = *reinterpret_cast<const float4 *>(own);
                sum += (quarters.x + quarters.y) + (quarters.z + quarters.w);
            } else {
                sum += own[token];
            }
        }
        return fmaf(sum * factor, last.scales[second], last.biases[second]);
    }

    // Ends a unit: lanes of neighbouring columns store both of them in one word. All lanes call this.
    DEVICE void finish(const float *sums, float factor, int stride, int unit, const Last &last) const {
        const int column = division.first_row(unit) + place;
        float a = 0.0f, b = 0.0f;
        if (works()) a = sum_of(sums, factor, stride, place, last, 0);
        if (works() && own.kind != ADDED) b = sum_of(sums, factor, stride, place + 8, last, 1);
        if (own.kind == ADDED) {
            a = fmaf(own.add, a, last.before);
        } else if (own.kind == GATED_PAIR) {
            a = activate(a) * b;
        } else {
            const bool turns = unit / UNITS_OF_HEAD < inputs.heads + inputs.kv_heads;
            const float2 angle = turns ? last.angle : make_float2(1.0f, 0.0f);
            const float first = a * angle.x - b * angle.y;
            b = b * angle.x + a * angle.y, a = first;
        }
        const bool is_odd = place % 2, stores = works() && (!is_odd || own.kind == QKV);
        const float other = __shfl_xor_sync(ALL_LANES, is_odd || own.kind != QKV ? a : b, 1);
        const u32 word = is_odd ? pack_bf16(other, b) : pack_bf16(a, other);
        bf16 *to = handed.at(own.output, own.flags & PLAIN_OUTPUT) + size_t(token) * own.output_stride + column;
        if (stores) store_word(is_odd ? to + HALF - 1 : to, word);
    }
};

// What a row's sums are multiplied by, once all warps have left their squares.
DEVICE float factor_of(const Operation &own, const Room &room, const End &end) {
    if (!own.norm || !end.works()) return 1.0f;
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) square += room.squares()[i * TOKENS + end.token];
    return rsqrtf(square * (1.0f / own.columns) + own.epsilon);
}

// What all warps share.
struct Launch {
    Room room;
    Ring ring;
    Handover handover;
    Sets sets;
    Inputs inputs;

    // The rows of this launch, once the launch before this one has ended.
    DEVICE Handed find() const {
        u32 attended = 0;
#pragma unroll
        for (int token = 0; token < MOST_ROWS; token++) {
            if (token < inputs.rows && u32(inputs.slots[token]) < u32(inputs.all_slots)) attended |= 1 << token;
        }
        const u32 number = load_word(sets.number);
        return {sets.at(number), attended, number};
    }
};

// A finishing warp. They take units in turn, so that what their ends need is there in time.
DEVICE void finish_units(Program program, const Launch &launch, int warp, int lane) {
    const Room &room = launch.room;
    const int step = gridDim.x;
    wait_for_previous();
    const Handed handed = launch.find();
    Turn turn = {0};
    for (int number = 0; number < program.count; number++) {
        const Operation &own = program.take(number);
        if (warp == 0) launch.sets.clear(handed, number, program.count, lane);
        if (own.kind == ATTEND) continue;
        const End end(own, launch.inputs, handed, lane);
        Last last = {{}, {}, make_float2(1.0f, 0.0f), 0.0f, 0};
        if (own.kind == QKV && end.works()) last.rope_row = launch.inputs.rope_rows[end.token];
        const int units = own.units;
        int unit = first_unit(own);
        for (; unit < units && int(turn.unit % FINISHERS) != warp; unit += step) turn.unit++;
        if (unit < units) end.begin(unit, last);
        float factor = 0.0f;
#pragma unroll 1
        while (unit < units) {
            rest_for_phase(launch.handover.full(turn), turn.parity());
            if (factor == 0.0f) factor = factor_of(own, room, end);
            end.finish(room.sums(turn.slot()), factor, SUM_STRIDE, unit, last);
            __syncwarp();
            arrive(launch.handover.empty(turn));
            do {
                turn.unit++, unit += step;
            } while (unit < units && int(turn.unit % FINISHERS) != warp);
            if (unit < units) end.begin(unit, last);
        }
    }
}
