// What cuda/layers.cu walks over, and the ring between the warps that copy weights and those that multiply them.

// One operation of a layer, 128 bytes: what it does, in the terms of linear_stream.cu, linear_rope.cu and attention_decode.cu.
struct Operation {
    const WEIGHT *weight;
    const Scale *scales, *minima;
    const float *bias, *norm; // either may be null
    const bf16 *input; // this, output and before: places in a set of rows, unless a flag says that they are pointers
    bf16 *output;
    KEY_TYPE *keys;
    VALUE_TYPE *values;
    union {
        const float2 *table;
        const bf16 *before; // of ADDED: what it is added to
    };
    int kind, input_stride, output_stride, weight_rows, columns;
    int units, rotation; // units of 16 weight rows; the first of them belongs to the block of this number
    float add, epsilon;
    int flags, before_stride, nothing;
};
static_assert(sizeof(Operation) == 128, "a word for each lane");

enum Kind { QKV, ATTEND, ADDED, GATED_PAIR }; // as in layers.py

constexpr int HALF = HEAD_DIM / 2, UNITS_OF_HEAD = HALF / 8;

// How an operation's units lie in the rows of its weight: 8 rows and 8 that they pair with, or 16.
struct Division {
    int kind, second;

    DEVICE explicit Division(const Operation &own)
        : kind(own.kind), second(own.kind == QKV ? HALF : own.kind == GATED_PAIR ? own.weight_rows / 2 : 8) {}

    DEVICE int first_row(int unit) const {
        if (kind == QKV) return unit / UNITS_OF_HEAD * HEAD_DIM + unit % UNITS_OF_HEAD * 8;
        return unit * (kind == GATED_PAIR ? 8 : 16);
    }
};

DEVICE int first_unit(const Operation &own) {
    const int number = int(blockIdx.x) - own.rotation;
    return number < 0 ? number + int(gridDim.x) : number;
}

// The input rows of a product: those that do not exist are zeros; words of others may not be there yet.
struct Incoming {
    const bf16 *begin;
    int stride;
    u32 exist;
    bool wait;

    DEVICE Incoming(const Operation &own, const Handed &handed)
        : begin(handed.at(own.input, own.flags & PLAIN_INPUT)), stride(own.input_stride),
          exist(own.flags & FROM_ATTENTION ? handed.attended : ALL_LANES), wait(!(own.flags & PLAIN_INPUT)) {}

    DEVICE const bf16 *row(int token) const { return exist >> token & 1 ? begin + token * size_t(stride) : nullptr; }
};

DEVICE int steps_of(const Operation &own) { return (own.columns + STEP - 1) / STEP; }

DEVICE Product product_of(const Operation &own, int rows) {
    return {nullptr, own.weight, own.scales, own.minima, own.norm, own.input_stride, rows, own.weight_rows, own.columns, own.units,
            Division(own).second};
}

// The operations one after the other, each copied to one of a warp's two places in shared memory, a word a lane, before it is needed.
struct Program {
    const u32 *words;
    Operation *places;
    int count, lane;

    DEVICE Program(const Operation *operations, int count, Operation *places, int lane)
        : words(reinterpret_cast<const u32 *>(operations)), places(places), count(count), lane(lane) {
        bring(0);
    }

    DEVICE void bring(int number) const {
        const u32 to = u32(__cvta_generic_to_shared(places + number % 2)) + lane * 4;
        if (number < count) asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(words + number * WARP + lane) : "memory");
    }

    // The operation of this number; they must be asked for in order.
    DEVICE const Operation &take(int number) const {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();
        bring(number + 1);
        return places[number % 2];
    }
};

// A place in a warp's part of the ring, and whether that was passed an odd number of times before.
struct Place {
    int slot;
    u32 parity;

    DEVICE void next(int slots) {
        if (++slot == slots) slot = 0, parity ^= 1;
    }
};

// Waits as wait_for_phase() does, and takes few instructions meanwhile.
DEVICE void rest_for_phase(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
    u32 ended;
    do {
        asm volatile("{ .reg .pred ended; mbarrier.try_wait.parity.shared.b64 ended, [%1], %2; selp.u32 %0, 1, 0, ended; }"
                     : "=r"(ended)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!ended);
#else
    wait_for_phase(barrier, parity);
#endif
}

// A unit of this block, counted through all operations: the place of its sums, and whether that was passed an odd number of times before.
struct Turn {
    u32 unit;

    DEVICE u32 slot() const { return unit % TURNS_AHEAD; }
    DEVICE u32 parity() const { return unit / TURNS_AHEAD % 2; }
};

// Barriers of the sums that the multiplying warps leave to the finishing ones.
struct Handover {
    u32 barriers;

    DEVICE u32 full(const Turn &turn) const { return barriers + turn.slot() * 16; }
    DEVICE u32 empty(const Turn &turn) const { return full(turn) + 8; }

    DEVICE void begin() const {
        constexpr int LEAVE = BY_GROUPS ? WARPS : THREADS; // sums: a thread of each warp, or all
        for (int i = 0; i < TURNS_AHEAD; i++) begin_barrier(barriers + i * 16, LEAVE), begin_barrier(barriers + i * 16 + 8, WARP);
    }
};
