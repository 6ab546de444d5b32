//! CUDA devices: their properties, the kernels that are loaded onto them, and the types that these
//! support.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, sys,
};
use candle_core::{DType, Device, Result, Tensor, bail};

use super::images::KernelFile;

/// A device with one stream of its own.
pub(crate) fn open(number: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(number)?;
    // SAFETY: events order the work of several streams on one tensor, and every tensor stays on
    // the one stream of its device.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

/// Free memory of the device, in bytes.
pub(crate) fn free_bytes(device: &Device) -> Option<u64> {
    let context = device.as_cuda_device().ok()?.cuda_stream().context().clone();
    context.mem_get_info().ok().map(|(free, _)| free as u64)
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
                bail!("the driver refuses the {name} kernels ({}): {error}", image.name())
            }
        }
    }
}

/// Unloads the kernels of devices that are closed, which take memory of the GPU.
pub(in crate::ops) fn unload_closed() {
    locked(&OPEN).retain(|(stream, _)| stream.strong_count() > 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::images::LAYOUT;

    #[test]
    fn a_refused_cubin_gives_way_to_ptx() {
        let Some(device) = crate::ops::cuda::tests::device() else { return };
        let gpu = Gpu::of(device.as_cuda_device().expect("a GPU")).expect("its properties");
        const BROKEN: &[u8] = b"\x7fELF without any kernel\0";
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
