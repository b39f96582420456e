// Keys (R2) and the beam (R4): one sorted array of the smallest keys seen, in shared memory.
//
// The twin of keys.py and beam.py. One warp works on a beam; its size and the place of its first unexpanded key
// are held by all lanes alike.

#include "warp.cuh"

constexpr uint64 KEY_NONE = 0xffffffffffffffffull;  // an empty slot: larger than every key
constexpr uint64 EXPANDED = 1;

// Key of a distance and an id, not expanded; a distance that is no number has none.
__device__ __forceinline__ uint64 make_key(float distance, int node) {
    if (!(distance == distance)) return KEY_NONE;
    const uint32 bits = __float_as_uint(distance);
    const uint32 ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    return static_cast<uint64>(ordered) << 32 | static_cast<uint64>(node) << 1;
}

__device__ __forceinline__ int key_node(uint64 key) {
    return static_cast<int>(static_cast<uint32>(key) >> 1);
}

__device__ __forceinline__ float key_distance(uint64 key) {
    const uint32 ordered = static_cast<uint32>(key >> 32);
    return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}

struct Beam {
    uint64* keys;  // (capacity,) ascending up to `size`
    int size;
    int capacity;
    int first;     // no key before this place is unexpanded
};

// What a new key must be smaller than to enter.
__device__ __forceinline__ uint64 worst(const Beam& beam) {
    return beam.size < beam.capacity ? KEY_NONE : beam.keys[beam.size - 1] & ~EXPANDED;
}

// How many keys of the beam are smaller.
__device__ __forceinline__ int place_of(const Beam& beam, uint64 key) {
    int low = 0, high = beam.size;
    while (low < high) {
        const int middle = (low + high) / 2;
        if ((beam.keys[middle] & ~EXPANDED) < key)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Merge one unexpanded key a lane (KEY_NONE: none), by rank. A key that is there already is dropped,
// and the one that is there stays (R7). All lanes of the warp call together.
__device__ __forceinline__ void merge(Beam& beam, uint64 key) {
    const int place = place_of(beam, key);
    const bool is_known = place < beam.size && (beam.keys[place] & ~EXPANDED) == key;
    bool is_new = key != KEY_NONE && place < beam.capacity && !is_known;
    uint32 entering = lanes_where(is_new);
    sync_warp();  // read before any lane writes, here or after
    if (entering == 0) return;
    int rank;  // among the entering
    for (;;) {
        bool is_copy = false;
        rank = 0;
        for (uint32 left = entering; left; left &= left - 1) {
            const int other_lane = lowest(left);
            const uint64 other = from_lane(key, other_lane);
            rank += other < key;
            is_copy |= other == key && other_lane < lane_number();
        }
        const uint32 once = lanes_where(is_new && !is_copy);
        if (once == entering) break;
        is_new = is_new && !is_copy;
        entering = once;
    }
    const int lowest_place = from_lane(place, lowest(lanes_where(is_new && rank == 0)));
    for (int base = (beam.size - 1) & -LANES; base + LANES > lowest_place; base -= LANES) {
        const int i = base + lane_number();
        const bool is_moving = i >= lowest_place && i < beam.size;
        const uint64 old = is_moving ? beam.keys[i] : KEY_NONE;
        int target = i + __popc(lanes_where(is_new && place < base));
        const bool is_between = is_new && place >= base && place < base + LANES;
        for (uint32 left = lanes_where(is_between); left; left &= left - 1)
            target += from_lane(place, lowest(left)) <= i;
        sync_warp();
        if (is_moving && target < beam.capacity) beam.keys[target] = old;
        sync_warp();
    }
    if (is_new && place + rank < beam.capacity) beam.keys[place + rank] = key;
    beam.size = min(beam.size + __popc(entering), beam.capacity);
    beam.first = min(beam.first, lowest_place);
    sync_warp();
}

// Mark the `expand` smallest unexpanded keys (R5), write their ids to picked; returns how many there
// were, 0 when the layer is done (R6). All lanes of the warp call together.
__device__ __forceinline__ int pick(Beam& beam, int expand, int* picked) {
    int count = 0;
    while (count < expand && beam.first < beam.size) {
        const int i = beam.first + lane_number();
        const uint64 key = i < beam.size ? beam.keys[i] : EXPANDED;
        const bool is_open = !(key & EXPANDED);
        const uint32 open = lanes_where(is_open);
        const int place = count + __popc(open & lanes_below());
        const bool is_picked = is_open && place < expand;
        if (is_picked) {
            beam.keys[i] = key | EXPANDED;
            picked[place] = key_node(key);
        }
        const uint32 left = lanes_where(is_open && !is_picked);
        count = min(count + __popc(open), expand);
        beam.first = left ? beam.first + lowest(left) : min(beam.first + LANES, beam.size);
    }
    sync_warp();
    return count;
}
