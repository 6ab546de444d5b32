//! Stores that outlive a request: in memory and bounded.

mod checkpoint;
mod in_flight;
mod jobs;
mod urls;

pub(crate) use checkpoint::SelectedCheckpoint;
pub(crate) use in_flight::{InFlight, InFlightRequest};
pub(crate) use jobs::{JobRecord, JobStore};
pub(crate) use urls::UrlStore;
