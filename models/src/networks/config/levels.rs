//! What the configurations of UNet and VAE have in common: the channels of their levels.

use crate::error::Result;
use crate::files::Keys;

/// Maximum number of levels of a UNet or a VAE, each of which halves the sides.
const MAX_LEVELS: usize = 8;

/// Maximum number of channels of a level.
const MAX_CHANNELS: usize = 65_536;

/// Checks the channels of the levels of a UNet or a VAE.
pub(super) fn check_levels(keys: &Keys, channels: &[usize]) -> Result<()> {
    let key = "block_out_channels";
    if !(1..=MAX_LEVELS).contains(&channels.len()) {
        return Err(keys.invalid(key, format!("{} must be 1 to {MAX_LEVELS}", channels.len())));
    }
    match channels.iter().find(|channels| !(1..=MAX_CHANNELS).contains(*channels)) {
        Some(found) => Err(keys.invalid(key, format!("{found} must be 1 to {MAX_CHANNELS}"))),
        None => Ok(()),
    }
}
