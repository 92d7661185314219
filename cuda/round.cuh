// Rows rounded to E4M3, each with its scale: the greatest magnitude becomes 448.

// What a row is multiplied by; its scale is stored by one thread of the block.
DEVICE float round_factor(float greatest, float *scale) {
    if (threadIdx.x == 0) *scale = greatest / 448.0f;
    return greatest > 0.0f ? 448.0f / greatest : 0.0f;
}

// Four numbers as from_float<e4m3> rounds them, in one register.
DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
    u32 all, none;
    asm("{ .reg .b16 first, second; cvt.rn.satfinite.e4m3x2.f32 first, %2, %1; cvt.rn.satfinite.e4m3x2.f32 second, %4, %3; "
        "mov.b32 %0, {first, second}; }"
        : "=r"(all)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(none) : "r"((all & 0x7f7f7f7fu) + 0x01010101u)); // all bits of those that are no number
    return all & ~none;
#else
    return from_float<e4m3>(a).bits | from_float<e4m3>(b).bits << 8 | from_float<e4m3>(c).bits << 16 | u32(from_float<e4m3>(d).bits) << 24;
#endif
}

// Stores neighbouring numbers, eight of them aligned to as many bytes.
template <int V> DEVICE void store_rounded(e4m3 *to, const float (&values)[V], float factor) {
    if constexpr (V == 8) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = values[i] * factor;
        *reinterpret_cast<uint2 *>(to) = make_uint2(pack_e4m3(x[0], x[1], x[2], x[3]), pack_e4m3(x[4], x[5], x[6], x[7]));
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = from_float<e4m3>(values[i] * factor);
    }
}

#ifndef INFER_F32
DEVICE void store_rounded(e4m3 *to, const Part<8> &part, float factor) {
    float values[8];
    part.get(values);
    store_rounded(to, values, factor);
}

// The greatest magnitudes of numbers in even and in odd places, in a pair; what is no number is passed over.
DEVICE u32 greatest_of(const Part<8> &part, u32 greatest) {
    const u32 words[4] = {part.words[0].x, part.words[0].y, part.words[0].z, part.words[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        asm("{ .reg .b32 magnitudes; abs.bf16x2 magnitudes, %1; max.bf16x2 %0, %0, magnitudes; }" : "+r"(greatest) : "r"(words[i]));
    }
    return greatest;
}

// The greatest magnitude of such a pair.
DEVICE u32 greater_half(u32 pair) { return max(pair & 0xffff, pair >> 16); }

// What a row is multiplied by, of whose greatest magnitudes each thread of the block, or of several, has some.
template <class Threads> DEVICE float round_factor(Threads &all, u32 greatest, float *scale) {
    return round_factor(low_bf16(all.greatest(greater_half(greatest))), scale);
}

#ifndef SHARES
#define SHARES 1 // blocks that share a row: a cluster
#endif

// The greatest number of all threads of the blocks that share a row: each warp sends its own to all of these blocks, and waits for nothing else.
struct Sharers {
    u32 barrier, parts; // in shared memory: (SHARES, warps) numbers, 32 at most
    u32 rank;

    static DEVICE int warps() { return blockDim.x / WARP; }

    // Waits for all blocks to be there; to be called before the kernel waits for those before it.
    DEVICE void begin() const {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0) {
            begin_barrier(barrier, 1);
            arrive_expecting(barrier, SHARES * warps() * 4);
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        cluster_barrier(false);
#endif
    }

    DEVICE u32 greatest(u32 value) const {
        value = warp_greatest(value);
#if __CUDA_ARCH__ >= 900
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        if (lane < SHARES) {
            asm volatile("{ .reg .u32 place, barrier; mapa.shared::cluster.u32 place, %0, %2; mapa.shared::cluster.u32 barrier, %1, %2; "
                         "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], %3, [barrier]; }" ::"r"(
                             parts + (rank * warps() + warp) * 4),
                         "r"(barrier), "r"(lane), "r"(value)
                         : "memory");
        }
        wait_for_phase(barrier, 0);
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(parts + min(lane, SHARES * warps() - 1) * 4) : "memory");
#endif
        return warp_greatest(value);
    }
};
#endif
