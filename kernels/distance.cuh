// Distances (R1) of one encoded query to encoded rows; the twin of distance.py and vectors.py.
//
// A team of TEAM lanes shares a row: member t takes its 16-byte chunks t, t + TEAM, ... The order of
// summation follows from ROW_BYTES, DTYPE and METRIC alone (R11), and no multiplication and addition
// is fused unless it says so. A lane asks for AT_ONCE chunks before it computes with the first.

#include "warp.cuh"
#include <cuda_fp16.h>

constexpr int L2 = 0, IP = 1;
constexpr int FP16 = 1, INT8 = 2, INT4 = 3;
constexpr bool HAS_CODES = DTYPE == INT8 || DTYPE == INT4;
constexpr float ORTHOGONAL = METRIC == IP ? 0.0f : 1.0f;  // distance where the dot product is 0

constexpr int CHUNKS = ROW_BYTES / 16;
constexpr int TEAM = CHUNKS <= 16 ? 4 : CHUNKS <= 32 ? 8 : CHUNKS <= 64 ? 16 : 32;
constexpr int TEAMS = LANES / TEAM;                           // in a warp
constexpr int PER_LANE = (CHUNKS + TEAM - 1) / TEAM;          // chunks of a row
constexpr int AT_ONCE = PER_LANE < 8 ? PER_LANE : 8;          // of those
constexpr int ROWS_AT_ONCE = 8 / AT_ONCE < TEAM ? 8 / AT_ONCE : TEAM;  // of one team
constexpr int QUERY_CHUNKS = DTYPE == FP16 || DTYPE == INT4 ? 2 : 1;  // that meet one chunk of a row
constexpr int QUERY_BYTES = QUERY_CHUNKS * ROW_BYTES + (HAS_CODES ? 32 : 0);
constexpr bool IS_QUERY_HELD = PER_LANE * QUERY_CHUNKS <= 12; // in registers; else read again
constexpr int HELD_CHUNKS = IS_QUERY_HELD ? PER_LANE * QUERY_CHUNKS : 0;

__device__ __forceinline__ uint4 load_chunk(const unsigned char* bytes) {
    return __ldg(reinterpret_cast<const uint4*>(bytes));
}

__device__ __forceinline__ uint4 no_chunk() { return make_uint4(0, 0, 0, 0); }

// A lane's part of one query.
struct Query {
    const unsigned char* bytes;  // (QUERY_BYTES,)
    uint4 held[IS_QUERY_HELD ? HELD_CHUNKS : 1];
    float scale, norm;           // of codes
    int offset;                  // int4: what twice the dot product of codes is too large by

    __device__ __forceinline__ uint4 load(int i, int half) const {
        const int chunk = i * TEAM + lane_number() % TEAM;
        if (chunk >= CHUNKS) return no_chunk();
        const int place = DTYPE == INT4 ? half * CHUNKS + chunk : chunk * QUERY_CHUNKS + half;
        uint4 part = load_chunk(bytes + place * 16);
        if (DTYPE == INT8) {  // codes are kept with offset 128; what meets a row's tail is nothing
            part.x ^= 0x80808080u;
            part.y ^= 0x80808080u;
            part.z ^= 0x80808080u;
            part.w ^= 0x80808080u;
            if (chunk == CHUNKS - 1) part.y = part.z = part.w = 0;
        }
        return part;
    }

    __device__ __forceinline__ uint4 chunk(int i, int half) const {
        return IS_QUERY_HELD ? held[i * QUERY_CHUNKS + half] : load(i, half);
    }
};

__device__ __forceinline__ Query load_query(const unsigned char* queries, int q) {
    Query query;
    query.bytes = queries + static_cast<long long>(q) * QUERY_BYTES;
    if (IS_QUERY_HELD) {
#pragma unroll
        for (int i = 0; i < HELD_CHUNKS; i++)
            query.held[i] = query.load(i / QUERY_CHUNKS, i % QUERY_CHUNKS);
    }
    if (HAS_CODES) {
        const uint4 tail = load_chunk(query.bytes + QUERY_BYTES - 16);
        query.scale = __uint_as_float(tail.y);
        query.norm = __uint_as_float(tail.z);
        query.offset = static_cast<int>(tail.w);
    }
    return query;
}

// Four sums of a float distance, or the sum of codes' products and the row's tail.
struct Sums {
    float x, y, z, w;
    int codes;
    float scale, norm;
};

__device__ __forceinline__ float accumulate(float query, float row, float sum) {
    if (METRIC != L2) return fmaf(query, row, sum);
    const float difference = __fsub_rn(query, row);
    return fmaf(difference, difference, sum);
}

__device__ __forceinline__ void accumulate4(Sums& sums, uint4 query, float4 row) {
    sums.x = accumulate(__uint_as_float(query.x), row.x, sums.x);
    sums.y = accumulate(__uint_as_float(query.y), row.y, sums.y);
    sums.z = accumulate(__uint_as_float(query.z), row.z, sums.z);
    sums.w = accumulate(__uint_as_float(query.w), row.w, sums.w);
}

__device__ __forceinline__ float4 floats_of_halves(uint32 low, uint32 high) {
    const float2 first = __half22float2(*reinterpret_cast<const __half2*>(&low));
    const float2 second = __half22float2(*reinterpret_cast<const __half2*>(&high));
    return make_float4(first.x, first.y, second.x, second.y);
}

// The sum and the products of 16 codes each, of a query and as they are stored.
__device__ __forceinline__ int add_products(int sum, uint4 query, uint4 row) {
    sum = __dp4a(static_cast<int>(query.x), static_cast<int>(row.x), sum);
    sum = __dp4a(static_cast<int>(query.y), static_cast<int>(row.y), sum);
    sum = __dp4a(static_cast<int>(query.z), static_cast<int>(row.z), sum);
    return __dp4a(static_cast<int>(query.w), static_cast<int>(row.w), sum);
}

// The low four bits of each byte from a bit on.
__device__ __forceinline__ uint4 nibbles(uint4 row, int from) {
    constexpr uint32 LOW = 0x0f0f0f0fu;
    return make_uint4(row.x >> from & LOW, row.y >> from & LOW, row.z >> from & LOW,
                      row.w >> from & LOW);
}

// One chunk of a row; `i` counts the lane's chunks.
__device__ __forceinline__ void add_chunk(Sums& sums, const Query& query, int i, uint4 row) {
    if (HAS_CODES) {
        if (DTYPE == INT4) {
            sums.codes = add_products(sums.codes, query.chunk(i, 0), nibbles(row, 0));
            sums.codes = add_products(sums.codes, query.chunk(i, 1), nibbles(row, 4));
        } else {
            sums.codes = add_products(sums.codes, query.chunk(i, 0), row);
        }
        if (i == PER_LANE - 1) {  // for the member that holds the last chunk: its tail
            sums.scale = __uint_as_float(row.y);
            sums.norm = __uint_as_float(row.z);
        }
    } else if (DTYPE == FP16) {
        accumulate4(sums, query.chunk(i, 0), floats_of_halves(row.x, row.y));
        accumulate4(sums, query.chunk(i, 1), floats_of_halves(row.z, row.w));
    } else {
        const float4 values = make_float4(__uint_as_float(row.x), __uint_as_float(row.y),
                                          __uint_as_float(row.z), __uint_as_float(row.w));
        accumulate4(sums, query.chunk(i, 0), values);
    }
}

constexpr int SHARE = TEAM / ROWS_AT_ONCE;  // lanes of a team that get the distance of the same row

// Which of its team's rows a lane gets the distance of, and whether it is the first to get it.
__device__ __forceinline__ int own_row() { return lane_number() % TEAM / SHARE; }
__device__ __forceinline__ bool is_first_of_row() { return lane_number() % SHARE == 0; }

// The distance of a lane's own row, from the sums of all rows; the same bits in each of its lanes.
__device__ __forceinline__ float finish(const Sums (&sums)[ROWS_AT_ONCE], const Query& query) {
    if (!HAS_CODES) {
        float parts[ROWS_AT_ONCE];
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++)
            parts[r] = __fadd_rn(__fadd_rn(sums[r].x, sums[r].y), __fadd_rn(sums[r].z, sums[r].w));
        const float sum = own_team_sum<TEAM>(parts);
        return METRIC == L2 ? sum : __fsub_rn(ORTHOGONAL, sum);
    }
    constexpr int LAST = (CHUNKS - 1) % TEAM;
    int parts[ROWS_AT_ONCE];
    float row_scale = 0, row_norm = 0;
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        parts[r] = sums[r].codes;
        const float scale = from_member<TEAM>(sums[r].scale, LAST);
        const float norm = from_member<TEAM>(sums[r].norm, LAST);
        if (r == own_row()) row_scale = scale, row_norm = norm;
    }
    const int sum = own_team_sum<TEAM>(parts);
    const float scale = __fmul_rn(query.scale, row_scale);
    const float norms = __fadd_rn(query.norm, row_norm);
    if (DTYPE == INT4) {
        const float codes = static_cast<float>(2 * sum - query.offset);
        return METRIC == L2 ? fmaf(-2.0f * scale, codes, norms) : fmaf(-scale, codes, ORTHOGONAL);
    }
    const float dot = __fmul_rn(scale, static_cast<float>(sum));
    if (METRIC != L2) return __fsub_rn(ORTHOGONAL, dot);
    const float distance = __fsub_rn(norms, __fmul_rn(2.0f, dot));
    return distance < 0 ? 0 : distance;  // NaN stays
}

// Distances to ROWS_AT_ONCE rows a team: each lane returns that of nodes[own_row()]. `nodes` is the same
// in all lanes of a team; where it is negative, the query is read in place of a row, so that no load
// needs a condition, and the distance means nothing. All lanes of the warp call together.
__device__ __forceinline__ float compute_distances(const unsigned char* rows, const Query& query,
                                                   const int (&nodes)[ROWS_AT_ONCE]) {
    const int member = lane_number() % TEAM;
    Sums sums[ROWS_AT_ONCE] = {};
    const unsigned char* own_parts[ROWS_AT_ONCE];  // where the member's first chunk of a row is
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        const unsigned char* row = rows + static_cast<long long>(nodes[r]) * ROW_BYTES;
        own_parts[r] = (nodes[r] >= 0 ? row : query.bytes) + member * 16;
    }
#pragma unroll(IS_QUERY_HELD ? PER_LANE : 1)  // the held query takes constant places only
    for (int begin = 0; begin < PER_LANE; begin += AT_ONCE) {
        uint4 parts[ROWS_AT_ONCE][AT_ONCE];
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++)
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int first = (begin + i) * TEAM;  // member 0's chunk
                const bool is_there = first + TEAM <= CHUNKS || first + member < CHUNKS;
                parts[r][i] = is_there ? load_chunk(own_parts[r] + first * 16) : no_chunk();
            }
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++)
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (begin + i < PER_LANE) add_chunk(sums[r], query, begin + i, parts[r][i]);
    }
    return finish(sums, query);
}
