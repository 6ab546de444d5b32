//! What the ControlNets of a request see, in the size of the images.

use std::sync::Arc;

use ::image::DynamicImage;
use sd_models::{AssetDir, Control, ControlRule, ModelInfo, Preprocessor, Size};

use super::controlnet::{ControlNet, Resolution, Unit};
use super::draw::DrawRequest;
use super::error::{ValidationError, brief};
use super::images::Transparency;
use super::input::{Input, size_of};
use super::limits::Limits;
use crate::image::{self, ControlMap, ControlOrigin, Fit};

/// A control picture of a request, decoded.
pub(super) struct DecodedControl {
    image: DynamicImage,
    model: String,
    preprocessor: Preprocessor,
    scale: f64,
    start: f64,
    end: f64,
    guess: bool,
    unit: Option<Unit>,
    fit: Fit,
}

impl DrawRequest {
    /// Gives the units of AUTOMATIC1111's extension, whose nets' names may end in a hash or be a part
    /// of one, the names that files have, and checks that there are those of all. Blocks, on a network
    /// folder for as long as that does.
    pub(crate) fn find_controlnets(
        &mut self,
        files: &AssetDir,
        limits: &Limits,
    ) -> Result<(), ValidationError> {
        let field = self.names.of("controlnets").to_owned();
        // More are refused.
        let nets = self.controlnets.iter_mut().flatten().take(limits.max_controlnets);
        for ControlNet { model, unit, .. } in nets {
            let Some(name) = model else { continue };
            let field = match unit {
                Some(unit) => format!("{}.model", unit.name),
                None => field.clone(),
            };
            if unit.is_some()
                && let Some((found, is_same)) = files.closest(name)
            {
                if !is_same {
                    let asked = brief(name);
                    self.warnings.push(format!("{field} {asked:?} was taken for {found:?}"));
                }
                *name = found;
            }
            files.check(name).map_err(|reason| {
                ValidationError::range(&field, format!("names the ControlNet {reason}"))
            })?;
        }
        Ok(())
    }

    /// Decodes the control pictures.
    pub(super) fn controls(
        &mut self,
        limits: &Limits,
    ) -> Result<Vec<DecodedControl>, ValidationError> {
        let nets = self.controlnets.take().unwrap_or_default();
        if nets.len() > limits.max_controlnets {
            let (count, most) = (nets.len(), limits.max_controlnets);
            let reason = format!("has {count} ControlNets; at most {most} are allowed");
            return Err(self.range("controlnets", reason));
        }
        let decoded = nets.iter().enumerate().map(|(k, net)| self.control(k, net, limits));
        let decoded = decoded.collect::<Result<Vec<_>, _>>();
        self.controlnets = Some(nets).filter(|nets| !nets.is_empty());
        let (decoded, warnings): (Vec<_>, Vec<_>) = decoded?.into_iter().unzip();
        self.warnings.extend(warnings.into_iter().flatten());
        Ok(decoded)
    }

    fn control(
        &self,
        k: usize,
        net: &ControlNet,
        limits: &Limits,
    ) -> Result<(DecodedControl, Vec<String>), ValidationError> {
        let name = match &net.unit {
            Some(unit) => unit.name.clone(),
            None => format!("{}[{k}]", self.names.of("controlnets")),
        };
        let image_name = format!("{name}.image");
        let own = net.image.as_ref();
        // As in the extension, the input image is the default.
        let file = own.or(self.image.as_ref().filter(|_| net.unit.is_some()));
        let required = || ValidationError::malformed(&image_name, "is required");
        let most = limits.max_input_pixels;
        let mut image = file.ok_or_else(required)?.decode(&image_name, most)?;
        let mut warnings = net.unit.as_ref().map_or_else(Vec::new, |unit| unit.warnings.clone());
        match self.transparency {
            Transparency::White => image = image::on_white(image),
            Transparency::Ignored if image::is_transparent(&image) => {
                warnings.push(format!(
                    "{image_name} is transparent in places: their hidden colours were used"
                ));
            }
            Transparency::Ignored => {}
        }
        if let Some(mask) = net.unit.as_ref().and_then(|unit| unit.mask.as_ref()) {
            let mask = image::on_white(mask.decode(&format!("{name}.mask"), most)?).to_luma8();
            // As in the extension: a mask that is more than one grey is a drawing.
            let all = |of: &dyn Fn(u8) -> bool| mask.pixels().all(|pixel| of(pixel.0[0]));
            if !all(&|grey| grey <= 5) && !all(&|grey| grey >= 250) {
                if (mask.width(), mask.height()) != (image.width(), image.height()) {
                    let reason = "must have the size of the image";
                    return Err(ValidationError::range(&format!("{name}.mask"), reason));
                }
                image = mask.into();
            }
        }
        let fit = match (&net.unit, own) {
            (Some(unit), Some(_)) => unit.fit,
            (Some(_), None) => self.fit,
            (None, _) => Fit::Stretch,
        };
        let preprocessor = net.preprocessor(&name)?;
        // A unit has a resolution of its own.
        if net.unit.is_none() && preprocessor != Preprocessor::None {
            image::check_own_size(&image, preprocessor, limits.most_of_a_map())
                .map_err(|reason| ValidationError::range(&image_name, reason))?;
        }
        let decoded = DecodedControl {
            image,
            model: net.model.clone().unwrap_or_default(),
            preprocessor,
            scale: net.scale.unwrap_or(1.0),
            start: net.start.unwrap_or(0.0),
            end: net.end.unwrap_or(1.0),
            guess: net.guess_mode.unwrap_or(false),
            unit: net.unit.clone(),
            fit,
        };
        Ok((decoded, warnings))
    }

    /// The controls in the size of the images.
    pub(super) fn sized(
        &mut self,
        decoded: Vec<DecodedControl>,
        size: Size,
        hires: Option<Size>,
        limits: &Limits,
    ) -> Result<Vec<Control>, ValidationError> {
        let sized = |control| self.sized_control(control, size, hires, limits);
        decoded.into_iter().map(sized).collect()
    }

    fn sized_control(
        &mut self,
        decoded: DecodedControl,
        size: Size,
        hires: Option<Size>,
        limits: &Limits,
    ) -> Result<Control, ValidationError> {
        let DecodedControl { image, preprocessor, unit, fit, .. } = decoded;
        let (picture, hires_picture) = match &unit {
            None => {
                let made = preprocessor.apply(&image::rgb(&image));
                let made = image::of_rgb(made);
                let fitted = |size| image::resize_to(&made, size, fit);
                (fitted(size), hires.map(fitted))
            }
            Some(unit) => {
                let overlay = self.overlay.as_ref().filter(|_| unit.is_cropped);
                let image = match overlay.and_then(|overlay| overlay.cropped(&image, size, fit)) {
                    Some(cropped) => cropped,
                    None => image,
                };
                let shorter = match unit.resolution {
                    Resolution::Shorter(side) => side,
                    Resolution::PixelPerfect => image::pixel_perfect(&image, size, fit),
                };
                let map = ControlMap::new(&image, preprocessor, shorter, limits.most_of_a_map());
                let refuse =
                    |reason| ValidationError::range(&format!("{}.image", unit.name), reason);
                let map = map.map_err(refuse)?;
                (map.fitted(size, fit), hires.map(|size| map.fitted(size, fit)))
            }
        };
        let (picture, hires_picture) = (Arc::new(picture), hires_picture.map(Arc::new));
        if unit.as_ref().is_some_and(|unit| unit.is_returned) {
            // As in the extension, the larger first.
            self.control_maps.returned.extend(hires_picture.clone());
            self.control_maps.returned.push(Arc::clone(&picture));
        }
        self.control_maps.origins.push(ControlOrigin {
            fit: unit.as_ref().map_or(fit, |unit| unit.fit),
            resolution: unit.as_ref().map(|unit| {
                (unit.processor_res, matches!(unit.resolution, Resolution::PixelPerfect))
            }),
        });
        Ok(Control {
            model: decoded.model,
            preprocessor,
            picture,
            hires_picture,
            scale: decoded.scale,
            start: decoded.start,
            end: decoded.end,
            rule: match unit {
                Some(unit) => ControlRule::Extension(unit.rule),
                None => ControlRule::Diffusers { guess: decoded.guess },
            },
        })
    }
}

/// The size of the images of a request that gives none: the input image's, or as in diffusers the
/// first control picture's.
pub(super) fn own_size(
    input: Option<&Input>,
    controls: &[DecodedControl],
    limits: &Limits,
    model: &ModelInfo,
) -> Option<Size> {
    let of_input = input.map(|input| input.size(limits, model));
    of_input.or_else(|| Some(size_of(&controls.first()?.image, limits, model)))
}
