// A weight matrix times few input rows: decoding. linear_stream.cuh says how.
// EPILOGUE: as epilogue.cuh says.
#include "common.cuh"
#include "activation.cuh"
#include "mma.cuh"
#include "linear_product.cuh"
#include "linear_stream.cuh"
#include "epilogue.cuh"

// What a thread needs at the end of its output.
struct Early {
    Ending first, second; // the second is up's, beside a gate
    float before;
};

// input (rows, columns), columns a multiple of 8, or 16 for E4M3 weights; weight (weight_rows, columns), both aligned to 16 bytes; scales
// (weight_rows) for E4M3, or (weight_rows, ceil(columns / STEP)) for GROUPED ones; scales and minima of PACKED weights as weights.cuh says,
// aligned to 16 bytes; then the rows that are combined, too, begin with a block; bias (weight_rows) may be null. Launch: any grid of up to
// ceil(outputs / OUTPUTS) blocks, THREADS threads or, of linear_stream.cuh, more; dynamic shared memory as stream() says.
BOUNDED_KERNEL(BOUND, 1)
linear_stream(const bf16 *input, const WEIGHT *weight, const float *bias, const Scale *scales, const Scale *minima, const float *norm,
              OUTPUT *output, int input_stride, int output_stride, int rows, int weight_rows, int columns, float add, float epsilon) {
    extern __shared__ uint4 dynamic[];
    const int outputs = EPILOGUE == GATED ? weight_rows / 2 : weight_rows, second = outputs;
    const Product product = {input, weight, scales, minima, norm, input_stride, rows, weight_rows, columns,
                             (outputs + OUTPUTS - 1) / OUTPUTS, second};
    const auto column_of = [](int unit, int thread) { return unit * OUTPUTS + thread % OUTPUTS; };
    const auto target = [&](int column, int thread) { return output + size_t(thread / OUTPUTS) * output_stride + column; };
    const auto begin = [&](int unit, int thread) {
        const int column = min(column_of(unit, thread), outputs - 1);
        Early early = {{scales, bias, column}, {scales, bias, EPILOGUE == GATED ? column + second : column}, 0.0f};
        if (EPILOGUE == ADD && thread / OUTPUTS < rows) early.before = to_float(*target(column, thread));
        return early;
    };
    const auto finish = [&](const float *sums, float factor, int stride, int unit, int thread, const Early &early) {
        const int token = thread / OUTPUTS, place = thread % OUTPUTS, column = column_of(unit, thread);
        if (token >= rows || column >= outputs) return;
        float result = early.first(sums, factor, stride, place, 0, token);
        if (EPILOGUE == GATED) result = activate(result) * early.second(sums, factor, stride, place, 1, token);
        if (EPILOGUE == ADD) result = fmaf(add, result, early.before);
        *target(column, thread) = from_float<OUTPUT>(result);
    };
    stream(product, dynamic, epsilon, [](int unit) { return unit * OUTPUTS; }, begin, finish);
}
