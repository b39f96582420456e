// Float32 queries encoded as vectors.py encodes them, bit for bit; but CuPy's -ftz makes subnormal numbers
// zero, and so the norm of a query whose scale, squared (int8), or squared length (int4) is one.
//
// One warp a query. Its sum of squares has the order of vectors.py: every lane adds all values, which
// go round by shuffles. A query that inputs.py would refuse (not finite, zero under cosine, too long, or
// too short under ip) becomes NaN throughout: its distances are none, and it finds nothing.
// Shared memory: DIM floats a warp for int4, which rotates there; else none.

#include "warp.cuh"
#include "distance.cuh"

struct Encoding {
    const float* vectors;    // (q, DIM)
    unsigned char* queries;  // (q, QUERY_BYTES)
    int count;
};

constexpr int TAIL_BYTES = 12;  // of a row of codes: float scale, float norm, int sum of codes
constexpr int ELEMENTS = HAS_CODES ? ROW_BYTES - TAIL_BYTES : QUERY_BYTES / 4;
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

// --- int4: rotation.py and four_bits.py ---

constexpr int ROUNDS = 4;
constexpr float HALF_ROOT = 0x1.6a09e6p-1f;
constexpr int SUMS = 8;  // that squares are first added to

__device__ constexpr int largest_power() {
    int power = 1;
    while (2 * power <= DIM) power *= 2;
    return power;
}
constexpr int POWER = largest_power();

// -1 or 1, by the place alone (splitmix64).
__device__ __forceinline__ float sign_of(int place) {
    uint64 x = static_cast<uint64>(place + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x >> 63 ? -1.0f : 1.0f;
}

// Walsh-Hadamard transform of POWER values, in place: the sums of rotation.py, which moves them.
__device__ __forceinline__ void transform(float* values) {
    float factor = 1;
#pragma unroll 1
    for (int half = 1; half < POWER; half *= 2) {
        factor = __fmul_rn(factor, HALF_ROOT);
        const float last = 2 * half == POWER ? factor : 1.0f;
        for (int pair = lane_number(); pair < POWER / 2; pair += LANES) {
            const int i = 2 * (pair & -half) + (pair & (half - 1));
            const float a = values[i], b = values[i + half];
            values[i] = __fmul_rn(__fadd_rn(a, b), last);
            values[i + half] = __fmul_rn(__fsub_rn(a, b), last);
        }
        sync_warp();
    }
}

__device__ __forceinline__ void turn_pairs(float* values) {
    constexpr int FAR = DIM - DIM / 2;
    for (int j = lane_number(); j < DIM / 2; j += LANES) {
        const float a = values[j], b = values[FAR + j];
        values[j] = __fmul_rn(__fadd_rn(a, b), HALF_ROOT);
        values[FAR + j] = __fmul_rn(__fsub_rn(a, b), HALF_ROOT);
    }
    sync_warp();
}

// Each lane begins with the values that it wrote.
__device__ __forceinline__ void rotate(float* values) {
#pragma unroll 1
    for (int turn = 0; turn < ROUNDS; turn++) {
        for (int j = lane_number(); j < DIM; j += LANES)
            values[j] = __fmul_rn(values[j], sign_of(turn * DIM + j));
        sync_warp();
        transform(values + turn % 2 * (DIM - POWER));
        if (turn % 2 && POWER < DIM) turn_pairs(values);
    }
}

// The sum of squares as `_square` of four_bits.py adds it; the same bits in each lane.
__device__ __forceinline__ double squared_length_by_sums(const float* values) {
    double own = 0, squares = 0;
    for (int j = lane_number(); j < DIM && lane_number() < SUMS; j += SUMS) {
        const double value = values[j];
        own = __dadd_rn(own, __dmul_rn(value, value));
    }
#pragma unroll
    for (int lane = 0; lane < SUMS; lane++) squares = __dadd_rn(squares, from_lane(own, lane));
    return squares;
}

// `values`: room for DIM floats in shared memory.
__device__ __forceinline__ void encode_int4(const float* vector, unsigned char* query, float* values,
                                            double length, bool is_valid) {
    for (int j = lane_number(); j < DIM; j += LANES)
        values[j] = is_valid ? scaled(vector, j, length) : 0.0f;
    rotate(values);
    float largest = 0;
    for (int j = lane_number(); j < DIM; j += LANES) largest = fmaxf(largest, fabsf(values[j]));
    const float scale = __fdiv_rn(warp_max(largest), 127.0f), unit = scale > 0 ? scale : 1.0f;
    int sum = 0;
    for (int place = lane_number(); place < QUERY_BYTES - TAIL_BYTES; place += LANES) {
        const int j = place / ROW_BYTES * ELEMENTS + place % ROW_BYTES;
        int code = 0;  // of what meets a row's tail, or nothing
        if (place % ROW_BYTES < ELEMENTS && j < DIM)
            code = static_cast<int>(__fadd_rn(__fdiv_rn(values[j], unit), 127.5f)) - 127;
        sum += code;
        query[place] = static_cast<unsigned char>(code);
    }
    sum = team_sum<LANES>(sum);
    const double squares = squared_length_by_sums(values);
    if (lane_number() != 0) return;
    float* tail = reinterpret_cast<float*>(query + QUERY_BYTES - TAIL_BYTES);
    tail[0] = is_valid ? scale : not_a_number();
    tail[1] = static_cast<float>(squares);
    tail[2] = __int_as_float(15 * sum);
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
    if (DTYPE == INT4) {
        DYNAMIC_SHARED(float, memory);
        encode_int4(vector, query, memory + threadIdx.x / LANES * DIM, length, is_valid);
        return;
    }
    float* values = reinterpret_cast<float*>(query);
    for (int j = lane_number(); j < ELEMENTS; j += LANES)
        values[j] = is_valid ? scaled(vector, j, length) : not_a_number();
}
