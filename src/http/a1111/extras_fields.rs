//! The fields of "extras": how pictures are upscaled without drawing, and what is done with each.

use std::sync::Arc;

use schemars::JsonSchema;
use sd_models::{
    Enlarge, ModelInfo, PictureUpscaler, PromptSyntax, Rgb, SamplerOptions, Size, Span, Spec,
    XlOptions,
};
use serde::Deserialize;
use serde_json::Value;

use super::nothing::is_off;
use crate::http::error::{ApiError, Result};
use crate::request::{Fields, Limits, MAX_SIDE, ValidationError};

/// Fields that ask for a restoration of faces, which there is not.
const RESTORATION: [&str; 2] = ["gfpgan_visibility", "codeformer_visibility"];

/// Fields that change nothing without a restoration of faces and a folder of results.
const WITHOUT_EFFECT: [&str; 3] = ["codeformer_weight", "upscale_first", "show_extras_results"];

/// The largest scale: nothing is computed that is so much larger.
const MAX_SCALE: u32 = 64;

/// How pictures are upscaled.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Extras {
    /// 0: by `upscaling_resize`. 1: to `upscaling_resize_w` x `upscaling_resize_h`. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    resize_mode: Option<usize>,
    /// Scale of the sides; they are rounded down to multiples of 8. Default: 2.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SCALE))]
    upscaling_resize: Option<f64>,
    /// Width in pixels. Default: 512.
    #[schemars(extend("minimum" = 1, "maximum" = MAX_SIDE))]
    upscaling_resize_w: Option<usize>,
    /// Height in pixels. Default: 512.
    #[schemars(extend("minimum" = 1, "maximum" = MAX_SIDE))]
    upscaling_resize_h: Option<usize>,
    /// With `resize_mode` 1, whether what is beyond the size is cropped. Default: true.
    upscaling_crop: Option<bool>,
    /// One of `/sdapi/v1/upscalers`. Default: None, which changes nothing.
    upscaler_1: Option<String>,
    /// A second one, whose picture is blended into that of the first.
    upscaler_2: Option<String>,
    /// The share of the second one. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    extras_upscaler_2_visibility: Option<f64>,
}

impl Extras {
    /// Takes the fields of both routes out.
    pub(super) fn read(fields: &mut Fields, limits: &Limits) -> Result<Self, ValidationError> {
        for name in RESTORATION {
            if let Some((name, value)) = fields.take(&[name])?
                && !is_off(&value)
            {
                let reason = "is not supported: there is no restoration of faces";
                return Err(ValidationError::range(&name, reason));
            }
        }
        for name in WITHOUT_EFFECT {
            fields.take(&[name])?;
        }
        fields.read(limits)
    }

    /// The first upscaler, unless it is none.
    pub(super) fn first(&self) -> Option<PictureUpscaler> {
        upscaler(self.upscaler_1.as_deref())
    }

    /// The second upscaler and its share, unless that is nothing.
    fn second(&self) -> Option<(PictureUpscaler, f32)> {
        let share = self.extras_upscaler_2_visibility.filter(|share| *share > 0.0)?;
        Some((upscaler(self.upscaler_2.as_deref())?, share as f32))
    }

    /// What to do with a picture.
    pub(super) fn spec(
        &self,
        picture: Rgb,
        upscaler: PictureUpscaler,
        limits: &Limits,
        model: &ModelInfo,
    ) -> Result<Spec> {
        let (name, scale, canvas) = match self.to() {
            None => ("upscaling_resize", self.by(), None),
            Some((width, height)) => {
                let by = |side: usize, of: usize| side as f64 / of as f64;
                let scale = by(width, picture.width).max(by(height, picture.height));
                let crop = self.upscaling_crop.unwrap_or(true);
                ("upscaling_resize_w", scale, crop.then_some((width, height)))
            }
        };
        let second = self.second();
        let enlarge = Enlarge { picture, scale, canvas, upscaler, second };
        let (width, height) = enlarge.size();
        let most = limits.max_pixels;
        let refuse = |(width, height): (usize, usize), why: String| {
            let reason = format!("gives an image of {width}x{height}; {why}");
            Err(ValidationError::range(name, reason).into())
        };
        for (width, height) in [(width, height)].into_iter().chain(enlarge.canvas) {
            if width.saturating_mul(height) > most {
                return refuse((width, height), format!("at most {most} pixels are generated"));
            }
        }
        let Some(size) = Size::new(width, height) else {
            return refuse((width, height), "sides are whole multiples of 8".into());
        };
        let spec = spec(enlarge, size, model);
        model.check(&spec).map_err(refused)?;
        Ok(spec)
    }

    /// The scale of mode 0.
    fn by(&self) -> f64 {
        self.upscaling_resize.filter(|by| *by > 0.0).unwrap_or(2.0)
    }

    /// The size of mode 1.
    fn to(&self) -> Option<(usize, usize)> {
        let (width, height) = (self.upscaling_resize_w, self.upscaling_resize_h);
        (self.resize_mode == Some(1)).then(|| (width.unwrap_or(512), height.unwrap_or(512)))
    }

    /// What is done, as AUTOMATIC1111 writes it into the file.
    pub(super) fn info(&self) -> String {
        let Some(first) = self.first() else { return String::new() };
        let quoted = |text: &str| match text.contains([',', ':', '\n']) {
            true => Value::from(text).to_string(),
            false => text.to_owned(),
        };
        let mut info = match self.to() {
            None => format!("Postprocess upscale by: {:?}", self.by()),
            Some((width, height)) => {
                let crop = format!(", Postprocess crop to: {width}x{height}");
                let crop = if self.upscaling_crop.unwrap_or(true) { &*crop } else { "" };
                format!("Postprocess upscale to: {width}x{height}{crop}")
            }
        };
        info += &format!(", Postprocess upscaler: {}", quoted(first.title()));
        if let Some((second, _)) = self.second() {
            info += &format!(", Postprocess upscaler 2: {}", quoted(second.title()));
        }
        info
    }

    /// Warnings for what has no effect.
    pub(super) fn without_effect(&self) -> Vec<String> {
        let idle = self.first().is_none() && self.second().is_some();
        let warning = "upscaler_2 has no effect without upscaler_1: the images are unchanged";
        idle.then(|| warning.to_owned()).into_iter().collect()
    }
}

/// The upscaler of a name, unless it is none.
fn upscaler(name: Option<&str>) -> Option<PictureUpscaler> {
    let name = name.map(str::trim).filter(|name| !name.is_empty())?;
    Some(PictureUpscaler::from(name)).filter(|upscaler| *upscaler != PictureUpscaler::None)
}

/// The spec of a picture that becomes this size.
fn spec(enlarge: Enlarge, size: Size, model: &ModelInfo) -> Spec {
    Spec {
        prompt: String::new(),
        prompt_syntax: PromptSyntax::Plain,
        negative_prompt: String::new(),
        loras: Vec::new(),
        size,
        steps: 1,
        guidance_scale: 1.0,
        seed: 0,
        sampler: model.defaults.sampler,
        schedule: model.defaults.schedule,
        sampler_options: SamplerOptions::default(),
        img2img: None,
        embeds_guidance: false,
        clip_skip: 0,
        guidance_rescale: 0.0,
        variation: None,
        warnings: Vec::new(),
        hires: None,
        tiling: false,
        vae_tiling: None,
        xl: XlOptions::default(),
        span: Span::default(),
        refiner: None,
        enlarge: Some(Arc::new(enlarge)),
        controls: Vec::new(),
        ip_adapters: Vec::new(),
        eta_noise_seed_delta: 0,
    }
}

/// The error of a spec that the model refuses, in the client's names.
pub(super) fn refused(error: sd_models::Error) -> ApiError {
    match error {
        sd_models::Error::Spec { field, reason } => {
            ValidationError::range(client_name(field), reason).into()
        }
        other => ValidationError::body(other.to_string()).into(),
    }
}

pub(super) fn client_name(field: &str) -> &str {
    match field {
        "upscaler" => "upscaler_1",
        "second_upscaler" => "upscaler_2",
        "scale" => "upscaling_resize",
        other => other,
    }
}
