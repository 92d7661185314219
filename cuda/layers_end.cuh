// How cuda/layers.cu ends units of products, and tells the other blocks.

// What has ended: a count that grows until the end, by one for each block and operation that it has a part in.
struct Grid {
    u32 *count;

    DEVICE void arrive() const { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }

    // Waits until the operations before this one have ended everywhere; one thread.
    DEVICE void wait(const Operation &own) const {
        const u32 wanted = own.before;
        u32 found;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
        } while (int(found - wanted) < 0);
    }
};

// The step, as far as products need it.
struct Inputs {
    const int *rope_rows, *slots;
    int rows, heads, kv_heads, all_slots;
};

constexpr int SUM_STRIDE = 3, MOST_SLOTS = 64; // of up to 2 rows

// Where things are in a block's shared memory, as far as that is known before: squares that each warp added up (WARPS, TOKENS), sums
// (TURNS_AHEAD, WARPS, 16, SUM_STRIDE), each warp's operation, barriers of the sums and of the ring; then the ring, and behind it the input,
// or what the warps of attention found.
constexpr int SUMS_AT = WARPS * TOKENS * 4, OPERATIONS_AT = SUMS_AT + TURNS_AHEAD * WARPS * 16 * SUM_STRIDE * 4;
constexpr int SUM_BARRIERS_AT = OPERATIONS_AT + ALL_WARPS * 128, RING_BARRIERS_AT = SUM_BARRIERS_AT + (TURNS_AHEAD + 1) * 16;
constexpr int RING_AT = (RING_BARRIERS_AT + MOST_SLOTS * 16 + 127) / 128 * 128; // else copies of E4M3 weights take a tenth longer

struct Room {
    u8 *begin;
    int slots;

    DEVICE float *squares() const { return reinterpret_cast<float *>(begin); }
    DEVICE float *sums(int turn) const { return reinterpret_cast<float *>(begin + SUMS_AT) + turn * (WARPS * 16 * SUM_STRIDE); }
    DEVICE Operation *operation(int warp) const { return reinterpret_cast<Operation *>(begin + OPERATIONS_AT) + warp; }
    DEVICE u8 *input() const { return begin + RING_AT + slots * Round::BYTES; }
};

// What a thread needs at the end of its output, or its two.
struct Last {
    float scales[2], biases[2];
    float2 angle;
    float before;
    int rope_row, slot;
};

// How an operation ends.
struct End {
    const Operation &own;
    const Inputs &inputs;
    Division division;
    int thread, each, token, place;

    DEVICE End(const Operation &own, const Inputs &inputs, int thread)
        : own(own), inputs(inputs), division(own), thread(thread), each(own.kind == ADDED ? 16 : 8), token(thread / each), place(thread % each) {}

    DEVICE bool works() const { return token < inputs.rows; }

    DEVICE void begin(int unit, Last &last) const {
        if (!works()) return;
        const int column = min(division.first_row(unit) + place, own.weight_rows - 1);
        const Ending first(own.scales, own.bias, column), second(own.scales, own.bias, own.kind == ADDED ? column : column + division.second);
        last.scales[0] = first.scale, last.biases[0] = first.bias, last.scales[1] = second.scale, last.biases[1] = second.bias;
        last.before = 0.0f;
        if (own.kind == ADDED) {
            const bf16 *at = own.output + size_t(token) * own.output_stride + column;
            u16 bits;
            asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(at));
            last.before = to_float(bf16{bits});
        }
        if (own.kind == QKV && unit / UNITS_OF_HEAD < inputs.heads + inputs.kv_heads) {
            last.angle = own.table[size_t(last.rope_row) * HALF + column % HEAD_DIM];
        }
    }

    // The sum of all warps for one of the 16 rows of the unit, the first of a pair or the second.
    DEVICE float sum_of(const float *sums, float factor, int stride, int row, const Last &last, int second) const {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < (BY_GROUPS ? 1 : WARPS); warp++) sum += sums[(warp * 16 + row) * stride + token];
        return fmaf(sum * factor, last.scales[second], last.biases[second]);
    }

    DEVICE void finish(const float *sums, float factor, int stride, int unit, const Last &last) const {
        if (!works()) return;
        const int column = division.first_row(unit) + place;
        if (own.kind == ADDED) {
            if (column >= own.weight_rows) return;
            const float result = sum_of(sums, factor, stride, place, last, 0);
            own.output[size_t(token) * own.output_stride + column] = from_float<bf16>(fmaf(own.add, result, last.before));
            return;
        }
        const float a = sum_of(sums, factor, stride, place, last, 0), b = sum_of(sums, factor, stride, place + 8, last, 1);
        if (own.kind == GATED_PAIR) {
            own.output[size_t(token) * own.output_stride + column] = from_float<bf16>(activate(a) * b);
            return;
        }
        const int head = unit / UNITS_OF_HEAD, dim = column % HEAD_DIM;
        const Outputs places = {own.output, own.keys, own.values, own.output_stride, inputs.heads, inputs.kv_heads, inputs.all_slots};
        const float2 angle = head < inputs.heads + inputs.kv_heads ? last.angle : make_float2(1.0f, 0.0f);
        places.store(token, last.slot, head, dim, a * angle.x - b * angle.y);
        places.store(token, last.slot, head, dim + HALF, b * angle.x + a * angle.y);
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
    Grid grid;
    Inputs inputs;
};

// A finishing warp. They take units in turn, so that what their ends need is there in time.
DEVICE void finish_units(Program program, const Launch &launch, int warp, int lane) {
    const Room &room = launch.room;
    const int step = gridDim.x;
    wait_for_previous();
    Turn turn = {0};
    for (int number = 0; number < program.count; number++) {
        const Operation &own = program.take(number);
        if (own.kind == ATTEND) continue;
        const End end(own, launch.inputs, lane);
        Last last = {{}, {}, make_float2(1.0f, 0.0f), 0.0f, 0, -1};
        if (own.kind == QKV && end.works()) last.rope_row = launch.inputs.rope_rows[end.token], last.slot = launch.inputs.slots[end.token];
        const int units = own.units;
        int unit = first_unit(own);
        const int times = (units - unit + step - 1) / step;
        for (; unit < units && int(turn.unit % FINISHERS) != warp; unit += step) turn.unit++;
        if (own.kind == ADDED && unit < units) launch.handover.follow(number - 1);
        if (unit < units) end.begin(unit, last);
        float factor = 0.0f;
#pragma unroll 1
        while (unit < units) {
            rest_for_phase(launch.handover.full(turn), turn.parity());
            if (factor == 0.0f) factor = factor_of(own, room, end);
            end.finish(room.sums(turn.slot()), factor, SUM_STRIDE, unit, last);
            __syncwarp();
            arrive(launch.handover.empty(turn));
            if (lane == 0 && launch.handover.end(times)) launch.grid.arrive();
            do {
                turn.unit++, unit += step;
            } while (unit < units && int(turn.unit % FINISHERS) != warp);
            if (unit < units) end.begin(unit, last);
        }
    }
}
