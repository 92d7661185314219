// The product that gives queries, keys and values, with rotation and storing behind it: queries go rotated to the output, keys rotated and
// values as they are to their pages. For rotation of whole heads in halves, heads of a multiple of 32, and types of keys and values that
// need no scale; else the product, and rope_write_kv (kv.cu) after it.
#include "common.cuh"
#include "kv.cuh"
#include "mma.cuh"
#include "linear_product.cuh"
#include "linear_stream.cuh"

static_assert(PAIRED, "dimensions are combined with those that they pair with");
constexpr int HALF = HEAD_DIM / 2, UNITS_OF_HEAD = HALF / OUTPUTS;
static_assert(HEAD_DIM % 32 == 0 && sizeof(KEY_TYPE) > 1 && sizeof(VALUE_TYPE) > 1, "rope_write_kv takes the others");

// Where rotated queries, keys and values go.
struct Outputs {
    bf16 *output;
    KEY_TYPE *keys;
    VALUE_TYPE *values;
    int stride, heads, kv_heads, all_slots;

    DEVICE void store(int token, int slot, int head, int dim, float value) const {
        const int kv_head = head < heads + kv_heads ? head - heads : head - heads - kv_heads;
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

// What a thread needs at the end of its two dimensions.
struct Early {
    Ending first, second;
    float2 angle;
};

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
    const Outputs places = {output, key_pages, value_pages, output_stride, heads, kv_heads, all_slots};
    const auto first_row = [](int unit) { return unit / UNITS_OF_HEAD * HEAD_DIM + unit % UNITS_OF_HEAD * OUTPUTS; };
    // A thread has one token. Its position is known before the kernel waits (attention_plan.cu).
    const int own_token = threadIdx.x / OUTPUTS;
    const bool has_token = own_token < rows;
    const int rope_row = has_token ? rope_rows[own_token] : 0, slot = has_token ? slots[own_token] : -1;
    const auto begin = [&](int unit, int thread) {
        const int row = first_row(unit) + thread % OUTPUTS;
        Early early = {{scales, bias, row}, {scales, bias, row + HALF}, make_float2(1.0f, 0.0f)};
        if (has_token && unit / UNITS_OF_HEAD < heads + kv_heads) early.angle = table[size_t(rope_row) * HALF + row % HEAD_DIM];
        return early;
    };
    const auto finish = [&](const float *sums, float factor, int stride, int unit, int thread, const Early &early) {
        const int token = own_token, place = thread % OUTPUTS, head = unit / UNITS_OF_HEAD, dim = (first_row(unit) + place) % HEAD_DIM;
        if (!has_token) return;
        const float2 angle = early.angle;
        const float a = early.first(sums, factor, stride, place, 0, token), b = early.second(sums, factor, stride, place, 1, token);
        places.store(token, slot, head, dim, a * angle.x - b * angle.y);
        places.store(token, slot, head, dim + HALF, b * angle.x + a * angle.y);
    };
    stream(product, dynamic, epsilon, first_row, begin, finish);
}
