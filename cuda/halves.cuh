// Input rows in half precision, for products with E4M3 weights, which the hardware makes half-precision numbers fastest.
//
// Each 128 columns of a row, a step, have a unit, a power of two, in which the greatest magnitude is from 2^14 to 2^15: so a bfloat16 number
// down to 2^-31 of that is exact. Infinite numbers and such as are none become a unit that is no number. A step is (rows, 128) numbers, whose
// places input_place() tells, and (rows, 4) floats, the first of them the unit.

constexpr int HALVES_OF_ROW = 256, HALF_BYTES = HALVES_OF_ROW + 16; // of a row's step

// Where 8 columns of a token are in a step (`eight` counts from 0 to 15), for lanes that read two neighbouring ones: what four lanes read
// together is neighbours, and two tokens take different banks.
DEVICE int halves_place(int token, int eight) {
    return token * HALVES_OF_ROW + eight / 8 * 128 + (eight % 2 ^ token % 2) * 64 + eight / 2 % 4 * 16;
}

// Two floats as half-precision numbers, the first in the lower half.
DEVICE u32 pack_halves(float first, float second) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

// The part of write_halves() behind the greatest magnitude of a step.
DEVICE void write_own_halves(const float (&values)[8], float greatest, u8 *step, int rows, int token, int eight, bool writes) {
    const u32 exponent = max(__float_as_uint(greatest) >> 23, 15u);
    const float inverse = __uint_as_float((268 - exponent) << 23);
    const float unit = __uint_as_float(exponent < 255 ? (exponent - 14) << 23 : 0x7fffffffu);
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = pack_halves(values[2 * i] * inverse, values[2 * i + 1] * inverse);
    if (writes) *reinterpret_cast<uint4 *>(step + halves_place(token, eight)) = make_uint4(words[0], words[1], words[2], words[3]);
    if (writes && eight == 0) *reinterpret_cast<float *>(step + rows * HALVES_OF_ROW + token * 16) = unit;
}

// Writes eight columns of a token to each of COUNT steps of `rows` rows: at once, so that instructions wait less for each other. Sixteen
// neighbouring lanes have the columns of a step; all lanes of a warp must call this, and `writes` says which of them write.
template <int COUNT>
DEVICE void write_halves(const float (&values)[COUNT][8], u8 *const (&steps)[COUNT], int rows, int token, int eight, const bool (&writes)[COUNT]) {
    float greatest[COUNT] = {};
#pragma unroll
    for (int i = 0; i < COUNT * 8; i++) greatest[i / 8] = greater_or_none(greatest[i / 8], fabsf(values[i / 8][i % 8]));
#pragma unroll
    for (int i = 0; i < 4 * COUNT; i++) {
        float &own = greatest[i % COUNT];
        own = greater_or_none(own, __shfl_xor_sync(ALL_LANES, own, 1 << i / COUNT));
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) write_own_halves(values[i], greatest[i], steps[i], rows, token, eight, writes[i]);
}

DEVICE void write_halves(const float (&values)[8], u8 *step, int rows, int token, int eight, bool writes) {
    const float(&all)[1][8] = reinterpret_cast<const float(&)[1][8]>(values);
    u8 *const steps[1] = {step};
    const bool all_writes[1] = {writes};
    write_halves<1>(all, steps, rows, token, eight, all_writes);
}
