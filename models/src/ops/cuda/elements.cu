// Conversions between types, sums and the embeddings of tokens: what a picture needs a few times,
// here so that the driver need not compile any of candle's kernels.

#include "common.cuh"

/// Mirrored by `ConvertArgs` in elements.rs.
struct Convert {
    void *out;
    const void *in;
    int count, unused;
};
static_assert(sizeof(Convert) == 24, "as in elements.rs");

/// A thread takes an element.
template <typename FROM, typename TO> __device__ void convert(const Convert &p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.count) ((TO *)p.out)[i] = from_float<TO>(to_float(((const FROM *)p.in)[i]));
}

/// Mirrored by `ScaledSumArgs` in elements.rs.
struct ScaledSum {
    void *out;
    const void *a, *b; // b is null if there is none
    float factor;      // of a
    int count, silu, unused;
};
static_assert(sizeof(ScaledSum) == 40, "as in elements.rs");

/// A thread takes an element.
template <typename T> __device__ void scaled_sum(const ScaledSum &p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    float v = __fmul_rn(to_float(((const T *)p.a)[i]), p.factor);
    if (p.b) v = __fadd_rn(v, to_float(((const T *)p.b)[i]));
    if (p.silu) v = v / (1.0f + expf(-v));
    ((T *)p.out)[i] = from_float<T>(v);
}

/// Mirrored by `EmbedArgs` in elements.rs.
struct Embed {
    void *out;             // (rows, width)
    const void *table;     // (vocabulary, width)
    const void *positions; // (length, width)
    const uint32_t *ids;   // (rows), where length divides rows
    int width, length, count;
};
static_assert(sizeof(Embed) == 48, "as in elements.rs");

/// The embedding of a row's token and that of its place. A thread takes an element.
template <typename T> __device__ void embed(const Embed &p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    int row = i / p.width, c = i % p.width;
    float token = to_float(((const T *)p.table)[(int64_t)p.ids[row] * p.width + c]);
    float place = to_float(((const T *)p.positions)[(int64_t)(row % p.length) * p.width + c]);
    ((T *)p.out)[i] = from_float<T>(token + place);
}

using f32 = float;
#define CONVERT(FROM, TO) \
    extern "C" __global__ void convert_##FROM##_##TO(const Convert p) { convert<FROM, TO>(p); }
#define KERNELS(T)                                                                        \
    extern "C" __global__ void scaled_sum_##T(const ScaledSum p) { scaled_sum<T>(p); }    \
    extern "C" __global__ void embed_##T(const Embed p) { embed<T>(p); }

CONVERT(f32, f16)
CONVERT(f16, f32)
KERNELS(f32)
KERNELS(f16)
#if __CUDA_ARCH__ >= 800
CONVERT(f32, bf16)
CONVERT(bf16, f32)
KERNELS(bf16)
#endif
