//! Bounds on the webhooks that are sent at a time: in all, and to one host, so that a host that does
//! not answer delays its own only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Maximum number of webhooks that are sent at a time.
const MAX_CALLS: usize = 16;

/// The same to one host.
const MAX_CALLS_OF_HOST: usize = 4;

/// The webhooks that are being sent.
#[derive(Debug)]
pub(crate) struct Calls {
    all: Arc<Semaphore>,
    /// By host and port, which the operator lists.
    hosts: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Default for Calls {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(MAX_CALLS)), hosts: Mutex::default() }
    }
}

impl Calls {
    /// Waits for a place to send a webhook to a host, which is free when the result is dropped.
    pub(crate) async fn place(&self, host: &str) -> [Option<OwnedSemaphorePermit>; 2] {
        let of_host = {
            let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
            let new = || Arc::new(Semaphore::new(MAX_CALLS_OF_HOST));
            Arc::clone(hosts.entry(host.to_owned()).or_insert_with(new))
        };
        // The semaphores are never closed. Who waits for a host takes no place of others.
        let of_host = of_host.acquire_owned().await.ok();
        [of_host, Arc::clone(&self.all).acquire_owned().await.ok()]
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_host_takes_a_part_of_the_places_and_all_together_no_more() {
        let calls = Calls::default();
        let mut places = Vec::new();
        for host in ["a", "b", "c", "d"] {
            for _ in 0..MAX_CALLS_OF_HOST {
                places.push(calls.place(host).now_or_never().expect("a place"));
            }
            assert!(calls.place(host).now_or_never().is_none(), "{host} has its places");
        }
        assert!(calls.place("e").now_or_never().is_none(), "there are no more in all");
        places.pop();
        assert!(calls.place("e").now_or_never().is_some());
    }
}
