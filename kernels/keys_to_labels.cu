// Labels and distances of keys, as Labels.of_keys in labels.py: each node's labels, ascending,
// nearest node first.
//
// A warp holds one query, and takes 32 of its keys at a time, a lane a key. The lane counts what its
// node gives; what the lanes below give together tells where the lane writes.

#include "warp.cuh"
#include "beam.cuh"

constexpr int IP = 1;

struct KeysToLabels {
    const unsigned long long* keys;   // (q, m) ascending
    const long long* offsets;         // (n + 1,) first entry of each node
    const long long* entry_labels;    // (entries,)
    long long* labels;                // (q, k), -1 where too few
    float* distances;                 // (q, k), +inf where too few
    int query_count;
    int m;
    int k;
    int root;                         // 1: square roots, for the metric "euclidean"
};

extern "C" __global__ void __launch_bounds__(128, 4) keys_to_labels(const KeysToLabels task) {
    const int q = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (q >= task.query_count) return;
    const uint64* keys = task.keys + static_cast<long long>(q) * task.m;
    long long* labels = task.labels + static_cast<long long>(q) * task.k;
    float* distances = task.distances + static_cast<long long>(q) * task.k;
    long long count = 0;  // given by the keys so far, at most k by each
    for (int base = 0; base < task.m && count < task.k; base += LANES) {
        const int i = base + lane_number();
        const uint64 key = i < task.m ? __ldg(keys + i) : KEY_NONE;
        long long first = 0, end = 0;
        if (key != KEY_NONE) {
            first = __ldg(task.offsets + key_node(key));
            end = __ldg(task.offsets + key_node(key) + 1);
        }
        const long long given = end - first < task.k ? end - first : task.k;
        const long long given_up_to = sum_up_to(given);
        const long long place = count + given_up_to - given;
        float distance = key_distance(key);
        if (task.root) distance = __fsqrt_rn(distance);
        if (METRIC == IP) distance = __fadd_rn(1.0f, distance);  // 1 - dot, of a key of -dot
        for (long long j = 0; j < given && place + j < task.k; j++) {
            labels[place + j] = __ldg(task.entry_labels + first + j);
            distances[place + j] = distance;
        }
        count += from_lane(given_up_to, LANES - 1);
        if (any_lane(key == KEY_NONE)) break;
    }
    for (long long place = count + lane_number(); place < task.k; place += LANES) {
        labels[place] = -1;
        distances[place] = __int_as_float(0x7f800000);
    }
}
