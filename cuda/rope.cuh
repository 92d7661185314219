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
