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
// and the one that is there stays (R7). All lanes of the warp call together, and exchange their keys
// by way of `room`: shared memory for one a lane, 16-byte aligned.
__device__ __forceinline__ void merge(Beam& beam, uint64 key, uint64* room) {
    const int place = place_of(beam, key);
    const bool is_known = place < beam.size && (beam.keys[place] & ~EXPANDED) == key;
    bool is_new = key != KEY_NONE && place < beam.capacity && !is_known;
    const uint32 alone = ~lane_number();  // is no node
    const uint32 copies = lanes_with_same(is_new ? key_node(key) : alone);
    is_new = is_new && lowest(copies) == lane_number();
    const uint32 entering = lanes_where(is_new);
    sync_warp();  // read before any lane writes, here or after
    if (entering == 0) return;
    const int count = __popc(entering), before = __popc(entering & lanes_below());
    room[is_new ? before : count + lane_number() - before] = is_new ? key : KEY_NONE;
    sync_warp();
    int rank = 0;  // among the entering
#pragma unroll 1
    for (int j = 0; j < count; j += 2) {
        const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(room + j);
        rank += two.x < key;
        rank += two.y < key;
    }
    const int target = place + rank;
    const int first = from_lane(place, lowest(lanes_where(is_new && rank == 0)));
    beam.size = min(beam.size + count, beam.capacity);
    beam.first = min(beam.first, first);
    sync_warp();
    room[lane_number()] = KEY_NONE;
    sync_warp();
    // From the end, 32 places at a time: each holds a key that enters, or the one that moves there.
#pragma unroll 1
    for (int base = (beam.size - 1) & -LANES; base + LANES > first; base -= LANES) {
        if (is_new && target >= base && target < base + LANES) room[target - base] = key;
        const int below = __popc(lanes_where(is_new && target < base));
        sync_warp();
        const int i = base + lane_number();
        uint64 own = room[lane_number()];
        room[lane_number()] = KEY_NONE;
        const bool is_moved = own == KEY_NONE;
        const int moved_by = below + __popc(~lanes_where(is_moved) & lanes_below());
        if (is_moved && i < beam.size) own = beam.keys[i - moved_by];
        sync_warp();
        if (i < beam.size) beam.keys[i] = own;
    }
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
