// Where keys and values lie: per layer two arrays (pages, kv_heads, PAGE_TOKENS * HEAD_DIM), one of keys and one of values, whose types
// may differ. 8-bit types have a scale per token and head beside them, (pages, kv_heads, PAGE_TOKENS) floats; keys of integers one for each
// 32 dimensions, (pages, kv_heads, HEAD_DIM / 32, PAGE_TOKENS), as on the CPU: a few dimensions of keys are far greater than others.
//
// A page's part for one head is one stretch of memory, so a block that reads one head streams whole pages. Inside it the order is that of
// the matrix instructions' operands (mma.cuh): 16 bytes that a lane reads are what it needs, so keys and values go from memory into
// registers without a detour, and copied to shared memory as they are they are read without bank conflicts.
//
//   keys:   (HEAD_DIM / SPAN, PAGE_TOKENS, SPAN), where four lanes read the SPAN dimensions of a token
//   values: (HEAD_DIM / TOGETHER, PAGE_TOKENS / 4, TOGETHER, 4): four neighbouring tokens of TOGETHER dimensions are 16 bytes
//
// Types and widths that this does not fit (float, and heads that are no multiple of SPAN) lie plainly: (PAGE_TOKENS, HEAD_DIM).
#ifndef KEY_TYPE
#define KEY_TYPE bf16
#endif
#ifndef VALUE_TYPE
#define VALUE_TYPE bf16
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif

constexpr int PAGE_TOKENS = 16; // as rust/kernels/src/kv.rs

template <class E> constexpr bool IS_INTEGER = false;
template <> constexpr bool IS_INTEGER<i8> = true;
template <class E> constexpr float GREATEST = IS_INTEGER<E> ? 127.0f : 448.0f; // number of an 8-bit type
constexpr int KEY_GROUP = IS_INTEGER<KEY_TYPE> && HEAD_DIM > 32 ? 32 : HEAD_DIM; // dimensions that share a scale
constexpr int KEY_SCALES = (HEAD_DIM + KEY_GROUP - 1) / KEY_GROUP;

template <class E> constexpr int SPAN = 64 / sizeof(E);
template <class E> constexpr int TOGETHER = 4 / sizeof(E);
template <class E> constexpr bool ORDERED = sizeof(E) < 4 && HEAD_DIM % SPAN<E> == 0;

// First part of a page for one head, and of a slot's (page * PAGE_TOKENS + place) scale.
DEVICE size_t page_index(int page, int kv_head, int kv_heads) {
    return (size_t(page) * kv_heads + kv_head) * PAGE_TOKENS * HEAD_DIM;
}

DEVICE size_t scale_index(int slot, int kv_head, int kv_heads, int groups, int group) {
    return ((size_t(slot / PAGE_TOKENS) * kv_heads + kv_head) * groups + group) * PAGE_TOKENS + slot % PAGE_TOKENS;
}

// Where a dimension of a token lies in its page.
template <class E> DEVICE int key_offset(int token, int dim) {
    if constexpr (ORDERED<E>) return dim / SPAN<E> * (PAGE_TOKENS * SPAN<E>) + token * SPAN<E> + dim % SPAN<E>;
    return token * HEAD_DIM + dim;
}

template <class E> DEVICE int value_offset(int token, int dim) {
    if constexpr (ORDERED<E>) {
        constexpr int together = TOGETHER<E>;
        return dim / together * (PAGE_TOKENS * together) + token / 4 * (4 * together) + dim % together * 4 + token % 4;
    }
    return token * HEAD_DIM + dim;
}
