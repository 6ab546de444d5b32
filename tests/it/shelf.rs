//! A loader of fake models, which counts them.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use sd_models::{ModelInfo, Rgb, Spec};
use sd_server::engine::{DeviceScheduler, Engine, Model};
use sd_server::registry::{ModelLoader, ModelRegistry, RegistryConfig};

use crate::fake::{ENGINE, Fake, FakeTrajectory};
use crate::harness::PATIENCE;

/// A fake that is counted while it is in memory.
struct Counted {
    fake: Fake,
    alive: Arc<AtomicUsize>,
    free_bytes: Arc<AtomicU64>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Model for Counted {
    type Trajectory = FakeTrajectory;

    fn info(&self) -> &ModelInfo {
        self.fake.info()
    }

    fn begin(&self, spec: &Spec) -> sd_models::Result<FakeTrajectory> {
        self.fake.begin(spec)
    }

    fn step(&self, batch: &mut [&mut FakeTrajectory]) -> sd_models::Result<()> {
        self.fake.step(batch)
    }

    fn decode(&self, trajectory: &mut FakeTrajectory) -> sd_models::Result<Option<Rgb>> {
        self.fake.decode(trajectory)
    }

    fn free_bytes(&self) -> Option<u64> {
        Some(self.free_bytes.load(Ordering::SeqCst))
    }
}

/// Models whose weights take as many bytes as their path says; `broken` is none, and 13, 14 and 15
/// do not load: the device is full, a file is wrong, and the disk does not answer.
#[derive(Clone)]
pub(crate) struct Shelf {
    device: DeviceScheduler,
    /// Number of models in memory.
    pub(crate) alive: Arc<AtomicUsize>,
    /// Number of models whose loading has begun.
    pub(crate) starts: Arc<AtomicUsize>,
    /// What the models take for the free memory of their device.
    pub(crate) free_bytes: Arc<AtomicU64>,
}

impl Default for Shelf {
    fn default() -> Self {
        let (device, alive, starts) = Default::default();
        Self { device, alive, starts, free_bytes: Arc::new(AtomicU64::new(u64::MAX)) }
    }
}

impl ModelLoader for Shelf {
    fn estimate_bytes(&self, path: &Path) -> anyhow::Result<u64> {
        Ok(path.file_name().and_then(|name| name.to_str()).unwrap_or_default().parse()?)
    }

    fn start(&self, path: &Path) -> io::Result<Engine> {
        let Self { alive, free_bytes, .. } = self.clone();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        self.starts.fetch_add(1, Ordering::SeqCst);
        Engine::start_on(&self.device, ENGINE, move || {
            match name.as_deref() {
                Some("13") => return Err(sd_models::Error::OutOfMemory("weights".into()).into()),
                Some("14") => anyhow::bail!("a tensor is missing"),
                Some("15") => std::thread::sleep(PATIENCE),
                _ => {}
            }
            alive.fetch_add(1, Ordering::SeqCst);
            let (mut fake, strings) = Fake::new();
            fake.pace = Duration::from_millis(5);
            drop(strings.permits);
            Ok(Counted { fake, alive, free_bytes })
        })
    }

    fn free_bytes(&self) -> Option<u64> {
        None
    }
}

/// The turn of a busy model that has to make room.
pub(crate) const TURN: Duration = Duration::from_millis(400);

/// A registry of the models of a directory, else one that SageMaker fills.
pub(crate) fn shelf(folder: Option<&Path>) -> (ModelRegistry, Shelf) {
    unloading(folder, None)
}

/// The same, in which a model that nobody uses for so long is unloaded.
pub(crate) fn unloading(
    folder: Option<&Path>,
    unload_after: Option<Duration>,
) -> (ModelRegistry, Shelf) {
    let shelf = Shelf::default();
    let settings = RegistryConfig {
        max_models: 3,
        memory_bytes: Some(100),
        folder: folder.map(Path::to_owned),
        multi_model: folder.is_none(),
        multi_model_root: "/".into(),
        unload_after,
        drain_timeout: Duration::from_secs(20),
        turn: TURN,
    };
    let first = Engine::absent(&shelf.device, ENGINE);
    (ModelRegistry::new(first, shelf.clone(), settings), shelf)
}
