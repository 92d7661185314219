// What linear_stream.cuh multiplies: rows of bfloat16, or of E4M3 with scales.

constexpr int STEP = 128 / sizeof(WEIGHT);  // columns
constexpr int LOADS = 2;                    // of 16 bytes, for each lane and row of a step
constexpr int RUN = STEP / LOADS / 4;       // columns of one such load
constexpr int PER_LOAD = STEP / LOADS / 8;  // eights of columns

struct Step {
    uint4 words[TILES][2][LOADS];
    float scales[TILES][2]; // of GROUPED weights
};

// Four neighbouring columns' worth of the first operand, in the order in which expand() gives weights.
DEVICE void operand(u32 word0, u32 word1, u32 &b0, u32 &b1) {
    if constexpr (sizeof(WEIGHT) == 1) {
        b0 = __byte_perm(word0, word1, 0x5410);
        b1 = __byte_perm(word0, word1, 0x7632);
    } else {
        b0 = word0, b1 = word1;
    }
}

// The weights of four columns (number `quad` of a load), for rows g and g + 8.
DEVICE void expand(const uint4 &upper, const uint4 &lower, int quad, u32 (&a)[4]) {
    if constexpr (sizeof(WEIGHT) == 1) {
        expand_e4m3(word_of(upper, quad), a[0], a[2]);
        expand_e4m3(word_of(lower, quad), a[1], a[3]);
    } else {
        a[0] = word_of(upper, 2 * quad), a[2] = word_of(upper, 2 * quad + 1);
        a[1] = word_of(lower, 2 * quad), a[3] = word_of(lower, 2 * quad + 1);
    }
}

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

    DEVICE void operator()(Step &step, int number) const {
        const int columns = product.columns;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int column = number * STEP + i * (STEP / LOADS);
            const bool inside = column + t * RUN < columns;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    step.words[tile][half][i] = make_uint4(0, 0, 0, 0);
                    if (GROUPED && i == 0) step.scales[tile][half] = number * STEP < columns ? __ldg(scales[tile][half] + number) : 0.0f;
                    if (inside) step.words[tile][half][i] = load_stream(rows[tile][half] + column * int(sizeof(WEIGHT)), policy);
                }
            }
        }
    }
};

struct Constants {}; // none are needed

// Multiplies a step's weights by the input in a slot of the ring.
template <class Input> DEVICE void multiply(const Input &input, const Step &step, int slot, const Constants &, Sums &all) {
    Sums sums = {}; // of this step, where it has a scale of its own
    if (!GROUPED) sums = all;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
#pragma unroll
        for (int part_of_run = 0; part_of_run < RUN / 8; part_of_run++) {
            const int eight = i * PER_LOAD + input.t * (RUN / 8) + part_of_run;
            uint4 values[PARTS];
            input.read(slot, eight, values);
#pragma unroll
            for (int quad = 0; quad < 2; quad++) {
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    u32 a[4];
                    expand(step.words[tile][0][i], step.words[tile][1][i], part_of_run * 2 + quad, a);
#pragma unroll
                    for (int part = 0; part < PARTS; part++) {
                        u32 b0, b1;
                        operand(word_of(values[part], 2 * quad), word_of(values[part], 2 * quad + 1), b0, b1);
                        mma(sums.values[tile][part], a[0], a[1], a[2], a[3], b0, b1);
                    }
                }
            }
        }
    }
    if (!GROUPED) {
        all = sums;
        return;
    }
#pragma unroll
    for (int i = 0; i < TILES * PARTS * 4; i++) {
        const int tile = i / (PARTS * 4), part = i / 4 % PARTS;
        float &sum = all.values[tile][part][i % 4];
        sum = fmaf(step.scales[tile][i % 4 / 2], sums.values[tile][part][i % 4], sum);
    }
}
