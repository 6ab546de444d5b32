// Between the order of latents, (batch, channels, pixels) f32, and that of activations, (batch,
// pixels, channels) in the network's type.

#include "common.cuh"

/// Mirrored by `LayoutArgs` in layout.rs.
struct Layout {
    void *out;
    const void *in;
    int pixels, channels, count; // count = batch * pixels * channels
};
static_assert(sizeof(Layout) == 32, "as in layout.rs");

/// A thread takes an element of the channels-last side.
template <typename T, bool LAST> __device__ void turn(const Layout &p) {
    int last = blockIdx.x * blockDim.x + threadIdx.x;
    if (last >= p.count) return;
    int c = last % p.channels, pixel = last / p.channels % p.pixels, sample = last / p.channels / p.pixels;
    int first = (sample * p.channels + c) * p.pixels + pixel;
    if (LAST)
        ((T *)p.out)[last] = from_float<T>(((const float *)p.in)[first]);
    else
        ((float *)p.out)[first] = to_float(((const T *)p.in)[last]);
}

#define KERNELS(T)                                                                                 \
    extern "C" __global__ void channels_last_##T(const Layout p) { turn<T, true>(p); }             \
    extern "C" __global__ void channels_first_##T(const Layout p) { turn<T, false>(p); }

using f32 = float;
KERNELS(f32)
KERNELS(f16)
#if __CUDA_ARCH__ >= 800
KERNELS(bf16)
#endif
