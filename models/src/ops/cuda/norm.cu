// Group and layer normalisation over channels-last activations, statistics in f32.

#include "common.cuh"

__device__ inline float silu(float x) { return x / (1.f + expf(-x)); }

/// Sums over a block, in every thread; `scratch` is 64 floats.
__device__ inline float2 block_sum(float2 v, float *scratch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    v = make_float2(warp_sum(v.x), warp_sum(v.y));
    if (lane == 0) scratch[warp] = v.x, scratch[32 + warp] = v.y;
    __syncthreads();
    v.x = warp_sum(lane < warps ? scratch[lane] : 0.f);
    v.y = warp_sum(lane < warps ? scratch[32 + lane] : 0.f);
    return v;
}

/// A group's mean and 1 / standard deviation from sums of x - pivot and of its square. The pivot,
/// a value of the group, keeps the difference of the two means from cancelling.
__device__ inline float2 statistics(float2 sums, float count, float pivot, float eps) {
    float mean = sums.x / count;
    float variance = fmaxf(sums.y / count - mean * mean, 0.f);
    return make_float2(pivot + mean, rsqrtf(variance + eps));
}

/// Mirrored by `GroupNormArgs` in norm.rs. The channels are those of `in`, (batch, pixels, c1), and
/// behind them those of `in2`, (batch, pixels, channels - c1).
template <typename T> struct GroupNorm {
    T *out; // (batch, pixels, channels)
    const T *in, *in2;
    const float *weight, *bias; // (channels)
    float *partial;             // (batch, parts, groups, 2)
    int pixels, channels, c1, groups;
    int run, parts; // pixels of a part
    float eps;
    int silu;
};
static_assert(sizeof(GroupNorm<f16>) == 80, "as in norm.rs");

/// A channel of a sample: its first value and the distance to the next.
template <typename T> struct Channel {
    const T *first;
    int row;
    __device__ Channel(const GroupNorm<T> &p, int sample, int c) {
        bool left = c < p.c1;
        row = left ? p.c1 : p.channels - p.c1;
        first = (left ? p.in + c : p.in2 + c - p.c1) + (int64_t)sample * p.pixels * row;
    }
    __device__ float operator[](int pixel) const { return to_float(first[(int64_t)pixel * row]); }
};

/// One block a group of one sample: grid (groups, batch). For small images.
template <typename T> __device__ void group_norm_small(const GroupNorm<T> &p) {
    __shared__ float scratch[64];
    int width = p.channels / p.groups, first = blockIdx.x * width, sample = blockIdx.y;
    T *out = p.out + (int64_t)sample * p.pixels * p.channels + first;
    float pivot = Channel<T>(p, sample, first)[0];
    float2 sums = make_float2(0.f, 0.f);
    for (int i = threadIdx.x; i < p.pixels * width; i += blockDim.x) {
        float x = Channel<T>(p, sample, first + i % width)[i / width] - pivot;
        sums.x += x, sums.y += x * x;
    }
    float2 s = statistics(block_sum(sums, scratch), (float)p.pixels * width, pivot, p.eps);
    for (int i = threadIdx.x; i < p.pixels * width; i += blockDim.x) {
        int c = i % width;
        float x = Channel<T>(p, sample, first + c)[i / width];
        float y = (x - s.x) * s.y * p.weight[first + c] + p.bias[first + c];
        out[(int64_t)(i / width) * p.channels + c] = from_float<T>(p.silu ? silu(y) : y);
    }
}

/// Sums of a run of pixels for each group: grid (parts, batch). Threads are along the channels, so
/// that the reads of a pixel coalesce; where there are more threads than channels they take several
/// pixels at once. Shared memory holds two floats a thread or a channel, whichever are more.
template <typename T> __device__ void group_norm_sums(const GroupNorm<T> &p) {
    extern __shared__ float columns[];
    int width = p.channels / p.groups, sample = blockIdx.y;
    int begin = blockIdx.x * p.run, end = min(begin + p.run, p.pixels);
    int lanes = max((int)blockDim.x / p.channels, 1);
    for (int i = threadIdx.x; i < p.channels * lanes; i += blockDim.x) {
        int c = i % p.channels;
        Channel<T> in(p, sample, c);
        float pivot = Channel<T>(p, sample, c - c % width)[0];
        float2 sums = make_float2(0.f, 0.f);
        for (int pixel = begin + i / p.channels; pixel < end; pixel += lanes) {
            float x = in[pixel] - pivot;
            sums.x += x, sums.y += x * x;
        }
        columns[2 * i] = sums.x, columns[2 * i + 1] = sums.y;
    }
    __syncthreads();
    float *partial = p.partial + ((int64_t)sample * p.parts + blockIdx.x) * p.groups * 2;
    for (int i = threadIdx.x; i < p.groups * 2; i += blockDim.x) {
        float sum = 0.f;
        for (int lane = 0; lane < lanes; lane++)
            for (int c = 0; c < width; c++) sum += columns[2 * (lane * p.channels + i / 2 * width + c) + i % 2];
        partial[i] = sum;
    }
}

/// The second half: grid (parts, batch). The partial sums are added in their order.
template <typename T> __device__ void group_norm_apply(const GroupNorm<T> &p) {
    extern __shared__ float columns[]; // mean and 1 / deviation of each group
    int width = p.channels / p.groups, sample = blockIdx.y;
    int begin = blockIdx.x * p.run, end = min(begin + p.run, p.pixels);
    const float *partial = p.partial + (int64_t)sample * p.parts * p.groups * 2;
    for (int g = threadIdx.x; g < p.groups; g += blockDim.x) {
        float2 sums = make_float2(0.f, 0.f);
        for (int i = g; i < p.parts * p.groups; i += p.groups) sums.x += partial[2 * i], sums.y += partial[2 * i + 1];
        float2 s = statistics(sums, (float)p.pixels * width, Channel<T>(p, sample, g * width)[0], p.eps);
        columns[2 * g] = s.x, columns[2 * g + 1] = s.y;
    }
    __syncthreads();
    int lanes = max((int)blockDim.x / p.channels, 1);
    for (int i = threadIdx.x; i < p.channels * lanes; i += blockDim.x) {
        int c = i % p.channels;
        Channel<T> in(p, sample, c);
        T *out = p.out + (int64_t)sample * p.pixels * p.channels + c;
        float mean = columns[2 * (c / width)], scale = columns[2 * (c / width) + 1] * p.weight[c];
        for (int pixel = begin + i / p.channels; pixel < end; pixel += lanes) {
            float y = (in[pixel] - mean) * scale + p.bias[c];
            out[(int64_t)pixel * p.channels] = from_float<T>(p.silu ? silu(y) : y);
        }
    }
}

/// Mirrored by `LayerNormArgs` in norm.rs.
template <typename T> struct LayerNorm {
    T *out;      // (rows, width)
    const T *in; // (rows, width)
    const float *weight, *bias;
    int rows, width;
    float eps;
};
static_assert(sizeof(LayerNorm<f16>) == 48, "as in norm.rs");

/// One warp a row.
template <typename T> __device__ void layer_norm(const LayerNorm<T> &p) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    const T *in = p.in + (int64_t)row * p.width;
    T *out = p.out + (int64_t)row * p.width;
    float sum = 0.f, squares = 0.f;
    for (int c = lane; c < p.width; c += 32) sum += to_float(in[c]);
    float mean = warp_sum(sum) / p.width;
    for (int c = lane; c < p.width; c += 32) {
        float x = to_float(in[c]) - mean;
        squares += x * x;
    }
    float scale = rsqrtf(warp_sum(squares) / p.width + p.eps);
    for (int c = lane; c < p.width; c += 32)
        out[c] = from_float<T>((to_float(in[c]) - mean) * scale * p.weight[c] + p.bias[c]);
}

#define KERNELS(T)                                                                                         \
    extern "C" __global__ void group_norm_small_##T(const GroupNorm<T> p) { group_norm_small(p); }         \
    extern "C" __global__ void group_norm_sums_##T(const GroupNorm<T> p) { group_norm_sums(p); }           \
    extern "C" __global__ void group_norm_apply_##T(const GroupNorm<T> p) { group_norm_apply(p); }         \
    extern "C" __global__ void layer_norm_##T(const LayerNorm<T> p) { layer_norm(p); }

using f32 = float;
KERNELS(f32)
KERNELS(f16)
#if __CUDA_ARCH__ >= 800
KERNELS(bf16)
#endif
