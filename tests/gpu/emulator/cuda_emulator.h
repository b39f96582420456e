// The CUDA words that the kernels use, for a C++20 compiler of the CPU.
//
// Included before an unmodified kernel. A CUDA thread ("lane") is a fiber; scheduler.cpp runs one
// at a time. Whatever makes lanes meet goes through emulator::meet() with the caller's place in the
// source; the rest is plain arithmetic.

#pragma once

#include <bit>
#include <cstring>
#include <math.h>
#include <source_location>
#include <stddef.h>
#include <type_traits>

#define ALWAYS_INLINE inline __attribute__((always_inline))

#define __global__
#define __host__
#define __device__
#define __forceinline__ ALWAYS_INLINE
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// How the kernels name dynamic shared memory, and pass on where they were called from.
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulator::shared)
#define SITE_ALONE std::source_location site = std::source_location::current()
#define SITE , SITE_ALONE
#define AT_ALONE site
#define AT , AT_ALONE

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

using Site = std::source_location;
using Bits = unsigned long long;

// Where lanes meet. A shuffle gives the value of lane `source` of the warp, a ballot a bit for each
// lane whose value is not zero, a match the lanes of equal value.
enum Kind { SYNC_WARP, SHUFFLE, BALLOT, MATCH, SYNC_BLOCK };

extern const uint3* thread;  // of the running lane
extern uint3 block;
extern dim3 block_size, grid_size;
extern unsigned char* shared;  // dynamic shared memory of the running block

Bits meet(Kind kind, const char* word, unsigned mask, Bits value, int source, Site site);
[[noreturn]] void trap(Site site);

template <typename T>
Bits to_bits(T value) {
    static_assert(sizeof(T) <= sizeof(Bits) && std::is_trivially_copyable_v<T>);
    Bits bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
ALWAYS_INLINE T shuffle(const char* word, unsigned mask, T value, int source, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
    const Bits bits = meet(SHUFFLE, word, mask, to_bits(value), source, site);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

inline int lane() {
    const unsigned row = thread->y + block_size.y * thread->z;
    return static_cast<int>((thread->x + block_size.x * row) % 32);
}

inline int segment(int width) { return lane() & -width; }  // first lane of the own one

}  // namespace emulator

#define threadIdx (*emulator::thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
constexpr int warpSize = 32;

// --- where lanes meet ---

ALWAYS_INLINE void __syncthreads(SITE_ALONE) {
    emulator::meet(emulator::SYNC_BLOCK, "__syncthreads", 0, 0, 0, site);
}

ALWAYS_INLINE void __syncwarp(unsigned mask SITE) {
    emulator::meet(emulator::SYNC_WARP, "__syncwarp", mask, 0, 0, site);
}

template <typename T>
ALWAYS_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32 SITE) {
    const int from = emulator::segment(width) + (source & (width - 1));
    return emulator::shuffle("__shfl_sync", mask, value, from, site);
}

template <typename T>
ALWAYS_INLINE T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32 SITE) {
    const int own = emulator::lane(), from = own ^ lane_mask;  // a lower segment may be read
    const bool is_inside = from < emulator::segment(width) + width;
    return emulator::shuffle("__shfl_xor_sync", mask, value, is_inside ? from : own, site);
}

template <typename T>
ALWAYS_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32 SITE) {
    const int own = emulator::lane(), from = own - static_cast<int>(distance);
    const bool is_inside = from >= emulator::segment(width);
    return emulator::shuffle("__shfl_up_sync", mask, value, is_inside ? from : own, site);
}

template <typename T>
ALWAYS_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32 SITE) {
    const int own = emulator::lane(), from = own + static_cast<int>(distance);
    const bool is_inside = from < emulator::segment(width) + width;
    return emulator::shuffle("__shfl_down_sync", mask, value, is_inside ? from : own, site);
}

ALWAYS_INLINE unsigned __ballot_sync(unsigned mask, int is_set SITE) {
    const bool bit = is_set != 0;
    return static_cast<unsigned>(
        emulator::meet(emulator::BALLOT, "__ballot_sync", mask, bit, 0, site));
}

ALWAYS_INLINE int __any_sync(unsigned mask, int is_set SITE) {
    return emulator::meet(emulator::BALLOT, "__any_sync", mask, is_set != 0, 0, site) != 0;
}

ALWAYS_INLINE int __all_sync(unsigned mask, int is_set SITE) {
    return emulator::meet(emulator::BALLOT, "__all_sync", mask, is_set != 0, 0, site) == mask;
}

template <typename T>
ALWAYS_INLINE unsigned __match_any_sync(unsigned mask, T value SITE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA matches 4 or 8 bytes");
    return static_cast<unsigned>(emulator::meet(
        emulator::MATCH, "__match_any_sync", mask, emulator::to_bits(value), 0, site));
}

inline void __trap(SITE_ALONE) { emulator::trap(site); }

// --- atomics: relaxed, as in CUDA ---

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                  std::is_same_v<T, unsigned long long>);
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// --- bits and numbers ---

#define __ldg(...) (*(__VA_ARGS__))  // no function: a sanitizer then names the kernel's line

inline int __popc(unsigned word) { return std::popcount(word); }
inline int __popcll(unsigned long long word) { return std::popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __ffsll(long long word) { return __builtin_ffsll(word); }
inline int __clz(int word) { return std::countl_zero(static_cast<unsigned>(word)); }
inline int __clzll(long long word) {
    return std::countl_zero(static_cast<unsigned long long>(word));
}

inline unsigned __brev(unsigned word) {
    word = (word >> 1 & 0x55555555u) | (word & 0x55555555u) << 1;
    word = (word >> 2 & 0x33333333u) | (word & 0x33333333u) << 2;
    word = (word >> 4 & 0x0f0f0f0fu) | (word & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(word);
}

// Four products of signed bytes, and a sum that wraps.
inline int __dp4a(int a, int b, int sum) {
    unsigned total = static_cast<unsigned>(sum);
    for (int shift = 0; shift < 32; shift += 8)
        total += static_cast<unsigned>(static_cast<signed char>(a >> shift) *
                                       static_cast<signed char>(b >> shift));
    return static_cast<int>(total);
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

// Rounded one by one: the compiler is told not to fuse (-ffp-contract=off).
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmin(static_cast<T>(a), static_cast<T>(b));
    else return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmax(static_cast<T>(a), static_cast<T>(b));
    else return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
