// Matrix instructions of a warp group on operands in shared memory, with float sums (compute capability 9.0): D (64, N) is, or gains,
// A (64, 32 bytes) * B (32 bytes, N), of E4M3 numbers (32 of them) or bfloat16 (16).
//
// As warp_group.cuh says of products of bfloat16: D as there, and both operands (rows, 128 bytes).
#if HAS_WARP_GROUPS
template <class E> struct GroupProduct;

#define LIST_4 "%0, %1, %2, %3"
#define LIST_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LIST_12 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11"
#define LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_24 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define LIST_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define SUMS_8 SUMS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define SUMS_12 SUMS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define SUMS_16 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define SUMS_24 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define SUMS_32 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
// By an instruction for 8 * N / 4 columns of B; `ends` are the rest of its operands: neither matrix is transposed.
#define MULTIPLY(count, instruction, list, sums, a_place, b_place, adds_place, ends)                                                     \
    static DEVICE void multiply(float (&d)[count], u64 a, u64 b, int adds) {                                                              \
        asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %" adds_place ", 0; wgmma.mma_async.sync.aligned." instruction " {" list        \
                     "}, %" a_place ", %" b_place ", adds, 1, 1" ends "; }"                                                               \
                     : sums                                                                                                               \
                     : "l"(a), "l"(b), "r"(adds));                                                                                        \
    }

template <> struct GroupProduct<e4m3> {
    MULTIPLY(8, "m64n16k32.f32.e4m3.e4m3", LIST_8, SUMS_8, "8", "9", "10", "")
    MULTIPLY(12, "m64n24k32.f32.e4m3.e4m3", LIST_12, SUMS_12, "12", "13", "14", "")
    MULTIPLY(16, "m64n32k32.f32.e4m3.e4m3", LIST_16, SUMS_16, "16", "17", "18", "")
    MULTIPLY(24, "m64n48k32.f32.e4m3.e4m3", LIST_24, SUMS_24, "24", "25", "26", "")
    MULTIPLY(32, "m64n64k32.f32.e4m3.e4m3", LIST_32, SUMS_32, "32", "33", "34", "")
};

template <> struct GroupProduct<bf16> {
    MULTIPLY(4, "m64n8k16.f32.bf16.bf16", LIST_4, SUMS_4, "4", "5", "6", ", 0, 0")
    MULTIPLY(8, "m64n16k16.f32.bf16.bf16", LIST_8, SUMS_8, "8", "9", "10", ", 0, 0")
    MULTIPLY(16, "m64n32k16.f32.bf16.bf16", LIST_16, SUMS_16, "16", "17", "18", ", 0, 0")
    MULTIPLY(24, "m64n48k16.f32.bf16.bf16", LIST_24, SUMS_24, "24", "25", "26", ", 0, 0")
    MULTIPLY(32, "m64n64k16.f32.bf16.bf16", LIST_32, SUMS_32, "32", "33", "34", ", 0, 0")
};
#endif
