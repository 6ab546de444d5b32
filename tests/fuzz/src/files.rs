//! Files that an operator downloads: checkpoints, configurations, LoRAs, embeddings, and the
//! prompts that meet their tokenizers. Whatever the bytes are: reading them ends with a value or
//! with an error of one line.

use std::io::{Cursor, Write as _};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use sd_models::files::IpAdapterFile;
use sd_models::networks::{ClipTextConfig, UNetConfig, VaeConfig};
use sd_models::sampling::SchedulerConfig;
use sd_models::text::{ClipTokenizer, Counted, Part, Schedule, chunks, parts};
use sd_models::{
    AddOns, AssetDir, Checkpoint, Control, ControlRule, DeviceName, Enlarge, IpAdapter,
    LoadOptions, LoraUse, PictureUpscaler, Pipeline, Precision, Preprocessor, PromptRole,
    PromptSyntax, Rgb, SafetyMode, Size, Source, Spec, unread,
};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::ROOT;
use crate::fake::spec;

/// Zeros that stand for the tensors' data.
const DATA: usize = 96 << 10;

/// Hands over the path of a file with these bytes, in a folder that has nothing else.
fn with_file(name: &str, bytes: &[u8], read: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(name);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    std::fs::write(&path, bytes).expect("it is written");
    read(&path);
}

fn short<T>(result: Result<T, sd_models::Error>) -> Option<T> {
    result.map_err(|error| assert!(error.to_string().len() < 64 << 10, "{error}")).ok()
}

/// Everything that is read of a checkpoint before its networks are built.
fn checkpoint(path: &Path) {
    let source = Source::Checkpoint(Checkpoint { file: path.to_owned(), vocabulary: None });
    short(sd_models::parameters(&options(source.clone(), AddOns::default()), false));
    let _ = UNetConfig::read(&source);
    let _ = VaeConfig::read(&source);
    let _ = ClipTextConfig::read(&source);
    let _ = short(source.read("scheduler/scheduler_config.json"));
    for folder in ["unet", "vae", "text_encoder"] {
        tensors(&source, folder);
    }
}

/// The tensors of one network in a checkpoint.
fn tensors(source: &Source, folder: &str) {
    if let Some(weights) = short(source.weights(folder, "", false)) {
        weights.finish(|_| false);
        assert!(weights.warnings().iter().all(|warning| warning.lines().count() == 1));
    }
}

/// A pickle is unpickled at every read; once shows what it has.
fn pickled(path: &Path) {
    let file = path.to_owned();
    tensors(&Source::Checkpoint(Checkpoint { file, vocabulary: None }), "unet");
}

/// A file with tensors, and its ending: the bytes are the header of a safetensors file, with the
/// right length before it and zeros behind it. A first byte tells of other forms: 0 a whole
/// safetensors file, 1 the pickle of a PyTorch file, 2 a PNG file, 3 a GGUF file up to its data.
fn tensor_file(data: &[u8]) -> (&'static str, Vec<u8>) {
    let length = (data.len() as u64).to_le_bytes();
    match data {
        [0, file @ ..] => ("safetensors", file.to_vec()),
        [1, pickle @ ..] => ("pt", pytorch_file(pickle)),
        [2, file @ ..] => ("png", file.to_vec()),
        [3, file @ ..] => ("gguf", [file, &vec![0; DATA]].concat()),
        header => ("safetensors", [&length, header, &vec![0; DATA]].concat()),
    }
}

/// A PyTorch file with this pickle and two storages.
fn pytorch_file(pickle: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in [("m/data.pkl", pickle), ("m/data/0", &[0; 4096]), ("m/data/1", &[0; 8])] {
        zip.start_file(name, stored).expect("an entry");
        zip.write_all(bytes).expect("it is written");
    }
    zip.finish().expect("an archive").into_inner()
}

/// Hands over the path of such a file.
fn with_tensor_file(data: &[u8], read: impl FnOnce(&Path)) {
    let (ending, bytes) = tensor_file(data);
    with_file(&format!("fuzzed-word.{ending}"), &bytes, read);
}

/// A single-file checkpoint.
pub fn safetensors(data: &[u8]) {
    with_tensor_file(data, checkpoint);
}

/// A UNet alone.
pub fn unet_file(data: &[u8]) {
    with_tensor_file(data, |path| {
        let source = Source::UNet(path.to_owned());
        short(UNetConfig::read(&source));
        tensors(&source, "unet");
    });
}

/// A GGUF file, up to its data, as a whole model and as a UNet.
pub fn gguf(data: &[u8]) {
    let file = [data, &vec![0; DATA]].concat();
    with_file("fuzzed.gguf", &file, |path| {
        checkpoint(path);
        tensors(&Source::UNet(path.to_owned()), "unet");
    });
}

/// The pickle in a PyTorch file that has two storages.
pub fn pickle(data: &[u8]) {
    with_file("fuzzed.ckpt", &pytorch_file(data), pickled);
}

/// A PyTorch file as a whole.
pub fn archive(data: &[u8]) {
    with_file("fuzzed.pt", data, pickled);
}

/// The configurations and the vocabulary of a model in the Diffusers format, the yaml file beside a
/// single file and the owner's defaults; the first byte tells which one the bytes are.
pub fn model_files(data: &[u8]) {
    const FILES: [&str; 12] = [
        "tokenizer/tokenizer.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "v1.yaml",
        "sd-server.json",
    ];
    let [kind, file @ ..] = data else { return };
    let name = FILES[usize::from(*kind) % FILES.len()];
    with_file(name, file, |path| {
        let root = path.ancestors().nth(name.split('/').count()).expect("a folder");
        let source = Source::Directory(root.to_owned());
        match name.split_once('/') {
            None if name == "v1.yaml" => beside_checkpoint(root),
            None if name == "sd-server.json" => defaults(root),
            Some((folder, name)) if name.ends_with(".index.json") => tensors(&source, folder),
            Some(("tokenizer", _)) => tokenizer(&source, root),
            Some(("scheduler", _)) => {
                let _ = SchedulerConfig::from_json(&String::from_utf8_lossy(file));
            }
            Some(("unet", _)) => drop(short(UNetConfig::read(&source))),
            Some(("vae", _)) => drop(short(VaeConfig::read(&source))),
            Some(_) => drop(short(ClipTextConfig::read(&source))),
            None => drop(short(sd_models::check_pipeline(&source))),
        }
    });
}

/// A tokenizer of which one file is fuzzed and the others are the built-in model's.
fn tokenizer(source: &Source, root: &Path) {
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
        let (known, path) = (Path::new(ROOT).join("models/demo/tokenizer"), root.join("tokenizer"));
        if !path.join(name).exists() {
            std::fs::copy(known.join(name), path.join(name)).expect("a copy");
        }
    }
    if let Some(tokenizer) = short(ClipTokenizer::load(source, 77)) {
        let _ = short(tokenizer.encode("a red house, (by) the sea"));
    }
}

/// A folder that has the configuration of a checkpoint gets the checkpoint.
fn beside_checkpoint(root: &Path) {
    let file = root.join("v1.safetensors");
    symlink(Path::new(ROOT).join("models/tests/fixtures/single/v1.safetensors"), &file)
        .expect("a link");
    let source = Source::Checkpoint(Checkpoint { file, vocabulary: None });
    let _ = short(source.read("scheduler/scheduler_config.json"));
    let _ = short(VaeConfig::read(&source));
}

/// A folder that has the owner's defaults gets the model.
fn defaults(root: &Path) {
    let model = Path::new(ROOT).join("models/tests/fixtures/v1");
    for entry in model.read_dir().expect("a model").flatten() {
        symlink(entry.path(), root.join(entry.file_name())).expect("a link");
    }
    drop(short(Pipeline::load(&options(Source::Directory(root.to_owned()), AddOns::default()))));
}

/// A prompt in both syntaxes, before a tokenizer.
pub fn prompt(data: &[u8]) {
    static TOKENIZER: LazyLock<ClipTokenizer> =
        LazyLock::new(|| ClipTokenizer::load(&Source::Demo, 77).expect("a tokenizer"));
    let prompt = String::from_utf8_lossy(data);
    let plain = short(TOKENIZER.encode(&prompt)).expect("any text has tokens");
    assert_eq!(plain.ids.len(), 77);
    let Some((text, loras)) = short(PromptSyntax::A1111.text(&prompt)) else { return };
    for Part { text, .. } in parts(&text) {
        for before in [None, Some(5)] {
            let Ok(schedule) = Schedule::new(&text, Counted { evaluations: 10, before }) else {
                continue;
            };
            assert!((0..20).all(|k| schedule.at(k) < schedule.texts.len()), "{schedule:?}");
        }
    }
    for role in [PromptRole::Plain, PromptRole::A1111, PromptRole::A1111Negative] {
        let told = unread(&prompt, role);
        assert!(told.is_none_or(|told| told.len() < prompt.len() + 200), "{role:?}");
    }
    assert!(loras.iter().all(|lora| lora.scale.is_finite() && lora.text_encoder_scale.is_finite()));
    let (chunks, _) = short(chunks(&text, &TOKENIZER)).expect("any text has tokens");
    assert!((1..=8).contains(&chunks.len()));
    for chunk in chunks {
        assert_eq!((chunk.ids.len(), chunk.weights.len()), (77, 77));
        assert!(chunk.weights.iter().all(|weight| weight.is_finite()));
    }
}

/// How to load a small model, with what stands beside it.
fn options(source: Source, add_ons: AddOns) -> LoadOptions {
    LoadOptions {
        name: None,
        source,
        unet: None,
        vae: None,
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::Never,
        threads: Some(1),
        add_ons,
    }
}

/// A small model, with what stands beside it.
fn load(add_ons: AddOns) -> Pipeline {
    let model = Path::new(ROOT).join("models/tests/fixtures/v1");
    Pipeline::load(&options(Source::Directory(model), add_ons)).expect("a model")
}

/// A small model and the folder of its LoRAs.
struct WithLoras {
    folder: TempDir,
    model: Pipeline,
}

static WITH_LORAS: LazyLock<WithLoras> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let directory = Some(folder.path().to_owned());
    let endings = &["safetensors", "pt", "png", "gguf"];
    let loras = AssetDir { directory, endings, ..AssetDir::default() };
    let model = load(AddOns { loras, max_lora_bytes: 1 << 24, ..AddOns::default() });
    WithLoras { folder, model }
});

impl WithLoras {
    /// A name that was not used: a LoRA that is read is cached under its name.
    fn name() -> String {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        format!("lora{}", NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn draw(&self, name: &str) {
        let size = self.model.info().defaults.size;
        let loras = vec![LoraUse::new(name, 0.5)];
        short(self.model.begin(&Spec { size, loras, ..spec(1, 1) }));
    }
}

/// A LoRA for a small model.
pub fn lora(data: &[u8]) {
    let (name, (ending, bytes)) = (WithLoras::name(), tensor_file(data));
    let path = WITH_LORAS.folder.path().join(format!("{name}.{ending}"));
    std::fs::write(&path, bytes).expect("it is written");
    WITH_LORAS.draw(&name);
    std::fs::remove_file(path).expect("it is removed");
}

/// PEFT's settings of a LoRA.
pub fn peft(data: &[u8]) {
    let lora = Path::new(ROOT).join("models/tests/fixtures/lora/peft/adapter_model.safetensors");
    let name = WithLoras::name();
    let folder = WITH_LORAS.folder.path().join(&name);
    std::fs::create_dir(&folder).expect("a folder");
    symlink(lora, folder.join("adapter_model.safetensors")).expect("a link");
    std::fs::write(folder.join("adapter_config.json"), data).expect("it is written");
    // It goes by the name of its folder.
    WITH_LORAS.draw(&name);
    std::fs::remove_dir_all(folder).expect("it is removed");
}

/// A small model and the folder of its ControlNets, of its IP-Adapters, or of its upscalers.
struct WithFiles {
    folder: TempDir,
    model: Pipeline,
}

static WITH_CONTROLNETS: LazyLock<WithFiles> = LazyLock::new(|| {
    WithFiles::new(|controlnets| AddOns {
        controlnets,
        max_controlnet_bytes: 1 << 24,
        ..AddOns::default()
    })
});

static WITH_IP_ADAPTERS: LazyLock<WithFiles> = LazyLock::new(|| {
    let model = WithFiles::new(|ip_adapters| AddOns {
        ip_adapters: AssetDir { skipped: IpAdapterFile::ENCODER_FOLDERS, ..ip_adapters },
        max_ip_adapter_bytes: 1 << 24,
        ..AddOns::default()
    });
    let encoder = Path::new(ROOT).join("models/tests/fixtures/ip/models/image_encoder");
    symlink(encoder, model.folder.path().join("image_encoder")).expect("a link");
    model
});

static WITH_UPSCALERS: LazyLock<WithFiles> = LazyLock::new(|| {
    WithFiles::new(|upscalers| AddOns {
        upscalers,
        max_upscaler_bytes: 1 << 24,
        ..AddOns::default()
    })
});

impl WithFiles {
    fn new(add_ons: impl Fn(AssetDir) -> AddOns) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let directory = Some(folder.path().to_owned());
        let endings = &["safetensors", "pt", "png", "gguf"];
        let add_ons = add_ons(AssetDir { directory, endings, ..AssetDir::default() });
        let fixtures = Path::new(ROOT).join("models/tests/fixtures");
        // The UNet that the nets of the corpus steer.
        let unet = Some(Source::Network(fixtures.join("control/v1/unet")));
        let options = options(Source::Directory(fixtures.join("v1")), add_ons);
        let model = Pipeline::load(&LoadOptions { unet, ..options }).expect("a model");
        Self { folder, model }
    }

    /// Draws or enlarges with the file of these bytes, whose name `spec` takes.
    fn draw(&self, data: &[u8], spec: impl FnOnce(String) -> Spec) {
        let (name, (ending, bytes)) = (WithLoras::name(), tensor_file(data));
        let path = self.folder.path().join(format!("{name}.{ending}"));
        std::fs::write(&path, bytes).expect("it is written");
        let (model, spec) = (&self.model, spec(name));
        let read = model.read_files(&spec).expect("a file is named");
        if let Some(files) = short(read()) {
            if spec.enlarge.is_some() {
                if let Some(mut enlargement) = short(model.begin_enlarging(&spec, files)) {
                    while !enlargement.done() && short(model.enlarge(&mut enlargement)).is_some() {}
                }
            } else if let Some(mut trajectory) = short(model.begin_with(&spec, files)) {
                short(model.step(&mut [&mut trajectory]));
            }
        }
        std::fs::remove_file(path).expect("it is removed");
    }
}

/// A ControlNet of a small model.
pub fn controlnet(data: &[u8]) {
    let size = Size::new(16, 16).expect("multiples of 8");
    let picture = Rgb { width: 16, height: 16, data: vec![90; 3 * 16 * 16] };
    WITH_CONTROLNETS.draw(data, |model| {
        let control = Control {
            model,
            preprocessor: Preprocessor::None,
            picture: Arc::new(picture),
            hires_picture: None,
            scale: 1.0,
            start: 0.0,
            end: 1.0,
            rule: ControlRule::Diffusers { guess: false },
        };
        Spec { size, controls: vec![control], ..spec(1, 1) }
    });
}

/// An IP-Adapter of a small model.
pub fn ip_adapter(data: &[u8]) {
    let size = Size::new(16, 16).expect("multiples of 8");
    let picture = Rgb { width: 8, height: 8, data: vec![90; 3 * 8 * 8] };
    WITH_IP_ADAPTERS.draw(data, |model| {
        let adapter = IpAdapter {
            model,
            pictures: vec![Arc::new(picture)],
            scale: 1.0.into(),
            start: 0.0,
            end: 1.0,
            unit: None,
        };
        Spec { size, ip_adapters: vec![adapter], ..spec(1, 1) }
    });
}

/// An upscaler of pictures.
pub fn upscaler(data: &[u8]) {
    let picture = Rgb { width: 8, height: 8, data: vec![90; 3 * 8 * 8] };
    WITH_UPSCALERS.draw(data, |name| {
        let upscaler = PictureUpscaler::from(name.as_str());
        let enlarge = Enlarge { picture, scale: 2.0, canvas: None, upscaler, second: None };
        let size = Size::new(16, 16).expect("multiples of 8");
        Spec { size, enlarge: Some(Arc::new(enlarge)), ..spec(1, 1) }
    });
}

/// A textual inversion embedding in any form of file.
pub fn embedding(data: &[u8]) {
    with_tensor_file(data, |path| {
        let embeddings = AssetDir { files: vec![path.to_owned()], ..AssetDir::default() };
        let add_ons = AddOns { embeddings, max_embedding_bytes: 1 << 20, ..AddOns::default() };
        let model = load(add_ons);
        let embeddings = &model.info().embeddings;
        assert!(embeddings.words.len() + embeddings.skipped.len() >= 1);
    });
}
