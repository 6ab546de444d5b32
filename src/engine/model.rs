//! The interface between the worker and a model.

use sd_models::{AssetFile, Enlargement, Error, ModelInfo, NamedFiles, Rgb, Size, Spec};

use crate::host::memory;

/// Reads files. Blocks, for as long as the file system does.
pub type ReadFiles = Box<dyn FnOnce() -> sd_models::Result<NamedFiles> + Send>;

/// A model: `sd_models::Pipeline`, or a fake in tests.
pub trait Model: 'static {
    /// A running image.
    type Trajectory: Trajectory;
    /// Name, device, defaults and limits.
    fn info(&self) -> &ModelInfo;
    /// Reads the files that an image names, for another thread to run; `None` if it names none.
    fn read_files(&self, _spec: &Spec) -> Option<ReadFiles> {
        None
    }
    /// Encodes the prompts and draws the initial noise of an image that names no files.
    fn begin(&self, spec: &Spec) -> sd_models::Result<Self::Trajectory>;
    /// [`Self::begin`] with what [`Self::read_files`] has read. Reads no file.
    fn begin_with(&self, spec: &Spec, _files: NamedFiles) -> sd_models::Result<Self::Trajectory> {
        self.begin(spec)
    }
    /// One UNet call for the batch, whose members have the same size, or one step of a picture that
    /// is enlarged.
    fn step(&self, batch: &mut [&mut Self::Trajectory]) -> sd_models::Result<()>;
    /// Decodes the image of a trajectory; of an unfinished one, its predicted x0. `None` if that was
    /// a part of it, and the next call goes on.
    fn decode(&self, trajectory: &mut Self::Trajectory) -> sd_models::Result<Option<Rgb>>;
    /// Whether the safety checker flags the image as NSFW; `None` without a checker.
    fn check_safety(&self, _image: &Rgb) -> sd_models::Result<Option<bool>> {
        Ok(None)
    }
    /// A preview of a running image, at low cost after warm-up; `None` if the model has none.
    fn preview(&self, _trajectory: &Self::Trajectory) -> sd_models::Result<Option<Rgb>> {
        Ok(None)
    }
    /// Number of tokens of a text.
    fn text_tokens(&self, _text: &str) -> usize {
        0
    }
    /// Waits until what steps have queued on the device is done.
    fn settle(&self) -> sd_models::Result<()> {
        Ok(())
    }
    /// Free memory of the device in bytes, if known.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
    /// Memory of the models that were read for images of this one, in bytes.
    fn refiner_bytes(&self) -> u64 {
        0
    }
}

/// The state of a running image, as far as the worker needs it.
pub trait Trajectory {
    /// Whether all steps are done and only decoding is left.
    fn done(&self) -> bool;
    /// Whether the next step is one of a picture that is enlarged or encoded, and no UNet call.
    fn enlarging(&self) -> bool {
        false
    }
    /// Whether there is something to show of it.
    fn has_image(&self) -> bool {
        self.done() || !self.enlarging() && self.progress().0 > 0
    }
    /// Steps completed, and in total.
    fn progress(&self) -> (usize, usize);
    /// Number of rows in a batch, in the current pass: two with guidance, else one; more if the
    /// prompt joins several.
    fn rows(&self) -> usize;
    /// The size in the current pass. Images of one size can share a UNet call.
    fn size(&self) -> Size;
    /// Pixels times rows times remaining UNet calls, over all passes.
    fn work_left(&self) -> usize {
        let (made, all) = self.progress();
        self.size().pixels() * self.rows() * all.saturating_sub(made)
    }
    /// The model of its next step, where that is another than the worker's: a refiner.
    fn model(&self) -> Option<&ModelInfo> {
        None
    }
    /// Warnings for the client, such as a truncated prompt.
    fn warnings(&self) -> &[String];
    /// The files of its LoRAs, in the versions that it uses.
    fn lora_files(&self) -> Vec<AssetFile> {
        Vec::new()
    }
}

/// Methods of a trait whose implementation is the type's own method of the same name.
macro_rules! forward {
    ($(fn $name:ident(&self $(, $argument:ident: $type:ty)?) -> $output:ty;)*) => {
        $(fn $name(&self $(, $argument: $type)?) -> $output {
            self.$name($($argument)?)
        })*
    };
}

/// A running image of a pipeline.
pub enum Running {
    /// One that is drawn.
    Drawing(Box<sd_models::Trajectory>),
    /// One that is enlarged, which becomes this size.
    Enlarging(Box<Enlargement>, Size),
}

impl Model for sd_models::Pipeline {
    type Trajectory = Running;

    forward! {
        fn info(&self) -> &ModelInfo;
        fn check_safety(&self, image: &Rgb) -> sd_models::Result<Option<bool>>;
        fn text_tokens(&self, text: &str) -> usize;
        fn refiner_bytes(&self) -> u64;
    }

    fn read_files(&self, spec: &Spec) -> Option<ReadFiles> {
        self.read_files(spec).map(|read| Box::new(read) as ReadFiles)
    }

    fn begin(&self, spec: &Spec) -> sd_models::Result<Running> {
        let read = self.read_files(spec).map(|read| read()).transpose()?;
        Model::begin_with(self, spec, read.unwrap_or_default())
    }

    fn begin_with(&self, spec: &Spec, files: NamedFiles) -> sd_models::Result<Running> {
        if spec.enlarge.is_some() {
            let enlargement = self.begin_enlarging(spec, files)?;
            return Ok(Running::Enlarging(Box::new(enlargement), spec.size));
        }
        Ok(Running::Drawing(Box::new(self.begin_with(spec, files)?)))
    }

    fn step(&self, batch: &mut [&mut Running]) -> sd_models::Result<()> {
        if let [Running::Enlarging(enlargement, _)] = batch {
            return self.enlarge(enlargement);
        }
        let drawing = batch.iter_mut().filter_map(|running| match running {
            Running::Drawing(trajectory) => Some(&mut **trajectory),
            Running::Enlarging(..) => None,
        });
        self.step(&mut drawing.collect::<Vec<_>>())
    }

    fn decode(&self, running: &mut Running) -> sd_models::Result<Option<Rgb>> {
        match running {
            Running::Drawing(trajectory) => self.decode_part(trajectory),
            Running::Enlarging(enlargement, _) => match enlargement.picture() {
                Some(picture) => Ok(Some(picture.clone())),
                None => {
                    let reason = "was interrupted before it was enlarged".into();
                    Err(Error::Spec { field: "image", reason })
                }
            },
        }
    }

    fn preview(&self, running: &Running) -> sd_models::Result<Option<Rgb>> {
        match running {
            Running::Drawing(trajectory) if trajectory.has_image() => {
                self.preview(trajectory).map(Some)
            }
            Running::Drawing(_) | Running::Enlarging(..) => Ok(None),
        }
    }

    fn settle(&self) -> sd_models::Result<()> {
        self.synchronize()
    }

    fn free_bytes(&self) -> Option<u64> {
        match self.info().device.as_str() {
            "cpu" => memory::available(),
            _ => self.free_device_bytes(),
        }
    }
}

impl Trajectory for Running {
    fn done(&self) -> bool {
        match self {
            Self::Drawing(trajectory) => trajectory.done(),
            Self::Enlarging(enlargement, _) => enlargement.done(),
        }
    }

    fn enlarging(&self) -> bool {
        match self {
            Self::Drawing(trajectory) => trajectory.enlarging(),
            Self::Enlarging(..) => true,
        }
    }

    fn has_image(&self) -> bool {
        match self {
            Self::Drawing(trajectory) => trajectory.has_image(),
            Self::Enlarging(enlargement, _) => enlargement.done(),
        }
    }

    fn progress(&self) -> (usize, usize) {
        match self {
            Self::Drawing(trajectory) => trajectory.progress(),
            Self::Enlarging(enlargement, _) => enlargement.progress(),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Drawing(trajectory) => trajectory.rows(),
            Self::Enlarging(..) => 1,
        }
    }

    fn size(&self) -> Size {
        match self {
            Self::Drawing(trajectory) => trajectory.size(),
            Self::Enlarging(_, size) => *size,
        }
    }

    fn work_left(&self) -> usize {
        match self {
            Self::Drawing(trajectory) => trajectory.work_left(),
            Self::Enlarging(enlargement, _) => enlargement.work_left(),
        }
    }

    fn model(&self) -> Option<&ModelInfo> {
        match self {
            Self::Drawing(trajectory) => trajectory.refiner(),
            Self::Enlarging(..) => None,
        }
    }

    fn warnings(&self) -> &[String] {
        match self {
            Self::Drawing(trajectory) => trajectory.warnings(),
            Self::Enlarging(..) => &[],
        }
    }

    fn lora_files(&self) -> Vec<AssetFile> {
        match self {
            Self::Drawing(trajectory) => trajectory.lora_files(),
            Self::Enlarging(..) => Vec::new(),
        }
    }
}
