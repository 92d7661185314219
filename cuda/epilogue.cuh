// How a product ends. EPILOGUE: 0 stores, 1 adds to the output, 2 takes the first half of the weight's rows as gates of the second and
// stores activation(gate) * up. To be included behind what says whether rows are PAIRED.
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
