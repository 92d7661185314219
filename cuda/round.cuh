// Rows rounded to E4M3, each with its scale: the greatest magnitude becomes 448.

// What a row is multiplied by; its scale is stored by one thread of the block.
DEVICE float round_factor(float greatest, float *scale) {
    if (threadIdx.x == 0) *scale = greatest / 448.0f;
    return greatest > 0.0f ? 448.0f / greatest : 0.0f;
}

// Stores neighbouring numbers, eight of them aligned to as many bytes.
template <int V> DEVICE void store_rounded(e4m3 *to, const float (&values)[V], float factor) {
    if constexpr (V == 8) {
        u32 words[2] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) words[i / 4] |= u32(from_float<e4m3>(values[i] * factor).bits) << (8 * (i % 4));
        *reinterpret_cast<uint2 *>(to) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = from_float<e4m3>(values[i] * factor);
    }
}
