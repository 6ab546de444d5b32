//! The Hugging Face hub and its local cache. Only the files that the pipeline reads are downloaded,
//! and a pickle only of a network that has nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use hf_hub::api::tokio::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use sd_models::{SafetyMode, Source, check_pipeline};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

/// How often a download that stalls is resumed.
const MAX_RESUMES: usize = 3;

/// The directories with weights, and the stem of the weight files.
const NETWORKS: [(&str, &str); 3] =
    [("text_encoder", "model"), ("unet", "diffusion_pytorch_model"), VAE];

const VAE: (&str, &str) = ("vae", "diffusion_pytorch_model");

/// The safety checker, which only some models have.
const CHECKER: (&str, &str) = ("safety_checker", "model");

/// The preprocessing of the safety checker.
const PREPROCESSOR: &str = "feature_extractor/preprocessor_config.json";

/// Other files that the pipeline reads if they exist.
const SMALL_FILES: [&str; 14] = [
    PREPROCESSOR,
    "model_index.json",
    "safety_checker/config.json",
    "scheduler/scheduler_config.json",
    "sd-server.json",
    "text_encoder/config.json",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
];

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
    /// Whether f16 weights are preferred.
    pub(crate) half: bool,
    /// Whether the safety checker is downloaded too.
    pub(crate) checking: SafetyMode,
}

impl Download {
    /// Downloads the model and returns its directory. Without a network the cache is enough.
    pub(crate) fn run(&self) -> Result<PathBuf> {
        if self.hub.offline
            && let Some(path) = self.cached()
        {
            return Ok(path);
        }
        self.fetch(|files| files_to_fetch(files, self.half, self.checking))
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, self.revision.clone())
    }

    /// The model's directory in the cache, if it is complete. No network access.
    pub(super) fn cached(&self) -> Option<PathBuf> {
        let path = self.snapshot("model_index.json");
        is_complete(&path, self.checking).then_some(path)
    }

    /// The directory of a VAE, alone or in a model, in the cache; else that of the repository, from
    /// the hub.
    pub(super) fn vae(&self) -> Result<PathBuf> {
        let cached = ["vae/config.json", "config.json"].map(|file| self.snapshot(file));
        let cached = cached.into_iter().find(|folder| is_network(folder));
        cached.map_or_else(|| self.fetch(|files| vae_to_fetch(files, self.half)), Ok)
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

/// Whether the cached model is complete: a download may have been interrupted.
fn is_complete(model: &Path, checking: SafetyMode) -> bool {
    let network = |folder: &str| is_network(&model.join(folder));
    // An invalid index is reported when it is loaded.
    let named = || check_pipeline(&Source::Directory(model.into())).unwrap_or(false);
    let checked = checking != SafetyMode::Never && named();
    model.join("model_index.json").is_file()
        && model.join("scheduler/scheduler_config.json").is_file()
        && NETWORKS.iter().all(|(folder, _)| network(folder))
        && (!checked || network(CHECKER.0) && model.join(PREPROCESSOR).is_file())
}

/// Whether a directory has a network's configuration and all of its weights.
fn is_network(folder: &Path) -> bool {
    let names = folder.read_dir().into_iter().flatten();
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names: Vec<String> = names.collect();
    let complete = |ending: &str| {
        let names = names.iter().filter(|name| name.ends_with(ending)).cloned();
        let names: Vec<_> = names.collect();
        !names.is_empty() && names.iter().all(|name| has_all_shards(name, &names))
    };
    folder.join("config.json").is_file() && [".safetensors", ".bin"].into_iter().any(complete)
}

/// Whether `names` has all shards of a file: three for `x-00001-of-00003.safetensors`.
fn has_all_shards(name: &str, names: &[String]) -> bool {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let Some((head, count)) = stem.rsplit_once("-of-") else {
        return true;
    };
    let Some((stem, _)) = head.rsplit_once('-') else { return true };
    let siblings = names.iter().filter(|n| n.starts_with(stem) && n.contains("-of-")).count();
    count.parse().is_ok_and(|count: usize| siblings >= count)
}

/// The weights of a network among the files of a repository: one variant, and pickles only if there
/// is nothing else. `folder` is empty or ends in a slash.
fn weights_to_fetch(files: &[String], folder: &str, stem: &str, half: bool) -> Option<Vec<String>> {
    // Pickles of transformers' networks have another name.
    let pickled = if stem == "model" { "pytorch_model" } else { stem };
    let variants = if half { [".fp16", ""] } else { ["", ".fp16"] };
    let forms = [(stem, "safetensors"), (pickled, "bin")]
        .into_iter()
        .flat_map(|form| variants.map(|infix| (form, infix)));
    forms
        .map(|((stem, ending), infix)| -> Vec<String> {
            let wanted = |file: &&String| {
                let rest = file.strip_prefix(folder).and_then(|name| name.strip_prefix(stem));
                let rest = rest.unwrap_or_default();
                rest == format!("{infix}.{ending}")
                    || rest == format!(".{ending}.index{infix}.json")
                    || rest.starts_with(&format!("{infix}-"))
                        && rest.ends_with(&format!(".{ending}"))
                        && !rest.contains('/')
            };
            files.iter().filter(wanted).cloned().collect()
        })
        .find(|found| found.iter().any(|file| !file.ends_with(".json")))
}

/// The files of a VAE to download: of the repository, or of the model that it holds.
fn vae_to_fetch(files: &[String], half: bool) -> Result<Vec<String>> {
    let folders = ["vae/", ""];
    let folder = folders.into_iter().find(|folder| files.contains(&format!("{folder}config.json")));
    let folder = folder.context("not a VAE in diffusers format: it has no config.json")?;
    let mut chosen = vec![format!("{folder}config.json")];
    let weights = weights_to_fetch(files, folder, VAE.1, half);
    chosen.extend(weights.context("it has no weights of a VAE")?);
    Ok(chosen)
}

/// The files of a repository to download: one variant of each network's weights.
pub(crate) fn files_to_fetch(
    files: &[String],
    half: bool,
    checking: SafetyMode,
) -> Result<Vec<String>> {
    let has = |name: &str| files.iter().any(|file| file == name);
    ensure!(has("model_index.json"), "not a diffusers model: it has no model_index.json");
    let mut chosen: Vec<String> = SMALL_FILES.map(String::from).into();
    let checked = checking != SafetyMode::Never && has("safety_checker/config.json");
    chosen.retain(|file| {
        has(file) && (checked || !file.starts_with(CHECKER.0) && file != PREPROCESSOR)
    });
    for (folder, stem) in NETWORKS.into_iter().chain(checked.then_some(CHECKER)) {
        let weights = weights_to_fetch(files, &format!("{folder}/"), stem, half);
        let advice = match (folder, stem) == CHECKER {
            true => "; --safety-checker off omits it",
            false => "",
        };
        let none = || format!("{folder} has no safetensors weights, nor any in .bin{advice}");
        chosen.extend(weights.with_context(none)?);
    }
    Ok(chosen)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(lines: &str) -> Vec<String> {
        lines.split_whitespace().map(Into::into).collect()
    }

    #[test]
    fn one_variant_of_safe_weights_is_needed() {
        let files = listing(
            "README.md model_index.json v1-5-pruned.ckpt v1-5-pruned.safetensors
             safety_checker/config.json safety_checker/model.safetensors
             feature_extractor/preprocessor_config.json scheduler/scheduler_config.json
             text_encoder/config.json text_encoder/model.safetensors
             text_encoder/model.fp16.safetensors text_encoder/pytorch_model.bin
             tokenizer/vocab.json tokenizer/merges.txt unet/config.json
             unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.safetensors
             unet/diffusion_pytorch_model.fp16.safetensors
             unet/diffusion_pytorch_model.non_ema.safetensors
             vae/config.json vae/diffusion_pytorch_model.safetensors",
        );
        let full = files_to_fetch(&files, false, SafetyMode::Never).expect("complete");
        assert!(full.contains(&"unet/diffusion_pytorch_model.safetensors".into()));
        assert_eq!(full.iter().filter(|f| f.ends_with(".safetensors")).count(), 3);
        assert!(!full.iter().any(|f| f.ends_with(".bin") || f.contains("safety")));
        assert!(!full.contains(&PREPROCESSOR.into()));
        let half = files_to_fetch(&files, true, SafetyMode::IfPresent).expect("complete");
        assert!(half.contains(&"unet/diffusion_pytorch_model.fp16.safetensors".into()));
        assert!(half.contains(&"vae/diffusion_pytorch_model.safetensors".into()));
        assert!(half.contains(&"safety_checker/model.safetensors".into()));
        assert!(half.contains(&PREPROCESSOR.into()));
        assert_eq!(half.iter().filter(|f| f.ends_with(".safetensors")).count(), 4);
        let pickled: Vec<String> =
            files.into_iter().filter(|file| file != "safety_checker/model.safetensors").collect();
        let error = files_to_fetch(&pickled, true, SafetyMode::IfPresent)
            .expect_err("a checker by name only");
        assert!(error.to_string().contains("--safety-checker off"), "{error}");
    }

    #[test]
    fn pickles_are_fetched_where_there_is_nothing_else() {
        let files = listing(
            "model_index.json text_encoder/pytorch_model.bin vae/config.json
             vae/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.bin
             unet/diffusion_pytorch_model-00001-of-00002.bin
             unet/diffusion_pytorch_model-00002-of-00002.bin
             unet/diffusion_pytorch_model.bin.index.json",
        );
        let full = files_to_fetch(&files, false, SafetyMode::IfPresent).expect("complete");
        assert_eq!(full.iter().filter(|file| file.starts_with("unet/")).count(), 3, "{full:?}");
        assert!(full.contains(&"text_encoder/pytorch_model.bin".into()));
        let half = files_to_fetch(&files, true, SafetyMode::IfPresent).expect("complete");
        assert!(half.contains(&"unet/diffusion_pytorch_model.fp16.bin".into()));
        let vae = vae_to_fetch(&files, true).expect("complete");
        assert_eq!(vae, ["vae/config.json", "vae/diffusion_pytorch_model.bin"]);
        let alone = listing("config.json diffusion_pytorch_model.safetensors a.ckpt");
        let vae = vae_to_fetch(&alone, true).expect("complete");
        assert_eq!(vae, ["config.json", "diffusion_pytorch_model.safetensors"]);
        assert!(vae_to_fetch(&listing("README.md"), false).is_err());
    }

    #[test]
    fn shards_come_with_their_index() {
        let files = listing(
            "model_index.json text_encoder/model.safetensors vae/diffusion_pytorch_model.safetensors
             unet/diffusion_pytorch_model-00001-of-00002.safetensors
             unet/diffusion_pytorch_model-00002-of-00002.safetensors
             unet/diffusion_pytorch_model.safetensors.index.json",
        );
        let unet = files_to_fetch(&files, true, SafetyMode::IfPresent).expect("complete");
        assert_eq!(unet.iter().filter(|f| f.starts_with("unet/")).count(), 3);
        assert!(files_to_fetch(&files[..2], false, SafetyMode::IfPresent).is_err());
        let names: Vec<String> =
            files.iter().filter_map(|f| f.strip_prefix("unet/")).map(Into::into).collect();
        assert!(has_all_shards(&names[0], &names));
        assert!(!has_all_shards(&names[0], &names[..1]));
    }
}
