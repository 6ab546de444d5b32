//! The safety checker of Stable Diffusion v1.x, which flags images as NSFW. CLIP's vision tower
//! turns an image into an embedding, whose cosines with those of some concepts are compared with
//! thresholds. What becomes of a flagged image is the caller's decision.
//!
//! Reference: diffusers 0.42 `pipelines/stable_diffusion/safety_checker.py`; transformers
//! `models/clip/modeling_clip.py`, `CLIPVisionModel`, and its `CLIPImageProcessor` over Pillow.

mod config;

use candle_core::{D, DType, Device, Tensor};

use self::config::{Preprocessor, tower};
use super::vision::VisionTower;
use crate::error::{Error, Result};
use crate::files::{Source, Weights};
use crate::layers::LayerBuilder;
use crate::ops::on_host;
use crate::picture::{Rgb, clip_crop};

/// Number of NSFW concepts.
const CONCEPTS: usize = 17;
/// Number of special care concepts.
const SPECIAL_CONCEPTS: usize = 3;
/// Added to all later scores once a special care concept is found (`adjustment` in diffusers).
const SPECIAL_CARE: f32 = 0.01;

/// The checker.
pub struct SafetyChecker {
    preprocessor: Preprocessor,
    tower: VisionTower,
    concepts: ConceptEmbeds,
    special: ConceptEmbeds,
}

/// Concept embeddings of unit length (D, n) f32, and the cosine above which an image matches each.
struct ConceptEmbeds {
    columns: Tensor,
    thresholds: Vec<f32>,
}

/// Scores: the cosines minus the thresholds, rounded as in diffusers.
#[derive(Debug, Clone, PartialEq)]
pub struct SafetyResult {
    /// Of the special care concepts.
    pub special: Vec<f32>,
    /// Of the NSFW concepts; above 0 the image is flagged.
    pub concepts: Vec<f32>,
}

impl SafetyResult {
    /// From the cosines of an image and the thresholds.
    fn new(special: (&[f32], &[f32]), concepts: (&[f32], &[f32])) -> Self {
        let mut care = 0.0;
        let mut scores = |(cosines, thresholds): (&[f32], &[f32]), calls_for_care: bool| {
            let score = |(cosine, threshold): (&f32, &f32)| {
                let score = ((cosine - threshold + care) * 1000.0).round_ties_even() / 1000.0;
                if calls_for_care && score > 0.0 {
                    care = SPECIAL_CARE;
                }
                score
            };
            cosines.iter().zip(thresholds).map(score).collect()
        };
        Self { special: scores(special, true), concepts: scores(concepts, false) }
    }

    /// Whether the image is flagged as NSFW.
    pub fn nsfw(&self) -> bool {
        self.concepts.iter().any(|score| *score > 0.0)
    }
}

impl SafetyChecker {
    /// Builds the checker from `safety_checker/` and `feature_extractor/`.
    pub fn load(source: &Source, weights: &Weights, device: &Device, dtype: DType) -> Result<Self> {
        let config = tower(source)?;
        let preprocessor = Preprocessor::read(source, config.image_size)?;
        let root = LayerBuilder::new(weights, device, dtype);
        let outputs = config.projection_dim;
        let checker = Self {
            preprocessor,
            tower: VisionTower::load(&root, config)?,
            concepts: ConceptEmbeds::load(&root, "concept_embeds", CONCEPTS, outputs)?,
            special: ConceptEmbeds::load(&root, "special_care_embeds", SPECIAL_CONCEPTS, outputs)?,
        };
        weights.finish(|name| name.ends_with("embeddings.position_ids"));
        Ok(checker)
    }

    /// Scores an image.
    pub fn check(&self, picture: &Rgb) -> Result<SafetyResult> {
        let embedding = self.embed(&self.preprocess(picture)?)?;
        let (special, concepts) =
            (self.special.cosines(&embedding)?, self.concepts.cosines(&embedding)?);
        Ok(SafetyResult::new(
            (&special, &self.special.thresholds),
            (&concepts, &self.concepts.thresholds),
        ))
    }

    /// The preprocessed image (3, S, S) f32 on the CPU: resized, cropped at the centre to S pixels,
    /// normalized.
    pub fn preprocess(&self, picture: &Rgb) -> Result<Tensor> {
        let Preprocessor { shortest_edge, normalization } = &self.preprocessor;
        normalization.of(&clip_crop(picture, *shortest_edge, self.tower.config().image_size))
    }

    /// A preprocessed image (3, S, S) -> its embedding (1, D) f32.
    pub fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        self.tower.embed(pixels)
    }
}

impl ConceptEmbeds {
    fn load(p: &LayerBuilder<'_>, name: &str, count: usize, width: usize) -> Result<Self> {
        let embeds = unit(&p.tensor(name, &[count, width])?)?;
        let thresholds = p.tensor(&format!("{name}_weights"), &[count])?.to_vec1()?;
        Ok(Self { columns: embeds.t()?.contiguous()?, thresholds })
    }

    fn cosines(&self, embedding: &Tensor) -> Result<Vec<f32>> {
        let embedding = unit(&on_host(embedding)?)?;
        let cosines = embedding.matmul(&self.columns)?.flatten_all()?.to_vec1::<f32>()?;
        if cosines.iter().any(|cosine| cosine.is_nan()) {
            // NaN is not above any threshold, so the image would pass.
            return Err(Error::Compute(candle_core::Error::Msg(
                "the image's embedding contains NaN".into(),
            )));
        }
        Ok(cosines)
    }
}

/// Rows of unit length, as torch's `normalize` makes them.
fn unit(rows: &Tensor) -> Result<Tensor> {
    let norms = rows.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.clamp(1e-12, f32::INFINITY)?;
    Ok(rows.broadcast_div(&norms)?)
}
