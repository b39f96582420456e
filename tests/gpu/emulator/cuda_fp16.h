// The half-precision words that the kernels use; see cuda_emulator.h.

#pragma once

struct __half { _Float16 value; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
inline float __low2float(__half2 halves) { return __half2float(halves.x); }
inline float __high2float(__half2 halves) { return __half2float(halves.y); }
inline float2 __half22float2(__half2 halves) {
    return {__half2float(halves.x), __half2float(halves.y)};
}
