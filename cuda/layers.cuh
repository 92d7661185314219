// What cuda/layers.cu walks over, and the ring between the warps that copy weights and those that multiply them.

// One operation of a layer, 128 bytes: what it does, in the terms of linear_stream.cu, linear_rope.cu and attention_decode.cu.
struct Operation {
    const WEIGHT *weight;
    const Scale *scales, *minima;
    const float *bias, *norm; // either may be null
    const bf16 *input;
    bf16 *output;
    KEY_TYPE *keys;
    VALUE_TYPE *values;
    const float2 *table;
    int kind, input_stride, output_stride, weight_rows, columns;
    int units, rotation; // units of 16 weight rows; the first of them belongs to the block of this number
    float add, epsilon;
    int before; // how many blocks have had a part in the operations before this one, all of them counted
    int nothing[2];
};
static_assert(sizeof(Operation) == 128, "a word for each lane");

// What attention needs beside an operation.
struct Pieces {
    const Item *items;
    const int *counts, *page_table;
    float *partials;
    int *counters;
    int page_stride;
    float scale, softcap;
};

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

DEVICE int steps_of(const Operation &own) { return (own.columns + STEP - 1) / STEP; }

DEVICE Product product_of(const Operation &own, int rows) {
    return {own.input, own.weight, own.scales, own.minima, own.norm, own.input_stride, rows, own.weight_rows, own.columns, own.units,
            Division(own).second};
}

// The operations one after the other, each brought to a warp's own place in shared memory a word a lane, before it is needed.
struct Program {
    const u32 *words;
    Operation *own;
    int count, lane;
    u32 next;

    DEVICE Program(const Operation *operations, int count, Operation *own, int lane)
        : words(reinterpret_cast<const u32 *>(operations)), own(own), count(count), lane(lane), next(words[lane]) {}

    // The operation of this number; they must be asked for in order.
    DEVICE const Operation &take(int number) {
        __syncwarp();
        reinterpret_cast<u32 *>(own)[lane] = next;
        __syncwarp();
        if (number + 1 < count) next = words[(number + 1) * WARP + lane];
        return *own;
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

// Barriers of the sums that the multiplying warps leave to the finishing ones, and the number of the operation that may read what others wrote.
struct Handover {
    u32 barriers;

    DEVICE u32 full(const Turn &turn) const { return barriers + turn.slot() * 16; }
    DEVICE u32 empty(const Turn &turn) const { return full(turn) + 8; }
    DEVICE u32 passed() const { return barriers + TURNS_AHEAD * 16; }
    DEVICE u32 ended() const { return passed() + 4; }

    DEVICE void begin() const {
        constexpr int LEAVE = BY_GROUPS ? WARPS : THREADS; // sums: a thread of each warp, or all
        for (int i = 0; i < TURNS_AHEAD; i++) begin_barrier(barriers + i * 16, LEAVE), begin_barrier(barriers + i * 16 + 8, WARP);
        asm volatile("st.shared.u32 [%0], 0;" ::"r"(passed()) : "memory");
        asm volatile("st.shared.u32 [%0], 0;" ::"r"(ended()) : "memory");
    }

    // Whether this was the last of so many times that an operation's units were ended by a warp.
    DEVICE bool end(int times) const {
        u32 before;
        asm volatile("atom.acq_rel.cta.shared.add.u32 %0, [%1], 1;" : "=r"(before) : "r"(ended()) : "memory");
        if (before != u32(times) - 1) return false;
        asm volatile("st.relaxed.cta.shared.u32 [%0], 0;" ::"r"(ended()) : "memory");
        return true;
    }

    // Whether this operation has begun to read.
    DEVICE bool has_passed(int number) const {
        int found;
        asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(found) : "r"(passed()) : "memory");
        return found >= number;
    }

    DEVICE void pass(int number) const { asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(passed()), "r"(number) : "memory"); }

    // Waits until this operation has begun to read.
    DEVICE void follow(int number) const {
        int found;
        do {
            asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(found) : "r"(passed()) : "memory");
        } while (found < number);
    }
};
