// Softmax(Q K^T) V on the tensor cores; no score ever reaches global memory (Milakov and
// Gimelshein 2018; Dao et al. 2022).

#include "common.cuh"

/// Mirrored by `AttentionArgs` in attention.rs. Rows may be strided; strides are in values.
template <typename T> struct Attention {
    const T *q, *k, *v;
    T *out; // (batch, queries, heads * width), dense
    int64_t q_sample, k_sample, v_sample;
    int q_row, k_row, v_row;
    int heads, width, queries, keys;
    float scale; // 1 / sqrt(width), times log2(e)
    int causal;
};
static_assert(sizeof(Attention<f16>) == 96, "as in attention.rs");

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

/// The pair of values at `from`, or zeros.
template <typename T> __device__ inline uint32_t pair(const T *from, bool inside) {
    return inside ? *(const uint32_t *)from : 0;
}

/// A block takes 64 queries of one head, a warp 16 of them: grid (queries, heads, batch). WIDTH is
/// the head's width rounded up to 16; the rest is zeros.
template <typename T, int WIDTH> __device__ void attention(const Attention<T> &p) {
    constexpr int KEYS = WIDTH > 80 ? 32 : 64, THREADS = 128, STAGES = 2;
    constexpr int ROW = WIDTH + 8; // an odd number of 16 bytes: eight rows meet all banks
    constexpr int CHUNKS = WIDTH / 8;
    __shared__ __align__(16) T tiles[STAGES][2][KEYS * ROW];

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair_of = lane % 4 * 2;
    int head = blockIdx.y * p.width;
    int first_query = blockIdx.x * 64 + warp * 16;
    const T *k = p.k + blockIdx.z * p.k_sample + head, *v = p.v + blockIdx.z * p.v_sample + head;

    uint32_t q[WIDTH / 16][4];
    {
        const T *from = p.q + blockIdx.z * p.q_sample + head;
#pragma unroll
        for (int s = 0; s < WIDTH / 16; s++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = first_query + quad + e % 2 * 8, c = s * 16 + e / 2 * 8 + pair_of;
                q[s][e] = pair(from + (int64_t)row * p.q_row + c, row < p.queries && c < p.width);
            }
    }

    auto load = [&](int block) {
        T *tile = tiles[block % STAGES][0];
#pragma unroll 1
        for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
            int row = i / CHUNKS, c = i % CHUNKS * 8, key = block * KEYS + row;
            bool inside = key < p.keys && c < p.width;
            int at = row * ROW + c;
            copy16(tile + at, inside ? k + (int64_t)key * p.k_row + c : k, inside);
            copy16(tile + KEYS * ROW + at, inside ? v + (int64_t)key * p.v_row + c : v, inside);
        }
        commit_copies();
    };

    float out[WIDTH / 8][4] = {};
    float max[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
    int last = p.causal ? min(p.keys, blockIdx.x * 64 + 64) : p.keys;
    int blocks = (last + KEYS - 1) / KEYS;
    load(0);
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        wait_copies<0>();
        __syncthreads(); // this tile has been loaded, and the one before it has been used
        if (block + 1 < blocks) load(block + 1);
        const T *tile = tiles[block % STAGES][0];

        float score[KEYS / 8][4] = {};
#pragma unroll
        for (int s = 0; s < WIDTH / 16; s++)
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                uint32_t b[4];
                load_matrices(b, tile + (j * 16 + lane % 8 + lane / 16 * 8) * ROW + s * 16 + lane / 8 % 2 * 8);
                multiply<T>(score[2 * j], q[s], b[0], b[1]);
                multiply<T>(score[2 * j + 1], q[s], b[2], b[3]);
            }

        float peak[2] = {max[0], max[1]};
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = block * KEYS + j * 8 + pair_of + e % 2;
                bool hidden = key >= p.keys || (p.causal && key > first_query + quad + e / 2 * 8);
                score[j][e] = hidden ? -INFINITY : score[j][e] * p.scale;
                peak[e / 2] = fmaxf(peak[e / 2], score[j][e]);
            }
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // The first key is never masked, so the maximum is finite from the first block on.
            peak[r] = quad_max(peak[r]);
            factor[r] = exp2f(max[r] - peak[r]);
            max[r] = peak[r];
            total[r] *= factor[r];
        }
#pragma unroll
        for (int d = 0; d < WIDTH / 8; d++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[d][e] *= factor[e / 2];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                score[j][e] = exp2f(score[j][e] - max[e / 2]);
                total[e / 2] += score[j][e];
            }

#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            // The scores of two tiles are in the layout of the left operand.
            const float *low = score[2 * j], *high = score[2 * j + 1];
            uint32_t a[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                             pack<T>(high[2], high[3])};
#pragma unroll
            for (int d = 0; d < WIDTH / 16; d++) {
                uint32_t b[4];
                load_transposed(b, tile + KEYS * ROW + (j * 16 + lane % 16) * ROW + d * 16 + lane / 16 * 8);
                multiply<T>(out[2 * d], a, b[0], b[1]);
                multiply<T>(out[2 * d + 1], a, b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = first_query + quad + r * 8;
        float inverse = 1.f / quad_sum(total[r]);
        if (row >= p.queries) continue;
        T *to = p.out + ((int64_t)blockIdx.z * p.queries + row) * p.heads * p.width + head;
#pragma unroll
        for (int d = 0; d < WIDTH / 8; d++) {
            int c = d * 8 + pair_of;
            if (c < p.width) *(uint32_t *)(to + c) = pack<T>(out[d][2 * r] * inverse, out[d][2 * r + 1] * inverse);
        }
    }
}

/// Heads too wide for one warp's registers: a block of 8 warps takes 32 queries, each warp the
/// scores of 8 keys and then an eighth of the channels. grid (queries, heads, batch); WIDTH is the
/// head's width. Shared memory: queries, probabilities, each warp's values, maxima.
template <typename T, int WIDTH> __device__ void attention_wide(const Attention<T> &p) {
    constexpr int QUERIES = 32, KEYS = 64, OWN = WIDTH / 8;
    constexpr int Q_ROW = WIDTH + 8, P_ROW = KEYS + 8, V_ROW = OWN + 8;
    extern __shared__ __align__(16) unsigned char memory[];
    T *q = (T *)memory;                    // (QUERIES, Q_ROW)
    T *probability = q + QUERIES * Q_ROW;  // (QUERIES, P_ROW)
    T *values = probability + QUERIES * P_ROW + threadIdx.x / 32 * 16 * V_ROW; // (16, V_ROW) of this warp
    float *peaks = (float *)(probability + QUERIES * P_ROW + 8 * 16 * V_ROW); // (8, QUERIES)

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair_of = lane % 4 * 2;
    int head = blockIdx.y * WIDTH, first_query = blockIdx.x * QUERIES;
    const T *k = p.k + blockIdx.z * p.k_sample + head, *v = p.v + blockIdx.z * p.v_sample + head;
    const T *from = p.q + blockIdx.z * p.q_sample + head;
    for (int i = threadIdx.x; i < QUERIES * WIDTH / 8; i += 256) {
        int row = i / (WIDTH / 8), c = i % (WIDTH / 8) * 8;
        bool inside = first_query + row < p.queries;
        copy16(q + row * Q_ROW + c, inside ? from + (int64_t)(first_query + row) * p.q_row + c : from, inside);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();

    float out[2][OWN / 8][4] = {};
    float max[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, total[4] = {}; // rows quad + 8 r
#pragma unroll 1
    for (int first_key = 0; first_key < p.keys; first_key += KEYS) {
        // Scores of this warp's 8 keys. The order of K is free: a lane takes 8 consecutive values of
        // both operands, so that 32 values are two multiply().
        int own = first_key + warp * 8;
        const T *key = k + (int64_t)(own + quad) * p.k_row;
        bool inside = own + quad < p.keys;
        float score[2][4] = {};
#pragma unroll 4
        for (int c = lane % 4 * 8; c < WIDTH; c += 32) {
            uint4 b = inside ? *(const uint4 *)(key + c) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 low = *(const uint4 *)(q + (half * 16 + quad) * Q_ROW + c);
                uint4 high = *(const uint4 *)(q + (half * 16 + quad + 8) * Q_ROW + c);
                uint32_t a0[4] = {low.x, high.x, low.y, high.y}, a1[4] = {low.z, high.z, low.w, high.w};
                multiply<T>(score[half], a0, b.x, b.y);
                multiply<T>(score[half], a1, b.z, b.w);
            }
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float peak = -INFINITY;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &s = score[r / 2][r % 2 * 2 + e];
                s = own + pair_of + e < p.keys ? s * p.scale : -INFINITY;
                peak = fmaxf(peak, s);
            }
            peak = quad_max(peak);
            if (lane % 4 == 0) peaks[warp * QUERIES + quad + 8 * r] = peak;
        }
        __syncthreads(); // every warp's maxima are there, and the last probabilities were used
        float factor[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float peak = max[r];
            for (int w = 0; w < 8; w++) peak = fmaxf(peak, peaks[w * QUERIES + quad + 8 * r]);
            factor[r] = exp2f(max[r] - peak);
            max[r] = peak;
            float low = exp2f(score[r / 2][r % 2 * 2] - peak), high = exp2f(score[r / 2][r % 2 * 2 + 1] - peak);
            total[r] = total[r] * factor[r] + low + high;
            *(uint32_t *)(probability + (quad + 8 * r) * P_ROW + warp * 8 + pair_of) = pack<T>(low, high);
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int d = 0; d < OWN / 8; d++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[half][d][e] *= factor[half * 2 + e / 2];
        __syncthreads(); // every probability is there, and the maxima were read
#pragma unroll 1
        for (int j = 0; j < KEYS / 16; j++) {
            for (int i = lane; i < 16 * OWN / 8; i += 32) {
                int row = i / (OWN / 8), c = i % (OWN / 8) * 8, at = first_key + j * 16 + row;
                bool in = at < p.keys;
                copy16(values + row * V_ROW + c, in ? v + (int64_t)at * p.v_row + warp * OWN + c : v, in);
            }
            commit_copies();
            wait_copies<0>();
            __syncwarp();
            uint32_t a[2][4];
            load_matrices(a[0], probability + lane % 16 * P_ROW + j * 16 + lane / 16 * 8);
            load_matrices(a[1], probability + (16 + lane % 16) * P_ROW + j * 16 + lane / 16 * 8);
#pragma unroll
            for (int d = 0; d < OWN / 16; d++) {
                uint32_t b[4];
                load_transposed(b, values + lane % 16 * V_ROW + d * 16 + lane / 16 * 8);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    multiply<T>(out[half][2 * d], a[half], b[0], b[1]);
                    multiply<T>(out[half][2 * d + 1], a[half], b[2], b[3]);
                }
            }
            __syncwarp();
        }
    }

    // Each warp has the sums over its own keys.
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; r++) {
        total[r] = quad_sum(total[r]);
        if (lane % 4 == 0) peaks[warp * QUERIES + quad + 8 * r] = total[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; r++) {
        float sum = 0.f;
        for (int w = 0; w < 8; w++) sum += peaks[w * QUERIES + quad + 8 * r];
        int row = first_query + quad + 8 * r;
        if (row >= p.queries) continue;
        T *to = p.out + ((int64_t)blockIdx.z * p.queries + row) * p.heads * WIDTH + head + warp * OWN + pair_of;
#pragma unroll
        for (int d = 0; d < OWN / 8; d++) {
            const float *o = out[r / 2][d] + r % 2 * 2;
            *(uint32_t *)(to + d * 8) = pack<T>(o[0] / sum, o[1] / sum);
        }
    }
}

#define KERNEL(T, WIDTH)                                                                                      \
    extern "C" __global__ void __launch_bounds__(128) attention_##WIDTH##_##T(const Attention<T> p) {         \
        attention<T, WIDTH>(p);                                                                               \
    }
#define KERNELS(T)                                                                                            \
    KERNEL(T, 16)                                                                                             \
    KERNEL(T, 32)                                                                                             \
    KERNEL(T, 48)                                                                                             \
    KERNEL(T, 64)                                                                                             \
    KERNEL(T, 80)                                                                                             \
    KERNEL(T, 128)                                                                                            \
    KERNEL(T, 160)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) attention_512_##T(const Attention<T> p) {               \
        attention_wide<T, 512>(p);                                                                            \
    }

KERNELS(f16)
#if __CUDA_ARCH__ >= 800
KERNELS(bf16)
#endif
