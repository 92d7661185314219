// The first half of what screen.cu explains, for up to TOKENS rows: what each token's logit is at most, and a lower bound of each row's greatest, by
// the matrix instructions of warp groups on integers (compute capability 9.0).
//
// A row x is rounded to integers X of 16 bits times a power of two s, and each of them is two digits of 8 bits: 256 times the first, plus the second.
// Instructions add products of weights' integers and digits exactly, over 128 columns that share a scale; both digits' sums make one integer
// below 2^30, which is rounded to float, scaled and added to the others: errors of less than (n / 128 + 4) * 2^-23 of ||w'|| ||s X||, which gamma of
// screen.cu has room for. So a logit is wrong by at most b S + c E, where b and S are as there, c = ||w|| + e and E >= ||x - s X||; for
// |w x - w' s X| <= ||w - w'|| ||x|| + ||w'|| ||x - s X||. Numbers of bfloat16 that are 1/128 of a row's greatest, or more, are integers here, so that E
// is next to nothing.
//
// Blocks stay, and share out the head by sixteens of its rows, in units of up to 256: each of two teams (warp groups) has two tiles of 64. While one
// scales and adds what came of a tile, the other multiplies. A warp copies a team's weights, another the digits and scales, through a ring of STAGES of
// 128 columns. On an H200, 64 rows times 128,256 x 4,096 take 152 us, of which copying alone takes 134; unscaled sums 144. That a team multiplies one of its
// tiles while it adds the other changed nothing there, and took 10 % more time at 8,192 columns. Copies that part the halves of 32 bytes, or the lines of
// 128, take twice as long.
#include "screen_many.cuh"
#include "screen_many_end.cuh"

// Four digits as packed matrices have four columns.
DEVICE u32 in_word(int a, int b, int c, int d) { return (a & 255) | (c & 255) << 8 | (b & 255) << 16 | (d & 255) << 24; }

// Rows of bfloat16 (rows, columns), columns a multiple of 128, as digits (columns / 128, DIGITS, 128), with pieces of 16 bytes exchanged as
// warp_group.cuh says; and what is known of them: measured (TOKENS), and of `found` as screen.cu has it S, and f, which is 1.
// Launch: TOKENS blocks, SCREENERS threads.
KERNEL screen_digits(const bf16 *input, u8 *digits, Measured *measured, Found *found, int stride, int rows, int columns) {
    __shared__ float scratch[WARP];
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.x;
    const bf16 *row = input + size_t(min(token, rows - 1)) * stride;
    float greatest = 0.0f, squares = 0.0f;
    for (int column = threadIdx.x * 8; column < columns; column += SCREENERS * 8) {
        const uint4 words = *reinterpret_cast<const uint4 *>(row + column);
#pragma unroll
        for (int i = 0; i < 4; i++) greatest = fmaxf(greatest, fmaxf(fabsf(low_bf16(word_of(words, i))), fabsf(high_bf16(word_of(words, i)))));
        squares = add_squares(words, squares);
    }
    greatest = block_max(greatest, scratch);
    const float length = length_of(block_sum(squares, scratch), 1.0f);
    // Where S is no number, or none that helps, all tokens are candidates, whatever the digits are. Elsewhere 2^-60 < greatest < 2^100.
    const bool is_known = token < rows && length < GREATEST;
    const u32 exponent = is_known ? (__float_as_uint(greatest) >> 23) - 14 : 127;
    const float scale = __uint_as_float(exponent << 23), inverse = __uint_as_float((254 - exponent) << 23);
    float errors = 0.0f;
    for (int column = threadIdx.x * 8; column < columns; column += SCREENERS * 8) {
        float values[8];
        int high[8], low[8];
        load<8>(row + column, values);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float value = is_known ? values[i] * inverse : 0.0f;
            const int integer = min(max(int(rintf(value)), -MOST_DIGITS), MOST_DIGITS);
            const float error = value - float(integer);
            errors = fmaf(error, error, errors);
            high[i] = (integer + 128) >> 8, low[i] = integer - high[i] * 256;
        }
        u8 *to = digits + size_t(column / BLOCK_COLUMNS) * DIGIT_BYTES + token * 128 + (piece_of(column) ^ token % 8) * 16 + column / 32 % 2 * 8;
        *reinterpret_cast<uint2 *>(to) = make_uint2(in_word(high[0], high[1], high[2], high[3]), in_word(high[4], high[5], high[6], high[7]));
        to += TOKENS * 128;
        *reinterpret_cast<uint2 *>(to) = make_uint2(in_word(low[0], low[1], low[2], low[3]), in_word(low[4], low[5], low[6], low[7]));
    }
    errors = block_sum(errors, scratch);
    if (threadIdx.x > 0) return;
    measured[token] = Measured{scale, (is_known ? length : INFINITE) * inverse, sqrtf(errors) * 1.0001f, SMALLEST * inverse};
    if (token < rows) found[token].length = length, found[token].factor = 1.0f;
}

// What each token's logit is at most: uppers (rows, weight_rows), as far as somebody may look there, and greatest (rows, ceil(weight_rows / 16)) of
// sixteen neighbours; and L of each row. digits and measured as screen_digits leaves them; weight, scales and bounds (2, weight_rows) as
// screen_bounds has them, not more rows than TOKENS. Launch: a block for each multiprocessor, not more than sixteens of weight rows, THREADS threads;
// 1024 bytes of dynamic shared memory to align it, STAGES * (STAGE_BYTES + SCALE_BYTES).
BOUNDED_KERNEL(THREADS, 1)
screen_many(const u8 *digits, const Measured *measured, const u8 *weight, const f16 *scales, const float *bounds, float *uppers, float *greatest,
            Found *found, int stride, int rows, int weight_rows, int columns) {
#if HAS_WARP_GROUPS
    extern __shared__ uint4 dynamic[];
    __shared__ u64 barriers[STAGES * (TEAMS + 2)];
    __shared__ alignas(16) Measured rows_here[TOKENS];
    __shared__ u32 lower[TOKENS];
    const u32 unaligned = u32(__cvta_generic_to_shared(dynamic)), memory = (unaligned + 1023) / 1024 * 1024;
    const Ring ring = {u32(__cvta_generic_to_shared(barriers)), memory};
    const Share share(weight_rows);
    const int warp = threadIdx.x / WARP, blocks = columns / BLOCK_COLUMNS, row_blocks = (weight_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    if (threadIdx.x == 0) ring.begin();
    __syncthreads();
    let_next_start();
    if (warp >= COMPUTING / WARP) {
        leave_registers<COPIER_REGISTERS>();
        const int copier = warp - COMPUTING / WARP;
        if (copier < TEAMS) {
            copy_weights(ring, share, weight, blocks, row_blocks, copier);
        } else if (copier == TEAMS) {
            wait_for_previous();
            copy_digits(ring, share, digits, scales, blocks, row_blocks);
        }
        end_group();
        wait_group<0>();
    } else {
        take_registers<OTHER_REGISTERS>();
        wait_for_previous();
        if (threadIdx.x < TOKENS) rows_here[threadIdx.x] = measured[threadIdx.x], lower[threadIdx.x] = 0;
        computing_barrier();
        const Place place = {uppers, greatest, found, stride, rows, weight_rows};
        RingTurn<STAGES> turn = {0, 0};
#pragma unroll 1
        for (int unit = 0; unit < share.units; unit++) {
            const int first = share.first(unit), last = share.first(unit + 1);
            const Bounds own_bounds(bounds, weight_rows, first, last);
            Sums sums = {};
            multiply_unit(ring, blocks, turn, sums);
            end_unit(sums, rows_here, lower, own_bounds, place, first, last);
        }
    }
#endif
}
