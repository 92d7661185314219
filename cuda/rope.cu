// Rotary position embedding, alone. A warp per head. HEAD_DIM is known at compile time.
#include "common.cuh"
#include "rope.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
constexpr int WARPS = 4;

// rows is (rows, heads * HEAD_DIM); table is (table rows, pairs) of (cosine, sine); rope_rows says which of its rows a row takes.
// Launch: grid (ceil(heads / WARPS), rows), WARPS warps.
KERNEL rope(T *rows, const float2 *table, const int *rope_rows, int stride, int heads, int pairs) {
    __shared__ float memory[WARPS][HEAD_DIM];
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= heads) return;
    float *values = memory[threadIdx.x / WARP];
    T *row = rows + size_t(blockIdx.y) * stride + head * HEAD_DIM;
    for (int i = lane; i < HEAD_DIM; i += WARP) values[i] = to_float(row[i]);
    __syncwarp();
    const float2 *turn = table + size_t(rope_rows[blockIdx.y]) * pairs;
    for (int i = lane; i < 2 * pairs; i += WARP) row[i] = from_float<T>(rotated(values, turn, pairs, i));
}
