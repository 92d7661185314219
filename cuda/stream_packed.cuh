// What linear_stream.cuh multiplies: packed integers of 4 or 8 bits with half-precision scales of groups (weights.cuh).
//
// An integer becomes bfloat16 by a mask that puts it into the mantissa of 128. For 4 bits the 128, and the 8 that is taken off codes
// without minima, come off at the end of a group: a matrix instruction on constants gives the inputs' sum, times -136. Sums over a group
// are exact but for float's rounding; then they are multiplied by the group's scale, and all rows of the batch share the unpacking.

constexpr int STEP = BLOCK_COLUMNS;
constexpr int LOADS = PACKED / 4;    // of 16 bytes, for each lane and row of a step
constexpr int PAIRS_OF_SCALES = (GROUPS + 1) / 2;
constexpr int PER_ROW = STEPS ? 2 : GROUPS; // minima, or units, of a row of a block
constexpr bool HAS_TOTAL = PACKED == 4 || MINIMA;
constexpr u32 TOTAL_OF = MINIMA ? 0x3f803f80u : 0xc308c308u; // 1, or -136

struct Step {
    uint4 words[TILES][2][LOADS];
    u32 scales[TILES][2][PAIRS_OF_SCALES], minima[TILES][2][PAIRS_OF_SCALES];
    u32 units[TILES][2];
};

// The half-precision numbers of a row of a block.
DEVICE void load_scales(const f16 *from, u32 (&scales)[PAIRS_OF_SCALES]) {
    if constexpr (GROUPS == 4) {
        const uint2 both = __ldg(reinterpret_cast<const uint2 *>(from));
        scales[0] = both.x, scales[1] = both.y;
    } else {
        scales[0] = __ldg(&from->bits);
    }
}

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

    DEVICE void operator()(Step &step, int number) const {
        if (number * STEP >= product.columns) return; // is not multiplied
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u8 *from = words[tile][half] + size_t(u32(number)) * BLOCK_BYTES;
#pragma unroll
                for (int i = 0; i < LOADS; i++) step.words[tile][half][i] = load_stream(from + i * 512, policy);
                const u32 place = u32(number) * (BLOCK_ROWS * GROUPS);
                load_scales(scales[tile][half] + place, step.scales[tile][half]);
                if (MINIMA && !STEPS) load_scales(minima[tile][half] + place, step.minima[tile][half]);
                const f16 *units = minima[tile][half] + u32(number) * (BLOCK_ROWS * PER_ROW);
                if (STEPS) step.units[tile][half] = __ldg(reinterpret_cast<const u32 *>(units));
            }
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
        for (int i = 0; i < 4; i++) asm volatile("mov.b32 %0, %1;" : "=r"(total[i]) : "n"(TOTAL_OF));
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

// Whether sums start from -136 times the inputs' sum: where that is known before, as in groups that are one quarter of a step.
constexpr bool FROM_TOTAL = PACKED == 4 && !MINIMA && GROUPS == 4;

// Sums of a group of columns: of each half where those have scales of their own.
typedef float GroupSums[1 + HALVES][TILES][PARTS][4];

// Adds the sums of a group, times its scales.
DEVICE void add_group(const Step &step, int group, const GroupSums &sums, const float (&totals)[PARTS][4], Sums &all) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float scales[2], seconds[2];
#pragma unroll
        for (int half = 0; half < 2; half++) factors_of(step, tile, half, group, scales[half], seconds[half]);
#pragma unroll
        for (int i = 0; i < PARTS * 4; i++) {
            const float total = totals[i / 4][i % 4];
            float sum = sums[0][tile][i / 4][i % 4], &to = all.values[tile][i / 4][i % 4];
            if (PACKED == 4 && !FROM_TOTAL) sum = MINIMA ? fmaf(-128.0f, total, sum) : sum + total;
            to = fmaf(scales[i % 4 / 2], sum, to);
            if (HALVES) to = fmaf(seconds[i % 4 / 2], sums[HALVES][tile][i / 4][i % 4], to);
            if (MINIMA) to = fmaf(seconds[i % 4 / 2], total, to);
        }
    }
}

// Multiplies a step's weights by the input in a slot of the ring.
template <class Input> DEVICE void multiply(const Input &input, const Step &step, int slot, const Constants &constants, Sums &all) {
    GroupSums sums;
    float totals[PARTS][4];
    const u32(&one)[4] = constants.total;
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
        uint4 values[PARTS];
        input.read(slot, quarter * 4 + input.t, values);
        const bool is_first = quarter % (4 / GROUPS) == 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const uint4 &b = values[part];
            if (is_first) clear(totals[part]);
            if (HAS_TOTAL) {
                mma(totals[part], one[0], one[1], one[2], one[3], b.x, b.y);
                mma(totals[part], one[0], one[1], one[2], one[3], b.z, b.w);
            }
#pragma unroll
            for (int tile = 0; tile < TILES && is_first; tile++) {
                for (int half = 0; half <= HALVES; half++) clear(sums[half][tile][part]);
                for (int i = 0; i < 4 && FROM_TOTAL; i++) sums[0][tile][part][i] = totals[part][i];
            }
        }
#pragma unroll
        for (int quad = 0; quad < 2; quad++) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                u32 a[4];
                unpack(step.words[tile][0], quarter, quad, constants, a[0], a[2]);
                unpack(step.words[tile][1], quarter, quad, constants, a[1], a[3]);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    const u32 b0 = word_of(values[part], 2 * quad), b1 = word_of(values[part], 2 * quad + 1);
                    if (!HALVES) mma(sums[0][tile][part], a[0], a[1], a[2], a[3], b0, b1);
                    for (int half = 0; half < 2 * HALVES; half++) { // lanes 0 and 1 of four have the first 16 columns
                        const bool is_own = input.t / 2 == half;
                        mma(sums[half][tile][part], a[0], a[1], a[2], a[3], is_own ? b0 : 0, is_own ? b1 : 0);
                    }
                }
            }
        }
        if (quarter % (4 / GROUPS) == 4 / GROUPS - 1) add_group(step, quarter / (4 / GROUPS), sums, totals, all);
    }
}
