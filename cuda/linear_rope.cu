// The product that gives queries, keys and values, with rotation and storing behind it: queries go rotated to the output, keys rotated and
// values as they are to their pages. For rotation of whole heads in halves, heads of a multiple of 32, and types of keys and values that
// need no scale; else the product, and rope_write_kv (kv.cu) after it.
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "linear_product.cuh"
#if PACKED == 4
#include "linear_registers.cuh"
#else
#include "linear_stream.cuh"
#endif

static_assert(PAIRED, "dimensions are combined with those that they pair with");
constexpr int HALF = HEAD_DIM / 2, UNITS_OF_HEAD = HALF / OUTPUTS;
static_assert(HEAD_DIM % 32 == 0 && sizeof(KEY_TYPE) > 1 && sizeof(VALUE_TYPE) > 1, "rope_write_kv takes the others");

// Where rotated queries, keys and values go.
struct Places {
    bf16 *output;
    KEY_TYPE *keys;
    VALUE_TYPE *values;
    const int *slots;
    int stride, heads, kv_heads, all_slots;

    DEVICE void store(int token, int head, int dim, float value) const {
        const int slot = slots[token], kv_head = head < heads + kv_heads ? head - heads : head - heads - kv_heads;
        if (head < heads) {
            output[size_t(token) * stride + head * HEAD_DIM + dim] = from_float<bf16>(value);
        } else if (u32(slot) < u32(all_slots)) {
            const size_t page = page_index(slot / PAGE_TOKENS, kv_head, kv_heads);
            if (head < heads + kv_heads) {
                keys[page + key_offset<KEY_TYPE>(slot % PAGE_TOKENS, dim)] = from_float<KEY_TYPE>(value);
            } else {
                values[page + value_offset<VALUE_TYPE>(slot % PAGE_TOKENS, dim)] = from_float<VALUE_TYPE>(value);
            }
        }
    }
};

#if PACKED != 4
// What a thread needs at the end of its two dimensions.
struct Early {
    Ending first, second;
    float2 angle;
};
#endif

// As linear_stream; weight is ((heads + 2 * kv_heads) * HEAD_DIM, columns), output (rows, heads * HEAD_DIM and more), table (table rows,
// HALF) of (cosine, sine). Launch: any grid of up to weight_rows / (2 * OUTPUTS) blocks, else as linear_stream.
BOUNDED_KERNEL(BOUND, 1)
linear_rope(const bf16 *input, const WEIGHT *weight, const float *bias, const Scale *scales, const Scale *minima, const float *norm,
            bf16 *output, KEY_TYPE *key_pages, VALUE_TYPE *value_pages, const float2 *table, const int *rope_rows, const int *slots,
            int input_stride, int output_stride, int rows, int columns, int heads, int kv_heads, int all_slots, float epsilon) {
    extern __shared__ uint4 dynamic[];
    const int units = (heads + 2 * kv_heads) * UNITS_OF_HEAD;
    const Product product = {input, weight, scales, minima, norm, input_stride, rows, (heads + 2 * kv_heads) * HEAD_DIM, columns,
                             units, HALF};
    const Places places = {output, key_pages, value_pages, slots, output_stride, heads, kv_heads, all_slots};
    const auto first_row = [](int unit) { return unit / UNITS_OF_HEAD * HEAD_DIM + unit % UNITS_OF_HEAD * OUTPUTS; };
#if PACKED == 4
    const Ending ending = {bias, scales, columns, epsilon};
    stream(product, dynamic, first_row, [&](const Shared &shared, const Squares &squares, int unit, int thread) {
        for (int i = thread; i < OUTPUTS * rows; i += WARPS * WARP) {
            const int place = i % OUTPUTS, token = i / OUTPUTS, head = unit / UNITS_OF_HEAD;
            const int dim = unit % UNITS_OF_HEAD * OUTPUTS + place, row = first_row(unit) + place;
            const float a = ending(shared, squares, place, 0, token, row), b = ending(shared, squares, place, 1, token, row + HALF);
            float2 angle = make_float2(1.0f, 0.0f);
            if (head < heads + kv_heads) angle = table[size_t(rope_rows[token]) * HALF + dim];
            places.store(token, head, dim, a * angle.x - b * angle.y);
            places.store(token, head, dim + HALF, b * angle.x + a * angle.y);
        }
    });
#else
    const auto begin = [&](int unit, int thread) {
        const int row = first_row(unit) + thread % OUTPUTS, token = thread / OUTPUTS;
        Early early = {{scales, bias, row}, {scales, bias, row + HALF}, make_float2(1.0f, 0.0f)};
        if (token < rows && unit / UNITS_OF_HEAD < heads + kv_heads) early.angle = table[size_t(rope_rows[token]) * HALF + row % HEAD_DIM];
        return early;
    };
    const auto finish = [&](const float *sums, const float *factors, int stride, int unit, int thread, const Early &early) {
        const int token = thread / OUTPUTS, place = thread % OUTPUTS, head = unit / UNITS_OF_HEAD, dim = (first_row(unit) + place) % HEAD_DIM;
        if (token >= rows) return;
        const float2 angle = early.angle;
        const float a = early.first(sums, factors, stride, place, 0, token), b = early.second(sums, factors, stride, place, 1, token);
        places.store(token, head, dim, a * angle.x - b * angle.y);
        places.store(token, head, dim + HALF, b * angle.x + a * angle.y);
    };
    stream(product, dynamic, epsilon, first_row, begin, finish);
#endif
}
