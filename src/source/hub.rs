//! The Hugging Face hub and its local cache. Only the files that the pipeline reads are downloaded,
//! and a pickle only of a network that has nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use hf_hub::api::tokio::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use super::repository::{Parts, files_to_fetch, is_complete, is_network, vae_to_fetch};

/// How often a download that stalls is resumed.
const MAX_RESUMES: usize = 3;

/// The hub and its local cache.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    /// The directory of `models--owner--name` directories.
    pub(crate) cache: Cache,
    /// The hub's URL, without a trailing slash.
    pub(crate) endpoint: String,
    /// Token for gated and private models; `None`: the token file next to the cache.
    pub(crate) token: Option<String>,
    /// Whether network access is forbidden (`HF_HUB_OFFLINE`).
    pub(crate) offline: bool,
    /// Time without a byte after which a download is resumed (`HF_HUB_DOWNLOAD_TIMEOUT`).
    pub(crate) stall_timeout: Duration,
}

/// A model to download.
#[derive(Debug)]
pub(crate) struct Download {
    /// The hub and its cache.
    pub(crate) hub: Hub,
    /// `owner/name`.
    pub(crate) id: String,
    /// Branch, tag or commit.
    pub(crate) revision: String,
    /// Which of its files.
    pub(crate) parts: Parts,
}

impl Download {
    /// Downloads the model and returns its directory. Without a network the cache is enough.
    pub(crate) fn run(&self) -> Result<PathBuf> {
        if self.hub.offline
            && let Some(path) = self.cached()
        {
            return Ok(path);
        }
        self.fetch(|files| files_to_fetch(files, self.parts))
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, self.revision.clone())
    }

    /// The model's directory in the cache, if it is complete. No network access.
    pub(super) fn cached(&self) -> Option<PathBuf> {
        let path = self.snapshot("model_index.json");
        is_complete(&path, self.parts).then_some(path)
    }

    /// The directory of a VAE, alone or in a model, in the cache; else that of the repository, from
    /// the hub.
    pub(super) fn vae(&self) -> Result<PathBuf> {
        let cached = ["vae/config.json", "config.json"].map(|file| self.snapshot(file));
        let cached = cached.into_iter().find(|folder| is_network(folder));
        cached.map_or_else(|| self.fetch(|files| vae_to_fetch(files, self.parts.half)), Ok)
    }

    /// The directory of a file in the cache.
    fn snapshot(&self, file: &str) -> PathBuf {
        let cache = self.hub.cache.repo(self.repo());
        let by_ref = cache.get(file).and_then(|path| Some(path.parent()?.into()));
        by_ref.unwrap_or_else(|| cache.pointer_path(&self.revision))
    }

    /// Downloads files that the cache lacks, which are selected from those of the repository, and
    /// returns their directory. Interrupted files are resumed: hf-hub does so after a file's
    /// contiguous beginning, so its parts should arrive in order, for which the runtime has one
    /// thread.
    pub(super) fn fetch(
        &self,
        select: impl Fn(&[String]) -> Result<Vec<String>>,
    ) -> Result<PathBuf> {
        let name = format!("{} ({})", self.id, self.revision);
        let offline = self.hub.offline;
        ensure!(!offline, "{name} is not in the cache, and HF_HUB_OFFLINE forbids to download it");
        for _ in 0..MAX_RESUMES {
            match self.attempt(&name, &select) {
                Err(error) if error.is::<Stalled>() => warn!("{error:#}; resuming"),
                done => return done,
            }
        }
        self.attempt(&name, &select)
    }

    /// One attempt in a runtime of its own, since hf-hub leaves tasks behind when it is cancelled.
    fn attempt(
        &self,
        name: &str,
        select: impl Fn(&[String]) -> Result<Vec<String>>,
    ) -> Result<PathBuf> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let done = runtime.block_on(self.download(name, select));
        runtime.shutdown_background();
        done
    }

    async fn download(
        &self,
        name: &str,
        select: impl Fn(&[String]) -> Result<Vec<String>>,
    ) -> Result<PathBuf> {
        let cache = self.hub.cache.clone();
        let token = self.hub.token.clone().or_else(|| cache.token());
        let api = ApiBuilder::from_cache(cache).with_endpoint(self.hub.endpoint.clone());
        let repo = api.with_token(token).with_progress(false).build()?.repo(self.repo());
        let listing = timeout(self.hub.stall_timeout, repo.info())
            .await
            .map_err(|_| anyhow!(self.stalled()))
            .and_then(|listing| listing.map_err(|error| self.explain(error)))
            .with_context(|| format!("cannot download {name}"))?;
        let files: Vec<String> = listing.siblings.into_iter().map(|file| file.rfilename).collect();
        let files = select(&files).with_context(|| name.to_owned())?;

        let present = self.hub.cache.repo(self.repo());
        let snapshot = present.pointer_path(&listing.sha);
        for (k, file) in files.iter().enumerate() {
            if snapshot.join(file).exists() {
                continue;
            }
            info!(file, "downloading {} of {}", k + 1, files.len());
            self.download_file(&repo, file, &snapshot.join(file))
                .await
                .with_context(|| format!("cannot download {file} of {name}"))?;
        }
        present.create_ref(&listing.sha).context("cannot write to the cache")?;
        Ok(snapshot)
    }

    /// Downloads a file to `target`. If another process is downloading it to the same cache, this
    /// waits for it.
    async fn download_file(&self, repo: &ApiRepo, file: &str, target: &Path) -> Result<()> {
        let mut waiting = false;
        while !target.exists() {
            let (received, mut last) = watch::channel(());
            let received = Arc::new(received);
            let bar = DownloadBar { bar: byte_bar(0), received: Arc::clone(&received) };
            let stalls =
                async { while timeout(self.hub.stall_timeout, last.changed()).await.is_ok() {} };
            let done = tokio::select! {
                done = repo.download_with_progress(file, bar) => done,
                () = stalls => return Err(self.stalled().into()),
            };
            match done {
                // It was locked for some seconds.
                Err(ApiError::LockAcquisition(path)) => {
                    if !std::mem::replace(&mut waiting, true) {
                        let path = path.display();
                        warn!(file, "waiting for another process that has locked {path}");
                    }
                }
                Err(error) => return Err(self.explain(error)),
                Ok(_) => break,
            }
            drop(received);
        }
        Ok(())
    }

    fn stalled(&self) -> Stalled {
        Stalled { host: self.hub.endpoint.clone(), seconds: self.hub.stall_timeout.as_secs() }
    }

    /// The error message for a failed request to the hub, with a remedy.
    fn explain(&self, error: ApiError) -> anyhow::Error {
        let Hub { endpoint, cache, .. } = &self.hub;
        let advice = match &error {
            ApiError::RequestError(request) => match request.status().map(|s| s.as_u16()) {
                Some(401 | 403) => {
                    "the model needs permission: accept its licence on the hub and set HF_TOKEN \
                     (the hub says the same of models that do not exist)"
                        .to_owned()
                }
                Some(404) => "the hub has no such model or revision".to_owned(),
                Some(status) => format!("{endpoint} responded with {status}"),
                None => format!(
                    "{endpoint} cannot be reached; without a network, use --model demo, give a \
                     directory with --model, or fill the cache elsewhere with `sd-server download`"
                ),
            },
            ApiError::IoError(_) => format!("cannot write to {}", cache.path().display()),
            _ => format!("{endpoint} sent an unexpected response"),
        };
        anyhow::Error::new(error).context(advice)
    }
}

/// A progress bar in bytes, on terminals only.
pub(crate) fn byte_bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

/// The hub has stopped to answer.
#[derive(Debug, thiserror::Error)]
#[error("{host} sent nothing for {seconds} s")]
struct Stalled {
    host: String,
    seconds: u64,
}

/// Progress bar of one file.
#[derive(Clone)]
struct DownloadBar {
    bar: ProgressBar,
    /// Sent whenever bytes have been received.
    received: Arc<watch::Sender<()>>,
}

impl hf_hub::api::tokio::Progress for DownloadBar {
    async fn init(&mut self, size: usize, file: &str) {
        self.bar.set_length(size as u64);
        self.bar.set_message(file.to_owned());
        self.received.send_replace(());
    }

    async fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
        self.received.send_replace(());
    }

    async fn finish(&mut self) {
        self.bar.finish();
    }
}

/// Whether this is `owner/name` in the characters that the hub allows.
pub(crate) fn is_hub_id(text: &str) -> bool {
    let word = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text.split_once('/').is_some_and(|(owner, name)| word(owner) && word(name))
}
