// How linear_stream.cuh multiplies weights of 4 bits: input rows become integers of two digits (digits.cuh), so that matrix instructions on
// bytes give exact sums over the 32 columns of a quarter of a step. A nibble in the upper half of a byte is 16 times the integer.
//
// Of one row (TOKENS 1), the 8 columns of the instruction are the quarters' two digits: column 2 * q + d holds digit d of quarter q while
// that is multiplied, else zeros, and lane t of four gets the sums of quarter t. Of more rows, the columns are rows, one digit at a time.
// Either way a sum of a quarter is the same, and they are added in the same order, so rows do not depend on their company.

#ifndef KEEPS
#define KEEPS 0 // 1: there are registers for what would be computed anew in every step, one instruction in five
#endif

constexpr bool IS_ONE = TOKENS == 1;

// Sums of a warp, for rows g and g + 8: of quarter t of all steps, or of each quarter.
struct Accumulator {
    float quarters[IS_ONE ? 1 : 4][PARTS][4];
};

// Where a lane finds its part of the input's digits in a slot.
struct Input : Prepared {
    u32 mask; // in a register, since an instruction has room for one constant only
    u32 is_own[IS_ONE && KEEPS ? 4 : 1];   // whether the lane has digits of a quarter, 1 or 0
    u32 from[PARTS][2], factors[PARTS][2]; // digits of either half of 64 columns, and factors of the lane's two tokens

    DEVICE Input(const Product &product, int warp, int lane) : Prepared(product, warp, lane) {
        asm volatile("mov.b32 %0, 0xf0f0f0f0;" : "=r"(mask));
        if (KEEPS) mask |= u32(product.rows) >> 28; // nothing, but the compiler would make the mask anew for each instruction
#pragma unroll
        for (int i = 0; IS_ONE && KEEPS && i < 4; i++) {
            u32 &flag = is_own[IS_ONE && KEEPS ? i : 0];
            flag = lane / 8 == i;
            asm volatile("" : "+r"(flag)); // or it would be a choice
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int g = lane / 4;
            // Tokens that do not exist are some other one: nobody uses their sums.
            from[part][0] = IS_ONE ? digits_place(0, g / 2 * 4 + t) + g % 2 * 8 : digits_place(min(part * 8 + g, rows - 1), t);
            from[part][1] = from[part][0] ^ 64;
#pragma unroll
            for (int i = 0; i < 2; i++) factors[part][i] = rows * DIGITS_OF_ROW + (IS_ONE ? t * 4 : min(part * 8 + 2 * t + i, rows - 1) * 32);
            if (KEEPS) asm volatile("" : "+r"(from[part][0]), "+r"(from[part][1]), "+r"(factors[part][0]), "+r"(factors[part][1]));
        }
    }
};

// Adds products of weights with digits, 32 columns of 16 rows by 8 columns of the instruction.
DEVICE void add_products(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#define PRODUCTS(type)                                                                                                                       \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." type ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])                                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if (MINIMA) {
        PRODUCTS("u8");
    } else {
        PRODUCTS("s8");
    }
#undef PRODUCTS
}

// The eight integers of a word, times 16: codes, or less 8 with a sign.
DEVICE void spread(u32 word, u32 mask, u32 &first, u32 &second) {
    const u32 sign = MINIMA ? 0 : 0x80808080u;
    first = (word << 4 & mask) ^ sign, second = (word & mask) ^ sign;
}

// A sum of two digits' products, scaled, and what the minimum adds.
DEVICE void add_scaled(float &sum, int high, int low, float unit, float scale, float total, float minimum) {
    sum = fmaf(float(high * 256 + low), unit * scale, sum);
    if (MINIMA) sum = fmaf(minimum, total, sum);
}

#if TOKENS == 1
DEVICE void multiply(const Input &input, const Step &step, u32 slot, Accumulator &all) {
    const uint2 own = load_shared_pair(slot + input.from[0][0]);
    const float unit = load_shared_float(slot + input.factors[0][0]);
    const float total = MINIMA ? load_shared_float(slot + input.factors[0][0] + 16) : 0.0f;
    float scales[2], minima[2];
#pragma unroll
    for (int half = 0; half < 2; half++) factors_of(step, 0, half, 0, scales[half], minima[half]);
    int sums[2][4] = {}; // two, so that instructions wait less for each other
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
        u32 a[4];
        spread(word_of(step.words[0][0][0], quarter), input.mask, a[0], a[2]);
        spread(word_of(step.words[0][1][0], quarter), input.mask, a[1], a[3]);
        if (KEEPS) { // a product is no work for the units that spread weights, as a choice is
            const u32 is_own = input.is_own[KEEPS ? quarter : 0];
            add_products(sums[quarter % 2], a, own.x * is_own, own.y * is_own);
        } else {
            const bool is_own = input.lane / 8 == quarter;
            add_products(sums[quarter % 2], a, is_own ? own.x : 0, is_own ? own.y : 0);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int high = sums[0][2 * half] + sums[1][2 * half], low = sums[0][2 * half + 1] + sums[1][2 * half + 1];
        add_scaled(all.quarters[0][0][2 * half], high, low, unit, scales[half], total, minima[half]);
    }
}

// Leaves a warp's sums where the others can read them: (16, stride).
DEVICE void publish(Accumulator &all, float *to, int rows, int stride, int g, int t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = all.quarters[0][0][2 * half];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        if (t == 0) to[(half * 8 + g) * stride] = sum;
    }
}
#else
DEVICE void multiply(const Input &input, const Step &step, u32 slot, Accumulator &all) {
    uint4 units[PARTS][2], totals[PARTS][2];
#pragma unroll
    for (int i = 0; i < PARTS * 2; i++) {
        const u32 from = slot + input.factors[i / 2][i % 2];
        units[i / 2][i % 2] = load_shared(from);
        if (MINIMA) totals[i / 2][i % 2] = load_shared(from + 16);
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
        float scales[2], minima[2];
        u32 a[4];
#pragma unroll
        for (int half = 0; half < 2; half++) factors_of(step, 0, half, quarter / (4 / GROUPS), scales[half], minima[half]);
        spread(word_of(step.words[0][0][0], quarter), input.mask, a[0], a[2]);
        spread(word_of(step.words[0][1][0], quarter), input.mask, a[1], a[3]);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const uint4 digits = load_shared(slot + input.from[part][quarter % 2] + quarter / 2 * 128);
            int high[4] = {}, low[4] = {};
            add_products(high, a, digits.x, digits.y);
            add_products(low, a, digits.z, digits.w);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float unit = __uint_as_float(word_of(units[part][i % 2], quarter));
                const float total = MINIMA ? __uint_as_float(word_of(totals[part][i % 2], quarter)) : 0.0f;
                add_scaled(all.quarters[quarter][part][i], high[i], low[i], unit, scales[i / 2], total, minima[i / 2]);
            }
        }
    }
}

// Leaves a warp's sums where the others can read them: (16, stride).
DEVICE void publish(const Accumulator &all, float *to, int rows, int stride, int g, int t) {
#pragma unroll
    for (int i = 0; i < PARTS * 4; i++) {
        const int token = i / 4 * 8 + 2 * t + i % 2, part = i / 4;
        const float(&q)[4][PARTS][4] = all.quarters;
        const float sum = (q[0][part][i % 4] + q[1][part][i % 4]) + (q[2][part][i % 4] + q[3][part][i % 4]);
        if (token < rows) to[(i % 4 / 2 * 8 + g) * stride + token] = sum;
    }
}
#endif
