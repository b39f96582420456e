// Labels and distances of keys, as Labels.spread in labels.py: each node's labels, ascending, nearest
// node first, those that are not allowed left out. One thread a query.

#include "warp.cuh"
#include "beam.cuh"

struct Spread {
    const unsigned long long* keys;   // (q, m)
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

extern "C" __global__ void __launch_bounds__(128, 4) spread(const Spread task) {
    const int q = blockIdx.x * blockDim.x + threadIdx.x;
    if (q >= task.query_count) return;
    const uint64* keys = task.keys + static_cast<long long>(q) * task.m;
    long long* labels = task.labels + static_cast<long long>(q) * task.k;
    float* distances = task.distances + static_cast<long long>(q) * task.k;
    const uint32* allowed = task.allowed ? task.allowed + q * task.allowed_stride : nullptr;
    int count = 0;
    for (int i = 0; i < task.m && keys[i] != KEY_NONE; i++) {
        const int node = key_node(keys[i]);
        const float distance = key_distance(keys[i]);
        for (long long entry = task.offsets[node]; entry < task.offsets[node + 1]; entry++) {
            if (count == task.k) return;
            if (allowed && !(allowed[entry >> 5] >> (entry & 31) & 1)) continue;
            labels[count] = task.entry_labels[entry];
            distances[count] = task.root ? __fsqrt_rn(distance) : distance;
            count++;
        }
    }
    for (; count < task.k; count++) {
        labels[count] = -1;
        distances[count] = __int_as_float(0x7f800000);
    }
}
