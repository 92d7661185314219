// How a row's token is drawn, as rust/engine/src/draw_layout.rs writes it: see `Draw` and `Change` in draw.rs.
#pragma once
#include "common.cuh"

struct Draw {
    u64 seed, position;
    double top_p;
    float inverse_temperature, min_p;
    u32 top_k;
    float repetition, frequency, presence;
    int first_change, changes;
    int allowed;   // word at which its mask begins, -1: all tokens
    int logprobs;  // how many, -1: none
    int uncounted; // row of the step before whose token is to be counted, -1: none
    int unused;
};

struct Change {
    int token;
    float bias;
    u32 seen;    // twice the count, plus 1 for tokens that were seen
    float saved; // the logit before
};

// What a row's uncounted token changes, if it is not among its changes.
struct Latest {
    int token;
    float saved;
};
