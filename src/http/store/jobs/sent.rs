//! The bodies of results that are being sent. All clients that receive one result share its memory:
//! it is taken once, not once for each connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use axum::body::Bytes;

/// The bodies by the ids of their jobs. A result never changes.
#[derive(Debug, Clone, Default)]
pub(super) struct SentBodies(Arc<Mutex<HashMap<String, Weak<Vec<u8>>>>>);

/// A body, as the owner of [`Bytes`].
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl SentBodies {
    /// The body of a result, read unless it is being sent. Blocks, as `read` does.
    pub(super) fn get<E>(
        &self,
        id: &str,
        read: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Bytes, E> {
        let mut bodies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bodies.retain(|_, body| body.strong_count() > 0);
        let body = match bodies.get(id).and_then(Weak::upgrade) {
            Some(body) => body,
            None => {
                let body = Arc::new(read()?);
                bodies.insert(id.to_owned(), Arc::downgrade(&body));
                body
            }
        };
        Ok(Bytes::from_owner(Shared(body)))
    }
}
