//! GPU metrics from NVIDIA's management library (NVML). The library is part of the driver and
//! loaded on first use; without it there are no GPUs to report. Nothing here fails: a value that
//! cannot be read is `None`. One thread reads, since a driver may hang.

use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::{Device, Nvml};

/// The name in every driver package; the name without a number is for developers.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// Time to wait for new values, which usually take milliseconds.
const TIMEOUT: Duration = Duration::from_millis(500);

/// The metrics of one GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct GpuReading {
    pub(crate) memory_used_bytes: Option<u64>,
    pub(crate) memory_bytes: Option<u64>,
    /// Share of recent time in which a kernel ran, 0 to 1.
    pub(crate) busy: Option<f64>,
    pub(crate) power_watts: Option<f64>,
    pub(crate) temperature_celsius: Option<f64>,
}

/// All GPUs visible to this process. Those that CUDA can use are in its order, so that `cuda:1` is
/// the second; the library's own order is another, and knows nothing of `CUDA_VISIBLE_DEVICES`.
/// Waits for milliseconds; if the driver takes longer than [`TIMEOUT`], the values are those of the
/// last time.
pub(crate) fn read() -> Vec<GpuReading> {
    static GPUS: LazyLock<Reader<Vec<GpuReading>>> = LazyLock::new(|| {
        Reader::start(|| {
            let nvml = Nvml::builder().lib_path(LIBRARY.as_ref()).init().ok();
            let uuids = sd_models::cuda_uuids();
            move || nvml.as_ref().map(|nvml| read_all(nvml, &uuids)).unwrap_or_default()
        })
    });
    GPUS.read(TIMEOUT)
}

/// A value that one thread reads on request. Whoever asks waits up to a timeout.
struct Reader<T> {
    /// Requests a new value. There is room for one request, so that none waits.
    requests: mpsc::SyncSender<()>,
    last: Arc<Last<T>>,
}

/// The last value, and how often it has been read.
#[derive(Default)]
struct Last<T> {
    value: Mutex<(u64, T)>,
    changed: Condvar,
}

impl<T> Last<T> {
    fn lock(&self) -> MutexGuard<'_, (u64, T)> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Default + Clone + Send + 'static> Reader<T> {
    /// Starts the thread, which begins with `open`. Without a thread the value stays the default.
    fn start<R: FnMut() -> T>(open: impl FnOnce() -> R + Send + 'static) -> Self {
        let (requests, requested) = mpsc::sync_channel(1);
        let last = Arc::<Last<T>>::default();
        let shared = Arc::clone(&last);
        let work = move || {
            let mut read = open();
            for () in requested {
                let value = read();
                let mut last = shared.lock();
                *last = (last.0 + 1, value);
                shared.changed.notify_all();
            }
        };
        let _ = thread::Builder::new().name("gpu metrics".into()).spawn(work);
        Self { requests, last }
    }

    /// A new value, or the last one if that takes longer than `timeout`.
    fn read(&self, timeout: Duration) -> T {
        let last = self.last.lock();
        let count = last.0;
        if let Err(mpsc::TrySendError::Disconnected(())) = self.requests.try_send(()) {
            return last.1.clone();
        }
        let unchanged = |last: &mut (u64, T)| last.0 == count;
        let waited = self.last.changed.wait_timeout_while(last, timeout, unchanged);
        waited.unwrap_or_else(PoisonError::into_inner).0.1.clone()
    }
}

fn read_all(nvml: &Nvml, uuids: &[String]) -> Vec<GpuReading> {
    if uuids.is_empty() {
        let gpus = 0..nvml.device_count().unwrap_or(0);
        let gpus = gpus.filter_map(|index| nvml.device_by_index(index).ok());
        return gpus.map(|gpu| read_one(&gpu)).collect();
    }
    // One that the library does not know keeps its place.
    let known = uuids.iter().map(|uuid| nvml.device_by_uuid(uuid.as_str()).ok());
    known.map(|gpu| gpu.map(|gpu| read_one(&gpu)).unwrap_or_default()).collect()
}

fn read_one(gpu: &Device<'_>) -> GpuReading {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_that_hangs_costs_one_thread_and_the_last_value_is_served() {
        let (values, next) = mpsc::channel();
        let reader = Reader::start(move || move || next.recv().unwrap_or(8));
        values.send(7).expect("a reader");
        assert_eq!(reader.read(Duration::from_secs(60)), 7);
        // It hangs now: nobody sends.
        for _ in 0..3 {
            assert_eq!(reader.read(Duration::from_millis(1)), 7);
        }
        drop(values);
        assert_eq!(reader.read(Duration::from_secs(60)), 8);
    }
}
