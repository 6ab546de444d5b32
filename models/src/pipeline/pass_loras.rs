//! The LoRAs of an image's passes: those that the request lists hold for both, those that a prompt
//! names for its pass.

use std::sync::Arc;

use super::pass::Pass;
use super::spec::Spec;
use crate::error::Result;
use crate::files::AssetFile;
use crate::layers::{LoraCache, LoraStack, ScaledLora};
use crate::text::{LoraUse, Loras};

/// The LoRAs of an image's passes.
#[derive(Clone, Default, PartialEq)]
pub struct PassLoras {
    /// Those of the base pass.
    pub base: LoraStack,
    /// Those of the hires pass; none without one.
    pub hires: LoraStack,
}

impl PassLoras {
    /// The files of all of them, in the versions that were read.
    pub(super) fn files(&self) -> Vec<AssetFile> {
        let mut files = self.base.files();
        for file in self.hires.files() {
            if !files.contains(&file) {
                files.push(file);
            }
        }
        files
    }

    /// What reads those of a spec; `None` if it has none.
    pub(super) fn reader(
        cache: &Arc<LoraCache>,
        spec: &Spec,
    ) -> Option<impl FnOnce() -> Result<Self> + Send + use<>> {
        let named = |pass: Pass<'_>| Ok((pass.field("prompt"), pass.text()?.1));
        // An error of a prompt is reported when the image begins.
        let passes = spec.passes().map(named).collect::<Result<Vec<_>>>().ok()?;
        let (cache, listed) = (Arc::clone(cache), spec.loras.clone());
        let some = !listed.is_empty() || passes.iter().any(|(_, named)| !named.is_empty());
        some.then_some(move || {
            let read =
                |(field, named): &(_, Loras)| stack(&cache, [("loras", &listed), (*field, named)]);
            let mut stacks = passes.iter().map(read).collect::<Result<Vec<_>>>()?.into_iter();
            let mut next = || stacks.next().unwrap_or_default();
            Ok(Self { base: next(), hires: next() })
        })
    }
}

/// LoRAs by the field that names them. Blocks.
fn stack(cache: &LoraCache, fields: [(&'static str, &[LoraUse]); 2]) -> Result<LoraStack> {
    let mut loras = Vec::new();
    for (field, used) in fields {
        for LoraUse { name, scale, text_encoder_scale } in used {
            let lora = cache.get(field, name)?;
            loras.push(ScaledLora { lora, unet: *scale, text: *text_encoder_scale });
            cache.admit(field, loras.iter().map(|scaled| &*scaled.lora))?;
        }
    }
    Ok(LoraStack::new(loras))
}
