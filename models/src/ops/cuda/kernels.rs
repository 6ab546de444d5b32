//! The files of kernels as `build.rs` compiled them, the devices they are loaded onto, and their
//! launches.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, LaunchConfig,
    PushKernelArg as _, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{DType, Error, Result, bail};

use crate::ops::types::KernelStats;

/// A file of kernels. Capabilities are 75 for compute capability 7.5.
pub(super) struct KernelFile {
    name: &'static str,
    /// Which a driver compiles for this capability and every later one; ascending.
    ptx: &'static [(i32, &'static str)],
    /// Machine code for one capability, and later ones of the same major version; ascending.
    cubins: &'static [(i32, &'static [u8])],
    launches: AtomicU64,
    flops: AtomicU64,
    bytes: AtomicU64,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

impl KernelFile {
    pub(super) const fn new(
        name: &'static str,
        ptx: &'static [(i32, &'static str)],
        cubins: &'static [(i32, &'static [u8])],
    ) -> Self {
        let [launches, flops, bytes] = [const { AtomicU64::new(0) }; 3];
        Self { name, ptx, cubins, launches, flops, bytes }
    }

    /// What is to be loaded onto a device of this capability, the best first.
    fn images(&self, capability: i32) -> impl Iterator<Item = ModuleImage> {
        let same = |of: i32| of / 10 == capability / 10 && of <= capability;
        let cubin = self.cubins.iter().rev().find(|(of, _)| same(*of));
        let ptx = self.ptx.iter().rev().find(|(of, _)| *of <= capability);
        let cubin = cubin.map(|(of, code)| ModuleImage::Cubin(*of, code));
        cubin.into_iter().chain(ptx.map(|(of, text)| ModuleImage::Ptx(*of, text)))
    }

    /// Counts the work of a launch: for benchmarks, which run alone.
    pub(super) fn count(&self, flops: u64, bytes: u64) {
        self.flops.fetch_add(flops, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What was launched since the program began, by file of kernels.
pub(crate) fn stats() -> Vec<(&'static str, KernelStats)> {
    let read = |source: &KernelFile| {
        let [launches, flops, bytes] = [&source.launches, &source.flops, &source.bytes]
            .map(|count| count.load(Ordering::Relaxed));
        (source.name, KernelStats { launches, flops, bytes })
    };
    SOURCES.iter().map(|source| read(source)).collect()
}

/// A file of kernels as a driver takes it, and for which capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ModuleImage {
    Cubin(i32, &'static [u8]),
    Ptx(i32, &'static str),
}

impl ModuleImage {
    fn load(self, context: &Arc<CudaContext>) -> Result<Arc<CudaModule>> {
        let image = match self {
            Self::Cubin(_, code) => Ptx::from_binary(code.to_vec()),
            Self::Ptx(_, text) => Ptx::from_src(text),
        };
        context.load_module(image).w()
    }

    fn name(self) -> String {
        let (kind, of) = match self {
            Self::Cubin(of, _) => ("cubin", of),
            Self::Ptx(of, _) => ("PTX", of),
        };
        format!("{kind} {}.{}", of / 10, of % 10)
    }
}

/// An open device: what is asked of it once, and the kernels on it.
pub(super) struct Gpu {
    context: Arc<CudaContext>,
    /// 75 for compute capability 7.5.
    pub(super) capability: i32,
    pub(super) processors: usize,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    /// By file, with the name of its image.
    modules: BTreeMap<&'static str, (Arc<CudaModule>, String)>,
    functions: BTreeMap<String, CudaFunction>,
}

/// The open of open devices, found by the device's stream.
static OPEN: Mutex<Vec<(Weak<CudaStream>, Arc<Gpu>)>> = Mutex::new(Vec::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// The gpu of an open device.
    pub(super) fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        let stream = device.cuda_stream();
        let mut open = locked(&OPEN);
        let known = open.iter().find(|(known, _)| known.as_ptr() == Arc::as_ptr(&stream));
        if let Some((_, gpu)) = known {
            return Ok(Arc::clone(gpu));
        }
        let gpu = Arc::new(Self::new(stream.context())?);
        open.push((Arc::downgrade(&stream), Arc::clone(&gpu)));
        Ok(gpu)
    }

    fn new(context: &Arc<CudaContext>) -> Result<Self> {
        use sys::CUdevice_attribute as A;
        let attribute = |which| context.attribute(which).w();
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self {
            context: Arc::clone(context),
            capability: 10 * major + minor,
            processors: processors.unsigned_abs() as usize,
            loaded: Mutex::default(),
        })
    }

    /// A kernel, loaded with its file when the first of it is asked for.
    fn function(&self, source: &KernelFile, name: String) -> Result<CudaFunction> {
        let mut loaded = locked(&self.loaded);
        if let Some(function) = loaded.functions.get(&name) {
            return Ok(function.clone());
        }
        if !loaded.modules.contains_key(source.name) {
            let module = self.load(source)?;
            loaded.modules.insert(source.name, module);
        }
        let function = loaded.modules[source.name].0.load_function(&name).w()?;
        loaded.functions.insert(name, function.clone());
        Ok(function)
    }

    /// The best image that the driver takes.
    fn load(&self, source: &KernelFile) -> Result<(Arc<CudaModule>, String)> {
        let mut refused = None;
        for image in source.images(self.capability) {
            match image.load(&self.context) {
                Ok(module) => return Ok((module, image.name())),
                // A cubin may be of a later toolkit than the driver, or of a chip that is not this.
                Err(error) => refused = Some((image, error)),
            }
        }
        let (name, of) = (source.name, self.capability);
        match refused {
            None => bail!("no {name} kernels for compute capability {}.{}", of / 10, of % 10),
            Some((image, error)) => {
                bail!("the driver refuses the {name} kernels ({}): {error}", image.name())
            }
        }
    }
}

/// Forgets the kernels of devices that are no longer open: on the device they take room.
pub(in crate::ops) fn unload_closed() {
    locked(&OPEN).retain(|(stream, _)| stream.strong_count() > 0);
}

/// What the kernels were loaded from: "cubin 8.6", "PTX 8.0", or both.
pub(super) fn loaded_images(device: &CudaDevice) -> Result<String> {
    let gpu = Gpu::of(device)?;
    let loaded = locked(&gpu.loaded);
    let mut names: Vec<_> = loaded.modules.values().map(|(_, name)| name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    Ok(names.join(", "))
}

/// Blocks, threads of each, and bytes of shared memory that only the launch knows.
pub(super) struct Grid {
    pub(super) blocks: (usize, usize, usize),
    pub(super) threads: usize,
    pub(super) shared: usize,
}

/// Queues `name` for the type.
///
/// # Safety
///
/// `problem` must be the kernel's argument, and every address in it of memory as large as it says.
pub(super) unsafe fn launch<P: DeviceRepr>(
    device: &CudaDevice,
    source: &KernelFile,
    (name, dtype): (&str, DType),
    grid: &Grid,
    problem: &P,
) -> Result<()> {
    let function = Gpu::of(device)?.function(source, format!("{name}_{}", dtype.as_str()))?;
    let shared = u32::try_from(grid.shared).map_err(Error::wrap)?;
    if shared > 48 << 10 {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(which, shared as i32).w()?;
    }
    let side = |n: usize| u32::try_from(n).map_err(Error::wrap);
    let (x, y, z) = grid.blocks;
    let config = LaunchConfig {
        grid_dim: (side(x)?, side(y)?, side(z)?),
        block_dim: (side(grid.threads)?, 1, 1),
        shared_mem_bytes: shared,
    };
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    builder.arg(problem);
    // SAFETY: the caller's.
    unsafe { builder.launch(config) }.w()?;
    source.launches.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    static FAT: KernelFile = KernelFile::new(
        "fat",
        &[(75, "old"), (80, "new")],
        &[(75, b"75"), (80, b"80"), (86, b"86"), (89, b"89"), (90, b"90")],
    );

    #[test]
    fn a_device_gets_the_cubin_of_its_kind_and_ptx_after_it() {
        let images = |source: &KernelFile, capability| -> Vec<_> {
            source.images(capability).map(ModuleImage::name).collect()
        };
        for (capability, expected) in [
            (75, ["cubin 7.5", "PTX 7.5"]),
            (80, ["cubin 8.0", "PTX 8.0"]),
            (86, ["cubin 8.6", "PTX 8.0"]),
            (87, ["cubin 8.6", "PTX 8.0"]),
            (89, ["cubin 8.9", "PTX 8.0"]),
            (90, ["cubin 9.0", "PTX 8.0"]),
        ] {
            assert_eq!(images(&FAT, capability), expected, "{capability}");
        }
        // Machine code of another major version never runs.
        assert_eq!(images(&FAT, 120), ["PTX 8.0"]);
        assert!(images(&FAT, 70).is_empty());
        let lean = KernelFile::new("lean", FAT.ptx, &[(86, b"86")]);
        assert_eq!(images(&lean, 80), ["PTX 8.0"]);
        assert_eq!(images(&lean, 75), ["PTX 7.5"]);
    }

    #[test]
    fn a_refused_cubin_gives_way_to_ptx() {
        let Some(device) = crate::ops::cuda::tests::device() else { return };
        let gpu = Gpu::of(device.as_cuda_device().expect("a GPU")).expect("a gpu");
        const BROKEN: &[u8] = b"\x7fELF without any kernel\0";
        const CUBINS: &[(i32, &[u8])] =
            &[(75, BROKEN), (80, BROKEN), (90, BROKEN), (100, BROKEN), (120, BROKEN)];
        let source = KernelFile::new("refused", LAYOUT.ptx, CUBINS);
        assert!(gpu.function(&source, "channels_last_f16".into()).is_ok());
        let loaded = locked(&gpu.loaded).modules["refused"].1.clone();
        assert!(loaded.starts_with("PTX "), "{loaded}");
        let broken = KernelFile::new("broken", &[(75, "no PTX")], CUBINS);
        let error = gpu.function(&broken, "channels_first_f16".into()).map(|_| ());
        let error = error.expect_err("there is nothing to load").to_string();
        assert!(error.contains("broken") && error.contains("PTX 7.5"), "{error}");
    }

    #[test]
    fn every_cubin_is_for_the_capability_that_it_is_said_to_be() {
        for source in SOURCES {
            assert!(source.cubins.is_sorted_by_key(|(of, _)| of), "{}", source.name);
            for (of, code) in source.cubins {
                assert_eq!(&code[..4], b"\x7fELF", "{}", source.name);
                // EM_CUDA; nvcc 13 (ABI 8) keeps the capability one byte further up than nvcc 12.
                assert_eq!(code[18..20], 190_u16.to_le_bytes(), "{}", source.name);
                let place = if code[8] >= 8 { 49 } else { 48 };
                assert_eq!(i32::from(code[place]), *of, "{}", source.name);
            }
        }
    }
}
