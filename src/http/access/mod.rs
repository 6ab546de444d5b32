//! Who may do what: the options, and the names and addresses that they compare. The checks are in
//! `middleware/`.

mod address;
mod config;
mod proxies;

pub(crate) use address::prefix;
pub use address::{AllowedHost, BaseUrl};
pub(crate) use address::{Authority, WebOrigin};
pub use config::{AccessConfig, ApiKey};
pub use proxies::TrustedProxies;
