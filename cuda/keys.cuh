// Keys of tokens: numbers that tell which of two tokens is the more likely, and among equals which has the lower id.
#pragma once
#include "common.cuh"

constexpr int ID_BITS = 20;

// A number that is larger for larger floats; both zeros have the same.
DEVICE u32 ordered(float value) {
    const u32 bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE u64 key_of(u32 likelihood, int id) { return u64(likelihood) << ID_BITS | u32((1 << ID_BITS) - 1 - id); }
DEVICE int id_of(u64 key) { return (1 << ID_BITS) - 1 - int(key & ((1 << ID_BITS) - 1)); }
DEVICE u32 likelihood_of(u64 key) { return u32(key >> ID_BITS); }

constexpr u64 NO_NUMBER = ~0ull;

// A logit's key; NaN and +inf win against everything.
DEVICE u64 logit_key(float value, int id) { return value < INFINITE ? key_of(ordered(value), id) : NO_NUMBER; }

// Whether a row's largest key is that of a finite logit: minus infinity, and nothing at all, are below.
DEVICE bool is_finite(u64 best) { return best != NO_NUMBER && likelihood_of(best) > ordered(-INFINITE); }
