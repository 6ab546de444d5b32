// Linear combinations of latents and guidance, all f32. Every operation is rounded by itself, as on
// the CPU, and none is contracted into another.

#include <stdint.h>

constexpr int TERMS = 4;

/// Mirrored by `CombineArgs` in combine.rs.
struct Combine {
    float *out;
    const float *in[TERMS];
    float factor[TERMS];
    int terms, count;
};
static_assert(sizeof(Combine) == 64, "as in combine.rs");

/// The sum of factor * input.
extern "C" __global__ void linear_combination_f32(const Combine p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    float sum = __fmul_rn(p.in[0][i], p.factor[0]);
#pragma unroll
    for (int t = 1; t < TERMS; t++)
        if (t < p.terms) sum = __fadd_rn(sum, __fmul_rn(p.in[t][i], p.factor[t]));
    p.out[i] = sum;
}

/// Guidance: a + t (b - a).
extern "C" __global__ void lerp_f32(const Combine p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    float a = p.in[0][i];
    p.out[i] = __fadd_rn(a, __fmul_rn(__fsub_rn(p.in[1][i], a), p.factor[1]));
}
