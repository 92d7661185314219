// A weight matrix times few input rows: decoding. linear_stream.cuh says how.
//
// EPILOGUE: 0 stores, 1 adds to the output, 2 takes the first half of the weight's rows as gates of the second and stores
// activation(gate) * up.
#include "common.cuh"
#include "activation.cuh"
#include "mma.cuh"
#include "linear_stream.cuh"

#ifndef EPILOGUE
#define EPILOGUE 0
#endif
#ifndef OUTPUT
#define OUTPUT T
#endif
#define STORE 0
#define ADD 1
#define GATED 2
static_assert((EPILOGUE == GATED) == PAIRED, "gates are combined with the rows of up");

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
