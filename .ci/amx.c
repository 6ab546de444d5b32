// An LD_PRELOAD: AMX-TILE and AMX-BF16 on an x86-64 Linux machine that has none. CPUID is made to
// fault and answered with both features, the permission to use tiles is granted, and the
// instructions, which such a processor refuses, are decoded from their bytes and executed here as
// Intel's manual says (volume 2). What the manual calls an exception ends the program. At the end
// the instructions are counted on stderr. AMX_REFUSE=1 refuses the permission.
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

static __thread uint8_t tiles[8][16][64];
static __thread uint8_t config[64]; // as ldtilecfg reads it; palette 0: not configured
static uint64_t counts[8];
enum { LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS, CPUID, ASKED };

static long raw(long n, long a, long b, long c, long d, long e, long f) {
    long r;
    register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
    asm volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    return r;
}

static void fail(const char *what) {
    fprintf(stderr, "amx emulator: %s\n", what);
    abort();
}

// What Rust calls to ask for the permission.
long syscall(long n, ...) {
    va_list l;
    va_start(l, n);
    long a[6];
    for (int i = 0; i < 6; i++) a[i] = va_arg(l, long);
    va_end(l);
    if (n == SYS_arch_prctl && a[0] == 0x1023 && a[1] == 18) {
        __atomic_add_fetch(&counts[ASKED], 1, 0);
        return getenv("AMX_REFUSE") ? (errno = EINVAL, -1) : 0;
    }
    long r = raw(n, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (r < 0 && r > -4096) { errno = -r; return -1; }
    return r;
}

static void cpuid_faults(int on) {
    if (raw(SYS_arch_prctl, 0x1012, !on, 0, 0, 0, 0)) fail("this machine cannot fault on cpuid");
}

static const int REGS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void on_segv(int s, siginfo_t *i, void *context) {
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)g[REG_RIP];
    if (i->si_code != SI_KERNEL || at[0] != 0x0F || at[1] != 0xA2) {
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    uint32_t leaf = g[REG_RAX], sub = g[REG_RCX], a, b, c, d;
    cpuid_faults(0);
    asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(sub));
    cpuid_faults(1);
    if (leaf == 7 && sub == 0) d |= 1u << 22 | 1u << 24;
    g[REG_RAX] = a, g[REG_RBX] = b, g[REG_RCX] = c, g[REG_RDX] = d, g[REG_RIP] += 2;
    __atomic_add_fetch(&counts[CPUID], 1, 0);
}

static int rows(int t) { return config[48 + t]; }
static int bytes(int t) { return config[16 + 2 * t] | config[17 + 2 * t] << 8; }

static float wide(const uint8_t *half) {
    uint32_t bits = (uint32_t)(half[0] | half[1] << 8) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static void dot(int c, int a, int b) {
    if (c == a || c == b || a == b) fail("#UD: one tile twice");
    if (bytes(a) / 4 != rows(b) || rows(a) != rows(c) || bytes(b) != bytes(c)) fail("#UD: shapes");
    unsigned csr = _mm_getcsr();
    _mm_setcsr(0x1F80 | 0x8040); // round to nearest, denormals are zero
    for (int m = 0; m < rows(c); m++) {
        float sums[32] = {0}, row[16];
        for (int k = 0; k < bytes(a) / 4; k++)
            for (int n = 0; n < bytes(c) / 4; n++)
                for (int h = 0; h < 2; h++)
                    sums[2 * n + h] = fmaf(wide(&tiles[a][m][4 * k + 2 * h]),
                                           wide(&tiles[b][k][4 * n + 2 * h]), sums[2 * n + h]);
        memcpy(row, tiles[c][m], 64);
        for (int n = 0; n < bytes(c) / 4; n++) row[n] += sums[2 * n] + sums[2 * n + 1];
        memcpy(tiles[c][m], row, 64);
    }
    _mm_setcsr(csr);
}

static void on_ill(int s, siginfo_t *i, void *context) {
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)g[REG_RIP];
    // VEX with three bytes, map 0F38, W0, L0.
    if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || at[2] & 0x84) {
        signal(SIGILL, SIG_DFL);
        return;
    }
    int pp = at[2] & 3, vvvv = ~(at[2] >> 3) & 15, op = at[3], modrm = at[4];
    int r = (at[1] & 0x80 ? 0 : 8) | (modrm >> 3 & 7), mod = modrm >> 6, rm = modrm & 7;
    int x8 = at[1] & 0x40 ? 0 : 8, b8 = at[1] & 0x20 ? 0 : 8, length = 5;
    uint64_t base = 0, index = 0;
    int sib = 0;
    if (mod != 3) {
        int scale = 0;
        int64_t displacement = 0;
        int code = rm;
        if (rm == 4) {
            sib = at[length++];
            scale = sib >> 6;
            if ((x8 | (sib >> 3 & 7)) != 4) index = (uint64_t)g[REGS[x8 | (sib >> 3 & 7)]] << scale;
            code = sib & 7;
            sib = 1;
        }
        int none = mod == 0 && code == 5;
        if (mod == 1) displacement = (int8_t)at[length++];
        if (mod == 2 || none) { int32_t d; memcpy(&d, at + length, 4); displacement = d; length += 4; }
        if (!none) base = g[REGS[b8 | code]];
        else if (rm == 5) base = g[REG_RIP] + length;
        base += displacement;
    }
    int what;
    if (op == 0x49 && pp == 0 && mod != 3 && r == 0 && vvvv == 0) {
        what = LDTILECFG;
        memcpy(config, (void *)(base + index), 64);
        if (config[0] != 1 || config[1]) fail("#GP: palette");
        for (int k = 2; k < 64; k++)
            if ((k < 16 || (k >= 32 && k < 48) || k >= 56) && config[k]) fail("#GP: reserved");
        for (int t = 0; t < 8; t++) if (rows(t) > 16 || bytes(t) > 64) fail("#GP: size");
        memset(tiles, 0, sizeof tiles);
    } else if (op == 0x49 && pp == 0 && modrm == 0xC0 && vvvv == 0) {
        what = TILERELEASE;
        memset(config, 0, 64);
        memset(tiles, 0xFF, sizeof tiles);
    } else {
        if (!config[0]) fail("#UD: not configured");
        if (op == 0x49 && pp == 3 && mod == 3 && rm == 0 && r < 8) {
            what = TILEZERO;
            memset(tiles[r], 0, 1024);
        } else if (op == 0x4B && (pp == 3 || pp == 2) && sib && vvvv == 0 && r < 8) {
            what = pp == 3 ? TILELOADD : TILESTORED;
            for (int k = 0; k < rows(r); k++) {
                void *place = (void *)(base + k * index);
                if (pp == 3) memcpy(tiles[r][k], place, bytes(r));
                else memcpy(place, tiles[r][k], bytes(r));
            }
        } else if (op == 0x5C && pp == 2 && mod == 3 && r < 8 && b8 == 0 && vvvv < 8) {
            what = TDPBF16PS;
            dot(r, rm, vvvv);
        } else {
            signal(SIGILL, SIG_DFL);
            return;
        }
    }
    __atomic_add_fetch(&counts[what], 1, 0);
    g[REG_RIP] += length;
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    action.sa_sigaction = on_ill;
    sigaction(SIGILL, &action, 0);
    action.sa_sigaction = on_segv;
    sigaction(SIGSEGV, &action, 0);
    cpuid_faults(1);
}

__attribute__((destructor)) static void end(void) {
    fprintf(stderr,
            "amx emulator: ldtilecfg %lu, tilerelease %lu, tilezero %lu, tileloadd %lu, tilestored %lu, "
            "tdpbf16ps %lu, cpuid %lu, permission asked %lu\n",
            counts[0], counts[1], counts[2], counts[3], counts[4], counts[5], counts[6], counts[7]);
}
