//! Typed requests: their fields, schemas and validation.

mod controlnet;
mod controls;
mod draw;
mod error;
mod fields;
mod images;
mod input;
mod ip_adapter;
mod ip_pictures;
mod json;
mod limits;
mod mask;
mod passes;
mod refiner;
mod sampler;
mod schema;
mod specs;
mod values;
mod xl;

pub(crate) use controlnet::{ControlMaps, ControlNet, Resolution, Unit, processed};
pub use draw::DrawRequest;
pub(crate) use draw::{MAX_GUIDANCE, MAX_SCORE, MAX_SEED_DELTA, MAX_SIDE};
pub use error::ValidationError;
pub(crate) use error::{brief, shortened};
pub use fields::Fields;
pub(crate) use fields::Names;
pub(crate) use images::{ImageFile, MaskArea, Transparency};
pub(crate) use ip_adapter::{IpAdapterFields, IpUnit, OneOrMany, Scale};
pub(crate) use json::{MAX_FIELDS, Object, object};
pub use limits::Limits;
pub(crate) use sampler::{sampler, schedule};
pub(crate) use schema::publish;
pub(crate) use values::found;
