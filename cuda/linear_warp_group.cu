// Products of a weight and 17 to 128 rows: what linear_warp_group.cuh multiplies, stored, added, or combined as gates. E4M3 weights and rows
// have a scale for each row.
//
// EPILOGUE: as epilogue.cuh says; but whether the product is added to the output, `beta` says.
#include "common.cuh"
#include "activation.cuh"
#include "linear_warp_group.cuh"
#include "warp_group_end.cuh"
#include "epilogue.cuh"

#if HAS_WARP_GROUPS
struct Ending {
    typedef Four<OUTPUT> Early;
    struct Kept {
        Factors::Rows own, others;
    };
    const Factors &factors;
    const Unit &unit;
    OUTPUT *output; // the unit's first
    int stride;
    float alpha, beta;

    DEVICE void begin() const { factors.read(unit); }

    DEVICE Early *place(int token, int row) const { return reinterpret_cast<Early *>(output + size_t(token) * stride + row); }

    DEVICE bool reads() const { return beta != 0.0f; }

    DEVICE void ask(int token, int row) const { asm volatile("prefetch.global.L1 [%0];" ::"l"(place(token, row))); }

    DEVICE Early read(int token, int row) const { return beta != 0.0f ? *place(token, row) : Early(); }

    DEVICE Kept keep(int row) const { return Kept{factors.of(row), factors.of(PAIRED ? GROUP_OUTPUTS + row : row)}; }

    DEVICE void store(const float4 &sums, const float4 &others, const Early &before, const Kept &kept, int token, int row) const {
        float all[4], ups[4];
        factors.apply(sums, kept.own, token, all);
        if (PAIRED) factors.apply(others, kept.others, token, ups);
        Early result;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float value = all[j];
            if (PAIRED) value = activate(value) * ups[j];
            value *= alpha;
            result.values[j] = from_float<OUTPUT>(beta != 0.0f ? fmaf(beta, to_float(before.values[j]), value) : value);
        }
        *place(token, row) = result;
    }
};
#endif

// output = alpha * (input * weight^T + bias) + beta * output; input (rows, columns), rows up to TOKENS, and weight (weight_rows, columns),
// aligned to 16 bytes, the stride of input too, weight_rows a multiple of 4, columns of 16 bytes; of E4M3 input_scales (rows), scales
// (weight_rows); bias (weight_rows) or null; output aligned to four elements, its stride too. PAIRED: output = alpha * activation(the first
// half of these) * the second half. Launch: for each UNIT_ROWS weight rows `splits` blocks, 1 or 2, which are a cluster, THREADS threads; 1024
// bytes of dynamic shared memory to align it, STAGES * STAGE_BYTES, and Pair::BYTES for two.
BOUNDED_KERNEL(THREADS, 1)
linear_warp_group(const WEIGHT *input, const float *input_scales, const WEIGHT *weight, const float *scales, const float *bias, OUTPUT *output,
                  int input_stride, int output_stride, int rows, int weight_rows, int columns, int splits, float alpha, float beta) {
#if HAS_WARP_GROUPS
    extern __shared__ uint4 dynamic[];
    __shared__ alignas(16) float kept[TOKENS + 2 * UNIT_ROWS];
    constexpr int BYTES = sizeof(WEIGHT);
    const int outputs = PAIRED ? weight_rows / 2 : weight_rows;
    const Unit unit = {int(blockIdx.x) / splits * UNIT_OUTPUTS, outputs};
    const Operands operands = {reinterpret_cast<const u8 *>(input), reinterpret_cast<const u8 *>(weight), input_stride * BYTES, rows,
                               weight_rows, columns * BYTES};
    const Factors factors = {operands, input_scales, scales, bias, kept};
    const Ending ending = {factors, unit, output + unit.first, output_stride, alpha, beta};
    multiply_unit(operands, dynamic, unit, ending, outputs - unit.first, splits);
#endif
}
