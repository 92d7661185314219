// Matrix instructions on bfloat16, with float sums: one warp, D (16, 8) += A (16, 16) * B (16, 8).
//
// With g = lane / 4 and t = lane % 4: A's registers hold (row g, k 2t and 2t+1), (row g+8, the same k), (row g, k 2t+8 and 2t+9),
// (row g+8, those); B's (k 2t and 2t+1, column g), (k 2t+8 and 2t+9, column g); D's (row g, columns 2t and 2t+1), (row g+8, the same).
// A sum over k may take its terms in any order, so both operands may permute k alike. That is used everywhere here: a lane reads 16
// neighbouring bytes of a row, and they serve as its part of the k of several instructions.
DEVICE void mma(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit numbers of which lane (g, t) holds row g, columns 2t and 2t+1.
DEVICE u32 transposed(u32 pair) {
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Sixteen bytes that are read once: past L1, first to leave L2.
DEVICE u64 streaming_policy() {
#if __CUDA_ARCH__ == 900
    return 0x12f0000000000000; // what the instruction gives: as a constant, it needs no registers
#else
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#endif
}

// What is read by all multiprocessors, one after the other: last to leave L2.
DEVICE u64 keeping_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DEVICE uint4 load_stream(const void *from, u64 policy) {
    uint4 value;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from), "l"(policy));
    return value;
}

// The same to an address in shared memory, by an asynchronous copy; or zeros.
DEVICE void copy_stream(u32 place, const void *from, bool exists, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(place), "l"(from), "r"(exists ? 16 : 0), "l"(policy)
                 : "memory");
}

// Brings 128 bytes that are read later to L2.
DEVICE void prefetch_line(const void *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

DEVICE uint4 load_shared(u32 place) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(place));
    return value;
}

DEVICE uint2 load_shared_pair(u32 place) {
    uint2 value;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(place));
    return value;
}

DEVICE float load_shared_float(u32 place) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(place));
    return value;
}

DEVICE u32 word_of(const uint4 &value, int i) { return i == 0 ? value.x : i == 1 ? value.y : i == 2 ? value.z : value.w; }

// Four E4M3 numbers as bfloat16: (first, third) and (second, fourth), exactly.
DEVICE void expand_e4m3(u32 word, u32 &even, u32 &odd) {
    const u32 magnitude = 0x07f007f0u, sign = 0x80008000u;
    const u32 a = (word << 4 & magnitude) | (word << 8 & sign), b = (word >> 4 & magnitude) | (word & sign);
    const u32 power = 0x7b807b80u, zero = 0x80008000u; // 2^120, by which the formats' exponents differ; -0, which changes no sign
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(even) : "r"(a), "r"(power), "r"(zero));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(odd) : "r"(b), "r"(power), "r"(zero));
}

// Four integers times a scale as bfloat16: (first, third) and (second, fourth); exactly where the scale is 1.
DEVICE void expand_integers(u32 word, float scale, u32 &even, u32 &odd) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // A byte plus 128 in the mantissa of 2^23 is a float at once; conversions are slow.
        const float number = __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440 + i));
        values[i] = (number - 8388736.0f) * scale;
    }
    even = pack_bf16(values[0], values[2]), odd = pack_bf16(values[1], values[3]);
}
