// What the kernels of a screened head share; screen.cu says what they are for.
#include "keys.cuh"
#include "mma.cuh"
#include "normed.cuh"

constexpr int SCREENERS = 256, SCREEN_WARPS = SCREENERS / WARP; // as many warps as linear_stream has
constexpr int SPAN = 64;                                        // columns of a step there
constexpr float SMALLEST = 1e-35f, GREATEST = 1e30f, LEAST_SQUARES = 1e-30f;

// Of a row: what was found up to now, how many candidates there were ever and in how many launches, and L, S and f.
struct Found {
    u64 key, counted, times;
    u32 arrived, lower; // `ordered` L, or 0
    float length, factor;
};

// What `ordered` was made of; minus infinity for 0.
DEVICE float disordered(u32 number) {
    return number == 0 ? -INFINITE : __uint_as_float(number & 0x80000000u ? number ^ 0x80000000u : ~number);
}

// By how much a logit may be wrong.
DEVICE float margin_of(float bound, float length) { return fmaf(bound, length, SMALLEST); }

// S.
DEVICE float length_of(float squares, float factor) { return squares >= LEAST_SQUARES ? sqrtf(squares) * 1.0001f * factor : INFINITE; }

// The sum of eight numbers' squares, and what was there.
DEVICE float add_squares(const uint4 &values, float sum) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float a = low_bf16(word_of(values, i)), b = high_bf16(word_of(values, i));
        sum = fmaf(b, b, fmaf(a, a, sum));
    }
    return sum;
}

// A row's S and f, and with a norm the row that is multiplied, (columns) at `normed` unless that is null. The sum of squares is that of
// linear_stream: by the same lanes, in the same order. By SCREENERS threads; `parts` is shared memory.
template <class Barrier>
DEVICE float2 measure(const bf16 *input, const float *norm, bf16 *normed, int columns, float epsilon, float2 *parts, Barrier barrier) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float squares = 0.0f, lengths = 0.0f;
    for (int column = (warp + lane / 8 * SCREEN_WARPS) * SPAN + lane % 8 * 8; column < columns; column += 4 * SCREEN_WARPS * SPAN) {
        uint4 values = *reinterpret_cast<const uint4 *>(input + column);
        if (norm) {
            float factors[8], own = 0.0f;
            load<8>(norm + column, factors);
            normalise(values, factors, own);
            squares += own;
            if (normed) *reinterpret_cast<uint4 *>(normed + column) = values;
        }
        lengths = add_squares(values, lengths);
    }
    squares = warp_sum(squares), lengths = warp_sum(lengths);
    if (lane == 0) parts[warp] = make_float2(squares, lengths);
    barrier();
    squares = lengths = 0.0f;
#pragma unroll
    for (int i = 0; i < SCREEN_WARPS; i++) squares += parts[i].x, lengths += parts[i].y;
    const float factor = norm ? norm_factor(squares, columns, epsilon) : 1.0f;
    return make_float2(length_of(lengths, factor), factor);
}
