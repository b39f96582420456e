// The visited cache (R7): which numbers a query has seen on this layer, as far as it remembers.
//
// Set-associative, first in first out: a bucket is one 16-byte word of 8 tags of 16 bits, or of 4 of
// 32 bits. Bucket and tag together are one to one with the number (TAG_BITS 16: while numbers are
// below 65535 * buckets), so an unseen number is never called seen. A forgotten one costs a row read.

#include "warp.cuh"

constexpr uint32 NO_TAG = TAG_BITS == 16 ? 0xffffu : 0xffffffffu;

struct Visited {
    uint4* buckets;   // (bucket_mask + 1,) in shared memory
    uint32 bucket_mask;
    int bucket_bits;
};

__device__ __forceinline__ uint32 tag_of(const Visited& visited, uint32 number) {
    return TAG_BITS == 16 ? number >> visited.bucket_bits : number;
}

__device__ __forceinline__ uint32 bucket_of(const Visited& visited, uint32 number) {
    const uint32 high = number >> visited.bucket_bits;  // scatters equal low bits; undone by the tag
    return (number ^ (high * 0x9e3779b1u >> 16)) & visited.bucket_mask;
}

// Not 0 where one of a word's two halves is.
__device__ __forceinline__ uint32 zero_halves(uint32 word) {
    return (word - 0x00010001u) & ~word & 0x80008000u;
}

__device__ __forceinline__ bool holds(uint4 bucket, uint32 tag) {
    if (TAG_BITS == 32)
        return bucket.x == tag || bucket.y == tag || bucket.z == tag || bucket.w == tag;
    const uint32 both = tag * 0x00010001u;
    return (zero_halves(bucket.x ^ both) | zero_halves(bucket.y ^ both) |
            zero_halves(bucket.z ^ both) | zero_halves(bucket.w ^ both)) != 0;
}

// The bucket with `tag` in front; its last tag is forgotten.
__device__ __forceinline__ uint4 pushed(uint4 bucket, uint32 tag) {
    if (TAG_BITS == 32) return make_uint4(tag, bucket.x, bucket.y, bucket.z);
    return make_uint4(bucket.x << 16 | tag, bucket.y << 16 | bucket.x >> 16,
                      bucket.z << 16 | bucket.y >> 16, bucket.w << 16 | bucket.z >> 16);
}

// Forget everything. All lanes of the warp call together.
__device__ __forceinline__ void forget(const Visited& visited) {
    const uint4 empty = make_uint4(FULL_WARP, FULL_WARP, FULL_WARP, FULL_WARP);
    for (uint32 i = lane_number(); i <= visited.bucket_mask; i += LANES) visited.buckets[i] = empty;
    sync_warp();
}

// Remember one number a lane (negative: none); true where it was not known to be visited, in one lane
// for each number. All lanes of the warp call together. Lanes that meet in a bucket take turns.
__device__ __forceinline__ bool visit(const Visited& visited, int number) {
    const uint32 bucket = bucket_of(visited, number), tag = tag_of(visited, number);
    bool is_waiting = number >= 0 && !holds(visited.buckets[bucket], tag);
    bool is_new = false;
    sync_warp();
    while (any_lane(is_waiting)) {
        const uint32 alone = ~lane_number();  // is no bucket
        const uint32 rivals = lanes_with_same(is_waiting ? bucket : alone);
        if (is_waiting && lowest(rivals) == lane_number()) {
            const uint4 old = visited.buckets[bucket];
            is_new = !holds(old, tag);
            if (is_new) visited.buckets[bucket] = pushed(old, tag);
            is_waiting = false;
        }
        sync_warp();
    }
    return is_new;
}
