// The part of a root-mean-square norm that is done before a product; the rest multiplies its sums.

// Eight input values of a token times the norm's factors, and their squares added up.
DEVICE void normalise(uint4 &values, const float (&factors)[8], float &squares) {
    u32 words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float a = low_bf16(words[i]), b = high_bf16(words[i]);
        squares = fmaf(b, b, fmaf(a, a, squares));
        words[i] = pack_bf16(a * factors[2 * i], b * factors[2 * i + 1]);
    }
    values = make_uint4(words[0], words[1], words[2], words[3]);
}

// What a row's sums are multiplied by after the norm.
DEVICE float norm_factor(float square, int columns, float epsilon) { return rsqrtf(square * (1.0f / columns) + epsilon); }
