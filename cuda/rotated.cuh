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
