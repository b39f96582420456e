// Labels and distances of keys, as Labels.spread in labels.py: each node's labels, ascending, nearest
// node first, those that are not allowed left out.
//
// A warp holds one query, and takes 32 of its keys at a time, a lane a key. The lane counts what its
// node gives; what the lanes below give together tells where the lane writes.

#include "warp.cuh"
#include "beam.cuh"

struct Spread {
    const unsigned long long* keys;   // (q, m) ascending
    const long long* offsets;         // (n + 1,) first entry of each node
    const long long* entry_labels;    // (entries,)
    const unsigned int* allowed;      // (1 or q, words) bits of entries; null: all are allowed
    long long* labels;                // (q, k), -1 where too few
    float* distances;                 // (q, k), +inf where too few
    long long allowed_stride;         // words from one query's bits to the next; 0: one mask for all
    int query_count;
    int m;
    int k;
    int root;                         // 1: square roots, for the metric "euclidean"
};

__device__ __forceinline__ bool is_allowed(const uint32* allowed, long long entry) {
    return !allowed || __ldg(allowed + (entry >> 5)) >> (entry & 31) & 1;
}

extern "C" __global__ void __launch_bounds__(128, 4) spread(const Spread task) {
    const int q = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (q >= task.query_count) return;
    const uint64* keys = task.keys + static_cast<long long>(q) * task.m;
    long long* labels = task.labels + static_cast<long long>(q) * task.k;
    float* distances = task.distances + static_cast<long long>(q) * task.k;
    const uint32* allowed = task.allowed ? task.allowed + q * task.allowed_stride : nullptr;
    long long count = 0;  // given by the keys so far, at most k by each
    for (int base = 0; base < task.m && count < task.k; base += LANES) {
        const int i = base + lane_number();
        const uint64 key = i < task.m ? __ldg(keys + i) : KEY_NONE;
        long long first = 0, end = 0;
        if (key != KEY_NONE) {
            first = __ldg(task.offsets + key_node(key));
            end = __ldg(task.offsets + key_node(key) + 1);
        }
        int given = 0;
        for (long long entry = first; entry < end && given < task.k; entry++)
            given += is_allowed(allowed, entry);
        const long long given_up_to = sum_up_to(given);
        long long place = count + given_up_to - given;
        const float distance = task.root ? __fsqrt_rn(key_distance(key)) : key_distance(key);
        for (long long entry = first; entry < end && place < task.k; entry++) {
            if (!is_allowed(allowed, entry)) continue;
            labels[place] = __ldg(task.entry_labels + entry);
            distances[place] = distance;
            place++;
        }
        count += from_lane(given_up_to, LANES - 1);
        if (any_lane(key == KEY_NONE)) break;
    }
    for (long long place = count + lane_number(); place < task.k; place += LANES) {
        labels[place] = -1;
        distances[place] = __int_as_float(0x7f800000);
    }
}
