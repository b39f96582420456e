// Keys (R1, R2) of listed candidates, for re-ranking a beam and for comparing all allowed ids.
//
// A warp holds one query; the warps of a block take different queries and the same ids, so that a row
// read by one is in the cache for the others. blockIdx.y takes a share of the candidates. The keys
// come out unsorted: the host sorts them and cuts off k.

#include "warp.cuh"
#include "distance.cuh"
#include "beam.cuh"

struct Comparison {
    const unsigned char* rows;             // (n, ROW_BYTES) encoded
    const unsigned char* queries;          // (q, QUERY_BYTES) encoded
    const int* ids;                        // (m,) compared with every query; null: candidates tell
    const unsigned long long* candidates;  // (q, m) keys whose ids are compared; KEY_NONE stays
    unsigned long long* keys;              // (q, m)
    int query_count;
    int count;                             // m
};

extern "C" __global__ void __launch_bounds__(256, 2) compare(const Comparison task) {
    const int q = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (q >= task.query_count) return;
    const Query query = load_query(task.queries, q);
    const long long first = static_cast<long long>(q) * task.count;
    const int team = lane_number() / TEAM;
    const int step = TEAMS * ROWS_AT_ONCE;
    for (int base = blockIdx.y * step; base < task.count; base += gridDim.y * step) {
        int places[ROWS_AT_ONCE], nodes[ROWS_AT_ONCE];
        float distances[ROWS_AT_ONCE];
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            places[r] = base + r * TEAMS + team;
            nodes[r] = -1;
            if (places[r] >= task.count) continue;
            if (task.ids) {
                nodes[r] = __ldg(task.ids + places[r]);
            } else {
                const uint64 candidate = __ldg(task.candidates + first + places[r]);
                if (candidate != KEY_NONE) nodes[r] = key_node(candidate);
            }
        }
        compute_distances(task.rows, query, nodes, distances);
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++)
            if (lane_number() % TEAM == 0 && places[r] < task.count)
                task.keys[first + places[r]] =
                    nodes[r] < 0 ? KEY_NONE : make_key(distances[r], nodes[r]);
    }
}
