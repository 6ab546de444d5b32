//! What the worker asks of a model and of a picture in the making.

use sd_models::{ModelInfo, Rgb, Size, Spec};

use crate::host::memory;

/// What the worker drives: `sd_models::Pipeline`, or a fake in tests.
pub trait Model: 'static {
    /// A picture in the making.
    type Trajectory: Trajectory;
    /// Name, device, defaults and limits.
    fn info(&self) -> &ModelInfo;
    /// What has to be read from files before `begin` finds all in memory: work for another thread.
    fn files(&self, _spec: &Spec) -> Option<Box<dyn FnOnce() + Send>> {
        None
    }
    /// Encodes the text and draws the noise.
    fn begin(&self, spec: &Spec) -> sd_models::Result<Self::Trajectory>;
    /// One evaluation for each member; all have the same size.
    fn step(&self, batch: &mut [&mut Self::Trajectory]) -> sd_models::Result<()>;
    /// The picture of a trajectory; of one that is not finished, what can be told of it.
    fn decode(&self, trajectory: &Self::Trajectory) -> sd_models::Result<Rgb>;
    /// Whether a picture should not be shown; `None` from a model that has nothing to tell by.
    fn check_safety(&self, _picture: &Rgb) -> sd_models::Result<Option<bool>> {
        Ok(None)
    }
    /// A small look at a picture in the making, from a model that can give one at little cost
    /// once it is warm.
    fn preview(&self, _trajectory: &Self::Trajectory) -> sd_models::Result<Option<Rgb>> {
        Ok(None)
    }
    /// Memory that the device has left, where that is known.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
}

/// What the worker must know of a picture in the making.
pub trait Trajectory {
    /// Whether nothing is left but to decode it.
    fn done(&self) -> bool;
    /// Evaluations made and to make.
    fn progress(&self) -> (usize, usize);
    /// Rows that one evaluation takes in a batch.
    fn rows(&self) -> usize;
    /// The size in this pass: pictures of one size can share an evaluation.
    fn size(&self) -> Size;
    /// Pixels times evaluations to make, in all passes.
    fn work_left(&self) -> usize {
        let (made, all) = self.progress();
        self.size().pixels() * all.saturating_sub(made)
    }
    /// What the client should know, such as a prompt that was cut.
    fn warnings(&self) -> &[String];
}

impl Model for sd_models::Pipeline {
    type Trajectory = sd_models::Trajectory;

    fn info(&self) -> &ModelInfo {
        self.info()
    }

    fn files(&self, spec: &Spec) -> Option<Box<dyn FnOnce() + Send>> {
        self.prefetch(spec)
    }

    fn begin(&self, spec: &Spec) -> sd_models::Result<Self::Trajectory> {
        self.begin(spec)
    }

    fn step(&self, batch: &mut [&mut Self::Trajectory]) -> sd_models::Result<()> {
        self.step(batch)
    }

    fn decode(&self, trajectory: &Self::Trajectory) -> sd_models::Result<Rgb> {
        self.decode(trajectory)
    }

    fn check_safety(&self, picture: &Rgb) -> sd_models::Result<Option<bool>> {
        self.check_safety(picture)
    }

    fn preview(&self, trajectory: &Self::Trajectory) -> sd_models::Result<Option<Rgb>> {
        self.preview(trajectory).map(Some)
    }

    fn free_bytes(&self) -> Option<u64> {
        match self.info().device.as_str() {
            "cpu" => memory::available(),
            _ => self.free_device_bytes(),
        }
    }
}

impl Trajectory for sd_models::Trajectory {
    fn done(&self) -> bool {
        self.done()
    }

    fn progress(&self) -> (usize, usize) {
        self.progress()
    }

    fn rows(&self) -> usize {
        self.rows()
    }

    fn size(&self) -> Size {
        self.size()
    }

    fn work_left(&self) -> usize {
        self.work_left()
    }

    fn warnings(&self) -> &[String] {
        self.warnings()
    }
}
