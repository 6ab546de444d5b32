//! Why a model is not available.

/// Why a model is not available.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// A model of this name is already loaded.
    #[error("the model {0:?} is already loaded")]
    Loaded(String),
    /// No model has this name.
    #[error("the model {0:?} does not exist")]
    Unknown(String),
    /// There is no room until another model is unloaded.
    #[error("not enough room for the model: {0}; unload another, or give it more room")]
    NoRoom(String),
    /// The models that could make room were busy until the request's deadline.
    #[error(
        "no room for the model {name:?}: others are finishing accepted requests; retry after {retry_after_s} s"
    )]
    Busy {
        /// The model that was not loaded.
        name: String,
        /// Estimated time until a model is idle, in seconds.
        retry_after_s: u64,
    },
    /// The model was not loaded by the request's deadline.
    #[error("the model was not loaded within the request's timeout")]
    Deadline,
    /// The server is draining.
    #[error("the server is shutting down")]
    Stopping,
    /// The files of the model are damaged, or no model.
    #[error("the model cannot be loaded: {0}")]
    Damaged(String),
    /// The model cannot be loaded, for another reason than its files.
    #[error("the model cannot be loaded: {0}")]
    Broken(String),
}

/// The result of the registry.
pub(super) type Result<T> = std::result::Result<T, RegistryError>;

impl RegistryError {
    pub(super) fn unknown(name: &str) -> Self {
        Self::Unknown(name.into())
    }

    /// The files are damaged, or no model, for this reason.
    pub(super) fn damaged(error: impl std::fmt::Display) -> Self {
        Self::Damaged(format!("{error:#}"))
    }

    /// The model cannot be loaded, for this reason.
    pub(super) fn broken(error: impl std::fmt::Display) -> Self {
        Self::Broken(format!("{error:#}"))
    }
}
