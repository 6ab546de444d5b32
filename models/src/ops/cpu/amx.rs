//! AMX: detection, and the micro-kernel for bf16 on its tiles, registers of 16 rows of 64 bytes
//! with an instruction that adds the product of two of them to a third (Intel's manual, volume 1,
//! chapter 18).
//!
//! Four registers accumulate 32 x 32 sums in f32, two by two hold the operands, so that each of
//! them is loaded once for two multiplications.

use std::sync::OnceLock;

use half::bf16;

use super::tile::{AMX_ROWS, AMX_TILE, NR, STEP};

/// Whether AMX can be used, or why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AmxStatus {
    /// The processor has none.
    Unsupported,
    /// The operating system does not let this process use it.
    NotPermitted,
    /// It computed wrong sums.
    SelfTestFailed,
    Usable,
}

/// Detects and tests AMX, once per process.
pub(super) fn status() -> AmxStatus {
    static STATUS: OnceLock<AmxStatus> = OnceLock::new();
    *STATUS.get_or_init(|| {
        if !supported() {
            return AmxStatus::Unsupported;
        }
        if !permitted() {
            return AmxStatus::NotPermitted;
        }
        // SAFETY: AMX is supported and permitted.
        let passed = self_test(&mut unsafe { Registers::configure() });
        if passed { AmxStatus::Usable } else { AmxStatus::SelfTestFailed }
    })
}

/// Whether bf16 is multiplied by AMX.
pub(super) fn has_amx() -> bool {
    #[cfg(test)]
    if tests::EMULATED.get() {
        return true;
    }
    status() == AmxStatus::Usable
}

/// AMX-TILE and AMX-BF16, on a processor that has AVX-512 as well.
#[cfg(target_arch = "x86_64")]
fn supported() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    // A processor with AVX-512 has leaf 7.
    is_x86_feature_detected!("avx512f")
        && std::arch::x86_64::__cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
}

#[cfg(not(target_arch = "x86_64"))]
fn supported() -> bool {
    false
}

/// Asks Linux to save these 8 KiB of registers for this process
/// (`Documentation/arch/x86/xstate.rst`); whether it does.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
        const XTILEDATA: i64 = 18;
        unsafe extern "C" {
            fn syscall(number: i64, ...) -> i64;
        }
        // SAFETY: this call changes nothing but the permission. Kernels without AMX reject it.
        unsafe { syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Whether a block of integers so small that all sums are exact is right.
fn self_test(tiles: &mut impl Tiles) -> bool {
    const STEPS: usize = 2;
    let a = |row: usize, k: usize| ((row * 5 + k * 3) % 17) as f32 - 8.0;
    let b = |k: usize, column: usize| ((k * 7 + column * 11) % 13) as f32 - 6.0;
    let mut left = [[bf16::ZERO; AMX_ROWS * STEP]; STEPS];
    let mut right = [[bf16::ZERO; STEP * NR]; STEPS];
    for (step, k) in (0..STEPS * STEP).map(|k| (k / STEP, k % STEP)) {
        for i in 0..AMX_ROWS {
            left[step][i * STEP + k] = bf16::from_f32(a(i, step * STEP + k));
        }
        for j in 0..NR {
            right[step][(k / 2 * NR + j) * 2 + k % 2] = bf16::from_f32(b(step * STEP + k, j));
        }
    }
    let mut sums = [f32::NAN; AMX_ROWS * NR];
    block(tiles, &left, &right, &mut sums, false);
    block(tiles, &left, &right, &mut sums, true);
    sums.iter().enumerate().all(|(at, sum)| {
        let products = (0..STEPS * STEP).map(|k| a(at / NR, k) * b(k, at % NR));
        *sum == 2.0 * products.sum::<f32>()
    })
}

/// Eight registers of [`AMX_TILE`] rows of 64 bytes, and the instructions on them.
trait Tiles {
    /// Fills a register with zeros.
    fn zero<const T: usize>(&mut self);

    /// # Safety
    /// At `from` are AMX_TILE rows of 64 bytes, `stride` bytes apart.
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize);

    /// # Safety
    /// As for `load`, and they are the caller's to write.
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize);

    /// C += A x B: f32 in C, bf16 in A, [row][k], and B, [k / 2][column][2].
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// Those of the processor, configured while this value lives. The compiler never uses them, so
/// their contents persist between the instructions.
pub(super) struct Registers(());

/// An AMX instruction. Rust's intrinsics for AMX are not stable (1.95), hence the assembly.
#[cfg(target_arch = "x86_64")]
macro_rules! tile {
    ($($code:tt)*) => {
        std::arch::asm!(
            $($code)*,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags)
        )
    };
}

#[cfg(not(target_arch = "x86_64"))]
macro_rules! tile {
    ($($code:tt)*) => {
        unreachable!("AMX is unsupported")
    };
}

#[cfg_attr(not(target_arch = "x86_64"), expect(unused, reason = "never called without AMX"))]
impl Registers {
    /// Configures all of them at their full size.
    ///
    /// # Safety
    /// AMX is supported and permitted.
    unsafe fn configure() -> Self {
        /// The operand of `ldtilecfg`: palette 1, then bytes per row and rows of each register.
        #[repr(align(64))]
        struct Full([u8; 64]);
        const FULL: Full = {
            let mut bytes = [0; 64];
            bytes[0] = 1;
            let mut t = 0;
            while t < 8 {
                bytes[16 + 2 * t] = 64;
                bytes[48 + t] = AMX_TILE as u8;
                t += 1;
            }
            Full(bytes)
        };
        static CONFIGURATION: Full = FULL;
        // SAFETY: the caller's promise; 64 bytes are read.
        unsafe { tile!("ldtilecfg [{from}]", from = in(reg) &raw const CONFIGURATION.0) };
        Self(())
    }
}

#[cfg_attr(not(target_arch = "x86_64"), expect(unused, reason = "never called without AMX"))]
impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: configure() requires AMX, and nothing is read from the registers any more.
        unsafe { tile!("tilerelease") };
    }
}

#[cfg_attr(not(target_arch = "x86_64"), expect(unused, reason = "never called without AMX"))]
impl Tiles for Registers {
    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        // SAFETY: configure() requires AMX.
        unsafe { tile!("tilezero tmm{t}", t = const T) };
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: configure() requires AMX; the rest is the caller's promise.
        unsafe {
            tile!("tileloadd tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from,
                stride = in(reg) stride);
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: as for load().
        unsafe {
            tile!("tilestored [{to} + {stride}], tmm{t}", t = const T, to = in(reg) to,
                stride = in(reg) stride);
        }
    }

    #[inline(always)]
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: configure() requires AMX.
        unsafe { tile!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B) };
    }
}

/// c (AMX_ROWS, NR) (+)= a, [step][AMX_ROWS][STEP], x b, [step][STEP / 2][NR][2].
fn block(
    tiles: &mut impl Tiles,
    a: &[[bf16; AMX_ROWS * STEP]],
    b: &[[bf16; STEP * NR]],
    c: &mut [f32; AMX_ROWS * NR],
    accumulate: bool,
) {
    const { assert!(NR == AMX_ROWS && STEP == AMX_ROWS, "four tiles of sums, rows of 64 bytes") };
    const ROW: usize = NR * size_of::<f32>();
    let c = c.as_mut_ptr().cast::<u8>();
    // SAFETY: the quarters of c begin at its rows 0 and AMX_TILE, and in the middle of those; the
    // halves of a are AMX_TILE of its rows each, those of b half of every pair of rows.
    unsafe {
        if accumulate {
            tiles.load::<0>(c, ROW);
            tiles.load::<1>(c.add(ROW / 2), ROW);
            tiles.load::<2>(c.add(AMX_TILE * ROW), ROW);
            tiles.load::<3>(c.add(AMX_TILE * ROW + ROW / 2), ROW);
        } else {
            tiles.zero::<0>();
            tiles.zero::<1>();
            tiles.zero::<2>();
            tiles.zero::<3>();
        }
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (a.as_ptr().cast::<u8>(), b.as_ptr().cast::<u8>());
            tiles.load::<4>(a, ROW / 2);
            tiles.load::<6>(b, ROW);
            tiles.dot::<0, 4, 6>();
            tiles.load::<7>(b.add(ROW / 2), ROW);
            tiles.dot::<1, 4, 7>();
            tiles.load::<5>(a.add(AMX_TILE * ROW / 2), ROW / 2);
            tiles.dot::<2, 5, 6>();
            tiles.dot::<3, 5, 7>();
        }
        tiles.store::<0>(c, ROW);
        tiles.store::<1>(c.add(ROW / 2), ROW);
        tiles.store::<2>(c.add(AMX_TILE * ROW), ROW);
        tiles.store::<3>(c.add(AMX_TILE * ROW + ROW / 2), ROW);
    }
}

/// The registers while a thread multiplies.
pub(super) enum AmxUnit {
    Registers(Registers),
    #[cfg(test)]
    Emulated(Box<tests::EmulatedTiles>),
}

impl AmxUnit {
    /// Panics without AMX: see [`has_amx`].
    pub(super) fn new() -> Self {
        #[cfg(test)]
        if status() != AmxStatus::Usable {
            return Self::Emulated(Box::new(tests::EmulatedTiles::new()));
        }
        assert_eq!(status(), AmxStatus::Usable, "AMX");
        // SAFETY: AMX is supported and permitted.
        Self::Registers(unsafe { Registers::configure() })
    }

    /// c (AMX_ROWS, NR) (+)= a, [step][AMX_ROWS][STEP], x b, [step][STEP / 2][NR][2].
    pub(super) fn block(
        &mut self,
        a: &[bf16],
        b: &[bf16],
        c: &mut [f32; AMX_ROWS * NR],
        accumulate: bool,
    ) {
        let (a, b) = (a.as_chunks().0, b.as_chunks().0);
        match self {
            Self::Registers(tiles) => block(tiles, a, b, c, accumulate),
            #[cfg(test)]
            Self::Emulated(tiles) => block(&mut **tiles, a, b, c, accumulate),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
