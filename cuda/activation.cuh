// The activation functions, chosen at compile time: ACTIVATION is one of the numbers below.
#define SILU 0
#define GELU_TANH 1
#define GELU_ERF 2
#define RELU 3
#define RELU_SQUARED 4

#ifndef ACTIVATION
#define ACTIVATION SILU
#endif

// x / (1 + exp(y)). Activations of bfloat16 need few digits, and the exact division and exponential took as long as the memory.
DEVICE float logistic(float x, float y) {
#ifdef INFER_F32
    return x / (1.0f + expf(y));
#else
    return x * reciprocal_fast(1.0f + exp2_fast(y * 1.44269504f));
#endif
}

DEVICE float activate(float x) {
    if constexpr (ACTIVATION == SILU) {
        return logistic(x, -x);
    } else if constexpr (ACTIVATION == GELU_TANH) {
        // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)): one exponential, and no cancellation for negative x.
        return logistic(x, x * fmaf(x * x, -0.071354814f, -1.595769f));
    } else if constexpr (ACTIVATION == GELU_ERF) {
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    } else if constexpr (ACTIVATION == RELU) {
        return fmaxf(x, 0.0f);
    } else {
        return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
    }
}
