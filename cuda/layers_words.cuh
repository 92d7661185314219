// How cuda/layers.cu hands rows from one operation to the next: by words that prove themselves, without a fence.
//
// A release of what a block has written waits for all copies that its multiprocessor has under way: 1.7 to 2.4 us on an H200, four times a
// layer. So nothing is released. Each operation of each layer has rows of its own, which hold NOT_THERE until a result is stored: two
// bfloat16 in 32 bits, at once; rounding never gives that word (NaN becomes 0x7fff). Who reads a row asks for its words again until they are all
// there. By the memory model of PTX that suffices, as all are relaxed and of the same width: the word is the message, and orders nothing else.
//
// There are two sets of such rows. A launch uses one and clears the other, which the next launch uses: between launches everything is ordered. So
// within a launch no word is written twice, and there is nothing to overwrite too early. Which set is next stands in memory, for launches
// may be replays of a graph. Rows of 64-bit words, two numbers and the launch's number, would need no clearing and one set for all
// layers, but are twice as many bytes on the way that everybody waits for: 115 KB a block before `down` of 70B.
//
// What else blocks of later operations overwrite, partial results of attention, is read before: who writes them depends, word for word, on
// what was computed from them, and no value comes out of thin air.

constexpr u32 NOT_THERE = 0xffffffffu;

enum Flag { PLAIN_INPUT = 1, PLAIN_OUTPUT = 2, PLAIN_BEFORE = 4, FROM_ATTENTION = 8 }; // as in layers.py

DEVICE uint4 load_words(const bf16 *from) {
    uint4 words;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from));
    return words;
}

DEVICE u32 load_word(const void *from) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}

DEVICE void store_word(bf16 *to, u32 word) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory"); }

DEVICE bool are_there(const uint4 &words) { return max(max(words.x, words.y), max(words.z, words.w)) != NOT_THERE; }

// Waits until all of a lane's words are there; `read` asks for some of them again.
template <int COUNT, class Read> DEVICE void wait_for_own_words(uint4 (&words)[COUNT], Read read) {
    bool misses;
    do {
        misses = false;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (!are_there(words[i])) words[i] = read(i), misses = true;
        }
    } while (misses);
}

template <int COUNT, class Read> DEVICE void wait_for_words(uint4 (&words)[COUNT], Read read) {
    wait_for_own_words(words, read);
    __syncwarp();
}

// Reads words, until all are there where that must be waited for.
template <int COUNT, class Read> DEVICE void read_words(uint4 (&words)[COUNT], bool waits, Read read) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) words[i] = read(i);
    if (waits) wait_for_words(words, read);
}

// The rows of a launch; which of a step's rows attention writes, not those that pad it; the number of the launch.
struct Handed {
    u8 *begin;
    u32 attended, launch;

    DEVICE bf16 *at(const bf16 *place, bool is_plain) const {
        return is_plain ? const_cast<bf16 *>(place) : reinterpret_cast<bf16 *>(begin + size_t(place));
    }
};

// Both sets, and the number of this launch, once the one before it has ended.
struct Sets {
    u8 *begin;
    const u32 *number;
    u32 bytes;

    DEVICE u8 *at(u32 launch) const { return begin + size_t(launch & 1) * bytes; }
    DEVICE u64 *exchange() const { return reinterpret_cast<u64 *>(begin + size_t(2) * bytes); } // layers_parts.cuh

    // Clears this block's part of the other set's so-many-th of `count` parts, by a warp.
    DEVICE void clear(const Handed &own, int part, int count, int lane) const {
        u8 *const other = own.begin == begin ? begin + bytes : begin;
        const int words = bytes / 16, each = (words + count - 1) / count, end = min(words, (part + 1) * each);
        for (int i = part * each + blockIdx.x * WARP + lane; i < end; i += gridDim.x * WARP) {
            reinterpret_cast<uint4 *>(other)[i] = make_uint4(NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE);
        }
    }
};
