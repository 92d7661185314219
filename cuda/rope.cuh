// Rotation of one head that lies in shared memory, by a row of the table of cosines and sines.
#ifndef INTERLEAVED
#define INTERLEAVED 0 // 0: value i pairs with i + pairs; 1: value 2i with 2i + 1
#endif

// Value `i` of the rotated head; `turn` is (pairs) of (cosine, sine). Values from 2 * pairs on stay as they are.
DEVICE float rotated(const float *head, const float2 *turn, int pairs, int i) {
    if (i >= 2 * pairs) return head[i];
    const int pair = INTERLEAVED ? i / 2 : i % pairs;
    const bool second = INTERLEAVED ? i % 2 : i >= pairs;
    const int partner = INTERLEAVED ? i ^ 1 : (second ? i - pairs : i + pairs);
    const float2 angle = turn[pair];
    const float across = head[partner] * angle.y;
    return head[i] * angle.x + (second ? across : -across);
}

// Eight neighbouring pairs of a row of the table, in halves: values i and i + pairs.
struct HalfTurn {
    float cosines[8], sines[8];

    DEVICE void read(const float2 *turn, int part) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 two = reinterpret_cast<const float4 *>(turn + part * 8)[i];
            cosines[2 * i] = two.x, sines[2 * i] = two.y, cosines[2 * i + 1] = two.z, sines[2 * i + 1] = two.w;
        }
    }

    // Both halves' values of these pairs, rotated.
    DEVICE void rotate(float (&first)[8], float (&second)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float a = first[i], b = second[i];
            first[i] = a * cosines[i] - b * sines[i];
            second[i] = b * cosines[i] + a * sines[i];
        }
    }
};
