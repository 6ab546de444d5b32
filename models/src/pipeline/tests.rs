//! What a pipeline caches, reads and frees, on the built-in model.

use std::path::Path;

use super::pass::Pass;
use super::prompts::CACHED_CHUNKS;
use super::*;
use crate::files::{AssetDir, Source};
use crate::picture::Size;
use crate::sampling::Span;
use crate::text::{LoraUse, Loras};

/// The built-in model in f32 on the CPU.
pub(crate) fn demo() -> Pipeline {
    open(AddOns::default())
}

fn open(add_ons: AddOns) -> Pipeline {
    load(Source::Demo, add_ons)
}

fn load(source: Source, add_ons: AddOns) -> Pipeline {
    let options = LoadOptions {
        name: None,
        source,
        unet: None,
        vae: None,
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::Never,
        threads: None,
        add_ons,
    };
    Pipeline::load(&options).expect("the demo model")
}

fn encoded(pipeline: &Pipeline, prompt: &str) -> Arc<Conditioning> {
    let spec = Spec { prompt: prompt.into(), guidance_scale: 1.0, ..spec(vec![]) };
    let begun = pipeline.begin(&spec).expect("begun");
    Arc::clone(begun.run.rows.at(0).next().expect("a row"))
}

fn spec(loras: Loras) -> Spec {
    Spec {
        prompt: "a cat".into(),
        prompt_syntax: PromptSyntax::Plain,
        negative_prompt: String::new(),
        loras,
        size: Size::new(64, 64).expect("multiples of 8"),
        steps: 1,
        guidance_scale: 7.5,
        seed: 0,
        sampler: crate::Sampler::Ddim,
        schedule: crate::SigmaSchedule::Model,
        sampler_options: crate::SamplerOptions::default(),
        img2img: None,
        embeds_guidance: false,
        clip_skip: 0,
        guidance_rescale: 0.0,
        variation: None,
        eta_noise_seed_delta: 0,
        xl: XlOptions::default(),
        span: Span::default(),
        refiner: None,
        warnings: Vec::new(),
        hires: None,
        controls: Vec::new(),
        tiling: false,
        vae_tiling: None,
        ip_adapters: Vec::new(),
        enlarge: None,
    }
}

#[test]
fn a_model_with_other_files_has_another_fingerprint() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let copy = tempfile::tempdir().expect("a folder");
    let to = copy.path();
    std::fs::copy(from.join("model_index.json"), to.join("model_index.json")).expect("a copy");
    for folder in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        std::fs::create_dir(to.join(folder)).expect("a folder");
        for entry in from.join(folder).read_dir().expect("a folder") {
            let file = Path::new(folder).join(entry.expect("a file").file_name());
            std::fs::copy(from.join(&file), to.join(&file)).expect("a copy");
        }
    }
    let fingerprint =
        || load(Source::Directory(to.into()), AddOns::default()).info().fingerprint.clone();
    let mut seen = vec![fingerprint()];
    assert_eq!(seen[0], demo().info().fingerprint, "the same files elsewhere");
    for (file, last, other) in [
        ("text_encoder/model.safetensors", None, 0x80),
        ("unet/diffusion_pytorch_model.safetensors", None, 0x80),
        ("vae/diffusion_pytorch_model.safetensors", None, 0x80),
        // White space for a line end: the weights are the same.
        ("scheduler/scheduler_config.json", Some(b'\n'), b'\n' ^ b' '),
    ] {
        let mut bytes = std::fs::read(to.join(file)).expect("a file");
        let end = bytes.last_mut().expect("not empty");
        assert!(last.is_none_or(|last| last == *end), "{file}");
        *end ^= other;
        std::fs::write(to.join(file), bytes).expect("written");
        let changed = fingerprint();
        assert!(!seen.contains(&changed), "{file}");
        seen.push(changed);
    }
}

#[test]
fn a_prompt_is_encoded_once_and_not_kept_for_ever() {
    let pipeline = demo();
    let encode = |prompt: &str| encoded(&pipeline, prompt);
    let contexts = || -> Vec<_> {
        let kept = pipeline.own.prompts.encoded.lock().expect("unpoisoned");
        let id = |encoded: &prompts::EncodedPrompt| encoded.context.id();
        kept.iter().map(|(key, encoded)| (key.text.clone(), id(encoded))).collect()
    };
    let of =
        |prompt: &str| contexts().into_iter().find(|(text, _)| text.as_deref() == Some(prompt));
    drop((encode(""), encode("a cat")));
    let (empty, cat) = (of(""), of("a cat"));
    for k in 0..CACHED_CHUNKS - 1 {
        encode(&format!("picture {k}"));
        encode("");
        assert_eq!(of(""), empty, "what is used again stays");
    }
    assert_eq!(of("a cat"), None, "what is not makes room");
    encode("a cat");
    assert_ne!(of("a cat"), cat);
    assert_eq!(contexts().len(), CACHED_CHUNKS);
}

#[test]
fn loras_are_read_before_a_picture_begins() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = file.join("../tests/pictures/loras/attention.safetensors");
    let loras = AssetDir { files: vec![file], ..AssetDir::default() };
    let add_ons = AddOns { loras, max_lora_bytes: 1 << 24, ..AddOns::default() };
    let pipeline = open(add_ons);
    let plain = spec(vec![]);
    let adapted = spec(vec![LoraUse::new("attention", 0.5)]);
    let named = Spec {
        prompt: "a cat <lora:attention:0.5>".into(),
        prompt_syntax: PromptSyntax::A1111,
        ..spec(vec![])
    };
    assert!(pipeline.read_files(&plain).is_none());
    let read = |spec| {
        let read = pipeline.read_files(spec).expect("a file");
        std::thread::spawn(read).join().expect("no panic").expect("read").loras
    };
    assert!(read(&adapted) == read(&named), "read once");
    let lyco = Spec { prompt: "a cat <lyco:attention:0.5>".into(), ..named.clone() };
    assert!(read(&lyco) == read(&named), "another spelling");
    let begun = pipeline
        .begin_with(&named, NamedFiles { loras: read(&named), ..NamedFiles::default() })
        .expect("begun");
    assert_eq!(
        begun.lora_files().iter().map(|file| &*file.name).collect::<Vec<_>>(),
        ["attention"]
    );
    // LoRA deltas, and one more chunk, are the difference to a plain image.
    let info = pipeline.info();
    let bytes = |spec| info.step_bytes(spec, spec.size);
    let memory = info.memory;
    assert_eq!(bytes(&adapted) - bytes(&plain), 2 * 64 * memory.lora_bytes);
    assert_eq!((bytes(&lyco), lyco.has_loras(), plain.has_loras()), (bytes(&named), true, false));
    let bytes_of_times =
        4 * pipeline.begin(&plain).expect("begun").run.time_embeddings.elem_count() as u64;
    assert_eq!(memory.time_bytes, bytes_of_times, "one step of DDIM");
    let longer = Spec { steps: 4, ..plain.clone() };
    assert_eq!(bytes(&longer) - bytes(&plain), 3 * memory.time_bytes);
    let heun = Spec { sampler: crate::Sampler::Heun, ..longer.clone() };
    assert_eq!(bytes(&heun) - bytes(&plain), 7 * memory.time_bytes);
    let wordy = Spec { prompt: "a cat ".repeat(100), ..named.clone() };
    assert_eq!(bytes(&wordy) - bytes(&plain), 4 * memory.chunk_bytes);
    let kv = encoded(&pipeline, "a cat");
    assert_eq!(memory.chunk_bytes, 4 * kv.len() as u64);
}

#[test]
fn options_of_the_sampler_are_used_or_named() {
    let pipeline = demo();
    let options = |eta, s_noise| crate::SamplerOptions { eta, s_noise, ..Default::default() };
    let drawn = |sampler, sampler_options| {
        let spec = Spec { sampler, sampler_options, steps: 2, ..spec(vec![]) };
        let mut trajectory = pipeline.begin(&spec).expect("begun");
        while !trajectory.done() {
            pipeline.step(&mut [&mut trajectory]).expect("a step");
        }
        let latents = trajectory.latents().flatten_all().and_then(|x| x.to_vec1::<f32>());
        (latents.expect("latents"), trajectory.warnings().to_vec())
    };
    let (plain, warnings) = drawn(crate::Sampler::Ddim, options(Some(0.0), Some(1.0)));
    assert_eq!((&plain, &warnings), (&drawn(crate::Sampler::Ddim, options(None, None)).0, &vec![]));
    let (noisy, warnings) = drawn(crate::Sampler::Ddim, options(Some(1.0), Some(0.5)));
    assert_ne!(plain, noisy);
    assert_eq!(warnings, ["s_noise has no effect on the sampler ddim"]);
    let (_, warnings) = drawn(crate::Sampler::Lms, options(Some(1.0), None));
    assert_eq!(warnings, ["eta has no effect on the sampler lms"]);
    for (field, options) in
        [("eta", options(Some(1.5), None)), ("s_noise", options(None, Some(f64::NAN)))]
    {
        let spec = Spec { sampler_options: options, ..spec(vec![]) };
        let error = pipeline.check(&spec).expect_err("out of range").to_string();
        assert!(error.starts_with(field), "{error}");
    }
    // CFG++ needs the unconditional row at every scale.
    let spec = Spec { sampler: crate::Sampler::EulerCfgPp, guidance_scale: 0.6, ..spec(vec![]) };
    assert_eq!((spec.rows(), pipeline.begin(&spec).expect("begun").rows()), (2, 2));
}

#[test]
fn keys_and_values_are_there_while_a_picture_needs_them() {
    let pipeline = demo();
    let encode = || encoded(&pipeline, "a cat");
    let (first, second) = (encode(), encode());
    assert!(first.has_prompt_of(&second), "two pictures share them");
    drop((first, second));
    let kept = pipeline.own.prompts.encoded.lock().expect("unpoisoned");
    assert!(kept.iter().all(|(_, encoded)| encoded.kv.upgrade().is_none()));
}

#[test]
fn texts_of_a_prompt_are_encoded_once_shared_and_estimated() {
    let pipeline = demo();
    let of = |prompt: &str, negative: &str| Spec {
        prompt: prompt.into(),
        negative_prompt: negative.into(),
        prompt_syntax: PromptSyntax::A1111,
        steps: 12,
        ..spec(vec![])
    };
    let kept = |begun: &Trajectory| {
        let mut all: Vec<Arc<Conditioning>> = Vec::new();
        for row in (0..=12).flat_map(|evaluation| begun.run.rows.at(evaluation)) {
            if !all.iter().any(|known| known.has_prompt_of(row)) {
                all.push(Arc::clone(row));
            }
        }
        all
    };
    let (info, plain) = (pipeline.info(), of("a cat", ""));
    let chunk = info.memory.chunk_bytes;
    // Of the plain prompt and its negative one, two are kept and two stacked.
    let rest = info.step_bytes(&plain, plain.size) - 4 * chunk;
    for (prompt, negative, texts, stacked) in [
        ("a [cat|dog|cat] x", "", 3, 2),
        ("[a|b] [c|d|e]", "[f:g:4]", 8, 2),
        ("[a:b:3] AND [c:d:5]:0.5", "e", 5, 3),
        ("[a:b:30]", "[c:d:0]", 2, 2),
    ] {
        let spec = of(prompt, negative);
        let (begun, again) = (pipeline.begin(&spec), pipeline.begin(&spec));
        let (begun, again) = (begun.expect("begun"), again.expect("begun"));
        let (first, second) = (kept(&begun), kept(&again));
        assert_eq!((first.len(), begun.rows()), (texts, stacked), "{prompt}");
        let shared = first.iter().zip(&second).all(|(a, b)| a.has_prompt_of(b));
        assert!(shared && second.len() == texts, "{prompt}");
        let rows = (stacked as u64 - 2) * (rest - 13 * info.memory.time_bytes) / 2;
        let least = rest + rows + (texts + stacked) as u64 * chunk;
        let estimate = info.step_bytes(&spec, spec.size);
        assert!((least..=least + 2 * chunk).contains(&estimate), "{prompt}: {estimate} {least}");
    }
    let hires = |prompt: Option<&str>| crate::Hires {
        size: plain.size,
        steps: 12,
        strength: 1.0,
        upscaler: crate::Upscaler::default(),
        prompt: prompt.map(str::to_owned),
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    };
    let bytes = |prompt| {
        let spec = Spec { hires: Some(hires(prompt)), ..plain.clone() };
        info.step_bytes(&spec, spec.size)
    };
    assert_eq!(bytes(Some("a [dog|fox]")) - bytes(None), 3 * chunk, "and its negative prompt");
}

#[test]
fn joined_prompts_stand_for_few_texts_together() {
    let texts = |counts: [usize; 2]| {
        let part = |(k, count): (usize, usize)| {
            let options: Vec<_> = (0..count).map(|n| format!("{k}x{n}")).collect();
            format!("[{}]", options.join("|"))
        };
        let parts: Vec<_> = counts.into_iter().enumerate().map(part).collect();
        let prompt_syntax = PromptSyntax::A1111;
        let spec = Spec { prompt: parts.join(" AND "), prompt_syntax, steps: 100, ..spec(vec![]) };
        let directions = Pass::base(&spec).directions().map_err(|error| error.to_string())?;
        Ok(directions.iter().map(|(schedule, _)| schedule.texts.len()).sum())
    };
    assert_eq!(texts([40, 24]), Ok(64));
    let refused = "prompt: stands for more than 64 different texts, the most there can be";
    assert_eq!(texts([40, 25]), Err(refused.to_owned()));
}

#[test]
fn an_estimate_counts_scores_decoding_and_what_is_enlarged() {
    let mut info = demo().info().clone();
    info.memory =
        MemoryEstimate { row_bytes: 5, score_bytes: 3, scale: 8, ..MemoryEstimate::default() };
    let base = Spec { guidance_scale: 1.0, ..spec(vec![]) };
    // Scores are of pairs of latents.
    assert_eq!(info.peak_bytes(&base), 64 * (5 + 64 * 3));
    let upscaler = Upscaler::Picture(PictureUpscaler::Lanczos);
    let hires = Hires {
        size: Size::new(128, 128).expect("multiples of 8"),
        steps: 1,
        strength: 1.0,
        upscaler,
        prompt: None,
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    };
    let enlarged = Spec { hires: Some(hires), ..base.clone() };
    assert_eq!(info.peak_bytes(&enlarged), 256 * (5 + 256 * 3));
    info.memory.decode_bytes = 100;
    assert_eq!(info.peak_bytes(&base), 64 * 64 * 100);
    assert_eq!(info.peak_bytes(&enlarged), 128 * 128 * 100);
    // Nothing is decoded of a picture that is only enlarged.
    let picture = Rgb { width: 64, height: 64, data: vec![0; 3 * 64 * 64] };
    let enlarge = Enlarge {
        picture,
        scale: 2.0,
        canvas: None,
        upscaler: PictureUpscaler::Lanczos,
        second: None,
    };
    let size = Size::new(128, 128).expect("multiples of 8");
    let alone = Spec { size, enlarge: Some(Arc::new(enlarge)), ..base };
    assert_eq!(info.peak_bytes(&alone), 3 * 3 * (64 * 64 + 128 * 128));
}
