// Keys (R1, R2) of listed candidates, for re-ranking a beam and for comparing all allowed ids.
//
// A warp holds one query; the warps of a block take different queries and the same ids, so that a row
// read by one is in the cache for the others. blockIdx.y takes a share of the candidates, and keeps
// the k smallest keys of it, which the host merges; or, for a k too large, all keys go out unsorted.
// Shared memory: room for a key a lane, and k keys a warp; none where k is 0.

#include "warp.cuh"
#include "distance.cuh"
#include "beam.cuh"

struct Comparison {
    const unsigned char* rows;             // (n, ROW_BYTES) encoded
    const unsigned char* queries;          // (q, QUERY_BYTES) encoded
    const int* ids;                        // (m,) compared with every query; null: candidates tell
    const unsigned long long* candidates;  // (q, m) keys whose ids are compared; KEY_NONE stays
    unsigned long long* keys;              // (q, shares, k) ascending; (q, m) where k is 0
    int query_count;
    int count;                             // m
    int k;                                 // keys kept of a share; 0: all, each in its place
};

// Which node query q is compared with at a place; negative: none.
__device__ __forceinline__ int node_at(const Comparison& task, int q, int place) {
    if (place >= task.count) return -1;
    if (task.ids) return __ldg(task.ids + place);
    const uint64 candidate = __ldg(task.candidates + static_cast<long long>(q) * task.count + place);
    return candidate == KEY_NONE ? -1 : key_node(candidate);
}

extern "C" __global__ void __launch_bounds__(256, 2) compare(const Comparison task) {
    const int q = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (q >= task.query_count) return;
    DYNAMIC_SHARED(unsigned char, memory);
    Beam beam;
    uint64* room = reinterpret_cast<uint64*>(memory) + threadIdx.x / LANES * LANES;
    beam.keys = reinterpret_cast<uint64*>(memory) + blockDim.x + threadIdx.x / LANES * task.k;
    beam.capacity = task.k;
    beam.size = beam.first = 0;
    const Query query = load_query(task.queries, q);
    const int team = lane_number() / TEAM;
    const int step = TEAMS * ROWS_AT_ONCE;
    for (int base = blockIdx.y * step; base < task.count; base += gridDim.y * step) {
        int nodes[ROWS_AT_ONCE];
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++) nodes[r] = node_at(task, q, base + r * TEAMS + team);
        const float distance = compute_distances(task.rows, query, nodes);
        const int place = base + own_row() * TEAMS + team;
        const int node = node_at(task, q, place);
        const uint64 key = is_first_of_row() && node >= 0 ? make_key(distance, node) : KEY_NONE;
        if (task.k == 0) {
            if (is_first_of_row() && place < task.count)
                task.keys[static_cast<long long>(q) * task.count + place] = key;
        } else if (any_lane(key < worst(beam))) {
            merge(beam, key, room);
        }
    }
    uint64* kept = task.keys + (static_cast<long long>(q) * gridDim.y + blockIdx.y) * task.k;
    for (int i = lane_number(); i < task.k; i += LANES)
        kept[i] = i < beam.size ? beam.keys[i] : KEY_NONE;
}
