//! The HTTP side: the routes, what every request passes, and one folder for each dialect.

mod a1111;
mod admin;
mod admission;
mod connections;
mod drawing;
mod error;
mod headers;
mod ids;
mod invocations;
mod middleware;
mod openai;
mod page;
mod router;
mod state;
mod store;

pub use connections::listen;
pub use router::router;
pub use state::{ApiKey, HttpConfig};
