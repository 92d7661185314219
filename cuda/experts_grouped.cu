// Mixture of experts for any number of rows: each expert's rows together, so that its weights are read once for every TILE of them.
//
// An entry is a row's choice of an expert, number row * used + i. `experts_members` lists the entries of each expert, ascending;
// `experts_grouped` multiplies tiles of them with the expert's weights, gate and up first (GATED), then down; `experts_sum` adds up what
// a row's entries gave, in ascending order of experts. How many tiles there are is known on the device only, so the grid has room for the
// most that there can be, and a step with these kernels can be captured. A result depends on its row alone.
#include "common.cuh"
#include "activation.cuh"
#include "mma.cuh"
#include "weights.cuh"

#ifndef TILE
#define TILE 16 // entries: 16 or 64
#endif
#ifndef GATED
#define GATED 0
#endif
constexpr int WARPS = 8;
constexpr int OUTPUTS = 128;                  // weight rows of a block; of GATED ones, half are gates
constexpr int STEP = 64;                      // columns
constexpr int EIGHTS = STEP / 8;              // 16 bytes each
constexpr int DOWN = TILE / 16;               // warps side by side along the entries
constexpr int ACROSS = WARPS / DOWN;          // ... and along the weight rows
constexpr int EIGHT_ROWS = OUTPUTS / 8 / ACROSS; // eights of weight rows of a warp
constexpr int STAGES = TILE == 16 ? 4 : 3;
constexpr int STAGE_BYTES = (TILE + OUTPUTS) * STEP * 2;
constexpr int SHARE = OUTPUTS * EIGHTS / (WARPS * WARP); // eights of the weights of a step that each thread brings
static_assert(CODED || sizeof(WEIGHT) == 2, "weights are bfloat16, and copied, or of few bits, and unpacked");

// members (experts, capacity): entries that chose an expert, ascending; counts (experts). Launch: grid (experts), WARPS warps.
KERNEL experts_members(const int *chosen, int *members, int *counts, int entries, int capacity) {
    __shared__ int found[2][WARPS];
    let_next_start();
    wait_for_previous();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int before = 0;
    for (int base = 0, turn = 0; base < entries; base += WARPS * WARP, turn ^= 1) {
        const int entry = base + threadIdx.x;
        const bool is_member = entry < entries && chosen[entry] == blockIdx.x;
        const u32 votes = __ballot_sync(ALL_LANES, is_member);
        if (lane == 0) found[turn][warp] = __popc(votes);
        __syncthreads();
        int place = before + __popc(votes & ((1u << lane) - 1));
        for (int i = 0; i < WARPS; i++) {
            if (i < warp) place += found[turn][i];
            before += found[turn][i];
        }
        if (is_member) members[size_t(blockIdx.x) * capacity + place] = entry;
    }
    if (threadIdx.x == 0) counts[blockIdx.x] = before;
}

// Which expert's entries a tile has: expert, first of its members, how many; none of them beyond the last tile.
DEVICE int3 tile_of(const int *counts, int experts, int number) {
    const int lane = threadIdx.x % WARP;
    int before = 0;
    for (int base = 0; base < experts; base += WARP) {
        const int count = base + lane < experts ? counts[base + lane] : 0, tiles = (count + TILE - 1) / TILE;
        int end = tiles;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, end, step);
            if (lane >= step) end += other;
        }
        end += before;
        const u32 votes = __ballot_sync(ALL_LANES, number < end);
        if (votes) {
            const int owner = __ffs(votes) - 1, first = (number - __shfl_sync(ALL_LANES, end - tiles, owner)) * TILE;
            return make_int3(base + owner, first, min(TILE, __shfl_sync(ALL_LANES, count, owner) - first));
        }
        before = __shfl_sync(ALL_LANES, end, WARP - 1);
    }
    return make_int3(0, 0, 0);
}

// Where eight columns of a row lie in a stage: eight rows' same columns take different banks.
DEVICE int place(int row, int eight) { return row * STEP * 2 + (eight ^ row % 8) * 16; }

DEVICE void load_matrices(const u8 *from, u32 (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(u32(__cvta_generic_to_shared(from))));
}

// What a block multiplies.
struct Tile {
    const bf16 *input;
    Matrix matrix;
    const int *members; // of the tile
    int count, input_stride, divisor; // entries; an entry's row of the input is the entry / divisor
    size_t first; // weight row of the expert
    int column, outputs; // the first output of the block, and all of them

    // The weight's row of a row of a stage: of GATED ones, eight gates, then eight of up. Beyond the last, some other row.
    DEVICE size_t weight_row(int row) const {
        if (GATED) return first + row / 8 % 2 * outputs + min(column + row / 16 * 8 + row % 8, outputs - 1);
        return first + min(column + row, outputs - 1);
    }

    // Copies a step's entries, and weights in bfloat16, to a stage. What lies beyond the columns becomes zeros.
    DEVICE void copy(u8 *stage, int number) const {
        for (int i = threadIdx.x; i < TILE * EIGHTS; i += WARPS * WARP) {
            const int row = i / EIGHTS, at = number * STEP + i % EIGHTS * 8;
            const bool exists = row < count && at < matrix.columns;
            const int entry = exists ? members[row] / divisor : 0;
            copy_16_cached(stage + place(row, i % EIGHTS), input + size_t(entry) * input_stride + (exists ? at : 0), exists);
        }
#pragma unroll
        for (int i = threadIdx.x; i < OUTPUTS * EIGHTS && !CODED; i += WARPS * WARP) {
            const int row = i / EIGHTS, at = number * STEP + i % EIGHTS * 8;
            const bool exists = at < matrix.columns;
            const WEIGHT *from = matrix.weight + weight_row(row) * matrix.columns + (exists ? at : 0);
            copy_16_cached(stage + (TILE + row / 8 * 8) * STEP * 2 + place(row % 8, i % EIGHTS), from, exists);
        }
        end_group();
    }

    // Reads this thread's share of a step of weights in few bits.
    DEVICE void fetch(Eight (&eights)[SHARE], int number) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int own = threadIdx.x + i * WARPS * WARP, at = number * STEP + own % EIGHTS * 8;
            if (at < matrix.columns) eights[i] = matrix.fetch(weight_row(own / EIGHTS), at);
            else eights[i] = {};
        }
    }

    // Puts it into a stage, in bfloat16.
    DEVICE void unpack(u8 *stage, const Eight (&eights)[SHARE], int number) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int own = threadIdx.x + i * WARPS * WARP;
            float values[8];
            Matrix::decode(eights[i], number * STEP + own % EIGHTS * 8, values);
            store<8>(reinterpret_cast<bf16 *>(stage + TILE * STEP * 2 + place(own / EIGHTS, own % EIGHTS)), values);
        }
    }
};

// Multiplies a stage: sums (eights of weight rows of the warp, 4) of the warp's 16 entries.
DEVICE void multiply(const u8 *stage, int down, int across, float (&sums)[EIGHT_ROWS][4]) {
    const int lane = threadIdx.x % WARP;
    const u8 *weights = stage + TILE * STEP * 2;
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
        u32 a[4];
        load_matrices(stage + place(down * 16 + lane % 16, k * 2 + lane / 16), a);
#pragma unroll
        for (int pair = 0; pair < EIGHT_ROWS / 2; pair++) {
            u32 b[4];
            const int row = (across * EIGHT_ROWS + pair * 2) * 8 + lane / 16 * 8 + lane % 8;
            load_matrices(weights + place(row, k * 2 + lane / 8 % 2), b);
            mma(sums[pair * 2], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma(sums[pair * 2 + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// Stores a warp's sums: activation(gate) * up, or each entry's share of the sum.
DEVICE void finish(const Tile &tile, const float *bias, const float *shares, bf16 *output, int down, int across, const float (&sums)[EIGHT_ROWS][4]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int eight = 0; eight < EIGHT_ROWS; eight += 1 + GATED) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = down * 16 + lane / 4 + i / 2 * 8, own = (across * EIGHT_ROWS + eight) * 8 / (1 + GATED) + lane % 4 * 2 + i % 2;
            const int column = tile.column + own;
            if (row >= tile.count || column >= tile.outputs) continue;
            const int entry = tile.members[row];
            float result = sums[eight][i] + (bias ? bias[tile.first + column] : 0.0f);
            if (GATED) {
                result = activate(result) * (sums[eight + GATED][i] + (bias ? bias[tile.first + tile.outputs + column] : 0.0f));
            } else {
                result *= shares[entry];
            }
            output[size_t(entry) * tile.outputs + column] = from_float<bf16>(result);
        }
    }
}

// GATED: output (entries, outputs) = activation(gate) * up, weight (experts, 2 * outputs, columns), input (rows, columns), one row for
// `used` entries. Else output = share * (input * weight^T + bias), weight (experts, outputs, columns), input (entries, columns), used 1.
// columns is a multiple of 8, input and weight are aligned to 16 bytes. Launch: grid (ceil(outputs / (OUTPUTS / (1 + GATED))), most tiles),
// WARPS warps, STAGES * STAGE_BYTES of dynamic shared memory.
BOUNDED_KERNEL(WARPS * WARP, 2)
experts_grouped(const bf16 *input, const int *members, const int *counts, const WEIGHT *weight, const float *bias, const Scale *scales,
                const Scale *minima, const float *shares, bf16 *output, int input_stride, int columns, int outputs, int experts,
                int capacity, int used, int group) {
    extern __shared__ uint4 dynamic[];
    u8 *stages = reinterpret_cast<u8 *>(dynamic);
    let_next_start();
    wait_for_previous();
    const int3 found = tile_of(counts, experts, blockIdx.y);
    if (found.z == 0) return;
    const int *own = members + size_t(found.x) * capacity + found.y;
    const size_t first = size_t(found.x) * outputs * (1 + GATED);
    const int column = blockIdx.x * (OUTPUTS / (1 + GATED));
    const Tile tile = {input, {weight, scales, minima, columns, group}, own, found.z, input_stride, used, first, column, outputs};
    const int warp = threadIdx.x / WARP, down = warp % DOWN, across = warp / DOWN, steps = (columns + STEP - 1) / STEP;
    float sums[EIGHT_ROWS][4] = {};
    const auto stage = [&](int number) { return stages + number % STAGES * STAGE_BYTES; };
    Eight eights[SHARE];
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < steps) tile.copy(stage(i), i);
        else end_group();
    }
    if (CODED) {
        tile.fetch(eights, 0);
        tile.unpack(stage(0), eights, 0);
        tile.fetch(eights, 1);
    }
    for (int number = 0; number < steps; number++) {
        wait_group<STAGES - 2>();
        __syncthreads(); // the step is there, and nobody reads the stages that are filled next
        const int next = number + STAGES - 1;
        if (next < steps) tile.copy(stage(next), next);
        else end_group();
        if (CODED && number + 1 < steps) {
            tile.unpack(stage(number + 1), eights, number + 1);
            tile.fetch(eights, number + 2);
        }
        multiply(stage(number), down, across, sums);
    }
    finish(tile, bias, shares, output, down, across, sums);
}

// output[row] = sum of parts (entries, width) of the row's entries that chose an expert. Launch: grid (ceil(width / (threads * 8)), rows).
KERNEL experts_sum(const int *chosen, const bf16 *parts, bf16 *output, int output_stride, int width, int used) {
    let_next_start();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (column >= width) return;
    float sums[8] = {}, values[8];
    for (int entry = blockIdx.y * used; entry < (blockIdx.y + 1) * used; entry++) {
        if (chosen[entry] < 0) continue;
        load<8>(parts + size_t(entry) * width + column, values);
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i] += values[i];
    }
    store<8>(output + size_t(blockIdx.y) * output_stride + column, sums);
}
