//! Single-file checkpoints, and CLIP's vocabulary for them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use hf_hub::Repo;
use sd_models::{Checkpoint, SafetyMode, Source};
use tracing::warn;

use super::hub::{Download, Hub};
use super::repository::Parts;

/// The repository with CLIP's vocabulary, which single-file checkpoints do not contain.
const VOCABULARY: &str = "openai/clip-vit-large-patch14";

const VOCABULARY_FILES: [&str; 2] = ["vocab.json", "merges.txt"];

/// Whether a file is a single-file checkpoint, by its extension.
pub(crate) fn is_checkpoint(path: &Path) -> bool {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    path.is_file() && ["safetensors", "gguf", "ckpt", "pt", "pth"].contains(&&*ending)
}

/// The model in a file, which is checked.
pub(super) fn source(file: PathBuf, hub: &Hub) -> Result<Source> {
    let checkpoint = Checkpoint { file, vocabulary: None };
    // Before the vocabulary is fetched, which is in vain for a file that is no model.
    checkpoint.check()?;
    let vocabulary = vocabulary(&checkpoint.file, hub)?;
    Ok(Source::Checkpoint(Checkpoint { vocabulary, ..checkpoint }))
}

/// CLIP's vocabulary from the cache or the hub, for a checkpoint without a `tokenizer/` or, as beside
/// the refiner of Stable Diffusion XL, `tokenizer_2/`.
fn vocabulary(file: &Path, hub: &Hub) -> Result<Option<PathBuf>> {
    if ["tokenizer", "tokenizer_2"].iter().any(|name| file.with_file_name(name).is_dir()) {
        return Ok(None);
    }
    let cache = hub.cache.repo(Repo::model(VOCABULARY.into()));
    let cached = || VOCABULARY_FILES.iter().map(|name| cache.get(name)).collect::<Option<Vec<_>>>();
    if cached().is_none() {
        let (hub, id, revision) = (hub.clone(), VOCABULARY.into(), "main".into());
        let checking = SafetyMode::Never;
        let parts = Parts { half: false, checking, unet: false, vae: false };
        let download = Download { hub, id, revision, parts };
        download.fetch(|_| Ok(VOCABULARY_FILES.map(String::from).into())).map_err(|error| {
            // Clients are told what is missing; why it was not fetched is for the operator.
            warn!("cannot fetch {VOCABULARY}: {error:#}");
            anyhow!(
                "{} holds no vocabulary: put tokenizer/vocab.json and tokenizer/merges.txt beside it",
                file.display()
            )
        })?;
    }
    let files = cached().context("the vocabulary is no longer in the cache")?;
    Ok(files.first().and_then(|path| path.parent()).map(Into::into))
}
