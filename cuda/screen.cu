// Greedy decoding with half of the head's bytes: a copy of the head in 8 bits (the rough one) gives approximate logits of all tokens, and only
// those tokens that can be the greatest after all are computed with the head itself. What is chosen is what the streaming product and
// `argmax` would choose, by proof. (Pruning by Cauchy and Schwarz: LEMP, Teflioudi et al., 2015; screening for softmax: L2S, Chen et al., 2019.)
//
// For token j with weights w, rough weights w', input x (as the product reads it: with a norm, times its factors and rounded to bfloat16),
// S = ||x|| f, where f is what sums are multiplied by after the norm, and e = ||w - w'||: in real numbers, x w' f and x w f differ by at most
// e S. Computed ones differ by at most margin = b S, b = e + gamma (||w|| + e), where gamma covers both products' rounding:
//   a matrix instruction adds 16 products to a sum, perhaps in two halves; cut off at 2^-23 of the greatest term each time, that is an error of at
//   most 20 * 2^-23 of sum |w x| <= ||w|| ||x||, where a sum stands for all terms of its chain. The streaming product of bfloat16 has chains of
//   2 ceil(n / 512) for n columns, screen_rough of 2 (32 columns), and adds those up in float, ceil(n / 1024) + 4 of them. Warps' sums, scales and
//   f are fewer than 40 roundings more, and the two f differ by fewer than n / 512 + 10. Together less than (n / 8 + 128) * 2^-23.
// screen_many.cu, for more rows, adds what rounding x costs it.
// S is rounded up by 1e-4, more than sums of squares lose. Rows so small that squares vanish, or so great that products could be infinite, have
// no screen: all tokens are computed. So it is, too, for tokens and rows with what is no number: comparisons with it leave nobody out.
//
// With L the greatest (approximate logit - margin), some token's logit is at least L; whoever has an approximate logit + margin < L is less than
// that one, and strictly. A candidate's logit has the bits that linear_stream gives it: the same matrix instructions on the same columns in the same
// order. All tokens may be candidates (a row of zeros): that gives the same result, but an H200 takes 450 to 700 us for each row (128,256 x
// 4,096) where the whole head takes 230 to 260 for all of them; whoever calls this sees counts, and gives a screen up that leaves so many.
#include "screen.cuh"
#include "weights.cuh"

// bounds (2, rows) float: b of each token, and ||w|| + e. exact (rows, columns); rough and scales as weights.cuh says.
// Launch: ceil(rows / 8) blocks, SCREENERS threads.
KERNEL screen_bounds(const bf16 *exact, const u8 *rough, const f16 *scales, float *bounds, int rows, int columns) {
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.x * SCREEN_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const Matrix matrix = {rough, scales, nullptr, columns, WEIGHT_GROUP};
    double squares = 0.0, errors = 0.0;
    for (int column = lane * 8; column < columns; column += WARP * 8) {
        float own[8], integers[8];
        load<8>(exact + size_t(row) * columns + column, own);
        const Eight eight = matrix.fetch(row, column);
        const double scale = to_float(f16{u16(eight.scale)});
        unpack(eight.words, integers);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const double value = own[i], error = value - scale * double(integers[i]);
            squares += value * value, errors += error * error;
        }
    }
    squares = warp_sum(squares), errors = warp_sum(errors);
    if (lane > 0) return;
    const double error = sqrt(errors), both = sqrt(squares) + error, bound = error + (columns * 0.125 + 128.0) * 0x1p-23 * both;
    bounds[row] = __double2float_ru(bound * (1.0 + 1e-9)), bounds[rows + row] = __double2float_ru(both * (1.0 + 1e-9));
}

// Multiplies a warp's steps of 16 rows of the head, g (upper) and g + 8 (lower) of each lane, by an input row: all columns of a matrix
// instruction are that row.
DEVICE void multiply_rows(const bf16 *upper, const bf16 *lower, const bf16 *input, int columns, int warp, int t, float (&sums)[2][4]) {
    constexpr int AHEAD = 4;
    for (int first = warp * SPAN + t * 8; first < columns; first += AHEAD * SCREEN_WARPS * SPAN) {
        uint4 a[2 * AHEAD][2], b[2 * AHEAD];
#pragma unroll
        for (int i = 0; i < 2 * AHEAD; i++) {
            const int column = first + i / 2 * (SCREEN_WARPS * SPAN) + i % 2 * (SPAN / 2);
            a[i][0] = a[i][1] = b[i] = make_uint4(0, 0, 0, 0);
            if (column >= columns) continue;
            a[i][0] = *reinterpret_cast<const uint4 *>(upper + column), a[i][1] = *reinterpret_cast<const uint4 *>(lower + column);
            b[i] = *reinterpret_cast<const uint4 *>(input + column);
        }
#pragma unroll
        for (int i = 0; i < 4 * AHEAD; i++) {
            const uint4 &one = a[i / 2][0], &other = a[i / 2][1], &row = b[i / 2];
            const int low = i % 2 * 2, high = low + 1;
            mma(sums[i % 2], word_of(one, low), word_of(other, low), word_of(one, high), word_of(other, high), word_of(row, low),
                word_of(row, high));
        }
    }
}

constexpr int EXACT_FOURS = 2;                       // that a thread reads at once
constexpr int STRETCH = EXACT_FOURS * SCREENERS * 4; // tokens that a block looks at, at once
constexpr int MOST_CANDIDATES = 2 * STRETCH;         // that are kept until they are computed

// The greatest logit of `count` candidates: a thread has some of the keys.
DEVICE u64 compute(const u32 *candidates, int count, const bf16 *weight, const bf16 *input, float factor, int columns) {
    __shared__ float sums[2][SCREEN_WARPS][16];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    u64 best = 0;
    for (int first = 0, turn = 0; first < count; first += 16, turn ^= 1) {
        const u32 upper = candidates[min(first + g, count - 1)], lower = candidates[min(first + g + 8, count - 1)];
        float own[2][4] = {};
        multiply_rows(weight + size_t(upper) * columns, weight + size_t(lower) * columns, input, columns, warp, t, own);
        if (t == 0) sums[turn][warp][g] = own[0][0] + own[1][0], sums[turn][warp][g + 8] = own[0][2] + own[1][2];
        __syncthreads();
        if (threadIdx.x >= 16 || first + int(threadIdx.x) >= count) continue;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SCREEN_WARPS; i++) sum += sums[turn][i][threadIdx.x];
        best = max(best, logit_key(sum * factor, candidates[first + threadIdx.x]));
    }
    return best;
}

// Of a block, in shared memory.
struct Candidates {
    u32 *list;
    int *count;

    DEVICE void add(int id) const { list[atomicAdd(count, 1)] = id; }
};

// What a block knows of a row that it chooses for.
struct Chosen {
    Found *row;
    const bf16 *weight, *input;
    int columns;
    float lower;

    DEVICE Chosen(Found *found, const bf16 *weight, const bf16 *inputs, int input_stride, int columns)
        : row(found + blockIdx.y), weight(weight), input(inputs + size_t(blockIdx.y) * input_stride), columns(columns), lower(disordered(row->lower)) {}

    // Looks at items of tokens, `step` at a time and not more than STRETCH tokens, and computes those that are candidates: look_at(first item,
    // candidates) adds them.
    template <class Look> DEVICE void choose(int begin, int end, int step, const Look &look_at, int *chosen) const {
        __shared__ u32 candidates[MOST_CANDIDATES];
        __shared__ int count;
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        u64 best = 0;
        u32 counted = 0;
        for (; begin < end; begin += step) {
            look_at(begin, Candidates{candidates, &count});
            __syncthreads();
            const int found_here = count;
            if (found_here == 0 || (begin + step < end && found_here <= MOST_CANDIDATES - STRETCH)) {
                __syncthreads();
                continue;
            }
            best = max(best, compute(candidates, found_here, weight, input, row->factor, columns));
            counted += found_here;
            __syncthreads();
            if (threadIdx.x == 0) count = 0;
            __syncthreads();
        }
        if (threadIdx.x < WARP) tell(best, counted, chosen);
    }

    // By a warp, whose first 16 lanes have the keys; the last block of a row tells what is chosen.
    DEVICE void tell(u64 best, u32 counted, int *chosen) const {
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, step));
        if (threadIdx.x > 0) return;
        if (counted) atomicMax(&row->key, best), atomicAdd(&row->counted, u64(counted));
        __threadfence();
        if (atomicAdd(&row->arrived, 1u) < gridDim.x - 1) return;
        __threadfence();
        best = atomicExch(&row->key, 0ull);
        row->arrived = row->lower = 0, row->times++;
        chosen[blockIdx.y] = is_finite(best) ? id_of(best) : -1;
    }
};

// chosen[row] as argmax has it, of weight (width, columns) times input (rows, columns): as it is, or as screen_rough left it; logits (rows, width)
// of that and bounds (width) are aligned to 16 bytes. Launch: grid (parts, rows), SCREENERS threads.
BOUNDED_KERNEL(SCREENERS, 2)
screen_exact(const float *logits, const float *bounds, const bf16 *weight, const bf16 *input, Found *found, int *chosen, int stride, int width,
             int input_stride, int columns) {
    let_next_start();
    const int fours = width / 4, each = (fours + gridDim.x - 1) / gridDim.x, end = min(int(blockIdx.x + 1) * each, fours);
    if (threadIdx.x % 8 == 0 && int(blockIdx.x) * each + int(threadIdx.x) < end) prefetch_line(bounds + (blockIdx.x * each + threadIdx.x) * 4);
    wait_for_previous();
    const Chosen own(found, weight, input, input_stride, columns);
    const float length = own.row->length;
    logits += size_t(blockIdx.y) * stride;
    const auto look_at = [&](int begin, const Candidates &candidates) {
        const auto look = [&](float logit, float bound, int id) {
            const float margin = margin_of(bound, length);
            if (!(margin < GREATEST && logit + margin < own.lower)) candidates.add(id);
        };
        float4 values[EXACT_FOURS], bounds_here[EXACT_FOURS];
#pragma unroll
        for (int i = 0; i < EXACT_FOURS; i++) {
            const int at = min(begin + i * SCREENERS + int(threadIdx.x), end - 1);
            values[i] = reinterpret_cast<const float4 *>(logits)[at], bounds_here[i] = reinterpret_cast<const float4 *>(bounds)[at];
        }
#pragma unroll
        for (int i = 0; i < EXACT_FOURS; i++) {
            const int at = begin + i * SCREENERS + threadIdx.x, id = at * 4;
            if (at >= end) continue;
            look(values[i].x, bounds_here[i].x, id), look(values[i].y, bounds_here[i].y, id + 1);
            look(values[i].z, bounds_here[i].z, id + 2), look(values[i].w, bounds_here[i].w, id + 3);
        }
    };
    own.choose(blockIdx.x * each, end, EXACT_FOURS * SCREENERS, look_at, chosen);
}

constexpr int MOST_SEGMENTS = 2048, AT_ONCE = 8; // sixteens of tokens that a block looks at, and a thread at once

// The same of what screen_many left: uppers (rows, width), aligned to 16 bytes, and greatest (rows, ceil(width / 16)). Launch: in so many parts that
// none has more than MOST_SEGMENTS.
BOUNDED_KERNEL(SCREENERS, 2)
screen_exact_many(const float *uppers, const float *greatest, const bf16 *weight, const bf16 *input, Found *found, int *chosen, int stride,
                  int width, int input_stride, int columns) {
    __shared__ u32 hits[MOST_SEGMENTS];
    __shared__ int count;
    let_next_start();
    const int segments = (width + 15) / 16, each = (segments + gridDim.x - 1) / gridDim.x, end = min(int(blockIdx.x + 1) * each, segments);
    if (threadIdx.x == 0) count = 0;
    wait_for_previous();
    __syncthreads();
    const Chosen own(found, weight, input, input_stride, columns);
    greatest += size_t(blockIdx.y) * segments, uppers += size_t(blockIdx.y) * stride;
    for (int begin = blockIdx.x * each + threadIdx.x; begin < end; begin += AT_ONCE * SCREENERS) {
        float most[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) most[i] = greatest[min(begin + i * SCREENERS, end - 1)];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i * SCREENERS < end && !(most[i] < own.lower)) hits[atomicAdd(&count, 1)] = begin + i * SCREENERS;
        }
    }
    __syncthreads();
    const auto look_at = [&](int begin, const Candidates &candidates) { // each thread has half a segment
        const int item = begin + threadIdx.x;
        if (item >= 2 * count) return;
        const int id = hits[item / 2] * 16 + item % 2 * 8;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            if (id + i >= width) continue;
            const float4 values = *reinterpret_cast<const float4 *>(uppers + id + i);
            if (!(values.x < own.lower)) candidates.add(id + i);
            if (!(values.y < own.lower)) candidates.add(id + i + 1);
            if (!(values.z < own.lower)) candidates.add(id + i + 2);
            if (!(values.w < own.lower)) candidates.add(id + i + 3);
        }
    };
    own.choose(0, 2 * count, SCREENERS, look_at, chosen);
}
