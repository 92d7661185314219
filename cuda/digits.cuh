// Input rows as integers of two signed bytes, for products with packed integers: matrix instructions then multiply integers by integers,
// and add them exactly.
//
// Each 32 columns of a row have a unit, a power of two, in which the greatest magnitude is 2^14 or more: a bfloat16 number down to 2^-7 of
// that is exact, what is less is rounded to the unit. Infinite numbers and such as are none become a unit that is no number.
//
// A step is 128 columns. Its digits are (rows, 4 quarters, 4 lanes, 2, 8): 8 columns of a quarter, high digits and then low ones; of odd
// rows, quarters change places by twos, so that lanes that read at once take different banks. Behind them are (rows, 2, 4) floats: for each
// quarter its unit / 16, because weights are multiplied as 16 times themselves, and with MINIMA the sum of its numbers.

constexpr int DIGITS_OF_ROW = 256, DIGIT_BYTES = DIGITS_OF_ROW + 32; // of a row's step

// Where the 16 digits of 8 columns are, in a step of one row: `eight` counts from 0 to 15.
DEVICE int digits_place(int token, int eight) { return token * DIGITS_OF_ROW + ((eight / 4) ^ (token & 1)) * 64 + eight % 4 * 16; }

// The part of write_digits() behind the greatest magnitude of 32 columns.
DEVICE void write_own_digits(const float (&values)[8], float greatest, u8 *step, int rows, int token, int eight, bool writes) {
    // What would be rounded to more than 32639, which two signed digits do not hold, counts as the next power of two.
    const u32 exponent = max((__float_as_uint(greatest) + 0x10200u) >> 23, 19u);
    const float inverse = __uint_as_float((268 - exponent) << 23);
    const float unit = __uint_as_float(exponent < 255 ? (exponent - 18) << 23 : 0x7fffffffu);
    // A number in the mantissa of 2^23 is an integer at once; with 128 more, its low digit has no sign.
    const float base = 12582912.0f + 128.0f;
    u32 numbers[8], total = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) numbers[i] = __float_as_uint(fmaf(values[i], inverse, base)), total += numbers[i];
    u32 high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; i++) { // in the order of nibbles in a word: columns 0, 4, 1, 5 and 2, 6, 3, 7
        const u32 first = __byte_perm(numbers[2 * i], numbers[2 * i + 4], 0x5140);
        const u32 second = __byte_perm(numbers[2 * i + 1], numbers[2 * i + 5], 0x5140);
        low[i] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
        high[i] = __byte_perm(first, second, 0x7632);
    }
    if (writes) *reinterpret_cast<uint4 *>(step + digits_place(token, eight)) = make_uint4(high[0], high[1], low[0], low[1]);
    float *factors = reinterpret_cast<float *>(step + rows * DIGITS_OF_ROW) + token * 8 + eight / 4;
    if (writes && eight % 4 == 0) factors[0] = unit;
    if (!MINIMA) return;
    int sum = int(total - 8 * __float_as_uint(base));
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    if (writes && eight % 4 == 0) factors[4] = float(sum) * (16.0f * unit);
}

// Writes eight columns of a token to each of COUNT steps of `rows` rows: at once, so that instructions wait less for each other. Four
// neighbouring lanes have the 32 columns of a unit; all lanes of a warp must call this, and `writes` says which of them write.
template <int COUNT>
DEVICE void write_digits(const float (&values)[COUNT][8], u8 *const (&steps)[COUNT], int rows, int token, int eight, const bool (&writes)[COUNT]) {
    float greatest[COUNT] = {};
#pragma unroll
    for (int i = 0; i < COUNT * 8; i++) greatest[i / 8] = greater_or_none(greatest[i / 8], fabsf(values[i / 8][i % 8]));
#pragma unroll
    for (int i = 0; i < COUNT; i++) greatest[i] = greater_or_none(greatest[i], __shfl_xor_sync(ALL_LANES, greatest[i], 1));
#pragma unroll
    for (int i = 0; i < COUNT; i++) greatest[i] = greater_or_none(greatest[i], __shfl_xor_sync(ALL_LANES, greatest[i], 2));
#pragma unroll
    for (int i = 0; i < COUNT; i++) write_own_digits(values[i], greatest[i], steps[i], rows, token, eight, writes[i]);
}

DEVICE void write_digits(const float (&values)[8], u8 *step, int rows, int token, int eight, bool writes) {
    const float(&all)[1][8] = reinterpret_cast<const float(&)[1][8]>(values);
    u8 *const steps[1] = {step};
    const bool all_writes[1] = {writes};
    write_digits<1>(all, steps, rows, token, eight, all_writes);
}
