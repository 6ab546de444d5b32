//! The options of the models that are loaded by name.

use std::path::PathBuf;
use std::time::Duration;

use crate::options::{bytes, min, switch};

/// Default of [`RegistryConfig::turn`]: several images, and well below usual timeouts.
const TURN: Duration = Duration::from_secs(10);

/// The bounds of the models that are loaded by name, which are options of `serve`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Several models")]
pub struct RegistryConfig {
    /// Directory whose directories and single files are models that requests can select by name.
    /// They are loaded on demand; when the limit is reached, the least recently used idle model is
    /// evicted. The model of --model is never evicted; without --model none is loaded on start
    #[arg(long = "models-dir", env = "SD_MODELS_DIR")]
    pub folder: Option<PathBuf>,
    /// Multi-model mode: SageMaker loads and unloads models through /models
    #[arg(long, env = "SAGEMAKER_MULTI_MODEL", value_parser = switch)]
    pub multi_model: bool,
    /// Directory below which the models of `POST /models` must be
    #[arg(long, env = "SD_MULTI_MODEL_ROOT", default_value = "/opt/ml/models")]
    pub multi_model_root: PathBuf,
    /// Maximum number of models loaded by name. At the limit, the least recently used idle model is
    /// evicted; SageMaker's `POST /models` gets 507 instead
    #[arg(long, env = "SD_MAX_MODELS", default_value = "8", value_parser = min::<1>)]
    pub max_models: usize,
    /// Maximum memory for the weights of models loaded by name, in bytes. At the limit, as for
    /// --max-models. Default: the free memory of the host; on a GPU no limit but the device's own
    #[arg(long = "models-memory-bytes", env = "SD_MODELS_MEMORY_BYTES", value_parser = bytes)]
    pub memory_bytes: Option<u64>,
    /// Time after which a model that no request uses is unloaded.
    #[arg(skip)]
    pub unload_after: Option<Duration>,
    /// Time to finish the accepted requests of a model that is unloaded.
    #[arg(skip)]
    pub drain_timeout: Duration,
    /// Time for which a busy model that has to make room still takes new requests, and then takes
    /// none, in turns.
    #[arg(skip = TURN)]
    pub turn: Duration,
}
