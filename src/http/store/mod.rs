//! Stores that outlive a request, all of them bounded. Jobs can outlive the process.

mod calls;
mod checkpoint;
mod in_flight;
mod jobs;
mod urls;

pub(crate) use calls::Calls;
pub(crate) use checkpoint::SelectedCheckpoint;
pub(crate) use in_flight::{InFlight, InFlightRequest};
pub(crate) use jobs::{
    Cursor, EndedJob, JobEnd, JobLimits, JobRecord, JobStore, NewJob, RemovedJob, StoredRequest,
    UnfinishedJob,
};
pub(crate) use urls::UrlStore;
