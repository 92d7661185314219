// Activation functions, alone and as the gate of a product.
//
// Many rows are rounded by as many blocks as run at once, which ask for the next row while they compute one: a block for each row waited for
// its loads, computed, and waited for its greatest number, and memory was idle (2,048 rows of 14,336 on an H200: 54 us, now 39; of 28,672
// 120, now 75; copying as many bytes takes 32 and 64). With few rows, four blocks for each were no faster than one.
#include "common.cuh"
#include "round.cuh"
#include "activation.cuh"

#ifndef VECTOR
#define VECTOR 1
#endif
#ifndef VECTORS
#define VECTORS 1 // of V values, for each thread: more keep memory busy where there are many rows
#endif
#ifndef AHEAD
#define AHEAD 0 // 1: rows are copied to shared memory while those before them are computed
#endif
constexpr int V = VECTOR;

// A thread's part of a row: VECTORS times V values of the gate and of up, all read before the first is needed.
struct Pairs {
    Part<V> gates[VECTORS], ups[VECTORS];
    int first, step, width;

    DEVICE bool column(int i, int &column) const {
        column = first + i * step;
        return column < width;
    }

    // Of a row's values those from this thread's first on.
    DEVICE void read(const T *gate, const T *up) {
        int at;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (!column(i, at)) continue;
            gates[i].read(gate + i * step);
            ups[i].read(up + i * step);
        }
    }

    // Gate i becomes what is to be stored.
    DEVICE void activate_part(int i) {
        float values[V], others[V];
        gates[i].get(values);
        ups[i].get(others);
#pragma unroll
        for (int j = 0; j < V; j++) values[j] = activate(values[j]) * others[j];
        gates[i].set(values);
    }
};

// Rows are taken from the last one on: of what the product before has written, the last rows are still in the L2 cache.

// output = activation(gate) * up, all (rows, width). Launch: grid (ceil(width / (threads * V * VECTORS)), rows).
KERNEL gated_activation(const T *gate, const T *up, T *output, int gate_stride, int up_stride, int output_stride, int width) {
    let_next_start();
    wait_for_previous();
    Pairs own;
    const int row = gridDim.y - 1 - blockIdx.y;
    own.first = (blockIdx.x * blockDim.x * VECTORS + threadIdx.x) * V, own.step = blockDim.x * V, own.width = width;
    own.read(gate + size_t(row) * gate_stride + own.first, up + size_t(row) * up_stride + own.first);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int at;
        if (!own.column(i, at)) continue;
        own.activate_part(i);
        own.gates[i].write(output + size_t(row) * output_stride + at);
    }
}

#if VECTOR == 8 && !defined(INFER_F32)
// What a thread reads of the block's rows, and its places in shared memory for one row, which it alone writes and reads. Each vector is asked
// for a row ahead, as soon as its place has been read.
struct RowsAhead {
    const T *gate, *up; // the thread's first values of the next row
    int rows;           // that are left
    uint4 *places;      // (VECTORS, 2, threads)

    DEVICE void start(const Pairs &own, int i) const {
        int at;
        uint4 *to = places + i * 2 * blockDim.x;
        if (rows > 0 && own.column(i, at)) {
            copy_16(to, gate + i * own.step);
            copy_16(to + blockDim.x, up + i * own.step);
        }
        end_group();
    }

    // Brings vector i of the row whose copies were started longest ago to registers.
    DEVICE void read(Pairs &own, int i) const {
        wait_group<VECTORS - 1>();
        own.gates[i].words[0] = places[i * 2 * blockDim.x];
        own.ups[i].words[0] = places[(i * 2 + 1) * blockDim.x];
    }

    DEVICE void next_row(int gate_stride, int up_stride) {
        gate -= size_t(gridDim.x) * gate_stride, up -= size_t(gridDim.x) * up_stride, rows -= gridDim.x;
    }
};

// The same rounded to T, and then to E4M3 as `quantize` of linear.cu does: output (rows, width) and scales (rows). Launch: grid (rows), as many
// threads as VECTORS * 8 values for each need; with AHEAD any grid, and VECTORS * 32 bytes of dynamic shared memory for each thread.
KERNEL gated_round(const T *gate, const T *up, e4m3 *output, float *scales, int gate_stride, int up_stride, int width, int rows) {
    extern __shared__ uint4 dynamic[];
    __shared__ alignas(16) u32 scratch[2][WARP];
    Reductions block(scratch);
    let_next_start();
    wait_for_previous();
    Pairs own;
    own.first = threadIdx.x * 8, own.step = blockDim.x * 8, own.width = width;
    const int first = rows - 1 - blockIdx.x;
    gate += size_t(first) * gate_stride + own.first, up += size_t(first) * up_stride + own.first;
    RowsAhead ahead = {gate, up, first + 1, dynamic + threadIdx.x};
    int at;
#pragma unroll
    for (int i = 0; AHEAD && i < VECTORS; i++) ahead.start(own, i);
#pragma unroll 1
    for (int row = first, end = AHEAD ? 0 : row; row >= end; row -= gridDim.x) {
        if (!AHEAD) own.read(gate, up);
        ahead.next_row(gate_stride, up_stride);
        u32 greatest = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (AHEAD) ahead.read(own, i);
            if (own.column(i, at)) {
                own.activate_part(i);
                greatest = greatest_of(own.gates[i], greatest);
            }
            if (AHEAD) ahead.start(own, i);
        }
        const float factor = round_factor(block, greatest, scales + row);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (own.column(i, at)) store_rounded(output + size_t(row) * width + at, own.gates[i], factor);
        }
    }
}
#endif

// rows = activation(rows), (rows, width). Launch: grid (ceil(width / (threads * V)), rows).
KERNEL activation(T *rows, int stride, int width) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    rows += size_t(blockIdx.y) * stride + column;
    float values[V];
    load<V>(rows, values);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] = activate(values[i]);
    store<V>(rows, values);
}
