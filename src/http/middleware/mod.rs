//! Layers around the routes.

pub(crate) mod auth;
pub(crate) mod cors;
pub(crate) mod forwarded;
pub(crate) mod observe;
pub(crate) mod origin;
pub(crate) mod sagemaker_route;
pub(crate) mod unread;
