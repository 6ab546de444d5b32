//! CUDA devices: their properties, the kernels that are loaded onto them, and the types that these
//! support.

use std::collections::BTreeMap;
use std::ffi::c_char;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};
use candle_core::{DType, Device, Result, Tensor, bail};

use super::images::KernelFile;
use super::{driver, pool, steps};

/// A device with one stream of its own.
///
/// # Errors
/// Of the driver; and, as a message, that it is too old for this build.
pub(crate) fn open(number: usize) -> Result<Device> {
    driver::check()?;
    let device = Device::new_cuda_with_stream(number)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: events order the work of several streams on one tensor, and every tensor stays on
    // the one stream of its device.
    unsafe { cuda.disable_event_tracking() };
    let stream = cuda.cuda_stream();
    // A thread that waits sleeps, where a host may have four cores for the server and all else.
    stream.context().set_blocking_synchronize().w()?;
    pool::keep(stream.context())?;
    Ok(device)
}

/// Free memory of the device, in bytes, with what its pool keeps.
pub(crate) fn free_bytes(device: &Device) -> Option<u64> {
    let context = device.as_cuda_device().ok()?.cuda_stream().context().clone();
    let (free, _) = context.mem_get_info().ok()?;
    Some(free as u64 + pool::kept_bytes(&context).unwrap_or(0))
}

/// Bytes that the device's pool keeps and nothing uses.
pub(crate) fn pool_bytes(device: &Device) -> Option<u64> {
    pool::kept_bytes(device.as_cuda_device().ok()?.cuda_stream().context())
}

/// The UUIDs of all cards as the management library writes them, in the order of their numbers here.
pub(crate) fn uuids() -> Vec<String> {
    let count = CudaContext::device_count().unwrap_or(0);
    let uuid = |number| {
        let device = result::device::get(number)?;
        let bytes = result::device::get_uuid(device)?.bytes;
        let hex =
            |part: &[c_char]| part.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let parts = [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]];
        Ok(format!("GPU-{}", parts.map(hex).join("-")))
    };
    // All or none: a card's number is its place.
    (0..count).map(uuid).collect::<std::result::Result<_, DriverError>>().unwrap_or_default()
}

/// The device's name.
pub(crate) fn name(device: &Device) -> Option<String> {
    device.as_cuda_device().ok()?.cuda_stream().context().name().ok()
}

/// The images that our kernels were loaded from: "cubin 8.6", "PTX 8.0", or both.
pub(crate) fn loaded_images(device: &Device) -> Option<String> {
    let gpu = Gpu::of(device.as_cuda_device().ok()?).ok()?;
    let loaded = locked(&gpu.loaded);
    let mut names: Vec<_> = loaded.modules.values().map(|(_, name)| name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    Some(names.join(", "))
}

/// Whether there are kernels on tensor cores for this type on this device.
pub(super) fn has_products(device: &Device, dtype: DType) -> Result<bool> {
    let Device::Cuda(device) = device else { return Ok(false) };
    let capability = Gpu::of(device)?.capability;
    Ok((dtype == DType::F16 && capability >= 75) || (dtype == DType::BF16 && capability >= 80))
}

/// Whether there are kernels without tensor cores for this type on the tensor's device, and it is
/// contiguous.
pub(super) fn has_plain(x: &Tensor, dtype: DType) -> Result<bool> {
    let Device::Cuda(device) = x.device() else { return Ok(false) };
    let single = dtype == DType::F32 && Gpu::of(device)?.capability >= 75;
    Ok(x.is_contiguous() && (single || has_products(x.device(), dtype)?))
}

/// An open device: its properties, and the kernels that are loaded onto it.
pub(super) struct Gpu {
    context: Arc<CudaContext>,
    /// 75 for compute capability 7.5.
    pub(super) capability: i32,
    /// Streaming multiprocessors.
    pub(super) processors: usize,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    /// By file, with the name of the image.
    modules: BTreeMap<&'static str, (Arc<CudaModule>, String)>,
    functions: BTreeMap<String, CudaFunction>,
}

/// All open devices, by their streams.
static OPEN: Mutex<Vec<(Weak<CudaStream>, Arc<Gpu>)>> = Mutex::new(Vec::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// That of an open device.
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

    /// A kernel; its file is loaded at the first use.
    pub(super) fn function(&self, file: &KernelFile, name: String) -> Result<CudaFunction> {
        let mut loaded = locked(&self.loaded);
        if let Some(function) = loaded.functions.get(&name) {
            return Ok(function.clone());
        }
        if !loaded.modules.contains_key(file.name) {
            let module = self.load(file)?;
            loaded.modules.insert(file.name, module);
        }
        let function = loaded.modules[file.name].0.load_function(&name).w()?;
        loaded.functions.insert(name, function.clone());
        Ok(function)
    }

    /// The best image that the driver accepts.
    fn load(&self, file: &KernelFile) -> Result<(Arc<CudaModule>, String)> {
        let mut refused = None;
        for image in file.images(self.capability) {
            match image.load(&self.context) {
                Ok(module) => return Ok((module, image.name())),
                // A cubin may be of a later toolkit than the driver, or of another chip.
                Err(error) => refused = Some((image, error)),
            }
        }
        let (name, of) = (file.name, self.capability);
        match refused {
            None => bail!("no {name} kernels for compute capability {}.{}", of / 10, of % 10),
            Some((image, error)) => {
                let (image, driver) = (image.name(), driver::name());
                bail!("{driver} refuses the {name} kernels ({image}): {error}")
            }
        }
    }
}

/// Returns the memory of all cards that nothing uses: that which their pools keep, and the kernels of
/// devices that are closed. Waits for the cards.
pub(in crate::ops) fn return_memory() {
    let known: Vec<_> = locked(&OPEN).iter().map(|(_, gpu)| Arc::clone(gpu)).collect();
    steps::forget_closed();
    locked(&OPEN).retain(|(stream, _)| stream.strong_count() > 0);
    for gpu in known {
        // A card that cannot is lost, which the next step tells.
        let _ = pool::trim(&gpu.context);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::images::LAYOUT;

    #[test]
    fn a_refused_cubin_gives_way_to_ptx() {
        let Some(device) = crate::ops::cuda::tests::device() else { return };
        let gpu = Gpu::of(device.as_cuda_device().expect("a GPU")).expect("its properties");
        // No sections, and room behind the header: a driver is not told where an image ends.
        const BROKEN: &[u8] = &{
            let mut image = [0; 4096];
            let header = b"\x7fELF\x02\x01\x01\x33\x07\0\0\0\0\0\0\0\x02\0\xbe\0\x01";
            let mut i = 0;
            while i < header.len() {
                image[i] = header[i];
                i += 1;
            }
            image[52] = 64;
            image
        };
        const CUBINS: &[(i32, &[u8])] =
            &[(75, BROKEN), (80, BROKEN), (90, BROKEN), (100, BROKEN), (120, BROKEN)];
        let file = KernelFile::new("refused", LAYOUT.ptx, CUBINS);
        assert!(gpu.function(&file, "channels_last_f16".into()).is_ok());
        let loaded = locked(&gpu.loaded).modules["refused"].1.clone();
        assert!(loaded.starts_with("PTX "), "{loaded}");
        let broken = KernelFile::new("broken", &[(75, "no PTX")], CUBINS);
        let error = gpu.function(&broken, "channels_first_f16".into()).map(|_| ());
        let error = error.expect_err("there is nothing to load").to_string();
        assert!(error.contains("broken") && error.contains("PTX 7.5"), "{error}");
    }
}
