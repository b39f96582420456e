// What the kernels use of a warp: every warp intrinsic is called here and nowhere else.
//
// All of them take part with the full warp. SITE and AT are empty in CUDA; on a machine without a
// GPU they carry the caller's file and line to whoever executes the kernels there.

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#define SITE_ALONE
#define AT_ALONE
#define SITE
#define AT
#endif

typedef unsigned int uint32;
typedef unsigned long long uint64;

constexpr uint32 FULL_WARP = 0xffffffffu;
constexpr int LANES = 32;

__device__ __forceinline__ int lane_number() { return threadIdx.x % LANES; }

// Bits of the lanes below this one.
__device__ __forceinline__ uint32 lanes_below() { return (1u << lane_number()) - 1; }

// Shared memory written by a lane before is seen by all lanes after.
__device__ __forceinline__ void sync_warp(SITE_ALONE) { __syncwarp(FULL_WARP AT); }

// One bit a lane.
__device__ __forceinline__ uint32 lanes_where(bool is_set SITE) {
    return __ballot_sync(FULL_WARP, is_set AT);
}

__device__ __forceinline__ bool any_lane(bool is_set SITE) { return lanes_where(is_set AT) != 0; }

__device__ __forceinline__ int lowest(uint32 lanes) { return __ffs(lanes) - 1; }

// Another lane's value.
template <typename T>
__device__ __forceinline__ T from_lane(T value, int lane SITE) {
    return __shfl_sync(FULL_WARP, value, lane, LANES AT);
}

// The value of one member of each team of `TEAM_LANES` lanes.
template <int TEAM_LANES, typename T>
__device__ __forceinline__ T from_member(T value, int member SITE) {
    return __shfl_sync(FULL_WARP, value, member, TEAM_LANES AT);
}

// The sum over a team, the same bits in each of its lanes.
template <int TEAM_LANES, typename T>
__device__ __forceinline__ T team_sum(T value SITE) {
#pragma unroll
    for (int distance = TEAM_LANES / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(FULL_WARP, value, distance, LANES AT);
    return value;
}

// Of COUNT sums over a team one a lane: that of values[member / (TEAM_LANES / COUNT)]. They have the
// bits of team_sum, from the same pairs in the same order, but each half of the lanes goes on with
// half of the sums, and gives its parts of the others away.
template <int TEAM_LANES, int COUNT, typename T>
__device__ __forceinline__ T own_team_sum(T (&values)[COUNT] SITE) {
    int distance = TEAM_LANES / 2;
#pragma unroll
    for (int left = COUNT / 2; left > 0; left /= 2, distance /= 2) {
        const bool is_upper = lane_number() & distance;
#pragma unroll
        for (int i = 0; i < left; i++) {
            const T given = is_upper ? values[i] : values[i + left];
            const T kept = is_upper ? values[i + left] : values[i];
            values[i] = kept + __shfl_xor_sync(FULL_WARP, given, distance, LANES AT);
        }
    }
#pragma unroll
    for (; distance > 0; distance /= 2)
        values[0] += __shfl_xor_sync(FULL_WARP, values[0], distance, LANES AT);
    return values[0];
}

// The sum over the lanes up to this one.
__device__ __forceinline__ long long sum_up_to(long long value SITE) {
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) {
        const long long lower = __shfl_up_sync(FULL_WARP, value, distance, LANES AT);
        if (lane_number() >= distance) value += lower;
    }
    return value;
}

// The largest value of the warp, in each lane.
__device__ __forceinline__ float warp_max(float value SITE) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance, LANES AT));
    return value;
}

// The lanes that hold the same value.
__device__ __forceinline__ uint32 lanes_with_same(uint32 value SITE) {
    return __match_any_sync(FULL_WARP, value AT);
}
