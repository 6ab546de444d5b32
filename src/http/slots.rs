//! What the requests in flight hold: slots, and bytes of bodies and of responses that their clients
//! have not taken; and the input images of those that wait to be generated. In all and of each
//! client.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::engine::Client;
use crate::host::freed::FreedMemory;

/// A number of requests and of bytes of their bodies and responses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub(crate) requests: usize,
    pub(crate) bytes: usize,
}

/// Counts what is held, and refuses what would exceed a limit.
#[derive(Debug)]
pub(crate) struct Slots {
    most: Amount,
    most_of_client: Amount,
    /// What is told of too many bytes, in all and of a client.
    of_bytes: [fn(usize) -> Limit; 2],
    held: Mutex<Held>,
    freed: FreedMemory,
}

#[derive(Debug, Default)]
struct Held {
    all: Amount,
    clients: HashMap<Client, Amount>,
}

/// The limit that a request would have exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Limit {
    /// Of all clients together.
    #[error("too many requests are in flight; the maximum is {0}, --max-requests")]
    Requests(usize),
    /// Of one client.
    #[error(
        "too many requests of this client are in flight; the maximum is {0}, \
             --max-requests-per-client"
    )]
    ClientRequests(usize),
    /// Of all clients together.
    #[error(
        "too many bytes of requests and of unread responses are in flight; the maximum is {0}, \
             --max-body-bytes-in-flight"
    )]
    Bytes(usize),
    /// Of one client.
    #[error(
        "too many bytes of this client's requests and unread responses are in flight; the maximum \
             is {0}, half of --max-body-bytes-in-flight"
    )]
    ClientBytes(usize),
    /// Input images, of all clients together.
    #[error(
        "too many bytes of input images are held until they are generated from; the maximum is {0}, \
             --max-decoded-bytes"
    )]
    Inputs(usize),
    /// Input images of one client.
    #[error(
        "too many bytes of this client's input images are held until they are generated from; the \
             maximum is {0}, half of --max-decoded-bytes"
    )]
    ClientInputs(usize),
}

/// What one request holds. Given back on drop.
#[derive(Debug)]
pub(crate) struct Share {
    slots: Arc<Slots>,
    client: Option<Client>,
    requests: usize,
    bytes: AtomicUsize,
}

impl Slots {
    pub(crate) fn new(most: Amount, most_of_client: Amount, freed: FreedMemory) -> Arc<Self> {
        let of_bytes: [fn(usize) -> Limit; 2] = [Limit::Bytes, Limit::ClientBytes];
        Arc::new(Self { most, most_of_client, of_bytes, held: Mutex::default(), freed })
    }

    /// For the input images of requests, of so many bytes together, and of half of that of a client.
    pub(crate) fn of_inputs(bytes: usize, freed: FreedMemory) -> Arc<Self> {
        let most = |bytes| Amount { requests: 0, bytes };
        let of_bytes: [fn(usize) -> Limit; 2] = [Limit::Inputs, Limit::ClientInputs];
        let (most, most_of_client, held) = (most(bytes), most(bytes.div_ceil(2)), Mutex::default());
        Arc::new(Self { most, most_of_client, of_bytes, held, freed })
    }

    /// The bytes that one client may hold at most.
    pub(crate) fn most_of_client(&self) -> usize {
        self.most_of_client.bytes
    }

    /// Takes bytes of the client of a share, of those that one client may have at most.
    pub(crate) fn take_for(self: &Arc<Self>, share: &Share, bytes: usize) -> Result<Share, Limit> {
        let bytes = bytes.min(self.most_of_client.bytes);
        self.take(share.client.as_ref(), Amount { requests: 0, bytes })
    }

    /// Takes a share. Without a client, only the limits of all clients together hold.
    pub(crate) fn take(
        self: &Arc<Self>,
        client: Option<&Client>,
        amount: Amount,
    ) -> Result<Share, Limit> {
        self.add(client, amount)?;
        let (slots, client) = (Arc::clone(self), client.cloned());
        Ok(Share { slots, client, requests: amount.requests, bytes: amount.bytes.into() })
    }

    /// Takes a share for bytes that are in memory already. It is never refused; what comes after it
    /// is, if it exceeds the limits.
    pub(crate) fn count(self: &Arc<Self>, client: Option<&Client>, bytes: usize) -> Share {
        let mut held = self.lock();
        let more = Amount { requests: 0, bytes };
        held.all = held.all.plus(more);
        if let Some(client) = client {
            let one = held.clients.entry(client.clone()).or_default();
            *one = one.plus(more);
        }
        drop(held);
        let (slots, client) = (Arc::clone(self), client.cloned());
        Share { slots, client, requests: 0, bytes: bytes.into() }
    }

    /// What all clients hold together.
    pub(crate) fn held(&self) -> Amount {
        self.lock().all
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, client: Option<&Client>, more: Amount) -> Result<(), Limit> {
        let mut held = self.lock();
        let all = held.all.plus(more);
        if all.requests > self.most.requests {
            return Err(Limit::Requests(self.most.requests));
        }
        // What a client holds beyond its own limit, in responses that it does not read, is not held
        // against others.
        let most_of_client = self.most_of_client.bytes;
        let beyond = held.clients.values().map(|one| one.bytes.saturating_sub(most_of_client));
        if all.bytes.saturating_sub(beyond.sum()) > self.most.bytes {
            return Err(self.of_bytes[0](self.most.bytes));
        }
        if let Some(client) = client {
            let (one, most) = (held.clients.get(client), self.most_of_client);
            let one = one.copied().unwrap_or_default().plus(more);
            if one.requests > most.requests {
                return Err(Limit::ClientRequests(most.requests));
            }
            if one.bytes > most.bytes {
                return Err(self.of_bytes[1](most.bytes));
            }
            held.clients.insert(client.clone(), one);
        }
        held.all = all;
        Ok(())
    }

    /// Who gives bytes back has freed them, or will in a moment.
    fn remove(&self, client: Option<&Client>, less: Amount) {
        self.freed.add(less.bytes);
        let mut held = self.lock();
        held.all = held.all.minus(less);
        if let Some(client) = client
            && let Some(one) = held.clients.get_mut(client)
        {
            *one = one.minus(less);
            if *one == Amount::default() {
                held.clients.remove(client);
            }
        }
    }
}

impl Amount {
    fn plus(self, other: Self) -> Self {
        let requests = self.requests.saturating_add(other.requests);
        Self { requests, bytes: self.bytes.saturating_add(other.bytes) }
    }

    fn minus(self, other: Self) -> Self {
        let requests = self.requests.saturating_sub(other.requests);
        Self { requests, bytes: self.bytes.saturating_sub(other.bytes) }
    }
}

impl Share {
    /// Takes more bytes, if fewer than `bytes` are held.
    pub(crate) fn grow_to(&mut self, bytes: usize) -> Result<(), Limit> {
        let held = self.bytes.get_mut();
        if bytes > *held {
            let more = Amount { requests: 0, bytes: bytes - *held };
            self.slots.add(self.client.as_ref(), more)?;
            *held = bytes;
        }
        Ok(())
    }

    /// Gives bytes back, if more than `bytes` are held.
    pub(crate) fn shrink_to(&self, bytes: usize) {
        let held = self.bytes.fetch_min(bytes, Ordering::Relaxed);
        let less = Amount { requests: 0, bytes: held.saturating_sub(bytes) };
        self.slots.remove(self.client.as_ref(), less);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let bytes = *self.bytes.get_mut();
        self.slots.remove(self.client.as_ref(), Amount { requests: self.requests, bytes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_limited_in_all_and_by_client_and_given_back() {
        let amount = |requests, bytes| Amount { requests, bytes };
        let slots = Slots::new(amount(3, 100), amount(2, 60), FreedMemory::default());
        let (a, b) = (Client::named("a"), Client::named("b"));
        let mut first = slots.take(Some(&a), amount(1, 10)).expect("room");
        let second = slots.take(Some(&a), amount(1, 10)).expect("room");
        let refused = |client, requests, bytes| slots.take(client, amount(requests, bytes)).err();
        assert_eq!(refused(Some(&a), 1, 0), Some(Limit::ClientRequests(2)));
        assert_eq!(refused(Some(&a), 0, 41), Some(Limit::ClientBytes(60)));
        assert_eq!(refused(Some(&b), 0, 81), Some(Limit::Bytes(100)));
        let third = slots.take(None, amount(1, 70)).expect("no limit but that of all");
        assert_eq!(refused(Some(&b), 1, 0), Some(Limit::Requests(3)));
        assert_eq!(first.grow_to(21), Err(Limit::Bytes(100)));
        assert_eq!((first.grow_to(20), first.grow_to(5)), (Ok(()), Ok(())));
        first.shrink_to(3);
        first.shrink_to(50);
        assert_eq!(slots.held(), amount(3, 83));
        let counted = slots.count(Some(&b), 1000);
        assert_eq!(slots.held(), amount(3, 1083));
        assert_eq!(refused(Some(&b), 0, 1), Some(Limit::Bytes(100)));
        drop((first, second, third, counted));
        assert_eq!(slots.held(), Amount::default());
        assert!(slots.lock().clients.is_empty());
    }

    #[test]
    fn input_images_are_limited_by_client_and_one_is_always_let_in() {
        let inputs = Slots::of_inputs(100, FreedMemory::default());
        let slots = Slots::new(inputs.most, inputs.most, FreedMemory::default());
        let [a, b] = ["a", "b"].map(|name| {
            let none = Amount::default();
            slots.take(Some(&Client::named(name)), none).expect("room")
        });
        let large = inputs.take_for(&a, 1000).expect("it is alone");
        assert_eq!(inputs.take_for(&a, 1).err(), Some(Limit::ClientInputs(50)));
        let other = inputs.take_for(&b, 50).expect("room");
        let nobody = slots.take(None, Amount::default()).expect("room");
        assert_eq!(inputs.take_for(&nobody, 1).err(), Some(Limit::Inputs(100)));
        large.shrink_to(10);
        assert!(inputs.take_for(&a, 40).is_ok());
        drop((large, other));
        assert_eq!(inputs.held(), Amount::default());
    }

    #[test]
    fn a_client_that_does_not_read_keeps_no_other_out() {
        let amount = |requests, bytes| Amount { requests, bytes };
        let slots = Slots::new(amount(9, 100), amount(9, 60), FreedMemory::default());
        let (a, b) = (Client::named("a"), Client::named("b"));
        let _unread = slots.count(Some(&a), 1000);
        assert_eq!(slots.take(Some(&a), amount(1, 0)).err(), Some(Limit::ClientBytes(60)));
        assert!(slots.take(Some(&b), amount(1, 40)).is_ok());
        assert_eq!(slots.take(Some(&b), amount(1, 41)).err(), Some(Limit::Bytes(100)));
        assert_eq!(slots.held().bytes, 1000);
    }
}
