//! The GPUs of this host, as NVIDIA's management library tells of them. The library comes with the
//! driver and is loaded when it is first asked; without it, as on hosts without a GPU, there is
//! nothing to tell. Nothing here fails: what cannot be read is `None`.

use std::sync::OnceLock;

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;

/// The name under which every driver package has it; the one without a number is for developers.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// What is known of one GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct GpuReading {
    pub(crate) memory_used_bytes: Option<f64>,
    pub(crate) memory_bytes: Option<f64>,
    /// The share of the last moments in which a kernel ran, 0 to 1.
    pub(crate) busy: Option<f64>,
    pub(crate) power_watts: Option<f64>,
    pub(crate) temperature_celsius: Option<f64>,
}

/// Every GPU that this process may see, in the library's order. Takes milliseconds.
pub(crate) fn read() -> Vec<GpuReading> {
    static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
    let load = || Nvml::builder().lib_path(LIBRARY.as_ref()).init().ok();
    let Some(nvml) = NVML.get_or_init(load) else { return Vec::new() };
    let gpus = 0..nvml.device_count().unwrap_or(0);
    gpus.filter_map(|index| nvml.device_by_index(index).ok())
        .map(|gpu| {
            let memory = gpu.memory_info().ok();
            let busy = gpu.utilization_rates().ok();
            let milliwatts = gpu.power_usage().ok();
            let celsius = gpu.temperature(TemperatureSensor::Gpu).ok();
            GpuReading {
                memory_used_bytes: memory.as_ref().map(|memory| memory.used as f64),
                memory_bytes: memory.as_ref().map(|memory| memory.total as f64),
                busy: busy.map(|busy| f64::from(busy.gpu) / 100.0),
                power_watts: milliwatts.map(|milliwatts| f64::from(milliwatts) / 1000.0),
                temperature_celsius: celsius.map(f64::from),
            }
        })
        .collect()
}
