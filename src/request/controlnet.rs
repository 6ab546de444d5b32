//! The ControlNets of a request: their fields.

use std::sync::Arc;

use schemars::JsonSchema;
use sd_models::{CANNY, Extension, MAX_CONTROL_SCALE, Preprocessor, Rgb, THRESHOLD};
use serde::Deserialize;

use super::error::ValidationError;
use super::images::ImageFile;
use super::limits::Limits;
use crate::image::{self, ControlOrigin, Fit};

/// Maximum of a preprocessor's threshold: the largest gradient of OpenCV's Sobel filter.
const MAX_THRESHOLD: u32 = 2040;

/// A ControlNet of a request.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ControlNet {
    /// Name of the net: of its file without the extension, or of its directory.
    #[schemars(required)]
    pub(crate) model: Option<String>,
    /// Control picture, in base64 or as a data URL. It is resized to the images.
    #[schemars(required)]
    pub(crate) image: Option<ImageFile>,
    /// Factor of what the net adds. Default: 1.
    #[schemars(extend("minimum" = -MAX_CONTROL_SCALE, "maximum" = MAX_CONTROL_SCALE))]
    pub(crate) scale: Option<f64>,
    /// Share of the steps before which the net adds nothing. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) start: Option<f64>,
    /// Share of the steps after which the net adds nothing. Default: 1.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) end: Option<f64>,
    /// Whether the net is to be followed more than the prompt, as in diffusers; for one net it
    /// holds for all. Default: false.
    pub(crate) guess_mode: Option<bool>,
    /// What is made of the picture first: none, canny, invert or threshold. Default: none.
    pub(crate) preprocessor: Option<String>,
    /// Gradient above which canny continues an edge, default 100; brightness above which threshold
    /// is white, default 127.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_THRESHOLD))]
    pub(crate) low: Option<f64>,
    /// Gradient above which canny begins an edge, default 200.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_THRESHOLD))]
    pub(crate) high: Option<f64>,
    /// What is special about a unit of AUTOMATIC1111's extension.
    #[serde(skip)]
    pub(crate) unit: Option<Unit>,
}

/// A unit of AUTOMATIC1111's extension.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    /// Where it stands in the body.
    pub(crate) name: String,
    /// How the control picture fills the size; none is as the input image does.
    pub(crate) fit: Fit,
    /// Length of the shorter side at which the preprocessor works.
    pub(crate) resolution: Resolution,
    /// The same as the unit has it, even where another is taken.
    pub(crate) processor_res: usize,
    /// The grey of a drawing that replaces the picture, where there is one.
    pub(crate) mask: Option<ImageFile>,
    /// Whether the picture is cropped to the masked area where only that is generated.
    pub(crate) is_cropped: bool,
    /// Whether the reply has the picture as the net saw it.
    pub(crate) is_returned: bool,
    pub(crate) rule: Extension,
    /// What of it has no effect.
    pub(crate) warnings: Vec<String>,
}

/// The size in which a preprocessor works.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Resolution {
    /// So many pixels along the shorter side.
    Shorter(usize),
    /// As the images.
    PixelPerfect,
}

/// The control pictures of a request, once they are in the size of the images.
#[derive(Debug, Clone, Default)]
pub(crate) struct ControlMaps {
    /// Those that the reply has.
    pub(crate) returned: Vec<Arc<Rgb>>,
    /// How each was prepared.
    pub(crate) origins: Vec<ControlOrigin>,
}

/// Memory that a preprocessor takes for a picture of these sides, in bytes: in its own size, or at a
/// resolution of the extension.
pub(crate) fn processed(
    own: (u32, u32),
    preprocessor: Preprocessor,
    resolution: Option<Resolution>,
    limits: &Limits,
) -> usize {
    /// Bytes of a pixel: two copies, and where edges are found also gradients and marks.
    const COPIES: usize = 6;
    const PIXEL_BYTES: usize = 16;
    let each = if preprocessor == Preprocessor::None { COPIES } else { PIXEL_BYTES };
    let whole = image::processed(own, Preprocessor::None, 0);
    let pixels = match (resolution, preprocessor) {
        (None, _) | (_, Preprocessor::None | Preprocessor::Invert) => whole,
        // More are refused.
        (Some(Resolution::Shorter(side)), _) => {
            image::processed(own, preprocessor, side).min(limits.most_of_a_map())
        }
        (Some(Resolution::PixelPerfect), _) => limits.most_of_a_map(),
    };
    pixels.saturating_mul(each)
}

impl ControlNet {
    /// Memory that its pictures take, decoded and processed, in bytes. `input` is the request's input
    /// image, which a unit without a picture decodes for itself.
    pub(super) fn weigh(&mut self, limits: &Limits, input: Option<&ImageFile>) -> usize {
        let most = limits.max_input_pixels;
        let mut input = input.filter(|_| self.unit.is_some()).cloned();
        let image = self.image.as_mut().or(input.as_mut());
        let Some(image) = image else { return 0 };
        let decoded = image.weigh(most);
        let Some(own) = image.dimensions(most) else { return 0 };
        // One that is unknown is refused.
        let preprocessor = self.preprocessor("").unwrap_or_default();
        let (mask, resolution) = match &mut self.unit {
            Some(unit) => (unit.mask.as_mut(), Some(unit.resolution)),
            None => (None, None),
        };
        let mask = mask.map_or(0, |mask| mask.weigh(most));
        decoded.saturating_add(mask).saturating_add(processed(
            own,
            preprocessor,
            resolution,
            limits,
        ))
    }

    /// The preprocessor with its thresholds.
    pub(crate) fn preprocessor(&self, name: &str) -> Result<Preprocessor, ValidationError> {
        let field = |field: &str| format!("{name}.{field}");
        let named = self.preprocessor.as_deref().map(str::trim).filter(|text| !text.is_empty());
        let refuse = |reason: String| ValidationError::range(&field("preprocessor"), reason);
        let preprocessor = named.unwrap_or("none").parse().map_err(refuse)?;
        let unused = |given: Option<f64>, name: &str| match given {
            Some(_) => {
                let reason =
                    format!("has no effect with the preprocessor {}", named.unwrap_or("none"));
                Err(ValidationError::range(&field(name), reason))
            }
            None => Ok(()),
        };
        Ok(match preprocessor {
            Preprocessor::Canny { .. } => Preprocessor::Canny {
                low: self.low.unwrap_or(CANNY.0),
                high: self.high.unwrap_or(CANNY.1),
            },
            Preprocessor::Threshold { .. } => {
                unused(self.high, "high")?;
                Preprocessor::Threshold { above: self.low.unwrap_or(THRESHOLD) }
            }
            other => {
                unused(self.low, "low")?;
                unused(self.high, "high")?;
                other
            }
        })
    }
}
