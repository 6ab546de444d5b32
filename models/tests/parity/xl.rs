//! Stable Diffusion XL: its networks, and whole runs of a small model with random weights, against
//! diffusers' pipelines.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sd_models::networks::{
    ClipTextConfig, ClipTextModel, PooledToken, UNet2DConditionModel, UNetConfig,
};
use sd_models::{
    AddOns, AssetDir, Checkpoint, DeviceName, Hires, Img2Img, LoadOptions, LoraStack, LoraUse,
    MaskedStart, Pipeline, Precision, PromptSyntax, Rgb, SafetyMode, Size, Source, Spec, Upscaler,
    XlOptions,
};

use crate::img2img::{copy, finish, load, spec};
use crate::{fixture, floats, path, relative_error};

const TOLERANCE: f32 = 1e-4;
const CPU: &Device = &Device::Cpu;

fn assert_close(what: &str, ours: &Tensor, reference: &Tensor) {
    let error = relative_error(ours, reference);
    println!("{what}: {error:.1e}");
    assert!(error <= TOLERANCE, "{what}: {error:.1e}");
}

#[test]
fn text_encoders_end_before_their_last_layer() {
    let source = Source::Directory(path("xl"));
    let expected = fixture("xl/networks.safetensors");
    let ids = expected["ids"].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
    for folder in ["text_encoder", "text_encoder_2"] {
        let config = ClipTextConfig::read_in(&source, folder).unwrap();
        let weights = source.weights(folder, "model", false).unwrap();
        let is_second = folder == "text_encoder_2";
        let load = if is_second { ClipTextModel::load_projected } else { ClipTextModel::load };
        let model = load(config, &weights, CPU, DType::F32).unwrap();
        assert!(weights.warnings().is_empty(), "{:?}", weights.warnings());
        for skip in [0, 1] {
            let loras = LoraStack::default();
            let ours = model.forward_pooled(skip, &ids, PooledToken::Configured, &loras).unwrap();
            let case = format!("{folder}.{skip}");
            assert_close(&case, &ours.states, &expected[&case]);
            assert_eq!(ours.pooled.is_some(), is_second);
            if let Some(pooled) = ours.pooled {
                assert_close(&format!("{case} pooled"), &pooled, &expected["pooled"]);
            }
            let last = PooledToken::Id(638);
            let by_id = model.forward_pooled(skip, &ids, last, &loras).unwrap().pooled;
            if let Some(pooled) = by_id {
                assert_close(&format!("{case} pooled by id"), &pooled, &expected["pooled"]);
            }
        }
    }
}

/// Two rows with their own timesteps, prompts, pooled prompts and sizes.
fn unet(name: &str, root: &str) {
    let source = Source::Directory(path(root));
    let weights = source.weights("unet", "diffusion_pytorch_model", false).unwrap();
    let config = UNetConfig::read(&source).unwrap();
    let model = UNet2DConditionModel::load(config, &weights, CPU, DType::F32).unwrap();
    assert!(weights.warnings().is_empty(), "{:?}", weights.warnings());
    let expected = fixture("xl/networks.safetensors");
    let of = |what: &str| &expected[&format!("{name}.{what}")];
    let sizes = of("sizes").to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let timesteps: Vec<f64> = floats(of("timesteps")).into_iter().map(f64::from).collect();
    let one = |x: &Tensor, row| x.narrow(0, row, 1).unwrap();
    let condition = |row: usize| {
        let prompt = model.condition(&one(of("context"), row), &[]).unwrap();
        let pooled = one(of("pooled"), row);
        model.add(prompt, &pooled, &sizes[row], &[]).unwrap()
    };
    let rows = [condition(0), condition(1)];
    let times = model.time_embeddings(&timesteps, &[]).unwrap();
    let ours = model.forward(of("latents"), &times, &rows, &[]).unwrap();
    assert_close(&format!("unet {name}"), &ours, of("output"));
    for (row, conditioning) in rows.into_iter().enumerate() {
        let (latents, time) = (one(of("latents"), row), one(&times, row));
        let alone = model.forward(&latents, &time, &[conditioning], &[]).unwrap();
        assert_eq!(relative_error(&alone, &one(&ours, row)), 0.0, "unet {name} row {row}");
    }
}

#[test]
fn unet_of_xl() {
    unet("unet", "xl");
}

#[test]
fn unet_of_xl_for_inpainting() {
    unet("inpaint", "xl/inpaint");
}

#[test]
fn unet_of_xl_whose_layers_differ() {
    unet("ssd", "xl/ssd");
}

/// The small model with other files; each test has its own.
fn model_with(test: &str, change: impl FnOnce(&Path)) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("xl-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("xl"), &root);
    change(&root);
    root
}

/// A JSON file with some of its keys changed.
fn edit(file: &Path, changes: &serde_json::Value) {
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    std::fs::write(file, json.to_string()).unwrap();
}

fn with_scheduler(test: &str, changes: &serde_json::Value) -> Pipeline {
    let file = "scheduler/scheduler_config.json";
    load(model_with(test, |root| edit(&root.join(file), changes)))
}

fn drawing(steps: usize, guidance_scale: f64, model: &Pipeline) -> Spec {
    let defaults = model.info().defaults;
    let (sampler, schedule) = (defaults.sampler, defaults.schedule);
    Spec { steps, guidance_scale, sampler, schedule, ..spec(None) }
}

/// Of runs that begin at a sigma of 4096, where diffusers' own in f32 is 7e-5 from that in f64.
const STEEP: f32 = 2e-4;

/// Specs against the cases of the fixture, all in one batch, and each alone.
fn check(model: &Pipeline, cases: &[(&str, Spec)]) {
    let expected = fixture("xl/pictures.safetensors");
    let begun = |spec| model.begin(spec).unwrap();
    let together = finish(model, cases.iter().map(|(_, spec)| begun(spec)).collect());
    for ((case, spec), together) in cases.iter().zip(together) {
        let error = relative_error(&together, &expected[*case]);
        println!("{case}: {error:.1e}");
        let tolerance = if *case == "text.zero_snr" { STEEP } else { TOLERANCE };
        assert!(error <= tolerance, "{case}: {error:.1e}");
        let alone = finish(model, vec![begun(spec)]);
        assert_eq!(relative_error(&alone[0], &together), 0.0, "{case} alone");
    }
}

#[test]
fn a_text_becomes_a_picture_as_in_diffusers() {
    let model = load(path("xl"));
    let info = model.info();
    assert_eq!((info.is_xl, info.warnings.len()), (true, 0), "{:?}", info.warnings);
    assert_eq!((info.defaults.guidance_scale, info.defaults.steps), (5.0, 50));
    assert_eq!(info.defaults.sampler.name(), "euler");
    let base = drawing(5, 3.0, &model);
    let negative = Spec { negative_prompt: "the sea".into(), ..base.clone() };
    let with = |xl| Spec { xl, ..base.clone() };
    let seconds = XlOptions {
        prompt_2: "a blue tree".into(),
        negative_prompt_2: "night".into(),
        ..XlOptions::default()
    };
    let sizes = XlOptions {
        original_size: Some([512, 768]),
        crop: [8, 16],
        target_size: Some([1024, 512]),
        ..XlOptions::default()
    };
    let cases = [
        ("text.absent", base.clone()),
        ("text.empty", with(XlOptions { encodes_empty: true, ..XlOptions::default() })),
        ("text.negative", negative.clone()),
        ("text.prompt_2", Spec { xl: seconds, ..negative.clone() }),
        ("text.unguided", Spec { guidance_scale: 1.0, ..base.clone() }),
        ("text.clip_skip", Spec { clip_skip: 1, ..negative.clone() }),
        ("text.sizes", with(sizes)),
        ("text.rescale", Spec { guidance_rescale: 0.7, ..negative }),
    ];
    check(&model, &cases);
    check(&model, &[("text.wide", Spec { size: Size::new(96, 64).unwrap(), ..base })]);
}

#[test]
fn a_turbo_model_is_drawn_with_its_own_defaults() {
    let model = with_scheduler(
        "turbo",
        &serde_json::json!({
            "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing",
        }),
    );
    let defaults = model.info().defaults;
    assert_eq!((defaults.steps, defaults.guidance_scale), (1, 1.0));
    let cases = [("text.turbo.1", 1), ("text.turbo.4", 4)];
    check(&model, &cases.map(|(case, steps)| (case, drawing(steps, 0.0, &model))));
}

#[test]
fn velocities_with_zero_terminal_snr() {
    let model = with_scheduler(
        "zero-snr",
        &serde_json::json!({
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": true,
            "timestep_spacing": "trailing",
        }),
    );
    let spec = Spec { guidance_rescale: 0.7, ..drawing(5, 3.0, &model) };
    check(&model, &[("text.zero_snr", spec)]);
}

/// Mean and standard deviation of the latents, in the VAE's configuration.
fn with_mean(test: &str) -> Pipeline {
    let mean = serde_json::json!({
        "latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [0.9, 1.1, 1.3, 0.8],
    });
    load(model_with(test, |root| edit(&root.join("vae/config.json"), &mean)))
}

#[test]
fn decoded_pictures_are_those_of_diffusers() {
    let expected = fixture("xl/pictures.safetensors");
    for (case, model) in [("plain", load(path("xl"))), ("mean", with_mean("mean"))] {
        let mut begun = model.begin(&drawing(5, 3.0, &model)).unwrap();
        while !begun.done() {
            model.step(&mut [&mut begun]).unwrap();
        }
        let Rgb { width, height, data } = model.decode(&begun).unwrap();
        assert_eq!((width, height), (64, 64));
        let theirs = expected[&format!("picture.{case}")].permute((0, 2, 3, 1)).unwrap();
        let theirs = floats(&(theirs * 255.0).unwrap());
        let differences = theirs.iter().zip(&data).map(|(a, b)| (a - f32::from(*b)).abs());
        let (sum, most) = differences.fold((0.0, 0_f32), |(sum, most), d| (sum + d, most.max(d)));
        let mean = sum / data.len() as f32;
        println!("picture {case}: mean {mean:.2e}, most {most:.2e}");
        // Rounding to whole numbers is a quarter on average.
        assert!(mean <= 0.5 && most <= 4.0, "{case}: {mean} {most}");
    }
}

#[test]
fn a_hires_pass_has_sizes_of_its_own() {
    let model = load(path("xl"));
    let hires = Hires {
        size: Size::new(96, 96).unwrap(),
        steps: 6,
        strength: 0.5,
        upscaler: Upscaler::default(),
        prompt: None,
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    };
    let spec = Spec { hires: Some(hires), ..drawing(5, 3.0, &model) };
    let mut begun = model.begin(&spec).unwrap();
    model.step(&mut [&mut begun]).unwrap();
    let preview = model.preview(&begun).unwrap();
    assert_eq!((preview.width, preview.height), (8, 8));
    let drawn = finish(&model, vec![begun]);
    assert_close("hires", &drawn[0], &fixture("xl/hires.safetensors")["hires"]);
}

/// Every case of a kind.
fn from_picture(kind: &str, model: &Pipeline) {
    let expected = fixture("xl/pictures.safetensors");
    let bytes = |name: &str| -> Vec<u8> {
        let values = floats(&expected[name]);
        values.into_iter().map(|value| value as u8).collect()
    };
    let start = |strength| Img2Img {
        picture: Rgb { width: 64, height: 64, data: bytes("picture") },
        strength,
        mask: ["hole", "told"].contains(&kind).then(|| bytes("mask")),
        masked_start: MaskedStart::Picture,
        takes_all_steps: false,
    };
    let base = drawing(6, 3.0, model);
    let cases = [("1.0", 1.0), ("0.5", 0.5)].map(|(name, strength)| {
        let img2img = Some(std::sync::Arc::new(start(strength)));
        (format!("{kind}.{name}"), Spec { img2img, ..base.clone() })
    });
    let cases: Vec<_> = cases.iter().map(|(name, spec)| (name.as_str(), spec.clone())).collect();
    check(model, &cases);
}

#[test]
fn pictures_become_others_and_holes_are_filled() {
    let model = load(path("xl"));
    from_picture("image", &model);
    from_picture("hole", &model);
    from_picture("moved", &with_mean("moved"));
    let told = model_with("told", |root| {
        std::fs::remove_dir_all(root.join("unet")).unwrap();
        copy(&path("xl/inpaint/unet"), &root.join("unet"));
    });
    from_picture("told", &load(told));
}

#[test]
fn what_has_no_effect_is_told() {
    let asks = XlOptions {
        prompt_2: "a".into(),
        crop: [1, 0],
        target_size: Some([64, 64]),
        ..XlOptions::default()
    };
    let of_first = load(path("v1"));
    let begun = of_first.begin(&Spec { xl: asks, ..spec(None) }).unwrap();
    let told: Vec<_> = begun.warnings().iter().map(|text| text.split(' ').next()).collect();
    assert_eq!(told, [Some("prompt_2"), Some("crop"), Some("target_size")]);
    let model = load(path("xl"));
    let idle = XlOptions { negative_prompt_2: "night".into(), ..XlOptions::default() };
    let begun = model.begin(&Spec { xl: idle, ..drawing(1, 3.0, &model) }).unwrap();
    assert!(begun.warnings()[0].starts_with("negative_prompt_2 has no effect"));
    let error = model.check(&Spec { clip_skip: 3, ..spec(None) }).unwrap_err().to_string();
    assert!(error.starts_with("clip_skip: must be 0 to 2, not 3"), "{error}");
}

#[test]
fn parts_that_do_not_fit_are_refused_by_name() {
    let refusal = |test: &str, file: &str, changes: serde_json::Value| {
        let root = model_with(test, |root| edit(&root.join(file), &changes));
        let opened = crate::img2img::open(Source::Directory(root), None);
        opened.err().expect("refused").to_string()
    };
    let json = |text: &str| serde_json::from_str(text).unwrap();
    let index = "model_index.json";
    for (test, file, changes, words) in [
        ("refiner", index, r#"{"text_encoder":[null,null]}"#, "cross_attention_dim: 40"),
        ("first", index, r#"{"_class_name":"StableDiffusionPipeline"}"#, "cross_attention_dim: 40"),
        (
            "ids",
            "unet/config.json",
            r#"{"projection_class_embeddings_input_dim":61}"#,
            "projection_class_embeddings_input_dim: 61; it must be 68",
        ),
        ("scored", index, r#"{"requires_aesthetics_score":true}"#, "asks for a score in the place"),
        ("plain", "unet/config.json", r#"{"addition_embed_type":null}"#, "addition_time_embed_dim"),
        ("mean-1", "vae/config.json", r#"{"latents_mean":[1]}"#, "latents_mean: must have 4"),
        (
            "scale",
            "vae/config.json",
            r#"{"latents_mean":[1,1,1,1],"latents_std":[0,1,1,1]}"#,
            "latents_std: 0",
        ),
    ] {
        let error = refusal(test, file, json(changes));
        assert!(error.contains(words) && error.lines().count() == 1, "{test}: {error}");
    }
}

#[test]
fn tokens_have_weights_in_both_encoders() {
    let model = load(path("xl"));
    let expected = fixture("xl/emphasis.safetensors");
    let prompts = ["a (red:1.4) house by the [sea]", "a house BREAK the (moon:0.5) at night"];
    for (k, prompt) in prompts.into_iter().enumerate() {
        let syntax = PromptSyntax::A1111;
        let spec = Spec {
            prompt: prompt.into(),
            prompt_syntax: syntax,
            // Not followed there.
            clip_skip: 1,
            ..drawing(5, 3.0, &model)
        };
        let begun = model.begin(&spec).unwrap();
        assert!(begun.warnings()[0].starts_with("clip_skip has no effect"));
        let drawn = finish(&model, vec![begun]);
        assert_close(prompt, &drawn[0], &expected[&format!("emphasis.{k}")]);
    }
}

/// The small model for inpainting as a single file, with what files in circulation have beside it.
fn single(test: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("xl-single-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir_all(root.join("unet")).unwrap();
    copy(&path("xl/tokenizer"), &root.join("tokenizer"));
    std::fs::copy(path("xl/single.safetensors"), root.join("a.safetensors")).unwrap();
    root
}

fn checkpoint(file: PathBuf) -> Source {
    Source::Checkpoint(Checkpoint { file, vocabulary: None })
}

#[test]
fn a_single_file_is_the_model() {
    let root = single("whole");
    let file = || checkpoint(root.join("a.safetensors"));
    // No shape tells the number of heads.
    let theirs = UNetConfig::read(&Source::Directory(path("xl/inpaint"))).unwrap();
    let mut ours = UNetConfig::read(&file()).unwrap();
    assert_eq!(ours.heads, [1, 1]);
    ours.heads.clone_from(&theirs.heads);
    assert_eq!(ours.sample_size, 128);
    ours.sample_size = theirs.sample_size;
    ours.norm_num_groups = theirs.norm_num_groups;
    assert_eq!(ours, theirs);
    let config = path("xl/inpaint/unet/config.json");
    std::fs::copy(config, root.join("unet/config.json")).unwrap();
    for folder in ["text_encoder", "text_encoder_2"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
        let config = |root: &Path| root.join(folder).join("config.json");
        std::fs::copy(config(&path("xl")), config(&root)).unwrap();
    }
    std::fs::create_dir_all(root.join("vae")).unwrap();
    std::fs::copy(path("xl/vae/config.json"), root.join("vae/config.json")).unwrap();
    // A VAE alone has the scale of the model's latents.
    let alone = root.join("vae-alone");
    std::fs::create_dir_all(&alone).unwrap();
    let vae = alone.join("vae.safetensors");
    std::fs::copy(path("xl/vae.safetensors"), &vae).unwrap();
    let model = crate::img2img::open(file(), Some(checkpoint(vae.clone()))).unwrap();
    assert!(model.info().is_xl && model.info().warnings.is_empty(), "{:?}", model.info().warnings);
    assert_eq!(model.info().defaults.sampler.name(), "euler");
    from_picture("told", &model);
    // As a linear layer, the projection is the other way round.
    let mut tensors =
        candle_core::safetensors::load(root.join("a.safetensors"), &Device::Cpu).unwrap();
    let name = "conditioner.embedders.1.model.text_projection";
    let matrix = tensors.remove(name).unwrap();
    let turned = matrix.t().unwrap().contiguous().unwrap();
    tensors.insert(format!("{name}.weight"), turned);
    let other = single("turned");
    for folder in ["unet", "text_encoder", "text_encoder_2", "vae"] {
        copy(&root.join(folder), &other.join(folder));
    }
    candle_core::safetensors::save(&tensors, other.join("a.safetensors")).unwrap();
    let vae_too = Some(checkpoint(vae));
    let model = crate::img2img::open(checkpoint(other.join("a.safetensors")), vae_too).unwrap();
    from_picture("told", &model);
    // As the VAE of a model of another family neither.
    let whole = path("single/v1.safetensors");
    let error = crate::img2img::open(file(), Some(checkpoint(whole))).err().unwrap().to_string();
    assert!(error.contains("has no VAE"), "{error}");
}

#[test]
fn a_turbo_model_in_a_single_file_has_its_own_size() {
    for (name, side) in [("sd_xl_turbo_1.0_fp16", 512), ("sd_xl_base_1.0", 1024)] {
        let root = single(name);
        let file = root.join(name).with_extension("safetensors");
        std::fs::rename(root.join("a.safetensors"), &file).unwrap();
        let vae = checkpoint(path("xl/vae.safetensors"));
        let model = crate::img2img::open(checkpoint(file), Some(vae)).unwrap();
        let defaults = model.info().defaults;
        assert_eq!((defaults.size.width(), defaults.size.height()), (side, side), "{name}");
        let is_turbo = side == 512;
        assert_eq!(defaults.steps == 1, is_turbo);
        assert_eq!(defaults.guidance_scale(true), if is_turbo { 1.0 } else { 7.5 });
    }
}

/// A file with more tensors, which hold nothing.
fn marked(file: &Path, marks: &[&str]) {
    let bytes = std::fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(length);
    let mut header: serde_json::Value = serde_json::from_slice(header).unwrap();
    for mark in marks {
        let empty = serde_json::json!({ "dtype": "F32", "shape": [0], "data_offsets": [0, 0] });
        header[*mark] = empty;
    }
    let header = header.to_string().into_bytes();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(file, [&length[..], &header, data].concat()).unwrap();
}

#[test]
fn marks_of_a_single_file_tell_what_it_predicts() {
    for (marks, predicted) in [
        (&[][..], "\"prediction_type\":\"epsilon\",\"rescale_betas_zero_snr\":false"),
        (&["v_pred"], "\"prediction_type\":\"v_prediction\",\"rescale_betas_zero_snr\":false"),
        (
            &["v_pred", "ztsnr"],
            "\"prediction_type\":\"v_prediction\",\"rescale_betas_zero_snr\":true",
        ),
    ] {
        let root = single("marks");
        let file = root.join("a.safetensors");
        marked(&file, marks);
        let scheduler = checkpoint(file).read("scheduler/scheduler_config.json").unwrap().unwrap();
        let scheduler = String::from_utf8(scheduler.into_owned()).unwrap();
        assert!(scheduler.contains(predicted), "{marks:?}: {scheduler}");
    }
    let root = single("edm");
    let file = root.join("a.safetensors");
    marked(&file, &["edm_mean", "edm_std"]);
    let error = Checkpoint { file, vocabulary: None }.check().unwrap_err().to_string();
    assert!(error.contains("noise levels of EDM"), "{error}");
}

fn with_add_ons(model: &str, add_ons: AddOns) -> Pipeline {
    Pipeline::load(&LoadOptions {
        name: None,
        source: Source::Directory(path(model)),
        unet: None,
        vae: None,
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::IfPresent,
        threads: Some(1),
        add_ons,
    })
    .unwrap()
}

#[test]
fn loras_add_to_both_encoders_and_the_unet() {
    let file = |name: &str| path("xl/lora").join(name).with_extension("safetensors");
    let loras = AssetDir { files: vec![file("kohya"), file("diffusers")], ..AssetDir::default() };
    let add_ons = AddOns { loras, max_lora_bytes: 1 << 24, ..AddOns::default() };
    let model = with_add_ons("xl", add_ons.clone());
    let expected = &fixture("xl/lora/expected.safetensors")["lora"];
    let plain = &fixture("xl/pictures.safetensors")["text.absent"];
    assert!(relative_error(plain, expected) > 0.01);
    for name in ["kohya", "diffusers"] {
        let loras = vec![LoraUse::new(name, 0.8)];
        let begun = model.begin(&Spec { loras, ..drawing(5, 3.0, &model) }).unwrap();
        assert!(begun.warnings().is_empty(), "{:?}", begun.warnings());
        // Beside one without.
        let other = model.begin(&drawing(5, 3.0, &model)).unwrap();
        let drawn = finish(&model, vec![begun, other]);
        assert_close(name, &drawn[0], expected);
        assert_close("beside it", &drawn[1], plain);
    }
    // A model with one text encoder has no place for it.
    let loras = vec![LoraUse::new("kohya", 0.8)];
    let begun = with_add_ons("v1", add_ons).begin(&Spec { loras, ..spec(None) });
    let error = begun.map(drop).unwrap_err().to_string();
    assert!(error.contains("Stable Diffusion XL"), "{error}");
}

#[test]
fn words_are_learned_by_both_encoders() {
    let directory = Some(path("xl/inversion"));
    let embeddings = AssetDir { directory, endings: &["safetensors"], ..AssetDir::default() };
    let max_embedding_bytes = 1 << 20;
    let model = with_add_ons("xl", AddOns { embeddings, max_embedding_bytes, ..AddOns::default() });
    let known = &model.info().embeddings;
    assert_eq!((known.words[0].word.as_str(), known.words.len(), known.width), ("thing", 1, 40));
    let skipped: Vec<_> = known.skipped.iter().map(|(stem, _)| stem.as_str()).collect();
    assert_eq!(skipped, ["expected", "first", "uneven"]);
    assert!(known.skipped[2].1.contains("2 vectors of clip_l, but 1 of clip_g"), "{known:?}");
    let spec = Spec { prompt: "a thing by the sea".into(), ..drawing(5, 3.0, &model) };
    let drawn = finish(&model, vec![model.begin(&spec).unwrap()]);
    let expected = &fixture("xl/inversion/expected.safetensors")["inversion"];
    assert_close("inversion", &drawn[0], expected);
}
