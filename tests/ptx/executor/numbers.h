// Numbers of given widths, and how float32 is flushed and rounded.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;

constexpr int LANES = 32;
constexpr u32 ALL_LANES = ~0u;

template <class To, class From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To other;
    memcpy(&other, &value, sizeof other);
    return other;
}

// .ftz: a subnormal number is a zero of its sign.
inline float flushed(float value) {
    const u32 bits = bits_as<u32>(value);
    return bits & 0x7f800000 ? value : bits_as<float>(bits & 0x80000000);
}

// Every NaN that an instruction of float32 makes is this one.
inline float canonical(float value) { return value == value ? value : bits_as<float>(0x7fffffffu); }

inline float float_of_half(u16 half) {
    const u32 sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
    const float value = exponent ? std::ldexp(float(fraction | 0x400), int(exponent) - 25)
                                 : std::ldexp(float(fraction), -24);
    return sign ? -value : value;
}

inline u64 shifted_left(u64 value, u32 by) { return by > 63 ? 0 : value << by; }
inline u64 shifted_right(u64 value, u32 by) { return by > 63 ? 0 : value >> by; }
inline u64 ones(u32 count) { return count > 63 ? ~u64(0) : (u64(1) << count) - 1; }
inline int count_of(u32 lanes) { return __builtin_popcount(lanes); }
inline int lowest(u32 lanes) { return __builtin_ctz(lanes); }

template <class F>
inline void each_lane(u32 lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(lowest(lanes));
}
