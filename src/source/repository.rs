//! Which files of a repository of models are read: of the listing of the hub, of its cache, or of a
//! directory.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use sd_models::{SafetyMode, Source, check_pipeline};

/// The directories with weights, and the stem of the weight files.
const NETWORKS: [(&str, &str); 3] =
    [("text_encoder", "model"), ("unet", "diffusion_pytorch_model"), VAE];

const VAE: (&str, &str) = ("vae", "diffusion_pytorch_model");

/// The second text encoder of Stable Diffusion XL.
const SECOND_ENCODER: (&str, &str) = ("text_encoder_2", "model");

/// The safety checker, which only some models have.
const CHECKER: (&str, &str) = ("safety_checker", "model");

/// The preprocessing of the safety checker.
const PREPROCESSOR: &str = "feature_extractor/preprocessor_config.json";

/// Other files that the pipeline reads if they exist.
const SMALL_FILES: [&str; 21] = [
    PREPROCESSOR,
    "model_index.json",
    "safety_checker/config.json",
    "scheduler/scheduler_config.json",
    "sd-server.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/added_tokens.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/vocab.json",
    "unet/config.json",
    "vae/config.json",
];

/// Which files of a model are needed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    /// Whether f16 weights are preferred.
    pub(crate) half: bool,
    /// Whether its safety checker is.
    pub(crate) checking: SafetyMode,
    /// Whether its own UNet is, and not another in its place.
    pub(crate) unet: bool,
    /// Whether its own VAE is.
    pub(crate) vae: bool,
}

impl Parts {
    /// The folders of its networks, and the stem of their weights. The refiner of Stable Diffusion XL
    /// has no first text encoder.
    fn networks(self, has_first: bool) -> impl Iterator<Item = (&'static str, &'static str)> {
        NETWORKS.into_iter().filter(move |(folder, _)| match *folder {
            "unet" => self.unet,
            "vae" => self.vae,
            _ => has_first,
        })
    }
}

/// Whether the cached model is complete: a download may have been interrupted.
pub(super) fn is_complete(model: &Path, parts: Parts) -> bool {
    let network = |folder: &str| is_network(&model.join(folder));
    // An invalid index is reported when it is loaded.
    let named = check_pipeline(&Source::Directory(model.into())).unwrap_or_default();
    let checked = parts.checking != SafetyMode::Never && named.safety_checker;
    model.join("model_index.json").is_file()
        && model.join("scheduler/scheduler_config.json").is_file()
        && parts.networks(named.text_encoder).all(|(folder, _)| network(folder))
        && (!named.second_text_encoder || network(SECOND_ENCODER.0))
        && (!checked || network(CHECKER.0) && model.join(PREPROCESSOR).is_file())
}

/// Whether a directory has a network's configuration and all of its weights.
pub(super) fn is_network(folder: &Path) -> bool {
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
pub(super) fn vae_to_fetch(files: &[String], half: bool) -> Result<Vec<String>> {
    let folders = ["vae/", ""];
    let folder = folders.into_iter().find(|folder| files.contains(&format!("{folder}config.json")));
    let folder = folder.context("not a VAE in diffusers format: it has no config.json")?;
    let mut chosen = vec![format!("{folder}config.json")];
    let weights = weights_to_fetch(files, folder, VAE.1, half);
    chosen.extend(weights.context("it has no weights of a VAE")?);
    Ok(chosen)
}

/// The files of a repository to download: one variant of each network's weights.
pub(crate) fn files_to_fetch(files: &[String], parts: Parts) -> Result<Vec<String>> {
    let Parts { half, checking, .. } = parts;
    let has = |name: &str| files.iter().any(|file| file == name);
    ensure!(has("model_index.json"), "not a diffusers model: it has no model_index.json");
    let mut chosen: Vec<String> = SMALL_FILES.map(String::from).into();
    let checked = checking != SafetyMode::Never && has("safety_checker/config.json");
    chosen.retain(|file| {
        has(file) && (checked || !file.starts_with(CHECKER.0) && file != PREPROCESSOR)
    });
    let second = has("text_encoder_2/config.json").then_some(SECOND_ENCODER);
    let has_first = second.is_none() || has("text_encoder/config.json");
    let networks = parts.networks(has_first).chain(second).chain(checked.then_some(CHECKER));
    for (folder, stem) in networks {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(lines: &str) -> Vec<String> {
        lines.split_whitespace().map(Into::into).collect()
    }

    fn parts(half: bool, checking: SafetyMode) -> Parts {
        Parts { half, checking, unet: true, vae: true }
    }

    #[test]
    fn what_options_replace_is_not_fetched() {
        let files = listing(
            "model_index.json scheduler/scheduler_config.json text_encoder/config.json
             text_encoder/model.safetensors unet/config.json
             unet/diffusion_pytorch_model.safetensors vae/config.json
             vae/diffusion_pytorch_model.safetensors",
        );
        let fetched = |unet, vae| {
            let parts = Parts { unet, vae, ..parts(false, SafetyMode::Never) };
            files_to_fetch(&files, parts).expect("complete")
        };
        let all = fetched(true, true);
        let without =
            |left: &str| all.iter().filter(|file| *file != left).cloned().collect::<Vec<_>>();
        assert_eq!(fetched(false, true), without("unet/diffusion_pytorch_model.safetensors"));
        assert_eq!(fetched(true, false), without("vae/diffusion_pytorch_model.safetensors"));
    }

    #[test]
    fn both_text_encoders_of_xl_are_needed() {
        let files = listing(
            "model_index.json scheduler/scheduler_config.json text_encoder/config.json
             text_encoder/model.safetensors text_encoder_2/config.json
             text_encoder_2/model.fp16.safetensors text_encoder_2/model.safetensors
             tokenizer/vocab.json tokenizer_2/vocab.json tokenizer_2/merges.txt unet/config.json
             unet/diffusion_pytorch_model.safetensors vae/config.json
             vae/diffusion_pytorch_model.safetensors vae_1_0/config.json
             vae_1_0/diffusion_pytorch_model.safetensors sd_xl_base_1.0.safetensors",
        );
        let fetched = files_to_fetch(&files, parts(true, SafetyMode::IfPresent)).expect("complete");
        for wanted in ["text_encoder_2/model.fp16.safetensors", "tokenizer_2/merges.txt"] {
            assert!(fetched.contains(&wanted.into()), "{fetched:?}");
        }
        assert_eq!(fetched.iter().filter(|file| file.ends_with(".safetensors")).count(), 4);
        let half: Vec<String> =
            files.into_iter().filter(|file| !file.starts_with("text_encoder_2/model")).collect();
        let error = files_to_fetch(&half, parts(true, SafetyMode::Never)).expect_err("incomplete");
        assert!(error.to_string().contains("text_encoder_2 has no safetensors"), "{error}");
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
        let full = files_to_fetch(&files, parts(false, SafetyMode::Never)).expect("complete");
        assert!(full.contains(&"unet/diffusion_pytorch_model.safetensors".into()));
        assert_eq!(full.iter().filter(|f| f.ends_with(".safetensors")).count(), 3);
        assert!(!full.iter().any(|f| f.ends_with(".bin") || f.contains("safety")));
        assert!(!full.contains(&PREPROCESSOR.into()));
        let half = files_to_fetch(&files, parts(true, SafetyMode::IfPresent)).expect("complete");
        assert!(half.contains(&"unet/diffusion_pytorch_model.fp16.safetensors".into()));
        assert!(half.contains(&"vae/diffusion_pytorch_model.safetensors".into()));
        assert!(half.contains(&"safety_checker/model.safetensors".into()));
        assert!(half.contains(&PREPROCESSOR.into()));
        assert_eq!(half.iter().filter(|f| f.ends_with(".safetensors")).count(), 4);
        let pickled: Vec<String> =
            files.into_iter().filter(|file| file != "safety_checker/model.safetensors").collect();
        let error = files_to_fetch(&pickled, parts(true, SafetyMode::IfPresent))
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
        let full = files_to_fetch(&files, parts(false, SafetyMode::IfPresent)).expect("complete");
        assert_eq!(full.iter().filter(|file| file.starts_with("unet/")).count(), 3, "{full:?}");
        assert!(full.contains(&"text_encoder/pytorch_model.bin".into()));
        let half = files_to_fetch(&files, parts(true, SafetyMode::IfPresent)).expect("complete");
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
        let unet = files_to_fetch(&files, parts(true, SafetyMode::IfPresent)).expect("complete");
        assert_eq!(unet.iter().filter(|f| f.starts_with("unet/")).count(), 3);
        assert!(files_to_fetch(&files[..2], parts(false, SafetyMode::IfPresent)).is_err());
        let names: Vec<String> =
            files.iter().filter_map(|f| f.strip_prefix("unet/")).map(Into::into).collect();
        assert!(has_all_shards(&names[0], &names));
        assert!(!has_all_shards(&names[0], &names[..1]));
    }
}
