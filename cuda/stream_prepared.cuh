// What stream_digits.cuh and stream_halves.cuh have in common: input rows are brought to the form that they are multiplied in. Where the block
// does that itself (RESIDENT), they are bfloat16 in memory; else linear.cu has prepared them, (steps, rows, INPUT_BYTES).
#include "digits.cuh"
#include "halves.cuh"

constexpr int INPUT_BYTES = PACKED ? DIGIT_BYTES : HALF_BYTES; // of a row's step
constexpr bool IS_PREPARED = true;

// Where 8 columns of a token lie in a slot.
DEVICE int input_place(int token, int eight) { return PACKED ? digits_place(token, eight) : halves_place(token, eight); }

// A warp's steps of rows that are prepared.
struct Prepared {
    const u8 *begin, *at; // the lane's part of the warp's first step, and of the next one that is copied
    int rows, step_bytes, lane, t;

    DEVICE Prepared(const Product &product, int warp, int lane)
        : rows(product.rows), step_bytes(product.rows * INPUT_BYTES), lane(lane), t(lane % 4) {
        begin = reinterpret_cast<const u8 *>(product.input) + size_t(warp) * step_bytes + lane * 16;
        restart();
    }

    // Goes to the warp's first step.
    DEVICE void restart() { at = begin; }

    // Starts copying the next step to a slot.
    DEVICE void start(u32 slot) {
#pragma unroll 1
        for (int place = 0; place < step_bytes - lane * 16; place += WARP * 16) copy_16_to(slot + lane * 16 + place, at + place, true);
        at += WARPS * size_t(step_bytes);
    }

    // Writes eight columns of a token to each of COUNT slots, normalised with NORM, and adds up their squares.
    template <int COUNT>
    DEVICE static void put(const uint4 (&raw)[COUNT], const float (&norm)[COUNT][8], u8 *const (&slots)[COUNT], int rows, int token, int eight,
                           const bool (&writes)[COUNT], float (&squares)[COUNT]) {
        float values[COUNT][8];
#pragma unroll
        for (int i = 0; i < COUNT * 4; i++) {
            const u32 word = word_of(raw[i / 4], i % 4);
            values[i / 4][i % 4 * 2] = low_bf16(word), values[i / 4][i % 4 * 2 + 1] = high_bf16(word);
        }
#pragma unroll
        for (int i = 0; i < COUNT * 8 && NORM; i++) {
            float &value = values[i / 8][i % 8];
            squares[i / 8] = fmaf(value, value, squares[i / 8]), value *= norm[i / 8][i % 8];
        }
        if (PACKED) {
            write_digits<COUNT>(values, slots, rows, token, eight, writes);
        } else {
            write_halves<COUNT>(values, slots, rows, token, eight, writes);
        }
    }
};
