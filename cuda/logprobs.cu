// How likely the chosen token and the most likely ones are by the model alone: rust/engine/src/logprobs.rs.
#include "draw.cuh"
#include "select.cuh"

constexpr int MOST_LOGPROBS = 32;
constexpr int LOGPROB_VALUES = 2 + 2 * MOST_LOGPROBS;

struct Logits {
    static constexpr int BITS = 32 + ID_BITS;
    const float *logits;
    int width;

    DEVICE u64 operator()(int id) const { return key_of(ordered(logits[id]), id); }
};

// Undoes what `change` did to a row.
DEVICE void restore(float *logits, const Draw &draw, const Change *changes, const Latest &latest) {
    for (int i = threadIdx.x; i < draw.changes; i += THREADS) {
        const Change &own = changes[draw.first_change + i];
        logits[own.token] = own.saved;
    }
    if (threadIdx.x == 0 && latest.token >= 0) logits[latest.token] = latest.saved;
    __syncthreads();
}

// told[row] = of each row that asks for it, the chosen token's log-probability and rank, then the most likely tokens, then their
// log-probabilities, MOST_LOGPROBS each; (rows, LOGPROB_VALUES). `changes` may be none. Launch: grid (rows), THREADS threads.
BOUNDED_KERNEL(THREADS, 1)
logprobs(float *logits, const Draw *draws, const Change *changes, const Latest *latest, const int *chosen, int *told, int stride,
         int width) {
    __shared__ Work work;
    let_next_start();
    wait_for_previous();
    const Draw draw = draws[blockIdx.x];
    const int token = chosen[blockIdx.x];
    if (draw.logprobs < 0 || token < 0) return;
    logits += size_t(blockIdx.x) * stride, told += blockIdx.x * LOGPROB_VALUES;
    restore(logits, draw, changes, latest[blockIdx.x]);
    const Logits keys = {logits, width};
    u64 best = 0;
    const float own = logits[token];
#pragma unroll 8
    for (int id = threadIdx.x; id < width; id += THREADS) best = max(best, keys(id));
    const float largest = logits[id_of(block_max(best, work))];
    double mass = 0.0, total, ranks;
    int above = 0;
#pragma unroll 4
    for (int id = threadIdx.x; id < width; id += THREADS) {
        mass += exp_exact(__fsub_rn(logits[id], largest));
        above += logits[id] > own || logits[id] == own && id < token;
    }
    block_running_sum(mass, work, total);
    block_running_sum(above, work, ranks);
    const double log_sum = double(largest) + log(total);
    if (threadIdx.x == 0) {
        told[0] = __float_as_int(float(double(own) - log_sum));
        told[1] = int(ranks) + 1;
    }
    if (draw.logprobs == 0) return;
    const Cut cut = select<false>(keys, work, 1, draw.logprobs);
    gather(keys, work, cut.least, cut.kept);
    const int place = threadIdx.x;
    if (place >= min(draw.logprobs, cut.kept)) return;
    const int id = id_of(work.ranked[place]);
    told[2 + place] = id;
    told[2 + MOST_LOGPROBS + place] = __float_as_int(float(double(logits[id]) - log_sum));
}
