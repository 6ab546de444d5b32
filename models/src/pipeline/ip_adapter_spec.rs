//! What an image asks of IP-Adapters.

use std::sync::Arc;

use super::control_spec::ControlPasses;
use crate::networks::{CrossAttentionPlace, UNetConfig, UNetPart};
use crate::picture::Rgb;

/// Maximum magnitude of a scale. More only burns the image.
pub const MAX_IP_SCALE: f64 = 10.0;

/// An IP-Adapter of an image, and the pictures that it is to look like.
#[derive(Debug, Clone, PartialEq)]
pub struct IpAdapter {
    /// Name of the adapter.
    pub model: String,
    /// Pictures as the adapter sees them ([`crate::networks::IpAdapterModel::picture`]).
    pub pictures: Vec<Arc<Rgb>>,
    /// Factor of what it adds.
    pub scale: IpScale,
    /// Share of the steps before which it adds nothing, 0 to 1.
    pub start: f64,
    /// Share of the steps after which it adds nothing, 0 to 1.
    pub end: f64,
    /// Of a unit of AUTOMATIC1111's extension, the passes in which it takes part: then the shares are
    /// counted as there. Without, it takes part in both.
    pub unit: Option<ControlPasses>,
}

/// The factor of what an adapter adds.
#[derive(Debug, Clone, PartialEq)]
pub enum IpScale {
    /// In all cross attentions.
    All(f64),
    /// In those of some blocks; in others it adds nothing. As diffusers' dictionaries.
    Blocks(Vec<BlockScale>),
    /// In those of each transformer: on the way down, in the middle, on the way up. As the advanced
    /// weights of AUTOMATIC1111's extension.
    Transformers(Vec<f64>),
}

/// The factor in a block.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockScale {
    /// The part of the UNet.
    pub part: UNetPart,
    /// The block there; none for all.
    pub block: Option<usize>,
    /// The factor in each of its transformers, or one for all.
    pub scales: Vec<f64>,
}

impl From<f64> for IpScale {
    fn from(scale: f64) -> Self {
        Self::All(scale)
    }
}

impl IpScale {
    /// All its numbers.
    pub fn numbers(&self) -> Vec<f64> {
        match self {
            Self::All(scale) => vec![*scale],
            Self::Transformers(scales) => scales.clone(),
            Self::Blocks(blocks) => blocks.iter().flat_map(|block| block.scales.clone()).collect(),
        }
    }

    /// The factor in each cross attention of a UNet.
    ///
    /// # Errors
    /// A block that has no cross attention, or another number of transformers; the text reads on from
    /// the adapter's name.
    pub(super) fn of(&self, unet: &UNetConfig) -> Result<Vec<f64>, String> {
        let places = unet.cross_attentions();
        let blocks = match self {
            Self::All(scale) => return Ok(vec![*scale; places.len()]),
            Self::Transformers(scales) => {
                let of = |place: &CrossAttentionPlace| (place.part, place.block, place.layer);
                let transformers = places.chunk_by(|a, b| of(a) == of(b));
                let count = transformers.clone().count();
                if scales.len() != count {
                    let found = scales.len();
                    return Err(format!("takes {count} advanced weights, not {found}"));
                }
                let each = transformers.zip(scales);
                return Ok(each.flat_map(|(own, scale)| vec![*scale; own.len()]).collect());
            }
            Self::Blocks(blocks) => blocks,
        };
        let mut factors = vec![0.0; places.len()];
        for scale in blocks {
            let BlockScale { part, block, scales } = scale;
            let name = scale.name();
            let mut is_any = false;
            for (place, factor) in places.iter().zip(&mut factors) {
                if place.part != *part || block.is_some_and(|block| block != place.block) {
                    continue;
                }
                is_any = true;
                let layers = places
                    .iter()
                    .filter(|other| (other.part, other.block) == (place.part, place.block));
                let layers = layers.map(|other| other.layer + 1).max().unwrap_or(1);
                *factor = match &scales[..] {
                    [one] => *one,
                    each if each.len() == layers => each[place.layer],
                    each => {
                        let count = each.len();
                        return Err(format!(
                            "has {count} scales of {name}, which has {layers} transformers"
                        ));
                    }
                };
            }
            if !is_any {
                return Err(format!(
                    "has a scale of {name}, which is no part of the UNet with attention to the prompt"
                ));
            }
        }
        Ok(factors)
    }
}

impl BlockScale {
    /// As in diffusers' dictionaries.
    fn name(&self) -> String {
        let part = match self.part {
            UNetPart::Down => "down",
            UNetPart::Middle => "mid",
            UNetPart::Up => "up",
        };
        self.block.map_or(part.to_owned(), |block| format!("{part}.block_{block}"))
    }
}

impl IpAdapter {
    /// Whether it takes part in a pass of an image with a hires pass or without.
    pub(super) fn is_in(&self, hires: bool, has_hires: bool) -> bool {
        match self.unit.unwrap_or_default() {
            ControlPasses::Both => true,
            ControlPasses::Base => !hires,
            // As in the extension, without a hires pass it is nothing that could be chosen.
            ControlPasses::Hires => hires || !has_hires,
        }
    }
}
