// Copies of whole pages in all layers at once, inside a step's graph or alone: a copy for each layer by the driver takes the host a hundred times as long.
#include "common.cuh"

// `parts` is (parts, 2): where the first page of a layer's keys, values or scales lies, and bytes of a page, a multiple of 16.
DEVICE void copy_part(const u64 *parts, int from, int to) {
    const size_t size = parts[2 * blockIdx.x + 1];
    u8 *pages = reinterpret_cast<u8 *>(parts[2 * blockIdx.x]);
    const uint4 *source = reinterpret_cast<const uint4 *>(pages + from * size);
    uint4 *target = reinterpret_cast<uint4 *>(pages + to * size);
    for (size_t i = threadIdx.x; i < size / 16; i += blockDim.x) target[i] = source[i];
}

// Neither lets the next kernel start early: attention reads some pages before it waits. Launch: grid (parts).
KERNEL copy_page(const u64 *parts, int from, int to) {
    wait_for_previous();
    copy_part(parts, from, to);
}

// `copies` is (copies, 2): from, to; -1 stands for none. In any order: no page is both. Launch: grid (parts, copies).
KERNEL copy_pages(const u64 *parts, const int *copies) {
    wait_for_previous();
    const int from = copies[2 * blockIdx.y], to = copies[2 * blockIdx.y + 1];
    if (from >= 0) copy_part(parts, from, to);
}
