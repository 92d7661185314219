// What every kernel file starts with: element types, conversions, vectors of neighbouring elements, reductions, dependent launch.
//
// No header of CUDA is included: NVRTC then needs no folder of headers on a user's machine, and compiles a file in milliseconds.
// Compile-time choices come as macros. INFER_F32 makes activations float instead of bfloat16; the others stand where they are used.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
struct e4m3 {
    u8 bits;
};
struct i8 {
    u8 bits;
};

#ifdef INFER_F32
typedef float T;
#else
typedef bf16 T;
#endif

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define BOUNDED_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
#define INFINITE __int_as_float(0x7f800000)

// ---- programmatic dependent launch: a kernel may start while the one before it ends

// Waits until everything that earlier kernels wrote is visible. Before it, only read what no kernel writes: weights.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start once every block of this one has called this or ended; it still waits as above.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- clusters: blocks that run together and read each other's shared memory; where there are none, a block is alone

// Waits for all threads of the cluster, or of the block where it is alone.
DEVICE void cluster_barrier(bool is_alone) {
#if __CUDA_ARCH__ >= 900
    if (!is_alone) {
        asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

// Sixteen bytes at an address in the shared memory of a block of the cluster.
DEVICE float4 load_of_block(u32 place, u32 block) {
    float4 value;
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .u32 place; mapa.shared::cluster.u32 place, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [place]; }"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(place), "r"(block));
#else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(place));
#endif
    return value;
}

// ---- conversions, all rounding to nearest even

DEVICE float to_float(float value) { return value; }

DEVICE float to_float(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }

DEVICE float to_float(f16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Exponent and mantissa of an E4M3 number, shifted, are those of a float 2^120 times smaller, subnormal ones included.
DEVICE float to_float(e4m3 value) {
    const float magnitude = __uint_as_float(u32(value.bits & 0x7f) << 20) * 0x1p120f;
    return value.bits & 0x80 ? -magnitude : magnitude;
}

DEVICE float to_float(i8 value) { return float(static_cast<signed char>(value.bits)); }

template <class E> DEVICE E from_float(float value);

template <> DEVICE float from_float<float>(float value) { return value; }

template <> DEVICE bf16 from_float<bf16>(float value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <> DEVICE f16 from_float<f16>(float value) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// The nearest integer from -127 to 127, ties to even, as on the CPU (kv/element.rs).
template <> DEVICE i8 from_float<i8>(float value) { return i8{u8(int(fminf(fmaxf(rintf(value), -127.0f), 127.0f)))}; }

// The nearest E4M3 number, ties to even, beyond 448 that; 0 for NaN, as on the CPU (kv/e4m3.rs).
template <> DEVICE e4m3 from_float<e4m3>(float value) {
#if __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value == value ? value : 0.0f));
    return e4m3{u8(pair)};
#else
    const float magnitude = fminf(fabsf(value), 448.0f);
    if (value != value) return e4m3{0};
    const int exponent = max(int(__float_as_uint(magnitude) >> 23) - 127, -6);
    const float unit = __uint_as_float(u32(exponent - 3 + 127) << 23);
    const u32 steps = u32(rintf(magnitude / unit));
    return e4m3{u8((__float_as_uint(value) >> 31 << 7) | ((exponent + 6) * 8 + steps))};
#endif
}

// Two floats as two bfloat16 in one register, the first in the lower half.
DEVICE u32 pack_bf16(float first, float second) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

// 2^x, within 2 ulp; 0 for minus infinity.
DEVICE float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1 / x, within 1 ulp; 0 for infinity and for what is nearly that.
DEVICE float reciprocal_fast(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The greater number, or none if one of them is none.
DEVICE float greater_or_none(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// ---- vectors of neighbouring elements; V is 1 or 8, and addresses are aligned to V elements (at most 16 bytes)

template <int V, class E> DEVICE void load(const E *from, float (&values)[V]) {
    if constexpr (V == 8 && sizeof(E) == 4) {
        const float4 a = reinterpret_cast<const float4 *>(from)[0], b = reinterpret_cast<const float4 *>(from)[1];
        values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
        values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
    } else if constexpr (V == 8 && sizeof(E) == 2) {
        const uint4 raw = *reinterpret_cast<const uint4 *>(from);
        const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            values[2 * i] = to_float(E{u16(words[i])});
            values[2 * i + 1] = to_float(E{u16(words[i] >> 16)});
        }
    } else if constexpr (V == 8) {
        const uint2 raw = *reinterpret_cast<const uint2 *>(from);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = to_float(E{u8((i < 4 ? raw.x : raw.y) >> (8 * (i % 4)))});
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) values[i] = to_float(from[i]);
    }
}

template <int V, class E> DEVICE void store(E *to, const float (&values)[V]) {
    if constexpr (V == 8 && sizeof(E) == 4) {
        reinterpret_cast<float4 *>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
        reinterpret_cast<float4 *>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
    } else if constexpr (V == 8 && sizeof(E) == 2) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i] = from_float<E>(values[2 * i]).bits | u32(from_float<E>(values[2 * i + 1]).bits) << 16;
        }
        *reinterpret_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = from_float<E>(values[i]);
    }
}

// V neighbouring activations in registers, as they lie in memory.
template <int V> struct Part {
    static constexpr int WORDS = V * sizeof(T) / 16;
    uint4 words[WORDS];

    DEVICE void read(const T *from) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = reinterpret_cast<const uint4 *>(from)[i];
    }

    DEVICE void write(T *to) const {
#pragma unroll
        for (int i = 0; i < WORDS; i++) reinterpret_cast<uint4 *>(to)[i] = words[i];
    }

    DEVICE void get(float (&values)[V]) const { load<V>(reinterpret_cast<const T *>(words), values); }
    DEVICE void set(const float (&values)[V]) { store<V>(reinterpret_cast<T *>(words), values); }
};

template <> struct Part<1> {
    T value;

    DEVICE void read(const T *from) { value = *from; }
    DEVICE void write(T *to) const { *to = value; }
    DEVICE void get(float (&values)[1]) const { values[0] = to_float(value); }
    DEVICE void set(const float (&values)[1]) { value = from_float<T>(values[0]); }
};

// ---- asynchronous copies to shared memory, by each thread for itself; a group is what was started since the last one ended

// Copies 16 bytes past L1.
DEVICE void copy_16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}

// Copies 16 bytes that this multiprocessor reads again, or clears them; to an address in shared memory.
DEVICE void copy_16_to(u32 place, const void *from, bool exists) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

DEVICE void copy_16_cached(void *to, const void *from, bool exists) {
    copy_16_to(u32(__cvta_generic_to_shared(to)), from, exists);
}

// Copies BYTES, 4 or 8, to an address in shared memory.
template <int BYTES> DEVICE void copy_piece(u32 place, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(place), "l"(from), "n"(BYTES) : "memory");
}

DEVICE void copy_4(void *to, const void *from) { copy_piece<4>(u32(__cvta_generic_to_shared(to)), from); }

DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last N groups of this thread are there.
template <int N> DEVICE void wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- barriers in shared memory, by their addresses: each phase ends when so many have arrived

DEVICE void begin_barrier(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

DEVICE void arrive(u32 barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// Arrives once all copies to shared memory that this thread has started are there.
DEVICE void arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// A slot of a ring of SLOTS, and whether all were taken an odd number of times before.
template <int SLOTS> struct RingTurn {
    int slot;
    u32 round;

    DEVICE void next() {
        slot++;
        if (slot == SLOTS) slot = 0, round ^= 1;
    }
};

#if __CUDA_ARCH__ >= 900
// Arrives, and lets the phase wait for so many bytes.
DEVICE void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes) : "memory");
}

// Copies a multiple of 16 bytes to an address in shared memory, told to a barrier there, by the copy engine.
DEVICE void copy_bulk(u32 to, const void *from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}
#endif

// Waits for the end of a phase: of those with even numbers (parity 0), or odd ones, it is the current or the one before.
DEVICE void wait_for_phase(u32 barrier, u32 parity) {
    u32 ended;
    do {
        asm volatile("{ .reg .pred ended; mbarrier.test_wait.parity.shared.b64 ended, [%1], %2; selp.u32 %0, 1, 0, ended; }"
                     : "=r"(ended)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!ended);
}

// ---- reductions, each in one fixed order

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

DEVICE double warp_sum(double value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

DEVICE float warp_max(float value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// The sum over all threads of the block, given to all of them. `scratch` is (32) floats of shared memory.
DEVICE float block_sum(float value, float *scratch) {
    value = warp_sum(value);
    __syncthreads(); // the scratch may still be read from the last time
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < (blockDim.x + WARP - 1) / WARP ? scratch[threadIdx.x % WARP] : 0.0f);
}

// The greatest of no negative values, likewise.
DEVICE float block_max(float value, float *scratch) {
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    return warp_max(threadIdx.x % WARP < (blockDim.x + WARP - 1) / WARP ? scratch[threadIdx.x % WARP] : 0.0f);
}

// The greatest of a number of each lane.
DEVICE u32 warp_greatest(u32 value) {
    u32 greatest;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(greatest) : "r"(value));
    return greatest;
}

// Reductions over all threads of a block of whole warps, one after the other: with one barrier each, for they write to (2, 32) words of shared
// memory in turn, and who gets there has read what is two reductions old.
struct Reductions {
    static constexpr int FEW = 8; // warps, whose parts each thread adds up itself
    u32 (*scratch)[WARP];
    int turn;

    DEVICE explicit Reductions(u32 (&scratch)[2][WARP]) : scratch(scratch), turn(0) {}

    // Gives all threads the warps' parts, zeros behind them.
    DEVICE const u32 *share(u32 part) {
        u32 *parts = scratch[turn];
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        turn ^= 1;
        if (lane == 0) {
            parts[warp] = part;
        } else if (warp == 0 && lane >= blockDim.x / WARP) {
            parts[lane] = 0;
        }
        __syncthreads();
        return parts;
    }

    // As block_sum adds them, bit for bit.
    DEVICE float sum(float value) {
        const u32 *parts = share(__float_as_uint(warp_sum(value)));
        if (blockDim.x > FEW * WARP) return warp_sum(__uint_as_float(parts[threadIdx.x % WARP]));
        const float4 low = reinterpret_cast<const float4 *>(parts)[0], high = reinterpret_cast<const float4 *>(parts)[1];
        return ((low.x + high.x) + (low.z + high.z)) + ((low.y + high.y) + (low.w + high.w));
    }

    DEVICE u32 greatest(u32 value) { return warp_greatest(share(warp_greatest(value))[threadIdx.x % WARP]); }
};
