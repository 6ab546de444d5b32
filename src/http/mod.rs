//! The HTTP server: routes, middleware, admission, and a folder for each API.

mod a1111;
mod access;
mod admin;
mod admission;
mod coding;
mod connections;
mod deadline;
mod docs;
mod drawing;
mod error;
mod extract;
mod headers;
mod ids;
mod invocations;
mod links;
mod middleware;
mod openai;
mod page;
mod progress;
mod reading;
mod router;
mod slots;
mod state;
mod store;
mod streaming;
mod unsent;

pub use access::{AccessConfig, AllowedHost, ApiKey, BaseUrl, TrustedProxies};
pub use connections::{RESERVED_CONNECTIONS, listen};
pub use router::router;
pub(crate) use router::router_with;
pub use state::HttpConfig;
