//! Fields and options that nothing reads. AUTOMATIC1111 passes over them; here the response warns,
//! unless they ask for nothing.

use serde_json::Value;

use super::nothing::is_off;
use crate::request::{Fields, Object, brief};

/// Maximum number of warnings.
const MAX: usize = 16;

/// Fields that change no image: how AUTOMATIC1111 stores them, and the parts of what is refused or
/// switched off elsewhere.
const SILENT: [&str; 12] = [
    "do_not_save_samples",
    "do_not_save_grid",
    "override_settings_restore_afterwards",
    "refiner_switch_at",
    "comments",
    "script_args",
    "image_cfg_scale",
    // Without `enable_hr`.
    "denoising_strength",
    "firstphase_width",
    "firstphase_height",
    // Without a mask.
    "mask_round",
    "initial_noise_multiplier",
];

/// The warnings of the fields that remain, and of the options of the request. Without `warns_of_hires`
/// the fields of the hires pass are those of a pass that is switched off.
pub(super) fn warnings(
    fields: &Fields,
    options: Option<&Object>,
    warns_of_hires: bool,
) -> Vec<String> {
    let is_of_hires = |name: &str| !warns_of_hires && name.starts_with("hr_");
    let is_silent = |name: &str| SILENT.contains(&name) || is_of_hires(name);
    let fields = fields.rest().filter(|(name, _)| !is_silent(name));
    let fields = fields.map(|(name, value)| (brief(name).into_owned(), value));
    let options = options.into_iter().flatten();
    let options =
        options.map(|(name, value)| (format!("override_settings.{}", brief(name)), value));
    said(fields.chain(options))
}

/// The warning of options that are set.
pub(super) fn of_options(options: &Object) -> Vec<String> {
    said(options.iter().map(|(name, value)| (brief(name).into_owned(), value)))
}

fn said<'a>(unread: impl Iterator<Item = (String, &'a Value)>) -> Vec<String> {
    let mut names: Vec<_> =
        unread.filter(|(_, value)| !is_off(value)).map(|(name, _)| name).collect();
    let more = names.len().saturating_sub(MAX);
    names.truncate(MAX);
    let mut warnings: Vec<_> =
        names.iter().map(|name| format!("{name} has no effect here and was ignored")).collect();
    if more > 0 {
        warnings.push(format!("{more} more fields have no effect here and were ignored"));
    }
    warnings
}
