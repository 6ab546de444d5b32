// Convolutions and linear layers as one GEMM on the tensor cores (implicit im2col).
//
// A row of the left matrix is a receptive field, gathered from one or two channels-last images
// while it is copied into shared memory: padding, stride, nearest-neighbour resizing and the
// concatenation of skips exist only as addresses. A linear layer is the 1x1 convolution of one long
// row. The epilogue (bias, shift, activation or GEGLU, residual) is computed in registers.

#include "common.cuh"

enum Activation { NONE, SILU, GELU, QUICK_GELU, LEAKY_RELU, GEGLU };

/// Mirrored by `ProductArgs` in product.rs.
template <typename T> struct Product {
    const T *a, *a2;       // (batch, h, w, c1) and (batch, h, w, c - c1)
    const T *weight;       // (n, row), row = taps * c rounded up to 8 and filled with zeros
    const float *bias;     // (n) or null
    const T *shift;        // (batch, n), rows `shift_row` apart, or null: added at every pixel
    const T *residual;     // like out, or null
    T *out;                // (m, n), or (m, n / 2) after GEGLU
    int m, n, row;         // m = batch * out_h * out_w
    int h, w, c, c1;       // the images in memory
    int sized_h, sized_w;  // the resized image, which the kernel moves over
    int out_h, out_w;
    int kernel, stride, before;
    int shift_row;
    int activation;
};
static_assert(sizeof(Product<f16>) == 120, "as in product.rs");

constexpr int DEPTH = 32; // K of a tile, in values: four chunks of 16 bytes

/// The place of a chunk in a tile: swizzled, so that eight rows use all banks.
__device__ inline int place(int row, int chunk) { return row * DEPTH + ((chunk ^ (row >> 1 & 3)) << 3); }

// Not inlined: the unrolled epilogue calls them a hundred times.
__device__ __noinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }

__device__ __noinline__ float activate(float x, int activation) {
    switch (activation) {
    case SILU: return x / (1.f + expf(-x));
    case GELU: return gelu(x);
    case QUICK_GELU: return x / (1.f + expf(-1.702f * x));
    case LEAKY_RELU: return fmaxf(x, 0.2f * x);
    default: return x;
    }
}

/// A block computes ROWS x COLUMNS in warps of 32 x 32 or 64 x 32: grid (columns x rows). WHOLE says
/// that c and c1 are multiples of 8, so that a chunk never crosses a tap.
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, bool WHOLE>
__device__ void product(const Product<T> &p) {
    constexpr int WARP_COLUMNS = 32, STAGES = 3;
    constexpr int WARPS_ACROSS = COLUMNS / WARP_COLUMNS;
    constexpr int THREADS = ROWS / WARP_ROWS * WARPS_ACROSS * 32;
    constexpr int A_CHUNKS = ROWS * 4 / THREADS, B_CHUNKS = COLUMNS * 4 / THREADS;
    __shared__ __align__(16) T tiles[STAGES][(ROWS + COLUMNS) * DEPTH];

    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int across = (p.n + COLUMNS - 1) / COLUMNS;
    int first_row = blockIdx.x / across * ROWS, first_column = blockIdx.x % across * COLUMNS;
    int chunk = thread % 4; // the same for every row that this thread copies
    int pixels = p.out_h * p.out_w;

    // The top left of the receptive fields that this thread gathers.
    int top[A_CHUNKS], left[A_CHUNKS];
    int64_t sample[A_CHUNKS];
#pragma unroll
    for (int i = 0; i < A_CHUNKS; i++) {
        int m = first_row + (thread + i * THREADS) / 4, at = m % pixels;
        top[i] = m < p.m ? at / p.out_w * p.stride - p.before : -(1 << 28);
        left[i] = at % p.out_w * p.stride - p.before;
        sample[i] = (int64_t)(m / pixels) * p.h * p.w;
    }
    bool resized = p.sized_h != p.h || p.sized_w != p.w;
    // The index of a pixel of the resized image, or -1 in the padding.
    auto pixel = [&](int i, int tap_y, int tap_x) -> int64_t {
        int y = top[i] + tap_y, x = left[i] + tap_x;
        if ((unsigned)y >= (unsigned)p.sized_h || (unsigned)x >= (unsigned)p.sized_w) return -1;
        if (resized) y = y * p.h / p.sized_h, x = x * p.w / p.sized_w;
        return sample[i] + y * p.w + x;
    };
    auto channel = [&](int64_t at, int c) {
        return c < p.c1 ? p.a + at * p.c1 + c : p.a2 + at * (p.c - p.c1) + (c - p.c1);
    };

    // Tap and channel of this thread's next chunk: loads follow K in order.
    int c = chunk * 8, tap_y = 0, tap_x = 0, next = chunk * 8;
    auto load = [&](T *tile) {
        if (WHOLE) {
            while (c >= p.c) {
                c -= p.c;
                if (++tap_x == p.kernel) tap_x = 0, tap_y++;
            }
        }
#pragma unroll
        for (int i = 0; i < A_CHUNKS; i++) {
            T *to = tile + place((thread + i * THREADS) / 4, chunk);
            if (WHOLE) {
                int64_t at = next < p.row ? pixel(i, tap_y, tap_x) : -1;
                copy16(to, at < 0 ? p.a : channel(at, c), at >= 0);
            } else {
#pragma unroll 1
                for (int j = 0; j < 8; j++) {
                    int k = next + j, tap = k / p.c;
                    int64_t at = tap < p.kernel * p.kernel ? pixel(i, tap / p.kernel, tap % p.kernel) : -1;
                    to[j] = at < 0 ? from_float<T>(0.f) : *channel(at, k % p.c);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < B_CHUNKS; i++) {
            int row = (thread + i * THREADS) / 4, n = first_column + row;
            bool inside = n < p.n && next < p.row;
            copy16(tile + ROWS * DEPTH + place(row, chunk), inside ? p.weight + (int64_t)n * p.row + next : p.weight,
                   inside);
        }
        next += DEPTH, c += DEPTH;
    };

    constexpr int TILES_DOWN = WARP_ROWS / 16, TILES_ACROSS = WARP_COLUMNS / 8;
    int warp_row = warp / WARPS_ACROSS * WARP_ROWS, warp_column = warp % WARPS_ACROSS * WARP_COLUMNS;
    float sum[TILES_DOWN][TILES_ACROSS][4] = {};
    auto compute = [&](const T *tile) {
#pragma unroll
        for (int half = 0; half < DEPTH / 16; half++) {
            uint32_t a[TILES_DOWN][4], b[TILES_ACROSS / 2][4];
#pragma unroll
            for (int i = 0; i < TILES_DOWN; i++)
                load_matrices(a[i], tile + place(warp_row + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < TILES_ACROSS / 2; j++) {
                int row = warp_column + j * 16 + lane % 8 + lane / 16 * 8;
                load_matrices(b[j], tile + ROWS * DEPTH + place(row, half * 2 + lane / 8 % 2));
            }
#pragma unroll
            for (int i = 0; i < TILES_DOWN; i++)
#pragma unroll
                for (int j = 0; j < TILES_ACROSS; j++)
                    multiply<T>(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    };

    int steps = (p.row + DEPTH - 1) / DEPTH;
#pragma unroll 1
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < steps) load(tiles[stage]);
        commit_copies();
    }
    for (int step = 0; step < steps; step++) {
        wait_copies<STAGES - 2>();
        __syncthreads(); // this tile has been loaded, and the one before it has been used
        if (step + STAGES - 1 < steps) load(tiles[(step + STAGES - 1) % STAGES]);
        commit_copies();
        compute(tiles[step % STAGES]);
    }

#pragma unroll
    for (int i = 0; i < TILES_DOWN * 2; i++) {
        int m = first_row + warp_row + i * 8 + lane / 4;
        if (m >= p.m) continue;
        const T *shift = p.shift ? p.shift + (int64_t)(m / pixels) * p.shift_row : nullptr;
#pragma unroll
        for (int j = 0; j < TILES_ACROSS; j++) {
            int n = first_column + warp_column + j * 8 + lane % 4 * 2;
            if (n >= p.n) continue;
            bool both = n + 1 < p.n;
            float v[2] = {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]};
            if (p.bias) {
                v[0] += p.bias[n];
                if (both) v[1] += p.bias[n + 1];
            }
            if (p.activation == GEGLU) { // columns are value, gate, value, gate
                p.out[(int64_t)m * (p.n / 2) + n / 2] = from_float<T>(v[0] * gelu(v[1]));
                continue;
            }
            if (shift) {
                v[0] += to_float(shift[n]);
                if (both) v[1] += to_float(shift[n + 1]);
            }
            if (p.activation) v[0] = activate(v[0], p.activation), v[1] = activate(v[1], p.activation);
            int64_t at = (int64_t)m * p.n + n;
            if (p.n % 2 == 0) { // so that pairs are aligned
                if (p.residual) {
                    uint32_t bits = *(const uint32_t *)(p.residual + at);
                    T pair[2];
                    memcpy(pair, &bits, 4);
                    v[0] += to_float(pair[0]), v[1] += to_float(pair[1]);
                }
                *(uint32_t *)(p.out + at) = pack<T>(v[0], v[1]);
            } else {
                for (int e = 0; e < 1 + both; e++)
                    p.out[at + e] = from_float<T>(p.residual ? v[e] + to_float(p.residual[at + e]) : v[e]);
            }
        }
    }
}

// BLOCKS of them fit a processor, whatever the compiler: the large tile is at the limit.
#define KERNEL(T, ROWS, COLUMNS, WARP_ROWS, THREADS, BLOCKS, WHOLE, NAME)    \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)            \
        product_##NAME##_##T(const Product<T> p) {                           \
        product<T, ROWS, COLUMNS, WARP_ROWS, WHOLE>(p);                      \
    }
#define KERNELS(T)                                     \
    KERNEL(T, 128, 128, 64, 256, 2, true, large)       \
    KERNEL(T, 128, 64, 32, 256, 1, true, middle)       \
    KERNEL(T, 64, 64, 32, 128, 1, true, small)         \
    KERNEL(T, 64, 64, 32, 128, 1, false, ragged)

KERNELS(f16)
#if __CUDA_ARCH__ >= 800
KERNELS(bf16)
#endif
