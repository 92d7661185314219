// A weight matrix times few input rows: decoding. linear_stream.cuh says how.
// EPILOGUE: as epilogue.cuh says.
#include "common.cuh"
#include "activation.cuh"
#include "mma.cuh"
#include "linear_stream.cuh"
#include "epilogue.cuh"

// input (rows, columns), columns a multiple of 8, or 16 for E4M3 weights; weight (weight_rows, columns), both aligned to 16 bytes; scales
// (weight_rows) for E4M3, or (weight_rows, ceil(columns / STEP)) for GROUPED ones; scales and minima of PACKED weights as weights.cuh says,
// then the rows that are combined, too, begin with a block; bias (weight_rows) may be null. Launch: any grid of up to
// ceil(outputs / OUTPUTS) blocks, TEAMS * WARPS warps, dynamic shared memory as stream() says.
BOUNDED_KERNEL(TEAMS * WARPS * WARP, 1)
linear_stream(const bf16 *input, const WEIGHT *weight, const float *bias, const Scale *scales, const Scale *minima, const float *norm,
              OUTPUT *output, int input_stride, int output_stride, int rows, int weight_rows, int columns, float add, float epsilon) {
    extern __shared__ uint4 dynamic[];
    const int outputs = EPILOGUE == GATED ? weight_rows / 2 : weight_rows, second = outputs;
    const Product product = {input, weight, scales, minima, norm, input_stride, rows, weight_rows, columns,
                             (outputs + OUTPUTS - 1) / OUTPUTS, second};
    const Ending ending = {bias, scales, columns, epsilon};
    stream(product, dynamic, [](int unit) { return unit * OUTPUTS; }, [&](const Shared &shared, const Squares &squares, int unit, int thread) {
        for (int i = thread; i < OUTPUTS * rows; i += WARPS * WARP) {
            const int place = i % OUTPUTS, token = i / OUTPUTS, column = unit * OUTPUTS + place;
            if (column >= outputs) continue;
            OUTPUT *to = output + size_t(token) * output_stride + column;
            float result = ending(shared, squares, place, 0, token, column);
            if (EPILOGUE == GATED) result = activate(result) * ending(shared, squares, place, 1, token, column + second);
            if (EPILOGUE == ADD) result = fmaf(add, result, to_float(*to));
            *to = from_float<OUTPUT>(result);
        }
    });
}
