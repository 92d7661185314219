// How cuda/layers.cu multiplies weights of E4M3 or bfloat16 on the matrix instructions of warp groups (compute capability 9.0), which read
// them where the copy engine has left them: without a register, a conversion or an instruction of its own for any weight.
//
// Each of two warp groups has 8 of the 16 weight rows of a unit. An instruction takes 256 bytes of each, as its first operand of 64 rows and
// 32 bytes: 8 neighbouring pieces of 16 bytes are what the hardware reads as 8 rows, so row 8 r + i of the operand has the pieces i and 8 + i
// of weight row r. The second operand is the input, which lies in memory as the weight's rows do, and so column i has the pieces i and 8 + i
// of it. Wanted are the products of row 8 r + i with column i, one of eight; all of them take hardly more time than shared memory takes to give
// the weights. So nothing is exchanged (swizzled), and rows are copied as they are.
//
// For weights of E4M3 an input number is the sum of PIECES numbers of E4M3, x = unit * (p0 + p1 / 16 + p2 / 256), each of them in columns of
// its own. Each STRETCH of a row has a unit, a power of two, in which the greatest magnitude is from 2^7 to 2^8. Two pieces are a bfloat16
// number exactly, down to 2^-14 of that, three a number in half precision, to which rows that a norm multiplies are rounded, as in
// halves.cuh. The instructions keep few digits of a long sum (linear_warp_group.cuh), so after each stretch, 64 products, theirs is added to
// one in float, where the unit is applied. Bfloat16 is multiplied as it is, and added to sums in float as often.
//
// A round takes some 550 cycles, in which memory brings 0.6 of one: after a wait the warps catch up, though not fast. One instruction that
// copies a round in the place of 16 (a tensor map, boxes of 8 KB) took 65.4 us a layer of 8B in place of 62.8, with 8 rounds under way 67.3.
#if BY_GROUPS
constexpr bool IN_PIECES = sizeof(WEIGHT) == 1;
constexpr int RUNS = IN_PIECES ? 2 : 1, STRETCH = RUNS * WARP * 8; // of 8 columns, of a lane; columns
constexpr int GROUP_ROWS = 8;                                      // weight rows of a warp group
constexpr int PRODUCT_BYTES = 256, ROUND_ROW = WARPS * 128;        // of a weight row in an instruction, and in a round
static_assert(WARPS == 8, "two warp groups");

// Operands that the hardware reads as they lie: pieces of 16 bytes, 8 neighbouring ones of which are 8 rows or columns; the next 16 bytes of
// those are 128 bytes on, the next 8 of them `stride` bytes.
DEVICE u64 as_it_lies(u32 place, u32 stride) { return u64(stride >> 4) << 32 | 8 << 16 | place >> 4; }

// The same, but that the second 16 bytes are the first again.
DEVICE u64 first_half(u64 operand) { return operand & ~(u64(0x3fff) << 16); }

// The input rows of an operation in shared memory: (TOKENS, PIECES, pitch) bytes, zeros behind the row, and units (TOKENS, stretches).
struct Lying {
    u8 *begin;
    u32 pitch;
    int stretches;
    float *units;

    DEVICE Lying(const Product &product, u8 *begin, int pieces) : begin(begin) {
        pitch = (product.columns * u32(sizeof(WEIGHT)) + PRODUCT_BYTES - 1) / PRODUCT_BYTES * PRODUCT_BYTES;
        stretches = (product.columns + STRETCH - 1) / STRETCH;
        units = reinterpret_cast<float *>(begin + TOKENS * pieces * pitch);
    }
};

// Four half-precision numbers as E4M3, and 16 times what that leaves of them.
DEVICE u32 take_piece(u32 &first, u32 &second) {
    u32 piece;
    asm("{ .reg .b16 a, b; .reg .b32 c, d; cvt.rn.satfinite.e4m3x2.f16x2 a, %1; cvt.rn.satfinite.e4m3x2.f16x2 b, %2; mov.b32 %0, {a, b};"
        " cvt.rn.f16x2.e4m3x2 c, a; cvt.rn.f16x2.e4m3x2 d, b; sub.rn.f16x2 c, %1, c; sub.rn.f16x2 d, %2, d;"
        " mul.rn.f16x2 %1, c, %3; mul.rn.f16x2 %2, d, %3; }"
        : "=&r"(piece), "+r"(first), "+r"(second)
        : "r"(0x4c004c00u));
    return piece;
}

// Brings the input rows of an operation, each warp every eighth stretch.
template <bool NORMED> struct GroupBringing {
    static constexpr int PIECES = !IN_PIECES ? 1 : NORMED ? 3 : 2, BATCH = 8 / RUNS; // stretches that are asked for together
    const Product &product;
    const Incoming &incoming;
    const Lying &to;
    int warp, lane;
    float factors[RUNS][8]; // of the warp's first stretch, which are there before the kernel waits

    DEVICE GroupBringing(const Product &product, const Incoming &incoming, const Lying &to, int warp, int lane)
        : product(product), incoming(incoming), to(to), warp(warp), lane(lane) {
        if (!NORMED) return;
        read_factors(warp);
        for (int stretch = warp + WARPS; stretch < to.stretches; stretch += WARPS) {
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
                if (column(stretch, run) < product.columns) prefetch_line(product.norm + column(stretch, run));
            }
        }
    }

    DEVICE int column(int stretch, int run) const { return stretch * STRETCH + run * (WARP * 8) + lane * 8; }

    DEVICE void read_factors(int stretch) {
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
#pragma unroll
            for (int i = 0; i < 8; i++) factors[run][i] = 0.0f;
            if (column(stretch, run) < product.columns) load<8>(product.norm + column(stretch, run), factors[run]);
        }
    }

    // What lies beyond the row becomes zeros.
    DEVICE uint4 read(const bf16 *row, int stretch, int run) const {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row && column(stretch, run) < product.columns) raw = load_words(row + column(stretch, run));
        return raw;
    }

    // Writes a stretch of a token as it is.
    DEVICE void put_plain(uint4 (&raw)[RUNS], int stretch, u8 *row, float &squares) const {
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            if (NORMED) normalise(raw[run], factors[run], squares);
            const u32 place = column(stretch, run) * 2;
            if (place < to.pitch) *reinterpret_cast<uint4 *>(row + place) = raw[run];
        }
    }

    // Writes a stretch of a token in pieces, and its unit.
    DEVICE void put_pieces(const uint4 (&raw)[RUNS], int stretch, u8 *row, float *unit, float &squares) const {
        float values[RUNS][8], greatest = 0.0f;
#pragma unroll
        for (int i = 0; i < RUNS * 8; i++) {
            const u32 word = word_of(raw[i / 8], i % 8 / 2);
            float &value = values[i / 8][i % 8];
            value = i % 2 ? high_bf16(word) : low_bf16(word);
            if (NORMED) squares = fmaf(value, value, squares), value *= factors[i / 8][i % 8];
            greatest = greater_or_none(greatest, fabsf(value));
        }
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) greatest = greater_or_none(greatest, __shfl_xor_sync(ALL_LANES, greatest, step));
        const u32 exponent = max(__float_as_uint(greatest) >> 23, 15u);
        const float inverse = __uint_as_float((261 - exponent) << 23);
        if (lane == 0) *unit = __uint_as_float(exponent < 255 ? (exponent - 7) << 23 : 0x7fffffffu);
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            u32 halves[4];
#pragma unroll
            for (int i = 0; i < 4; i++) halves[i] = pack_halves(values[run][2 * i] * inverse, values[run][2 * i + 1] * inverse);
            const u32 place = column(stretch, run);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                const u32 first = take_piece(halves[0], halves[1]), second = take_piece(halves[2], halves[3]);
                if (place < to.pitch) *reinterpret_cast<uint2 *>(row + piece * to.pitch + place) = make_uint2(first, second);
            }
        }
    }

    // Brings a token, and returns the sum of the lane's squares.
    DEVICE float bring_token(int token) {
        const bf16 *from = incoming.row(token);
        u8 *row = to.begin + token * PIECES * to.pitch;
        float squares = 0.0f;
#pragma unroll 1
        for (int base = warp; base < to.stretches; base += BATCH * WARPS) {
            uint4 all[BATCH * RUNS], raw[BATCH][RUNS];
            read_words(all, incoming.wait, [&](int i) { return read(from, base + i / RUNS * WARPS, i % RUNS); });
#pragma unroll
            for (int i = 0; i < BATCH * RUNS; i++) raw[i / RUNS][i % RUNS] = all[i];
            const int end = min(to.stretches, base + BATCH * WARPS);
#pragma unroll 1
            for (int stretch = base; stretch < end; stretch += WARPS) { // short: what does not fit the instruction cache is slow
                if (NORMED && (stretch > warp || token > 0)) read_factors(stretch);
                if constexpr (IN_PIECES) {
                    put_pieces(raw[0], stretch, row, to.units + token * to.stretches + stretch, squares);
                } else {
                    put_plain(raw[0], stretch, row, squares);
                }
#pragma unroll
                for (int i = 0; i + 1 < BATCH; i++) {
#pragma unroll
                    for (int run = 0; run < RUNS; run++) raw[i][run] = raw[i + 1][run];
                }
            }
        }
        return squares;
    }

    // Brings all rows, and leaves the squares of each, for all warps that multiply.
    DEVICE void bring(float *all_squares) {
#pragma unroll 1
        for (int token = 0; token < TOKENS; token++) {
            const float squares = bring_token(token);
            if (!NORMED) continue;
            const float sum = warp_sum(squares);
            if (lane == 0) all_squares[token] = sum;
        }
        multiply_what_was_copied();
        work_barrier();
    }
};

// Multiplies the units of an operation: of the sums of two weight rows, those of the columns 2 t and 2 t + 1 of each token.
template <bool NORMED> struct GroupProducts {
    static constexpr int PIECES = GroupBringing<NORMED>::PIECES, COUNT = 4 * PIECES * TOKENS;
    typedef float Products[COUNT];
    const Launch &launch;
    const Lying &input;
    u64 first_input;
    int warp, lane, steps;
    float sums[TOKENS][4];

    DEVICE GroupProducts(const Launch &launch, const Lying &input, int warp, int lane, int steps)
        : launch(launch), input(input), warp(warp), lane(lane), steps(steps) {
        first_input = as_it_lies(u32(__cvta_generic_to_shared(input.begin)), input.pitch);
    }

    DEVICE static void multiply(Products &products, u64 weights, u64 own_input, int adds) {
        GroupProduct<WEIGHT>::multiply(products, weights, own_input, adds);
    }

    // Adds the products of a part of a stretch.
    DEVICE void add(Products &products, int stretch) {
        hold(products);
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            const float unit = IN_PIECES ? input.units[token * input.stretches + stretch] : 1.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *own = products + token * PIECES * 4 + i;
                float sum = own[(PIECES - 1) * 4];
#pragma unroll
                for (int piece = PIECES - 2; piece >= 0; piece--) sum = fmaf(sum, 0.0625f, own[piece * 4]);
                sums[token][i] = IN_PIECES ? fmaf(sum, unit, sums[token][i]) : sums[token][i] + sum;
            }
        }
    }

    // A whole round: four instructions, of which two are a stretch of E4M3.
    DEVICE void multiply_whole(u64 weights, u64 own_input, int stretch, u32 empty) {
        Products products[2];
        multiplied_from_here();
        multiply(products[0], weights, own_input, 0);
        multiply(products[0], weights + PRODUCT_BYTES / 16, own_input + PRODUCT_BYTES / 16, 1);
        end_products();
        multiply(products[1], weights + PRODUCT_BYTES / 8, own_input + PRODUCT_BYTES / 8, 0);
        multiply(products[1], weights + PRODUCT_BYTES * 3 / 16, own_input + PRODUCT_BYTES * 3 / 16, 1);
        end_products();
        wait_for_products<1>();
        add(products[0], stretch);
        wait_for_products<0>();
        if (lane == 0) arrive(empty);
        add(products[1], stretch + 1);
    }

    // A round of less than eight steps.
    DEVICE void multiply_rest(u64 weights, u64 own_input, int count, int stretch, u32 empty) {
#pragma unroll 1
        for (int step = 0; step < count; step += 2) {
            Products products;
            multiplied_from_here();
            multiply(products, step + 1 < count ? weights : first_half(weights), own_input, 0);
            end_products();
            wait_for_products<0>();
            add(products, stretch + step / 4);
            weights += PRODUCT_BYTES / 16, own_input += PRODUCT_BYTES / 16;
        }
        if (lane == 0) arrive(empty);
    }

    DEVICE void multiply_unit(Place &place) {
#pragma unroll
        for (int i = 0; i < TOKENS * 4; i++) sums[i / 4][i % 4] = 0.0f;
        const Ring &ring = launch.ring;
        u64 own_input = first_input;
        int stretch = 0;
#pragma unroll 1
        for (int left = steps; left > 0; left -= WARPS) {
            rest_for_phase(ring.full(place), place.parity);
            const u64 weights = as_it_lies(ring.slot(place) + warp / 4 * (GROUP_ROWS * ROUND_ROW), ROUND_ROW);
            if (left >= WARPS) {
                multiply_whole(weights, own_input, stretch, ring.empty(place));
            } else {
                multiply_rest(weights, own_input, left, stretch, ring.empty(place));
            }
            own_input += ROUND_ROW / 16, stretch += 2;
            place.next(ring.slots);
        }
    }

    // Leaves the sums of a unit to those who end it: a lane has those of one column if its number says that this is a wanted one.
    DEVICE void hand_over(const Turn &turn) const {
        const bool is_wanted = lane % 4 == lane / 8;
        float all[TOKENS][2];
#pragma unroll
        for (int i = 0; i < TOKENS * 2; i++) {
            const float *own = sums[i / 2] + i % 2 * 2;
            all[i / 2][i % 2] = warp_sum(!is_wanted ? 0.0f : lane / 4 % 2 ? own[1] : own[0]);
        }
        rest_for_phase(launch.handover.empty(turn), turn.parity() ^ 1);
        float *to = launch.room.sums(turn.slot()) + warp * (2 * SUM_STRIDE);
        if (lane > 0) return;
#pragma unroll
        for (int i = 0; i < TOKENS * 2; i++) to[i % 2 * SUM_STRIDE + i / 2] = all[i / 2][i % 2];
        arrive(launch.handover.full(turn));
    }
};

template <bool NORMED>
DEVICE void multiply_operation(const Operation &own, const Launch &launch, const Handed &handed, int warp, int lane, Place &place, Turn &turn) {
    const Product product = product_of(own, TOKENS);
    const Incoming incoming(own, handed);
    const Lying input(product, launch.room.input(), GroupBringing<NORMED>::PIECES);
    GroupBringing<NORMED> bringing(product, incoming, input, warp, lane);
    work_barrier(); // nobody needs the input of the operation before this one
    bringing.bring(launch.room.squares() + warp * TOKENS);
    GroupProducts<NORMED> products(launch, input, warp, lane, steps_of(own));
    const int units = own.units;
#pragma unroll 1
    for (int unit = first_unit(own); unit < units; unit += gridDim.x, turn.unit++) {
        products.multiply_unit(place);
        products.hand_over(turn);
    }
}

// A multiplying warp; six of them attend, too.
DEVICE void multiply_by_groups(Program program, const Launch &launch, const Pieces &pieces, int warp, int lane) {
    Place place = {0, 0};
    Turn turn = {0};
    wait_for_previous();
    const Handed handed = launch.find();
    find_first(launch, pieces, warp, threadIdx.x % WARP);
    for (int number = 0; number < program.count; number++) {
        const Operation &own = program.take(number);
        if (own.kind == ATTEND) {
            attend_or_help(own, launch, handed, pieces, handed.launch * program.count + number, warp, threadIdx.x % WARP);
        } else if (first_unit(own) >= own.units) {
            continue;
        } else if (own.norm) {
            multiply_operation<true>(own, launch, handed, warp, lane, place, turn);
        } else {
            multiply_operation<false>(own, launch, handed, warp, lane, place, turn);
        }
    }
}
#endif
