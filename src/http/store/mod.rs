//! What is kept between requests, all of it in memory and bounded.

mod checkpoint;
mod in_flight;
mod jobs;
mod urls;

pub(crate) use checkpoint::Checkpoint;
pub(crate) use in_flight::{Begun, Underway};
pub(crate) use jobs::{Entry, JobStore};
pub(crate) use urls::Shelf;
