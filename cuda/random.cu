// Random weights, as rust/model/src/dummy.rs makes them: a value follows from a weight's seed and the value's place alone.
#include "common.cuh"

// output[i] = value number first + i of a weight: a multiple of 2^-13 between -2^-5 and 2^-5. Launch: one thread for each.
KERNEL random_weights(T *output, u64 seed, u64 first, u64 count) {
    let_next_start();
    wait_for_previous();
    const u64 place = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (place >= count) return;
    const u64 number = first + place;
    u64 word = seed + (number / 8 + 1) * 0x9e3779b97f4a7c15ull; // SplitMix64
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ word >> 27) * 0x94d049bb133111ebull;
    word ^= word >> 31;
    const int byte = static_cast<signed char>(word >> number % 8 * 8);
    output[place] = from_float<T>(float(2 * byte + 1) / 8192.0f);
}
