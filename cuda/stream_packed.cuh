// What linear_stream.cuh multiplies: packed integers of 4 or 8 bits with half-precision scales of groups (weights.cuh).
//
// An integer becomes bfloat16 by a mask that puts it into the mantissa of 128. With minima, a matrix instruction on ones gives the inputs'
// sum. Sums over a group are exact but for float's rounding; then they are multiplied by the group's scale, and all rows of the batch share
// the unpacking. So it is for 8 bits; stream_digits.cuh multiplies those of 4.

constexpr int STEP = BLOCK_COLUMNS;
constexpr int LOADS = PACKED / 4;    // of 16 bytes, for each lane and row of a step
constexpr int PAIRS_OF_SCALES = (GROUPS + 1) / 2;
constexpr int PER_ROW = STEPS ? 2 : GROUPS; // minima, or units, of a row of a block
constexpr bool OWN_GROUP = PACKED == 4 && TOKENS == 1 && GROUPS == 4; // a lane takes the scale of quarter t alone

struct Step {
    uint4 words[TILES][2][LOADS];
    u32 scales[TILES][2][PAIRS_OF_SCALES], minima[TILES][2][PAIRS_OF_SCALES];
    u32 units[TILES][2];
};

// Where the lanes' rows are, for linear_many.cu.
struct Reader {
    const Product &product;
    int g, t;
    u64 policy;
    const u8 *words[TILES][2]; // the lane's part of the first block of its rows
    const f16 *scales[TILES][2], *minima[TILES][2];

    // Points at the rows of another unit; all counts are multiples of 8.
    DEVICE void move(int first) {
        const int steps = (product.columns + STEP - 1) / STEP, last = (product.weight_rows - 1) / BLOCK_ROWS;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = first + tile * ROWS + half * (PAIRED ? product.second : 8);
                const size_t block = size_t(min(row / BLOCK_ROWS, last)) * steps;
                words[tile][half] = product.weight + block * BLOCK_BYTES + (g * 4 + t) * 16;
                scales[tile][half] = product.scales + (block * BLOCK_ROWS + g) * GROUPS;
                if (MINIMA || STEPS) minima[tile][half] = product.minima + (block * BLOCK_ROWS + g) * PER_ROW;
            }
        }
    }
};

// A warp's way from the weight to its ring in shared memory, and on to registers: words as lanes read them, by halves of 8 rows, then
// scales, then minima or units, each piece of 16 bytes of them by one lane.
template <int TEAM> struct Feed {
    static constexpr int WORDS = 2 * LOADS * 512, PER_MINIMA = STEPS || MINIMA ? PER_ROW : 0, PIECES = 2 * (GROUPS + PER_MINIMA);
    static constexpr int BYTES = WORDS + PIECES * 16; // of a step

    const Product &product;
    int warp, lane;
    u64 policy;
    u32 to, scales, minima;  // where in a step's slot the lane writes and reads words, and reads scales and minima
    const u8 *at, *piece;    // the lane's words and piece of the next step
    u32 apart, piece_step;   // pieces of 16 bytes from the first half to the second; bytes from one step's piece to the next one's

    DEVICE Feed(const Product &product, int warp, int lane)
        : product(product), warp(warp), lane(lane), policy(streaming_policy()), at(nullptr), piece(nullptr), apart(0) {
        const int g = lane / 4;
        to = lane * 16, scales = WORDS + g * (GROUPS * 2), minima = WORDS + 32 * GROUPS + g * (PER_ROW * 2);
        if (OWN_GROUP) scales += lane % 4 * 2, minima += STEPS ? 0 : lane % 4 * 2;
        piece_step = TEAM * 16 * (lane < 2 * GROUPS ? GROUPS : PER_ROW);
        asm volatile("" : "+r"(to), "+r"(scales), "+r"(piece_step)); // or they are computed anew in every step
    }

    // Goes to the warp's first step of another unit; all counts of rows are multiples of 8.
    DEVICE void move(int first) {
        const int steps = (product.columns + STEP - 1) / STEP, last = (product.weight_rows - 1) / BLOCK_ROWS;
        const int block = min(first / BLOCK_ROWS, last), other = min((first + (PAIRED ? product.second : 8)) / BLOCK_ROWS, last);
        at = product.weight + (size_t(block) * steps + warp) * BLOCK_BYTES + lane * 16;
        apart = u32(other - block) * u32(steps) * (BLOCK_BYTES / 16);
        const bool is_scale = lane < 2 * GROUPS;
        const int pieces = is_scale ? GROUPS : PER_ROW, number = (is_scale ? lane : lane - 2 * GROUPS) % (2 * pieces);
        const size_t place = (size_t(number < pieces ? block : other) * steps + warp) * pieces + number % pieces;
        piece = reinterpret_cast<const u8 *>(is_scale ? product.scales : product.minima) + place * 16;
    }

    // Starts copying the next step.
    DEVICE void start(u32 slot) {
#pragma unroll
        for (int i = 0; i < 2 * LOADS; i++) {
            copy_stream(slot + to + i * 512, at + size_t(i < LOADS ? 0 : apart) * 16 + i % LOADS * 512, true, policy);
        }
        if (lane < PIECES) copy_stream(slot + to + WORDS, piece, true, policy);
        at += TEAM * BLOCK_BYTES, piece += piece_step;
    }

    DEVICE void read(u32 slot, Step &step) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) step.words[0][half][i] = load_shared(slot + to + (half * LOADS + i) * 512);
            read_row(slot + scales + half * (16 * GROUPS), step.scales[0][half]);
            const u32 own = slot + minima + half * (16 * PER_ROW);
            if (MINIMA && !STEPS) read_row(own, step.minima[0][half]);
            if (STEPS) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(step.units[0][half]) : "r"(own));
        }
    }

    // Half-precision numbers of a row.
    DEVICE static void read_row(u32 from, u32 (&to)[PAIRS_OF_SCALES]) {
        if constexpr (GROUPS == 4 && !OWN_GROUP) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from));
        } else {
            u16 one;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(one) : "r"(from));
            to[0] = one;
        }
    }
};

// Constants in registers: an instruction has room for one immediate number only, and a matrix instruction for none.
struct Constants {
    u32 low, sign, exponent, total[4];

    DEVICE Constants() {
        asm volatile("mov.b32 %0, %1;" : "=r"(low) : "n"(PACKED == 4 ? 0x000f000fu : 0x007f007fu));
        asm volatile("mov.b32 %0, 0x00800080;" : "=r"(sign));
        asm volatile("mov.b32 %0, 0x43004300;" : "=r"(exponent)); // 128
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("mov.b32 %0, %1;" : "=r"(total[i]) : "n"(0x3f803f80u));
    }
};

// (word & mask) | bits, in one instruction.
DEVICE u32 masked(u32 word, u32 mask, u32 bits) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
    return result;
}

// Four columns (`quad` 0 or 1 of the lane's eight in a quarter of the step) of a row, as pairs of bfloat16; those of 4-bit codes are 128
// too great.
DEVICE void unpack(const uint4 (&words)[LOADS], int quarter, int quad, const Constants &constants, u32 &first, u32 &second) {
    if constexpr (PACKED == 4) {
        const u32 word = word_of(words[0], quarter) >> (8 * quad);
        first = masked(word, constants.low, constants.exponent);
        second = masked(word >> 4, constants.low, constants.exponent);
    } else {
        // The low bits count from 128; where the sign bit is set, 256 come off, else 128.
        const u32 word = word_of(words[quarter / 2], quarter % 2 * 2 + quad), minus_one = 0xbf80bf80u;
        const u32 a = masked(word, constants.low, constants.exponent), b = masked(word >> 8, constants.low, constants.exponent);
        const u32 c = masked(word, constants.sign, constants.exponent), d = masked(word >> 8, constants.sign, constants.exponent);
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(first) : "r"(c), "r"(minus_one), "r"(a));
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(second) : "r"(d), "r"(minus_one), "r"(b));
    }
}

DEVICE void clear(float (&sums)[4]) { sums[0] = sums[1] = sums[2] = sums[3] = 0.0f; }

// Scale of a group's row and of its second half, or its minimum.
DEVICE void factors_of(const Step &step, int tile, int half, int group, float &scale, float &second) {
    const u32 scales = step.scales[tile][half][group / 2] >> (16 * (group % 2));
    if (STEPS) {
        const u32 units = step.units[tile][half];
        scale = to_float(f16{u16(units)}) * step_of(scales, 0);
        if (HALVES) second = to_float(f16{u16(units)}) * step_of(scales, 1);
        if (MINIMA) second = -to_float(f16{u16(units >> 16)}) * step_of(scales, 1);
    } else {
        scale = to_float(f16{u16(scales)});
        if (MINIMA) second = to_float(f16{u16(step.minima[tile][half][group / 2] >> (16 * (group % 2)))});
    }
}

#if PACKED == 8 // stream_digits.cuh multiplies those of 4 bits

// Sums of some columns, of each half of a group where those have scales of their own; and of the inputs.
struct Partial {
    float sums[1 + HALVES][PARTS][4], totals[PARTS][4];

    DEVICE void add(const Partial &other) {
#pragma unroll
        for (int i = 0; i < PARTS * 4; i++) {
            for (int half = 0; half <= HALVES; half++) sums[half][i / 4][i % 4] += other.sums[half][i / 4][i % 4];
            totals[i / 4][i % 4] += other.totals[i / 4][i % 4];
        }
    }
};

// Adds the sums of a group, times its scales.
DEVICE void add_group(const Step &step, int group, const Partial &partial, Sums &all) {
    float scales[2], seconds[2];
#pragma unroll
    for (int half = 0; half < 2; half++) factors_of(step, 0, half, group, scales[half], seconds[half]);
#pragma unroll
    for (int i = 0; i < PARTS * 4; i++) {
        const float total = partial.totals[i / 4][i % 4];
        float &to = all.values[0][i / 4][i % 4];
        to = fmaf(scales[i % 4 / 2], partial.sums[0][i / 4][i % 4], to);
        if (HALVES) to = fmaf(seconds[i % 4 / 2], partial.sums[HALVES][i / 4][i % 4], to);
        if (MINIMA) to = fmaf(seconds[i % 4 / 2], total, to);
    }
}

// Starts the sums of a quarter of a step, and adds up its inputs, in two turns.
DEVICE void begin_quarter(const uint4 (&values)[PARTS], int turn, const u32 (&one)[4], Partial &partial) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const uint4 &b = values[part];
        float(&totals)[4] = partial.totals[part];
        if (turn == 0) clear(totals);
        if (MINIMA) mma(totals, one[0], one[1], one[2], one[3], turn == 0 ? b.x : b.z, turn == 0 ? b.y : b.w);
        if (turn == 0) continue;
        for (int half = 0; half <= HALVES; half++) {
            for (int i = 0; i < 4; i++) partial.sums[half][part][i] = 0.0f;
        }
    }
}

// Adds four columns of each lane's eight of a quarter.
DEVICE void multiply_quad(const Step &step, const uint4 (&values)[PARTS], int quarter, int quad, int t, const Constants &constants,
                          Partial &partial) {
    u32 a[4];
    unpack(step.words[0][0], quarter, quad, constants, a[0], a[2]);
    unpack(step.words[0][1], quarter, quad, constants, a[1], a[3]);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const u32 b0 = word_of(values[part], 2 * quad), b1 = word_of(values[part], 2 * quad + 1);
        if (!HALVES) mma(partial.sums[0][part], a[0], a[1], a[2], a[3], b0, b1);
        for (int half = 0; half < 2 * HALVES; half++) { // lanes 0 and 1 of four have the first 16 columns
            const bool is_own = t / 2 == half;
            mma(partial.sums[half][part], a[0], a[1], a[2], a[3], is_own ? b0 : 0, is_own ? b1 : 0);
        }
    }
}

// Multiplies a step's weights by the input in a slot: quarters together, as far as there are registers, so that instructions wait less for
// each other.
template <class Input> DEVICE void multiply(const Input &input, const Step &step, u32 slot, Sums (&all)[2]) {
    const Constants &constants = input.constants;
    constexpr int TOGETHER = PARTS > 1 || HALVES ? 1 : MINIMA ? 2 : 4, GROUP_QUARTERS = 4 / GROUPS;
    Partial group;
#pragma unroll
    for (int base = 0; base < 4; base += TOGETHER) {
        uint4 values[TOGETHER][PARTS];
        Partial own[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) input.read(slot, (base + i) / 2, (base + i) % 2, values[i]);
#pragma unroll
        for (int i = 0; i < 2 * TOGETHER; i++) begin_quarter(values[i % TOGETHER], i / TOGETHER, constants.total, own[i % TOGETHER]);
#pragma unroll
        for (int i = 0; i < 2 * TOGETHER; i++) {
            const int number = i % TOGETHER;
            multiply_quad(step, values[number], base + number, i / TOGETHER, input.t, constants, own[number]);
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int quarter = base + i;
            if (quarter % GROUP_QUARTERS == 0) {
                group = own[i];
            } else {
                group.add(own[i]);
            }
            if (quarter % GROUP_QUARTERS == GROUP_QUARTERS - 1) add_group(step, quarter / GROUP_QUARTERS, group, all[0]);
        }
    }
}
#endif
