//! Textual inversion embeddings of every kind of file that `make_fixtures.py` wrote, all with the
//! same vectors.

use sd_models::{
    AddOns, AssetDir, DeviceName, LoadOptions, Pipeline, Precision, SafetyMode, Source, Spec,
};

use crate::img2img::{finish, spec as base};
use crate::{path, relative_error};

#[test]
fn every_kind_of_file_holds_the_same_vectors() {
    let endings = &["safetensors", "pt", "bin", "png"];
    let embeddings =
        AssetDir { directory: Some(path("inversion")), endings, ..AssetDir::default() };
    let model = Pipeline::load(&LoadOptions {
        name: None,
        source: Source::Directory(path("v1")),
        unet: None,
        vae: None,
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::Never,
        threads: Some(1),
        add_ons: AddOns { embeddings, max_embedding_bytes: 1 << 20, ..AddOns::default() },
    })
    .unwrap();
    let known = &model.info().embeddings;
    let words: Vec<_> = known.words.iter().map(|word| (&*word.word, word.count)).collect();
    assert_eq!(
        words,
        [("chunk", 2), ("<seen>", 2), ("dictionary", 2), ("plain", 2), ("stripes", 2)]
    );
    let reasons: Vec<_> = known.skipped.iter().map(|(_, reason)| &**reason).collect();
    assert_eq!(
        reasons,
        [
            "large.safetensors: is of Stable Diffusion XL: it holds 2 tensors, the first \"clip_g\"",
            "second.safetensors: its vectors have 1024 numbers, as those of Stable Diffusion 2.x; \
             those of this model have 32",
            "spoilt.safetensors: holds NaN or infinite numbers",
            "stripes: its token \"<seen>\" is a word of another file",
        ]
    );
    let drawn = |word: &str| {
        let prompt = format!("a house of {word}");
        let spec = Spec { prompt, steps: 1, ..base(None) };
        finish(&model, vec![model.begin(&spec).unwrap()]).remove(0)
    };
    let plain = drawn("plain");
    for word in ["chunk", "<seen>", "dictionary", "stripes"] {
        assert!(relative_error(&drawn(word), &plain) < 1e-5, "{word}");
    }
    assert!(relative_error(&drawn("picture"), &plain) > 1e-4);
}
