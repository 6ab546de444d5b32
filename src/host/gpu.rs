//! GPU metrics from NVIDIA's management library (NVML). The library is part of the driver and
//! loaded on first use; without it there are no GPUs to report. Nothing here fails: a value that
//! cannot be read is `None`.

use std::sync::OnceLock;

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;

/// The name in every driver package; the name without a number is for developers.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// The metrics of one GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct GpuReading {
    pub(crate) memory_used_bytes: Option<u64>,
    pub(crate) memory_bytes: Option<u64>,
    /// Share of recent time in which a kernel ran, 0 to 1.
    pub(crate) busy: Option<f64>,
    pub(crate) power_watts: Option<f64>,
    pub(crate) temperature_celsius: Option<f64>,
}

/// All GPUs visible to this process, in NVML's order. Takes milliseconds.
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
                memory_used_bytes: memory.as_ref().map(|memory| memory.used),
                memory_bytes: memory.as_ref().map(|memory| memory.total),
                busy: busy.map(|busy| f64::from(busy.gpu) / 100.0),
                power_watts: milliwatts.map(|milliwatts| f64::from(milliwatts) / 1000.0),
                temperature_celsius: celsius.map(f64::from),
            }
        })
        .collect()
}
