// Approximate logits by the rough head, and L of each row: the first half of what screen.cu explains. A streaming product (linear_stream.cuh) of up to 8
// resident rows, but warps meet after UNITS units only: the units of 8-bit weights are half as long, and meeting after each took an H200 9 us.
#include "common.cuh"
#include "mma.cuh"
#include "linear_product.cuh"
#include "linear_stream.cuh"
#include "screen.cuh"

constexpr int UNITS = 4;                                             // between two meetings of the warps
constexpr int BATCH_OUTPUTS = UNITS * 16;                            // of a row
constexpr int ENDS = (TOKENS * BATCH_OUTPUTS + THREADS - 1) / THREADS; // outputs that a thread ends
static_assert(TOKENS == 8 && RESIDENT && PACKED == 8 && !STEPS, "what is made for screens");

// A block's shared memory: that of linear_stream.cuh with other sums, and what `measure` and squares of rows need.
struct RoughMemory : Memory {
    DEVICE float *lengths() const { return sums(2 * UNITS); } // (WARPS, TOKENS)
    DEVICE float2 *parts() const { return reinterpret_cast<float2 *>(lengths() + WARPS * TOKENS); }
    DEVICE u8 *ring(int warp) const { return reinterpret_cast<u8 *>(lengths()) + 512 + warp * DEPTH * slot_bytes(); }
    DEVICE u8 *input() const { return ring(WARPS); }
};

// Leaves the squares of what the warp multiplies, of each row.
DEVICE void add_lengths(const RoughMemory &memory, const u8 *own_input, int own_steps, int warp, int lane) {
#pragma unroll 1
    for (int token = 0; token < memory.rows; token++) {
        float sum = 0.0f;
        for (int step = lane / EIGHTS; step < own_steps; step += AT_ONCE) {
            const u8 *slot = own_input + step * memory.rows * INPUT_BYTES;
            sum = add_squares(*reinterpret_cast<const uint4 *>(slot + input_place(token, lane % EIGHTS)), sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) memory.lengths()[warp * TOKENS + token] = sum;
    }
}

// What a thread ends: outputs of a batch, thread + i * THREADS, of a row each.
struct Ends {
    float factor[ENDS], length[ENDS], best[ENDS], bound[ENDS];

    DEVICE static int row(int thread, int i) { return (thread + i * THREADS) / BATCH_OUTPUTS; }

    // The weight's row.
    DEVICE static int column(int thread, int first, int i) {
        const int output = (thread + i * THREADS) % BATCH_OUTPUTS;
        return (first + output / 16 * int(gridDim.x)) * 16 + output % 16;
    }

    DEVICE void read_bounds(const float *bounds, int thread, int first, int weight_rows) {
#pragma unroll
        for (int i = 0; i < ENDS; i++) bound[i] = bounds[min(column(thread, first, i), weight_rows - 1)];
    }

    // After the warps have met for the first time.
    DEVICE void measure_rows(const RoughMemory &memory, int thread, int columns, float epsilon) {
#pragma unroll
        for (int i = 0; i < ENDS; i++) {
            best[i] = -INFINITE, factor[i] = 1.0f;
            const int token = row(thread, i);
            if (token >= memory.rows) continue;
            if (NORM) factor[i] = norm_scale(memory, token, columns, epsilon);
            float squares = 0.0f;
            for (int warp = 0; warp < WARPS; warp++) squares += memory.lengths()[warp * TOKENS + token];
            length[i] = length_of(squares, factor[i]);
        }
    }

    DEVICE void end(const RoughMemory &memory, int turn, float *logits, int stride, int thread, int first, int weight_rows) {
#pragma unroll
        for (int i = 0; i < ENDS; i++) {
            const int token = row(thread, i), output = (thread + i * THREADS) % BATCH_OUTPUTS, id = column(thread, first, i);
            if (token >= memory.rows || id >= weight_rows) continue;
            const float *sums = memory.sums(turn * UNITS + output / 16) + output % 16 * memory.stride() + token;
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++) sum += sums[warp * 16 * memory.stride()];
            const float logit = sum * factor[i], margin = margin_of(bound[i], length[i]), lower = logit - margin;
            logits[size_t(token) * stride + id] = logit;
            if (margin < GREATEST && lower > best[i] && lower < INFINITE) best[i] = lower;
        }
    }

    DEVICE void leave(Found *found, int thread, int rows) const {
#pragma unroll
        for (int i = 0; i < ENDS; i++) { // the outputs of a row are those of whole warps
            const float greatest = warp_max(best[i]);
            if (thread % WARP == 0 && row(thread, i) < rows && greatest > -INFINITE) atomicMax(&found[row(thread, i)].lower, ordered(greatest));
        }
    }
};

// logits (rows, weight_rows) of input (rows, columns), columns a multiple of 128; L, S and f of each row; and with NORM the rows that are
// multiplied, at `normed`. bounds (weight_rows) as screen.cu makes them; found (rows) as screen_exact leaves it. Launch: as linear_stream, at
// least as many blocks as rows.
BOUNDED_KERNEL(512, 1)
screen_rough(const bf16 *input, const WEIGHT *weight, const Scale *scales, const float *bounds, const float *norm, bf16 *normed, Found *found,
             float *logits, int input_stride, int normed_stride, int stride, int rows, int weight_rows, int columns, float epsilon) {
    extern __shared__ uint4 dynamic[];
    let_next_start();
    if (threadIdx.x >= THREADS) return end_block(false);
    const Product product = {input, weight, scales, nullptr, norm, input_stride, rows, weight_rows, columns, (weight_rows + 15) / 16, 0};
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int steps = columns / STEP, own_steps = max((steps - warp + WARPS - 1) / WARPS, 0);
    const RoughMemory memory = {{reinterpret_cast<u8 *>(dynamic), rows}};
    const u32 ring = u32(__cvta_generic_to_shared(memory.ring(warp)));
    Places places = {ring, ring + DEPTH * memory.slot_bytes(), ring, u32(memory.slot_bytes()), 0, u32(rows * INPUT_BYTES)};
    const auto first_row = [](int unit) { return unit * 16; };
    Ahead<decltype(first_row)> ahead(product, warp, lane, own_steps, first_row);
#pragma unroll 1
    for (u32 slot = ring; slot < places.ring_end; slot += places.slot_bytes) {
        wait_group<PACE - 1>();
        ahead.start(slot, nullptr);
    }
    u8 *own_input = memory.input() + warp * ((steps + WARPS - 1) / WARPS) * places.input_bytes;
    Residence residence(product, warp, lane, own_steps, own_input);
    Input inputs(product, warp, lane);
    wait_for_previous();
    places.resident = u32(__cvta_generic_to_shared(own_input));
    if (NORM) {
        residence.bring_normalised(memory);
    } else {
        residence.bring();
    }
    __syncwarp();
    add_lengths(memory, own_input, own_steps, warp, lane);
    const int own_row = gridDim.x - 1 - blockIdx.x; // of the last blocks, which often have a unit less
    if (own_row < rows) {
        const bf16 *from = input + size_t(own_row) * input_stride;
        bf16 *to = normed + size_t(own_row) * normed_stride;
        const float2 row = measure(from, NORM ? norm : nullptr, to, columns, epsilon, memory.parts(), [] { work_barrier(); });
        if (thread == 0) found[own_row].length = row.x, found[own_row].factor = row.y;
    }
    Ends ends;
    int turn = 0;
    for (int first = blockIdx.x; first < product.units; first += UNITS * gridDim.x, turn ^= 1) {
        ends.read_bounds(bounds, thread, first, weight_rows);
#pragma unroll 1
        for (int i = 0; i < UNITS && first + i * int(gridDim.x) < product.units; i++) {
            Accumulator sums = {};
            multiply_steps<false>(own_steps, ahead, inputs, residence, places, sums);
            publish(sums, memory.sums(turn * UNITS + i) + warp * 16 * memory.stride(), rows, memory.stride(), lane / 4, lane % 4);
        }
        work_barrier();
        if (first == blockIdx.x) ends.measure_rows(memory, thread, columns, epsilon);
        ends.end(memory, turn, logits, stride, thread, first, weight_rows);
    }
    ends.leave(found, thread, rows);
    end_block(true);
}
