//! Pictures that wait for a place in a batch: bounded, oldest first. Plain data; the engine
//! puts a lock around it.

use std::collections::VecDeque;

use super::job::Order;

/// The waiting pictures.
#[derive(Debug)]
pub(super) struct Queue {
    orders: VecDeque<Order>,
    capacity: usize,
    closed: bool,
}

/// Why a job was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Full,
    Closed,
}

impl Queue {
    pub(super) fn new(capacity: usize) -> Self {
        Self { orders: VecDeque::new(), capacity, closed: false }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.orders.is_empty()
    }

    /// All pictures of a job or none. A job larger than the queue is taken when nobody waits.
    pub(super) fn push(&mut self, job: Vec<Order>) -> Result<(), Refused> {
        if self.closed {
            return Err(Refused::Closed);
        }
        if self.orders.len() + job.len() > self.capacity {
            // Clients who left must not keep others out.
            self.orders.retain(Order::wanted);
        }
        if !self.orders.is_empty() && self.orders.len() + job.len() > self.capacity {
            return Err(Refused::Full);
        }
        self.orders.extend(job);
        Ok(())
    }

    /// Takes out the oldest wanted picture that `fits`.
    pub(super) fn next(&mut self, fits: impl FnMut(&Order) -> bool) -> Option<Order> {
        self.orders.retain(Order::wanted);
        let place = self.orders.iter().position(fits)?;
        self.orders.remove(place)
    }

    /// Takes nothing more.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Takes nothing more and gives back what waits.
    pub(super) fn clear(&mut self) -> VecDeque<Order> {
        self.closed = true;
        std::mem::take(&mut self.orders)
    }
}
