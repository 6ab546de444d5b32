//! The order in which jobs are submitted to a full queue: for each client the jobs of the highest
//! priority first, then in the order of acceptance. The engine is fair between clients.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::engine::{Client, Priority};

/// Client, priority and number of a job.
type Place = (String, Reverse<Priority>, i64);

/// The jobs that wait to be submitted.
#[derive(Debug, Default)]
pub(super) struct Turns {
    waiting: Mutex<BTreeSet<Place>>,
    left: Notify,
}

/// The turn of a job, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    place: Place,
}

impl Turns {
    fn waiting(&self) -> MutexGuard<'_, BTreeSet<Place>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no job of the client is before this one.
    pub(super) async fn wait(&self, client: &Client, priority: Priority, seq: i64) -> Turn<'_> {
        let place = (client.name().to_owned(), Reverse(priority), seq);
        self.waiting().insert(place.clone());
        let turn = Turn { turns: self, place };
        loop {
            let mut left = pin!(self.left.notified());
            // From here on a notification is not missed.
            left.as_mut().enable();
            if turn.is_next() {
                return turn;
            }
            left.await;
        }
    }
}

impl Turn<'_> {
    fn is_next(&self) -> bool {
        let waiting = self.turns.waiting();
        let before = waiting.range(..&self.place).next_back();
        before.is_none_or(|before| before.0 != self.place.0)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.waiting().remove(&self.place);
        self.turns.left.notify_waiters();
    }
}
