// Float32 queries that are on the GPU already, encoded as vectors.py encodes them, bit for bit
// (but subnormal numbers, which CuPy's -ftz makes zero).
//
// One thread a query, because the order of its sums must be that of vectors.py. A query that is not
// finite, or zero under cosine, becomes NaN throughout: its distances are none, and it finds nothing.

#include "warp.cuh"
#include "distance.cuh"

struct Encoding {
    const float* vectors;    // (q, DIM)
    unsigned char* queries;  // (q, QUERY_BYTES)
    int count;
};

constexpr int TAIL_BYTES = 12;  // of an int8 row: float scale, float norm, int sum of codes
constexpr int ELEMENTS = DTYPE == INT8 ? ROW_BYTES - TAIL_BYTES : QUERY_BYTES / 4;
constexpr int COSINE = 2;

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// One value of a query: of unit length under cosine.
__device__ __forceinline__ float scaled(float value, double length) {
    return METRIC == COSINE ? static_cast<float>(__ddiv_rn(value, length)) : value;
}

__device__ __forceinline__ void encode_codes(const float* vector, unsigned char* query,
                                             double length, bool is_valid) {
    float largest = 0;
#pragma unroll 4
    for (int j = 0; j < DIM; j++) largest = fmaxf(largest, fabsf(scaled(vector[j], length)));
    const float scale = __fdiv_rn(largest, 127.0f), divisor = scale > 0 ? scale : 1.0f;
    int squares = 0, sum = 0;
#pragma unroll 4
    for (int j = 0; j < ELEMENTS; j++) {
        const float value = j < DIM ? scaled(vector[j], length) : 0.0f;
        const float rounded = rintf(__fdiv_rn(value, divisor));
        const int code = static_cast<int>(fminf(fmaxf(rounded, -127.0f), 127.0f));
        squares += code * code;
        sum += code;
        query[j] = static_cast<unsigned char>(code ^ 128);
    }
    for (int j = ELEMENTS; j < QUERY_BYTES - TAIL_BYTES; j++) query[j] = 0;
    const float norm = __fmul_rn(__fmul_rn(scale, scale), static_cast<float>(squares));
    float* tail = reinterpret_cast<float*>(query + QUERY_BYTES - TAIL_BYTES);
    tail[0] = is_valid ? scale : not_a_number();
    tail[1] = norm;
    tail[2] = __int_as_float(sum);
}

extern "C" __global__ void __launch_bounds__(128, 4) encode(const Encoding task) {
    const int q = blockIdx.x * blockDim.x + threadIdx.x;
    if (q >= task.count) return;
    const float* vector = task.vectors + static_cast<long long>(q) * DIM;
    unsigned char* query = task.queries + static_cast<long long>(q) * QUERY_BYTES;
    double squares = 0;
#pragma unroll 4
    for (int j = 0; j < DIM; j++) {
        const double value = vector[j];
        squares = __dadd_rn(squares, __dmul_rn(value, value));
    }
    const bool is_valid = isfinite(squares) && !(METRIC == COSINE && squares == 0);
    const double length = __dsqrt_rn(squares);
    if (DTYPE == INT8) {
        encode_codes(vector, query, length, is_valid);
        return;
    }
    float* values = reinterpret_cast<float*>(query);
#pragma unroll 4
    for (int j = 0; j < ELEMENTS; j++)
        values[j] = !is_valid ? not_a_number() : j < DIM ? scaled(vector[j], length) : 0.0f;
}
