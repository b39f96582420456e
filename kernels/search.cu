// Beam search over the graph for many queries: rules R1-R11 of search.py, whose twin this is.
//
// A group of WARPS warps walks one query at a time and takes the next by an atomic counter, so the
// grid is as large as the GPU holds and no larger. Warp 0 of a group owns the walk: it picks what to
// expand, lists the unvisited neighbours and merges their keys; all warps of the group compute
// distances. With one warp a query there is no __syncthreads; with more a block is one group.
//
// Shared memory of a group, in this order: beam, allowed keys (R8), stage, fresh, visited, pending,
// picked, state. `struct Shared` gives the sizes; launch_plan.py computes the same sum.

#include "warp.cuh"
#include "distance.cuh"
#include "visited.cuh"
#include "beam.cuh"

struct Graph {
    const int* neighbors0;           // (n, 2 M) ids, -1 = empty, filled from the left
    const int* nodes;                // (N,) ids of layer 1, then of layer 2, ...
    const int* neighbors;            // (N, M) numbers on the same layer, -1 = empty
    const int* below;                // (N,) number of the node one layer down; layer 1: its id
    const long long* layer_offsets;  // (top + 1,) first row of each layer in the three above
    const unsigned char* rows;       // (n, ROW_BYTES) encoded
    int top;                         // the highest layer
};

struct Task {
    const unsigned char* queries;    // (q, QUERY_BYTES) encoded
    const unsigned int* allowed;     // (1 or q, words) bits of ids; null: all are allowed
    const int* own;                  // (q,) ids of R10; null: an ordinary search
    unsigned long long* keys;        // (q, k) ascending, KEY_NONE where too few
    int* counts;                     // (q, 3): hops, distances, blocked (R8)
    unsigned int* next_query;        // one counter, 0 before the launch
    long long allowed_stride;        // words from one query's bits to the next; 0: one mask for all
    int query_count;
    int ef;                          // beam capacity on layer 0: max(ef, k)
    int ef_upper;                    // beam capacity above
    int k;
    int expand;                      // 1 to 32
    int visited_buckets;             // a power of two
};

constexpr int STAGE = 64;  // keys on their way into the beam, and room to merge them
constexpr int PENDING = 128;                        // unvisited neighbours of one round
constexpr int BATCH = WARPS == 1 ? LANES : PENDING; // distances between two looks at the beam
constexpr int FRESH = WARPS == 1 ? 0 : BATCH;       // one warp's fresh keys lie on the stage
constexpr int LINKS_AT_ONCE = PENDING / LANES;      // links that a lane asks for at once

struct State {
    int query;
    int count;    // pending numbers; 0: the query has ended
    int layer;
    int spare;
};

struct Shared {
    uint64* beam;
    uint64* allowed_keys;
    uint64* stage;    // (STAGE,)
    uint64* fresh;    // (FRESH,) keys as they were computed
    uint4* buckets;
    int* pending;     // (PENDING,) numbers on the layer
    int* picked;      // (LANES,)
    State* state;
};

__device__ __forceinline__ int even(int count) { return (count + 1) & ~1; }

__device__ __forceinline__ Shared divide(unsigned char* shared, const Task& task, int group) {
    const int slots = even(max(task.ef, task.ef_upper));
    const int allowed = HAS_ALLOWED_KEYS ? even(task.k) : 0;
    const int bytes = 8 * (slots + allowed + STAGE + FRESH) + 16 * task.visited_buckets +
                      4 * (PENDING + LANES) + static_cast<int>(sizeof(State));
    Shared parts;
    parts.beam = reinterpret_cast<uint64*>(shared + group * bytes);
    parts.allowed_keys = parts.beam + slots;
    parts.stage = parts.allowed_keys + allowed;
    parts.fresh = parts.stage + STAGE;
    parts.buckets = reinterpret_cast<uint4*>(parts.fresh + FRESH);
    parts.pending = reinterpret_cast<int*>(parts.buckets + task.visited_buckets);
    parts.picked = parts.pending + PENDING;
    parts.state = reinterpret_cast<State*>(parts.picked + LANES);
    return parts;
}

__device__ __forceinline__ void sync_group(SITE_ALONE) {
    if (WARPS == 1)
        sync_warp(AT_ALONE);
    else
        __syncthreads(AT_ALONE);
}

// The walk of one query, as warp 0 of its group holds it; all lanes alike. The paper's algorithm 2,
// SEARCH-LAYER: ep is the seed, W the beam, C its unexpanded keys, v `visited`, c a picked key,
// e a pending neighbour, f the beam's worst key.
struct Walk {
    const Graph& graph;
    const Task& task;
    const Shared& shared;
    Visited visited;
    Beam beam;
    Beam allowed_keys;   // the k smallest allowed keys of layer 0 (R8)
    int query;
    int layer;
    long long start;     // first row of a layer above in nodes, neighbors, below
    int link, links;     // of those picked: the next to look at, and how many there are
    int staged;
    int hops, distances;

    __device__ __forceinline__ Walk(const Graph& graph, const Task& task, const Shared& shared)
        : graph(graph), task(task), shared(shared) {
        visited.buckets = shared.buckets;
        visited.bucket_mask = task.visited_buckets - 1;
        visited.bucket_bits = 31 - __clz(task.visited_buckets);
        beam.keys = shared.beam;
        allowed_keys.keys = shared.allowed_keys;
        allowed_keys.capacity = task.k;
        query = 0;  // a warp that owns no walk may read it, ahead of the test that it owns none
    }

    __device__ __forceinline__ bool is_allowed(uint64 key) const {
        if (key == KEY_NONE) return false;
        const int node = key_node(key);
        if (task.own && __ldg(task.own + query) == node) return false;
        if (!task.allowed) return true;
        const uint32 bits = __ldg(task.allowed + query * task.allowed_stride + (node >> 5));
        return bits >> (node & 31) & 1;
    }

    // Does the layer keep the allowed list?
    __device__ __forceinline__ bool keeps_allowed_keys() const {
        return HAS_ALLOWED_KEYS && layer == 0;
    }

    __device__ void enter_layer(int number) {
        layer = number;
        start = layer ? __ldg(graph.layer_offsets + layer - 1) : 0;
        beam.capacity = layer ? task.ef_upper : task.ef;
        beam.first = 0;
        link = links = staged = 0;
        forget(visited);
    }

    // The entry point, or the query's own node (R3, R10), is pending.
    __device__ void begin(int q) {
        query = q;
        beam.size = allowed_keys.size = allowed_keys.first = 0;
        hops = distances = 0;
        enter_layer(task.own ? 0 : graph.top);
        const int seed = task.own ? __ldg(task.own + query) : 0;
        visit(visited, lane_number() == 0 ? seed : -1);
        if (lane_number() == 0) shared.pending[0] = seed;
        publish(1);
    }

    __device__ __forceinline__ void publish(int count) {
        if (lane_number() == 0) {
            shared.state->count = count;
            shared.state->layer = layer;
        }
    }

    // List unvisited neighbours of what was picked, pick when all were looked at (R5); returns how
    // many are pending, 0 when nothing is left to expand (R6).
    __device__ int gather() {
        for (;;) {
            if (link == links) {
                const int picked = pick(beam, task.expand, shared.picked);
                if (picked == 0) return 0;
                hops += picked;
                link = 0;
                links = picked * (layer ? M : 2 * M);
            }
            const int count = list_unvisited();
            link = min(link + PENDING, links);
            sync_warp();
            if (count) return count;
        }
    }

    // The next links, all asked for at once, and of those the new ones moved to the front.
    __device__ int list_unvisited() {
        const int* neighbors = layer ? graph.neighbors + start * M : graph.neighbors0;
        const int width = layer ? M : 2 * M;
#pragma unroll
        for (int i = 0; i < LINKS_AT_ONCE; i++) {
            const int place = link + i * LANES + lane_number();
            const int row = layer ? place / M : place / (2 * M);
            int number = -1;
            if (place < links) {
                const long long first = static_cast<long long>(shared.picked[row]) * width;
                number = __ldg(neighbors + first + (place - row * width));
            }
            shared.pending[i * LANES + lane_number()] = number;
        }
        const int asked = min(links - link, PENDING);
        int count = 0;
#pragma unroll 1
        for (int base = 0; base < asked; base += LANES) {
            const int number = shared.pending[base + lane_number()];
            const bool is_new = visit(visited, number);
            const uint32 fresh = lanes_where(is_new);
            if (is_new) shared.pending[count + __popc(fresh & lanes_below())] = number;
            count += __popc(fresh);
        }
        return count;
    }

    // Where the next keys are written: of one warp, behind what is staged.
    __device__ __forceinline__ uint64* fresh() const {
        return WARPS == 1 ? shared.stage + staged : shared.fresh;
    }

    // Put fresh keys that can enter the beam (R4) or the allowed list (R8) on the stage, and merge
    // what is there when it may overflow or, at the end of a round, all.
    __device__ void stage(int count, bool is_last) {
        const uint64* keys = fresh();
#pragma unroll 1
        for (int base = 0; base < count; base += LANES) {
            const int i = base + lane_number();
            const uint64 key = i < count ? keys[i] : KEY_NONE;
            bool is_wanted = key < worst(beam);
            if (keeps_allowed_keys()) is_wanted |= key < worst(allowed_keys) && is_allowed(key);
            const uint32 wanted = lanes_where(is_wanted);
            if (WARPS == 1) sync_warp();  // read before they are written over
            if (is_wanted) shared.stage[staged + __popc(wanted & lanes_below())] = key;
            staged += __popc(wanted);
            sync_warp();
            const int kept = is_last && base + LANES >= count ? 0 : STAGE - LANES;
            while (staged > kept) merge_staged();
        }
    }

    // Merge the last staged keys, up to one a lane.
    __device__ void merge_staged() {
        const int count = min(staged, LANES);
        staged -= count;
        const bool has_key = lane_number() < count;
        const uint64 key = has_key ? shared.stage[staged + lane_number()] : KEY_NONE;
        sync_warp();
        uint64* room = shared.stage + even(staged);
        merge(beam, key, room);
        if (keeps_allowed_keys()) merge(allowed_keys, is_allowed(key) ? key : KEY_NONE, room);
    }

    // After the distances of a round: what is pending next, on this layer or on one below.
    __device__ void advance() {
        int count;
        while ((count = gather()) == 0 && layer > 0) descend();
        publish(count);
    }

    // The beam becomes the seed of the layer below (R3). Its order stays: `below` ascends with ids.
    __device__ void descend() {
        const long long start_above = start;
        enter_layer(layer - 1);
        for (int base = 0; base < beam.size; base += LANES) {
            const int i = base + lane_number();
            uint64 key = KEY_NONE;
            int number = -1;
            if (i < beam.size) {
                key = beam.keys[i];
                number = __ldg(graph.below + start_above + key_node(key));
                key = key >> 32 << 32 | static_cast<uint64>(number) << 1;
                beam.keys[i] = key;
            }
            visit(visited, number);
            if (keeps_allowed_keys())
                merge(allowed_keys, is_allowed(key) ? key : KEY_NONE, shared.stage);
        }
        beam.size = min(beam.size, beam.capacity);
        sync_warp();
    }

    // How many keys of the beam may not be returned (R8).
    __device__ int blocked() const {
        int count = 0;
#pragma unroll 1
        for (int base = 0; base < beam.size; base += LANES) {
            const int i = base + lane_number();
            count += __popc(lanes_where(i < beam.size && !is_allowed(beam.keys[i])));
        }
        return count;
    }

    // The result (R9).
    __device__ void write() const {
        uint64* keys = task.keys + static_cast<long long>(query) * task.k;
        const Beam& result = HAS_ALLOWED_KEYS ? allowed_keys : beam;
        const int barred = HAS_ALLOWED_KEYS ? blocked() : 0;
        for (int i = lane_number(); i < task.k; i += LANES)
            keys[i] = i < result.size ? result.keys[i] & ~EXPANDED : KEY_NONE;
        if (lane_number() == 0) {
            int* counts = task.counts + 3ll * query;
            counts[0] = hops;
            counts[1] = distances;
            counts[2] = barred;
        }
    }
};

// Keys of pending[0..count), count <= BATCH, to fresh; every warp of the group takes its rows.
__device__ __forceinline__ void compute_keys(const Graph& graph, const Query& query,
                                             uint64* fresh, const int* pending, int count,
                                             const int* layer_nodes, int warp) {
    const int team = warp * TEAMS + lane_number() / TEAM;
    for (int base = 0; base < count; base += WARPS * TEAMS * ROWS_AT_ONCE) {
        int nodes[ROWS_AT_ONCE];
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            const int place = base + r * WARPS * TEAMS + team;
            nodes[r] = place < count ? pending[place] : -1;
        }
        if (layer_nodes) {
#pragma unroll
            for (int r = 0; r < ROWS_AT_ONCE; r++)
                if (nodes[r] >= 0) nodes[r] = __ldg(layer_nodes + nodes[r]);
        }
        const float distance = compute_distances(graph.rows, query, nodes);
        const int place = base + own_row() * WARPS * TEAMS + team;
        if (is_first_of_row() && place < count) fresh[place] = make_key(distance, pending[place]);
    }
}

// Blocks that the registers of an SM must hold: 20 queries of 96 registers a lane, or 16 of 128 where
// much of a query is held. Of int4 less fits: beside an allowed list, or four warps.
constexpr int THREADS = WARPS == 8 ? 256 : 128;
constexpr int MOST_HELD = DTYPE != INT4 ? 8 : WARPS == 4 ? 0 : HAS_ALLOWED_KEYS ? 7 : 8;
constexpr int BLOCKS = WARPS == 8 ? 2 : HELD_CHUNKS > MOST_HELD ? 4 : 5;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
search(const Graph graph, const Task task) {
    DYNAMIC_SHARED(unsigned char, memory);
    const int group = threadIdx.x / (LANES * WARPS), warp = threadIdx.x / LANES % WARPS;
    const Shared shared = divide(memory, task, group);
    Walk walk(graph, task, shared);
    for (;;) {
        if (warp == 0 && lane_number() == 0)
            shared.state->query = static_cast<int>(atomicAdd(task.next_query, 1u));
        sync_group();
        const int q = shared.state->query;
        if (q >= task.query_count) return;
        const Query query = load_query(task.queries, q);
        if (warp == 0) walk.begin(q);
        for (;;) {
            sync_group();
            const int count = shared.state->count, layer = shared.state->layer;
            if (count == 0) break;
            const int* layer_nodes =
                layer ? graph.nodes + __ldg(graph.layer_offsets + layer - 1) : nullptr;
            for (int base = 0; base < count; base += BATCH) {
                const int batch = min(count - base, BATCH);
                compute_keys(graph, query, walk.fresh(), shared.pending + base, batch, layer_nodes,
                             warp);
                sync_group();
                if (warp == 0) walk.stage(batch, base + batch == count);
            }
            if (warp == 0) {
                walk.distances += count;
                walk.advance();
            }
        }
        if (warp == 0) walk.write();
    }
}
