//! The refiner of a request, and the part of the noise levels in which its images are drawn.

use std::sync::Arc;

use sd_models::{ModelInfo, Refiner, Source, Span};

use super::draw::DrawRequest;
use super::error::ValidationError;

/// Where a refiner takes over: the share of diffusers' documentation.
const DEFAULT_SWITCH: f64 = 0.8;

impl DrawRequest {
    /// Gives the refiner its files. `known` are the models that there are.
    pub(crate) fn set_refiner(
        &mut self,
        files: Result<Option<Source>, String>,
        known: &[String],
    ) -> Result<(), ValidationError> {
        let Some(name) = &self.refiner else { return Ok(()) };
        let refuse = |reason: String| Err(self.range("refiner", reason));
        self.refiner_files = match files {
            Ok(Some(files)) => Some(files),
            Ok(None) if known.is_empty() => {
                return refuse(format!("names {name:?}, which is unknown; there are no models"));
            }
            Ok(None) => {
                let known = known.join(", ");
                return refuse(format!("names {name:?}, which is unknown; known are {known}"));
            }
            Err(reason) => return refuse(format!("names {name:?}: {reason}")),
        };
        Ok(())
    }

    /// The refiner, unless it is the model itself.
    pub(super) fn refiner(
        &self,
        model: &ModelInfo,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Arc<Refiner>>, ValidationError> {
        let Some(name) = self.refiner.clone() else {
            let dependent = [("refiner_switch_at", self.refiner_switch_at.is_some())];
            return self.reject_without("refiner", dependent);
        };
        if name == model.name {
            let field = self.names.of("refiner");
            warnings.push(format!("{field} {name:?} has no effect: it is the model itself"));
            return Ok(None);
        }
        let unknown = || self.range("refiner", format!("names {name:?}, which is unknown"));
        let source = self.refiner_files.clone().ok_or_else(unknown)?;
        let switch_at = self.refiner_switch_at.unwrap_or(DEFAULT_SWITCH);
        Ok(Some(Arc::new(Refiner { name, source, switch_at })))
    }

    /// The part of the noise levels. As in diffusers, 0 is no start.
    pub(super) fn span(&self) -> Span {
        Span { start: self.denoising_start.filter(|start| *start > 0.0), end: self.denoising_end }
    }
}
