//! The refiner of a spec. Not the model itself, which is in [`super::refiner`].

use crate::files::{AssetFile, Checkpoint, Source};

/// A model that takes an image over.
#[derive(Debug, Clone, PartialEq)]
pub struct Refiner {
    /// Its name.
    pub name: String,
    /// Its files.
    pub source: Source,
    /// The share of the training's timesteps after which it takes over, 0 to 1.
    pub switch_at: f64,
}

impl Refiner {
    /// Its file in the present version, where it is a single one. Blocks: looks at it.
    pub fn file(&self) -> Option<AssetFile> {
        match &self.source {
            Source::Checkpoint(Checkpoint { file, .. }) => {
                AssetFile::new(&self.name, file.clone()).ok()
            }
            _ => None,
        }
    }
}
