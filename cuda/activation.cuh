// The activation functions, chosen at compile time: ACTIVATION is one of the numbers below.
#define SILU 0
#define GELU_TANH 1
#define GELU_ERF 2
#define RELU 3
#define RELU_SQUARED 4

#ifndef ACTIVATION
#define ACTIVATION SILU
#endif

DEVICE float activate(float x) {
    if constexpr (ACTIVATION == SILU) {
        return x / (1.0f + expf(-x));
    } else if constexpr (ACTIVATION == GELU_TANH) {
        // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)): one exponential, and no cancellation for negative x.
        return x / (1.0f + expf(x * fmaf(x * x, -0.071354814f, -1.595769f)));
    } else if constexpr (ACTIVATION == GELU_ERF) {
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    } else if constexpr (ACTIVATION == RELU) {
        return fmaxf(x, 0.0f);
    } else {
        return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
    }
}
