// What linear_stream.cuh multiplies: rows of bfloat16, or of E4M3 with scales.

constexpr int STEP = 128 / sizeof(WEIGHT);  // columns
constexpr int LOADS = 2;                    // of 16 bytes, for each lane and row of a step
constexpr int RUN = STEP / LOADS / 4;       // columns of one such load

struct Step {
    uint4 words[TILES][2][LOADS];
    float scales[TILES][2]; // of GROUPED weights
};

// The weights of four columns (number `quad` of a load), for rows g and g + 8.
DEVICE void expand(const uint4 &upper, const uint4 &lower, int quad, u32 (&a)[4]) {
    a[0] = word_of(upper, 2 * quad), a[2] = word_of(upper, 2 * quad + 1);
    a[1] = word_of(lower, 2 * quad), a[3] = word_of(lower, 2 * quad + 1);
}

// Where the lanes' rows are, for linear_many.cu.
struct Reader {
    const Product &product;
    int g, t;
    u64 policy;
    const u8 *rows[TILES][2]; // the lane's rows of the weight
    const float *scales[TILES][2]; // and of its scales

    // Points at the rows of another unit.
    DEVICE void move(int first) {
        const int columns = product.columns;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = min(first + tile * ROWS + half * (PAIRED ? product.second : 8) + g, product.weight_rows - 1);
                rows[tile][half] = reinterpret_cast<const u8 *>(product.weight + size_t(row) * columns) + t * 16;
                if (GROUPED) scales[tile][half] = product.scales + size_t(row) * ((columns + STEP - 1) / STEP);
            }
        }
    }
};

// A warp's way from the weight to its ring in shared memory, and on to registers. Lines of 128 bytes, 16 rows of them, are copied whole, 8
// lanes each; pieces of 16 bytes of odd rows are exchanged by fours, so that the lanes that read at once take different banks.
template <int TEAM> struct Feed {
    static constexpr int BYTES = 2048 + (GROUPED ? 64 : 0); // of a step

    const Product &product;
    int warp, lane, left; // columns from the next step on, less the lane's
    u64 policy;
    u32 to, from[2];   // where in a step's slot the lane writes, and reads
    const u8 *at;      // the lane's piece of the next step in the unit's first row
    u32 rows[4];       // from it to the lane's rows, in pieces of 16 bytes
    const float *scale;

    DEVICE Feed(const Product &product, int warp, int lane)
        : product(product), warp(warp), lane(lane), left(0), policy(streaming_policy()), at(nullptr), scale(nullptr) {
        const int g = lane / 4, t = lane % 4;
        to = lane / 8 * 128 + ((lane % 8) ^ (lane / 8 % 2 * 4)) * 16;
        from[0] = g * 128 + (t ^ (g % 2 * 4)) * 16;
        from[1] = from[0] ^ 64;
        asm volatile("" : "+r"(to), "+r"(from[0]), "+r"(from[1])); // or they are computed anew in every step
    }

    // Goes to the warp's first step of another unit.
    DEVICE void move(int first) {
        const u32 row_pieces = product.columns * u32(sizeof(WEIGHT)) / 16;
        first = min(first, product.weight_rows - 1);
#pragma unroll
        for (int i = 0; i < 4; i++) rows[i] = (row_of(first, i * 4 + lane / 8) - first) * row_pieces;
        at = reinterpret_cast<const u8 *>(product.weight) + (size_t(first) * row_pieces + warp * 8 + lane % 8) * 16;
        left = product.columns - warp * STEP - lane % 8 * int(16 / sizeof(WEIGHT));
        if (GROUPED) scale = product.scales + size_t(row_of(first, lane % 16)) * ((product.columns + STEP - 1) / STEP) + warp;
    }

    DEVICE int row_of(int first, int row) const {
        return min(first + row / 8 * (PAIRED ? product.second : 8) + row % 8, product.weight_rows - 1);
    }

    // Starts copying the next step.
    DEVICE void start(u32 slot) {
#pragma unroll
        for (int i = 0; i < 4; i++) copy_stream(slot + to + i * 512, at + size_t(rows[i]) * 16, left > 0, policy);
        if (GROUPED && lane < 16) copy_piece<4>(slot + 2048 + lane * 4, scale);
        at += TEAM * 128, left -= TEAM * STEP, scale += TEAM;
    }

    DEVICE void read(u32 slot, Step &step) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) step.words[0][half][i] = load_shared(slot + from[i] + half * 1024);
            if (GROUPED) asm volatile("ld.shared.f32 %0, [%1];" : "=f"(step.scales[0][half]) : "r"(slot + 2048 + (half * 8 + lane / 4) * 4));
        }
    }
};

struct Constants {}; // none are needed

#if !IS_E4M3 // stream_halves.cuh multiplies those

// Multiplies a step's weights by the input in a slot. There are two sums, so that instructions wait less for each other.
template <class Input> DEVICE void multiply(const Input &input, const Step &step, u32 slot, Sums (&all)[2]) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        uint4 values[PARTS];
        input.read(slot, 0, i, values);
#pragma unroll
        for (int quad = 0; quad < 2; quad++) {
            u32 a[4];
            expand(step.words[0][0][i], step.words[0][1][i], quad, a);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const u32 b0 = word_of(values[part], 2 * quad), b1 = word_of(values[part], 2 * quad + 1);
                mma(all[quad].values[0][part], a[0], a[1], a[2], a[3], b0, b1);
            }
        }
    }
}
#endif
