//! What an image asks of ControlNets.

use std::str::FromStr;
use std::sync::Arc;

use crate::picture::{Preprocessor, Rgb};

/// Maximum magnitude of a scale. More only burns the image.
pub const MAX_CONTROL_SCALE: f64 = 10.0;

/// A ControlNet of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Control {
    /// Name of the net.
    pub model: String,
    /// What has been made of the picture that was given, for the image's parameters.
    pub preprocessor: Preprocessor,
    /// What the net sees, in the size of the spec.
    pub picture: Arc<Rgb>,
    /// The same in the size of the hires pass; none without one.
    pub hires_picture: Option<Arc<Rgb>>,
    /// Factor of all that the net adds.
    pub scale: f64,
    /// Share of the steps before which the net adds nothing, 0 to 1.
    pub start: f64,
    /// Share of the steps after which the net adds nothing, 0 to 1.
    pub end: f64,
    /// How the net is applied.
    pub rule: ControlRule,
}

/// How a net is applied to rows, layers and steps.
#[derive(Debug, Clone, PartialEq)]
pub enum ControlRule {
    /// As in diffusers. A share counts timesteps: the net takes part in the i-th of n where
    /// `start <= i / n` and `(i + 1) / n <= end`.
    Diffusers {
        /// Only the conditional rows are steered, the outer layers less. Asked for by one net of
        /// an image, it holds for all.
        guess: bool,
    },
    /// As in AUTOMATIC1111's extension.
    Extension(Extension),
}

/// The settings of a unit of AUTOMATIC1111's extension.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Extension {
    /// What is more important.
    pub mode: ControlMode,
    /// The passes in which the net takes part.
    pub passes: ControlPasses,
    /// Whether the hires pass is steered as with [`ControlMode::Prompt`], for lines of one pixel.
    pub is_soft_in_hires: bool,
    /// A factor for each layer in place of the scale and the mode's factors.
    pub layers: Option<Vec<f64>>,
}

/// What is more important, by AUTOMATIC1111's extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ControlMode {
    /// Neither.
    #[default]
    Balanced,
    /// The outer layers are steered less: by 0.825 for each layer from the middle.
    Prompt,
    /// The same in the conditional rows alone.
    Control,
}

/// One row a mode: the extension's name, and its number there.
const MODES: [(ControlMode, &str, &str); 3] = [
    (ControlMode::Balanced, "Balanced", "0"),
    (ControlMode::Prompt, "My prompt is more important", "1"),
    (ControlMode::Control, "ControlNet is more important", "2"),
];

impl ControlMode {
    /// The extension's name.
    pub fn title(self) -> &'static str {
        let row = MODES.iter().find(|row| row.0 == self);
        row.expect("every variant has a row; a test walks them").1
    }
}

impl FromStr for ControlMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let name = name.trim();
        // An enumeration's member, as clients in Python print it, has its name behind a point.
        let member = name.rsplit('.').next().unwrap_or(name);
        let row = MODES.iter().find(|(mode, title, number)| {
            let own = format!("{mode:?}");
            title.eq_ignore_ascii_case(name) || *number == name || own.eq_ignore_ascii_case(member)
        });
        row.map(|row| row.0).ok_or_else(|| {
            let known = MODES.map(|row| row.1).join(", ");
            format!("{name:?} is unknown; known are {known}")
        })
    }
}

/// The passes in which a net takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ControlPasses {
    /// All.
    #[default]
    Both,
    /// The base pass.
    Base,
    /// The hires pass.
    Hires,
}

impl Control {
    /// Whether it is a unit of AUTOMATIC1111's extension.
    pub(super) fn is_unit(&self) -> bool {
        matches!(self.rule, ControlRule::Extension(_))
    }

    /// Whether it takes part in a pass.
    pub(super) fn is_in(&self, hires: bool) -> bool {
        let passes = match &self.rule {
            ControlRule::Diffusers { .. } => ControlPasses::Both,
            ControlRule::Extension(extension) => extension.passes,
        };
        match passes {
            ControlPasses::Both => true,
            ControlPasses::Base => !hires,
            // As in the extension, without a hires pass it is nothing that could be chosen.
            ControlPasses::Hires => hires || self.hires_picture.is_none(),
        }
    }

    /// Whether it takes part in each of `evaluations`, of which a step has `stages`.
    pub(super) fn active(&self, evaluations: usize, stages: usize) -> Vec<bool> {
        active((self.start, self.end), self.is_unit(), evaluations, stages)
    }

    /// Whether by its rule the unconditional row is left alone; a net whose residuals are pooled
    /// leaves it in any case.
    pub(super) fn steers_prompt_alone(&self) -> bool {
        match &self.rule {
            ControlRule::Diffusers { guess } => *guess,
            ControlRule::Extension(extension) => extension.mode == ControlMode::Control,
        }
    }
}

/// Whether what acts from a share of the steps to another takes part in each of `evaluations`, of which
/// a step has `stages`; a unit of AUTOMATIC1111's extension counts them as there.
pub(super) fn active(
    (start, end): (f64, f64),
    is_unit: bool,
    evaluations: usize,
    stages: usize,
) -> Vec<bool> {
    let of = |i: usize, n: usize| i as f64 / n as f64;
    let takes_part = |i: usize| {
        if !is_unit {
            return start <= of(i, evaluations) && of(i + 1, evaluations) <= end;
        }
        // AUTOMATIC1111 counts a step when its first evaluation is done.
        let (step, stage) = (i / stages, i % stages);
        let counted = if stage > 0 { step } else { step.saturating_sub(1) };
        (start..=end).contains(&of(counted, evaluations.div_ceil(stages)))
    };
    (0..evaluations).map(takes_part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_is_found_by_name_and_number() {
        for (mode, title, number) in MODES {
            assert_eq!(mode.title(), title);
            for name in [title, number, &title.to_uppercase(), &format!("ControlMode.{mode:?}")] {
                assert_eq!(name.parse(), Ok(mode), "{name}");
            }
        }
        assert!("3".parse::<ControlMode>().is_err());
    }
}
