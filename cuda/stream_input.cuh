// The input rows of linear_stream.cuh as bfloat16, and the sums of a warp.

constexpr int INPUT_BYTES = STEP * 2; // of a row's step
constexpr bool IS_PREPARED = false;

typedef Sums Accumulator[2];

// Where 8 columns of a token lie in a slot: what four lanes read together is neighbours, and two tokens take different banks.
DEVICE int input_place(int token, int eight) {
    return token * STEP * 2 + eight / 8 * 128 + (eight / 4 % 2 ^ token % 2) * 64 + eight % 4 * 16;
}

// A warp's steps of the input rows in shared memory, (rows, STEP) each.
struct Input {
    const bf16 *begin, *at; // the lane's part of its first row: in the warp's first step, and in the next one that is copied
    int stride, rows, columns, left, lane, t; // left: columns from that step on, less the lane's
    Constants constants;
    u32 to, from[PARTS][2]; // where in a slot the lane writes, and reads either half of 64 columns

    DEVICE Input(const Product &product, int warp, int lane)
        : stride(product.input_stride), rows(product.rows), columns(product.columns - warp * STEP - lane % EIGHTS * 8), lane(lane), t(lane % 4) {
        begin = product.input + size_t(lane / EIGHTS) * stride + warp * STEP + lane % EIGHTS * 8;
        to = input_place(lane / EIGHTS, lane % EIGHTS);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            // Tokens that do not exist are some other one: nobody uses their sums.
            const int token = min(part * 8 + lane / 4, rows - 1);
            from[part][0] = token * STEP * 2 + token % 2 * 64 + t * 16;
            from[part][1] = from[part][0] ^ 64;
            asm volatile("" : "+r"(from[part][0]), "+r"(from[part][1])); // or they are computed anew in every step
        }
        restart();
    }

    // Goes to the warp's first step.
    DEVICE void restart() { at = begin, left = columns; }

    // Starts copying the next step's columns to a slot; what lies beyond the row becomes zeros, and is not read.
    DEVICE void start(u32 slot) {
        const bf16 *source = at;
        u32 target = slot + to;
#pragma unroll 1
        for (int token = lane / EIGHTS; token < rows; token += AT_ONCE) {
            copy_16_to(target, source, left > 0);
            source += AT_ONCE * size_t(stride);
            target += AT_ONCE * STEP * 2;
        }
        at += WARPS * STEP, left -= WARPS * STEP;
    }

    // The lane's eight columns of each token, of a half of a block of 64 columns in a slot.
    DEVICE void read(u32 slot, int block, int half, uint4 (&values)[PARTS]) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++) values[part] = load_shared(slot + from[part][half] + block * 128);
    }

    // Writes eight columns of a token to each of COUNT slots, normalised with NORM, and adds up their squares.
    template <int COUNT>
    DEVICE static void put(const uint4 (&raw)[COUNT], const float (&norm)[COUNT][8], u8 *const (&slots)[COUNT], int rows, int token, int eight,
                           const bool (&writes)[COUNT], float (&squares)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            uint4 values = raw[i];
            if (NORM) normalise(values, norm[i], squares[i]);
            if (writes[i]) *reinterpret_cast<uint4 *>(slots[i] + input_place(token, eight)) = values;
        }
    }
};

// Leaves a warp's sums where its team can read them: (16, stride).
DEVICE void publish(const Accumulator &sums, float *to, int rows, int stride, int g, int t) {
#pragma unroll
    for (int i = 0; i < PARTS * 4; i++) {
        const int token = i / 4 * 8 + 2 * t + i % 2;
        if (token < rows) to[(i % 4 / 2 * 8 + g) * stride + token] = sums[0].values[0][i / 4][i % 4] + sums[1].values[0][i / 4][i % 4];
    }
}
