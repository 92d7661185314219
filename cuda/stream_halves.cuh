// How linear_stream.cuh multiplies E4M3 weights: by input rows in half precision (halves.cuh), whose units are applied to the sums of a step.

typedef Sums Accumulator[1];

// Where a lane finds its part of the input in a slot.
struct Input : Prepared {
    u32 from[PARTS][2], units[PARTS][2]; // either half of 16 columns, and units of the lane's two tokens

    DEVICE Input(const Product &product, int warp, int lane) : Prepared(product, warp, lane) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            // Tokens that do not exist are some other one: nobody uses their sums.
            from[part][0] = halves_place(min(part * 8 + lane / 4, rows - 1), t * 2);
            from[part][1] = from[part][0] ^ 64;
#pragma unroll
            for (int i = 0; i < 2; i++) units[part][i] = rows * HALVES_OF_ROW + min(part * 8 + 2 * t + i, rows - 1) * 16;
            asm volatile("" : "+r"(from[part][0]), "+r"(from[part][1])); // or they are computed anew in every step
            asm volatile("" : "+r"(units[part][0]), "+r"(units[part][1]));
        }
    }
};

// Four E4M3 numbers in half precision, in their order, exactly.
DEVICE void expand_to_halves(u32 word, u32 &first, u32 &second) {
#if __CUDA_ARCH__ >= 890
    // Halves of a register are what the instruction takes; shifted down, the second would cost one more.
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
        : "=r"(first), "=r"(second)
        : "r"(word));
#else
    const u32 a = __byte_perm(word, 0, 0x1404), b = __byte_perm(word, 0, 0x3424); // in the upper halves of 16 bits
    const u32 power = 0x5c005c00u, zero = 0x80008000u; // 2^8, by which the formats' exponents differ; -0, which changes no sign
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(first) : "r"((a & 0x80008000u) | (a >> 1 & 0x3f803f80u)), "r"(power), "r"(zero));
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(second) : "r"((b & 0x80008000u) | (b >> 1 & 0x3f803f80u)), "r"(power), "r"(zero));
#endif
}

DEVICE void add_products(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Multiplies a step's weights by the input in a slot. There are two sums, so that instructions wait less for each other.
DEVICE void multiply(const Input &input, const Step &step, u32 slot, Accumulator &all) {
    Sums sums[2] = {};
#pragma unroll
    for (int i = 0; i < LOADS * 2; i++) { // 32 columns each: 8 of a lane
        uint4 values[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; part++) values[part] = load_shared(slot + input.from[part][i % 2] + i / 2 * 128);
#pragma unroll
        for (int quad = 0; quad < 2; quad++) {
            u32 a[4];
            expand_to_halves(word_of(step.words[0][0][i / 2], i % 2 * 2 + quad), a[0], a[2]);
            expand_to_halves(word_of(step.words[0][1][i / 2], i % 2 * 2 + quad), a[1], a[3]);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                add_products(sums[quad].values[0][part], a, word_of(values[part], 2 * quad), word_of(values[part], 2 * quad + 1));
            }
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const float units[2] = {load_shared_float(slot + input.units[part][0]), load_shared_float(slot + input.units[part][1])};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float factor = GROUPED ? units[i % 2] * step.scales[0][i / 2] : units[i % 2];
            float &sum = all[0].values[0][part][i];
            sum = fmaf(factor, sums[0].values[0][part][i] + sums[1].values[0][part][i], sum);
        }
    }
}

// Leaves a warp's sums where the others can read them: (16, stride).
DEVICE void publish(const Accumulator &sums, float *to, int rows, int stride, int g, int t) {
#pragma unroll
    for (int i = 0; i < PARTS * 4; i++) {
        const int token = i / 4 * 8 + 2 * t + i % 2;
        if (token < rows) to[(i % 4 / 2 * 8 + g) * stride + token] = sums[0].values[0][i / 4][i % 4];
    }
}
