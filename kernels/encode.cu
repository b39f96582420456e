// Float32 queries encoded as vectors.py encodes them, bit for bit (but subnormal numbers, which CuPy's
// -ftz makes zero).
//
// One warp a query. Its sum of squares has the order of vectors.py: every lane adds all values, which
// go round by shuffles. A query that inputs.py would refuse (not finite, zero under cosine, too long, or
// too short under ip) becomes NaN throughout: its distances are none, and it finds nothing.

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
constexpr double LONGEST_SQUARED = 0x1.fffffep+125, SHORTEST_SQUARED = 1e-28;  // those of inputs.py

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// The sum of squares, in order; the same bits in each lane.
__device__ __forceinline__ double squared_length(const float* vector) {
    double squares = 0;
#pragma unroll 1
    for (int base = 0; base < DIM; base += LANES) {
        const int j = base + lane_number();
        const float own = j < DIM ? vector[j] : 0.0f;
#pragma unroll
        for (int lane = 0; lane < LANES; lane++) {
            const double value = from_lane(own, lane);
            squares = __dadd_rn(squares, __dmul_rn(value, value));  // beyond DIM: plus 0
        }
    }
    return squares;
}

__device__ __forceinline__ bool is_answerable(double squares) {
    if (METRIC == COSINE) return isfinite(squares) && squares > 0;
    return squares <= LONGEST_SQUARED && (METRIC == L2 || squares == 0 || squares >= SHORTEST_SQUARED);
}

// One value of a query: of unit length under cosine, 0 beyond DIM.
__device__ __forceinline__ float scaled(const float* vector, int j, double length) {
    if (j >= DIM) return 0;
    return METRIC == COSINE ? static_cast<float>(__ddiv_rn(vector[j], length)) : vector[j];
}

__device__ __forceinline__ void encode_codes(const float* vector, unsigned char* query,
                                             double length, bool is_valid) {
    float largest = 0;
    for (int j = lane_number(); j < DIM; j += LANES)
        largest = fmaxf(largest, fabsf(scaled(vector, j, length)));
    largest = warp_max(largest);
    const float scale = __fdiv_rn(largest, 127.0f), divisor = scale > 0 ? scale : 1.0f;
    int squares = 0, sum = 0;
    for (int j = lane_number(); j < ELEMENTS; j += LANES) {
        const float rounded = rintf(__fdiv_rn(scaled(vector, j, length), divisor));
        const int code = static_cast<int>(fminf(fmaxf(rounded, -127.0f), 127.0f));
        squares += code * code;
        sum += code;
        query[j] = static_cast<unsigned char>(code ^ 128);
    }
    squares = team_sum<LANES>(squares);
    sum = team_sum<LANES>(sum);
    for (int j = ELEMENTS + lane_number(); j < QUERY_BYTES - TAIL_BYTES; j += LANES) query[j] = 0;
    if (lane_number() != 0) return;
    float* tail = reinterpret_cast<float*>(query + QUERY_BYTES - TAIL_BYTES);
    tail[0] = is_valid ? scale : not_a_number();
    tail[1] = __fmul_rn(__fmul_rn(scale, scale), static_cast<float>(squares));
    tail[2] = __int_as_float(sum);
}

extern "C" __global__ void __launch_bounds__(128, 4) encode(const Encoding task) {
    const int q = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (q >= task.count) return;
    const float* vector = task.vectors + static_cast<long long>(q) * DIM;
    unsigned char* query = task.queries + static_cast<long long>(q) * QUERY_BYTES;
    const double squares = squared_length(vector), length = __dsqrt_rn(squares);
    const bool is_valid = is_answerable(squares);
    if (DTYPE == INT8) {
        encode_codes(vector, query, length, is_valid);
        return;
    }
    float* values = reinterpret_cast<float*>(query);
    for (int j = lane_number(); j < ELEMENTS; j += LANES)
        values[j] = is_valid ? scaled(vector, j, length) : not_a_number();
}
