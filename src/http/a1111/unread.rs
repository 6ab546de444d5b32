//! Fields and options that nothing reads. AUTOMATIC1111 passes over them; here the response warns,
//! unless they ask for nothing.

use serde_json::Value;

use super::nothing::is_off;
use crate::request::{Fields, Object, brief};

/// Maximum number of warnings.
const MAX: usize = 16;

/// Fields that change no image: how AUTOMATIC1111 stores them, and the parts of what is refused or
/// switched off elsewhere.
const SILENT: [&str; 11] = [
    "do_not_save_samples",
    "do_not_save_grid",
    "override_settings_restore_afterwards",
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

/// Options that are on by default, whose other values ask for something even where they are off.
const ON: [(&str, &str); 10] = [
    ("emphasis", "original"),
    ("enable_emphasis", "true"),
    ("enable_batch_seeds", "true"),
    ("comma_padding_backtrack", "20"),
    ("ESRGAN_tile", "192"),
    ("ESRGAN_tile_overlap", "8"),
    ("initial_noise_multiplier", "1"),
    ("extra_networks_default_multiplier", "1"),
    ("uni_pc_lower_order_final", "true"),
    ("hires_fix_refiner_pass", "second pass"),
];

/// Whether an option has no effect there, either.
fn asks_for_nothing(name: &str, value: &Value) -> bool {
    let name = name.rsplit('.').next().unwrap_or(name);
    let Some((_, default)) = ON.iter().find(|(on, _)| *on == name) else { return is_off(value) };
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_ascii_lowercase);
    value.is_null()
        || text.trim() == *default
        || matches!((text.trim().parse::<f64>(), default.parse::<f64>()), (Ok(a), Ok(b)) if a == b)
}

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
    let mut names: Vec<_> = unread
        .filter(|(name, value)| !asks_for_nothing(name, value))
        .map(|(name, _)| name)
        .collect();
    let more = names.len().saturating_sub(MAX);
    names.truncate(MAX);
    let mut warnings: Vec<_> =
        names.iter().map(|name| format!("{name} has no effect here and was ignored")).collect();
    if more > 0 {
        warnings.push(format!("{more} more fields have no effect here and were ignored"));
    }
    warnings
}
