// How the weights of linear_many.cu come to shared memory, become bfloat16 in registers, and are multiplied there.
//
// Packed weights are rounded to bfloat16 with their scales, as where they are unpacked for cuBLASLt; so are E4M3 weights with scales of
// groups, but not those with scales of rows, which are applied to the sums.
#include "linear_product.cuh"
#include "warp_group.cuh"

constexpr int SPAN = 64, SPANS = STEP / SPAN;                 // columns that four matrix instructions multiply
constexpr bool WIDE_LANES = !PACKED && sizeof(WEIGHT) == 1;   // a lane multiplies 16 neighbouring columns, not 8
constexpr int SPAN_BYTES = TOKENS * SPAN * 2, INPUT_BYTES = SPANS * SPAN_BYTES;

// Bytes of a warp's weights in a step, by halves of its rows: words, then scales and minima or units of 8 rows each.
constexpr int WORDS = 2 * LOADS * WARP * 16;
#if PACKED
constexpr int SCALE_BYTES = BLOCK_ROWS * GROUPS * 2, MINIMUM_BYTES = STEPS || MINIMA ? BLOCK_ROWS * PER_ROW * 2 : 0;
#else
constexpr int SCALE_BYTES = GROUPED ? 8 * 4 : 0, MINIMUM_BYTES = 0;
#endif
constexpr int SCALE_PIECE = SCALE_BYTES / 8 < 4 ? 4 : SCALE_BYTES / 8, MINIMUM_PIECE = MINIMUM_BYTES / 8 < 4 ? 4 : MINIMUM_BYTES / 8; // a lane's
constexpr int WARP_BYTES = WORDS + 2 * (SCALE_BYTES + MINIMUM_BYTES);

// Where a lane's part of a warp's weights is, and how it comes to shared memory.
struct Weights {
    const u8 *words[2], *scales, *minima; // of the step that is copied next; scales and minima of half lane / 8 (GROUPED: t)
    u64 policy;
    int columns, lane, g, t; // columns from that step on

    // Begins with a step of the rows from `row` on.
    DEVICE Weights(const Product &product, int row, int begin, int lane)
        : scales(nullptr), minima(nullptr), policy(streaming_policy()), columns(product.columns - begin * STEP), lane(lane), g(lane / 4),
          t(lane % 4) {
        Reader reader = {product, g, t, policy};
        reader.move(row);
#pragma unroll
        for (int half = 0; half < 2; half++) {
#if PACKED
            words[half] = reader.words[0][half] + size_t(begin) * BLOCK_BYTES;
            if (lane / 8 != half) continue;
            scales = reinterpret_cast<const u8 *>(reader.scales[0][half] - g * GROUPS) + size_t(begin) * SCALE_BYTES + lane % 8 * SCALE_PIECE;
            if (MINIMUM_BYTES == 0) continue;
            minima = reinterpret_cast<const u8 *>(reader.minima[0][half] - g * PER_ROW) + size_t(begin) * MINIMUM_BYTES;
            minima += lane % 8 * MINIMUM_PIECE;
#else
            words[half] = reader.rows[0][half] + size_t(begin) * STEP * sizeof(WEIGHT);
            if (GROUPED && t == half) scales = reinterpret_cast<const u8 *>(reader.scales[0][half] + begin);
#endif
        }
    }

    // Starts copying a step to a slot, and goes on to the next.
    DEVICE void copy(u32 slot) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const u32 to = slot + (half * LOADS + i) * 512 + lane * 16;
#if PACKED
                copy_stream(to, words[half] + i * 512, true, policy);
#else
                copy_stream(to, words[half] + i * 64, i * (STEP / LOADS) + t * RUN < columns, policy);
#endif
            }
            words[half] += PACKED ? BLOCK_BYTES : 128;
        }
        const u32 half = lane / 8, row = lane % 8;
        if (PACKED && lane < 16) {
            if (row * SCALE_PIECE < SCALE_BYTES) copy_piece<SCALE_PIECE>(slot + WORDS + half * SCALE_BYTES + row * SCALE_PIECE, scales);
            if (row * MINIMUM_PIECE < MINIMUM_BYTES) {
                copy_piece<MINIMUM_PIECE>(slot + WORDS + 2 * SCALE_BYTES + half * MINIMUM_BYTES + row * MINIMUM_PIECE, minima);
            }
        }
        if (GROUPED && t < 2) copy_piece<4>(slot + WORDS + t * SCALE_BYTES + g * 4, scales);
        scales += GROUPED ? 4 : SCALE_BYTES, minima += MINIMUM_BYTES, columns -= STEP;
    }

    // Brings a step from a slot to registers.
    DEVICE void read(u32 slot, Step &step) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) step.words[0][half][i] = load_shared(slot + (half * LOADS + i) * 512 + lane * 16);
#if PACKED
            read_rows(slot + WORDS + half * SCALE_BYTES + g * (GROUPS * 2), step.scales[0][half]);
            const u32 minima = slot + WORDS + 2 * SCALE_BYTES + half * MINIMUM_BYTES + g * (PER_ROW * 2);
            if constexpr (STEPS) {
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(step.units[0][half]) : "r"(minima));
            } else if constexpr (MINIMA) {
                read_rows(minima, step.minima[0][half]);
            }
#elif GROUPED
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(step.scales[0][half]) : "r"(slot + WORDS + half * SCALE_BYTES + g * 4));
#endif
        }
    }

    // Half-precision numbers of a row.
    template <int N> DEVICE static void read_rows(u32 from, u32 (&to)[N]) {
        if constexpr (N == 2) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from));
        } else {
            u16 one;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(one) : "r"(from));
            to[0] = one;
        }
    }
};

DEVICE u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

constexpr u32 ONES = 0x3f803f80u, NOTHING = 0x80008000u; // 1, and -0, in pairs

// Four E4M3 numbers as bfloat16, in their order, exactly.
DEVICE void expand_in_order(u32 word, u32 &first, u32 &second) {
    const u32 a = __byte_perm(word, 0, 0x1404), b = __byte_perm(word, 0, 0x3424); // in the upper halves of 16 bits
    const u32 power = 0x7b807b80u;                                               // 2^120, by which the formats' exponents differ
    first = fma_pair((a & 0x80008000u) | (a >> 4 & 0x07f007f0u), power, NOTHING);
    second = fma_pair((b & 0x80008000u) | (b >> 4 & 0x07f007f0u), power, NOTHING);
}

// What the weights of 32 columns are multiplied by and moved by, for rows g and g + 8, in pairs.
struct Factors {
    u32 scale[2], minimum[2];

    DEVICE void of(const Step &step, int quarter, int t) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            scale[half] = ONES, minimum[half] = NOTHING;
#if PACKED
            float factor, second = 0.0f;
            factors_of(step, 0, half, quarter / (4 / GROUPS), factor, second);
            if (HALVES && t / 2 == 1) factor = second;
            scale[half] = pack_bf16(factor, factor);
            if (MINIMA) minimum[half] = pack_bf16(second, second);
#elif GROUPED
            scale[half] = pack_bf16(step.scales[0][half], step.scales[0][half]);
#endif
        }
    }
};

// A warp's weights for four matrix instructions: a span of a step.
typedef u32 Operands[4][4];

DEVICE void weights_of(const Step &step, int span, int t, const Constants &constants, Operands &operands) {
    Factors factors;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32(&a)[4] = operands[i];
        const int quarter = span * 2 + i / 2;
        if (i % 2 == 0) factors.of(step, quarter, t);
#if PACKED
        unpack(step.words[0][0], quarter, i % 2, constants, a[0], a[2]);
        unpack(step.words[0][1], quarter, i % 2, constants, a[1], a[3]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (PACKED == 4) a[j] = fma_pair(a[j], ONES, MINIMA ? 0xc300c300u : 0xc308c308u); // less 128, or 136
            a[j] = fma_pair(a[j], factors.scale[j % 2], factors.minimum[j % 2]);
        }
#else
        if constexpr (WIDE_LANES) {
            expand_in_order(word_of(step.words[0][0][span], i), a[0], a[2]);
            expand_in_order(word_of(step.words[0][1][span], i), a[1], a[3]);
        } else {
            expand(step.words[0][0][i / 2], step.words[0][1][i / 2], i % 2, a);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (GROUPED) a[j] = fma_pair(a[j], factors.scale[j % 2], NOTHING);
        }
#endif
    }
}

typedef float Totals[PARTS * 4]; // of a warp: those of mma.cuh, one after the other

// Starts multiplying a span by the input rows in shared memory.
DEVICE void multiply_span(const Operands &operands, u32 place, int lane, Totals &sums) {
#if HAS_WARP_GROUPS
    multiplied_from_here();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply_group(sums, operands[i], described(place) + i * 2);
    end_products();
#else
    const u32 g = lane / 4, own = place + g * 128 + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 lower = own + ((i * 2) ^ g) * 16, upper = own + ((i * 2 + 1) ^ g) * 16;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            u32 b0, b1;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(b0) : "r"(lower + part * 1024));
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(b1) : "r"(upper + part * 1024));
            mma(*reinterpret_cast<float(*)[4]>(&sums[part * 4]), operands[i][0], operands[i][1], operands[i][2], operands[i][3], b0, b1);
        }
    }
#endif
}

// Waits until what was started is multiplied, but for the last LEFT spans.
template <int LEFT> DEVICE void finish_products() {
#if HAS_WARP_GROUPS
    wait_for_products<LEFT>();
#endif
}
