//! LoRA files whose tensors do not fit each other, whatever their shapes: refused by name, before
//! anything is computed with them; or warned of, if the others make a whole.

use std::path::{Path, PathBuf};

use sd_models::{LoraUse, Pipeline, Spec};
use serde_json::{Map, json};

use crate::img2img::spec as base;
use crate::lora_methods::limited;
use crate::path;

/// A weight of the text encoder, (64, 32).
const MODULE: &str = "lora_te_text_model_encoder_layers_0_mlp_fc1";

/// The role and the shape of a tensor.
type Part<'a> = (&'a str, &'a [usize]);

/// A file of tensors of bytes, all 1, of these shapes.
fn save(folder: &Path, name: &str, tensors: &[Part<'_>]) -> PathBuf {
    let (mut header, mut end) = (Map::new(), 0);
    for (role, shape) in tensors {
        let begin = end;
        end += if shape.contains(&0) { 0 } else { shape.iter().product::<usize>() };
        let entry = json!({ "dtype": "U8", "shape": shape, "data_offsets": [begin, end] });
        header.insert(format!("{MODULE}.{role}"), entry);
    }
    let header = serde_json::to_string(&header).unwrap();
    let path = folder.join(name).with_extension("safetensors");
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(&path, [&length[..], header.as_bytes(), &vec![1; end]].concat()).unwrap();
    path
}

fn with(loras: &[&str]) -> Spec {
    let loras = loras.iter().map(|name| LoraUse::new(*name, 1.0)).collect();
    Spec { prompt: "a red house".into(), loras, steps: 1, ..base(None) }
}

fn refusal(model: &Pipeline, loras: &[&str]) -> String {
    model.begin(&with(loras)).map(drop).unwrap_err().to_string()
}

#[test]
fn shapes_that_do_not_fit_are_refused_before_they_are_multiplied() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[Part<'_>], &str); 16] = [
        (&[("lokr_w1_a", &[1 << 20, 1]), ("lokr_w1_b", &[1, 1 << 20])], "does not divide"),
        (&[("lokr_w1_a", &[2, 3]), ("lokr_w1_b", &[2, 2])], "expected shape [3, 2]"),
        (&[("lokr_w1_a", &[2]), ("lokr_w1_b", &[1, 2])], "expected two dimensions, found [2]"),
        (&[("lokr_w1_a", &[2, 1])], "has no .lokr_w1_b beside it"),
        (&[("lokr_w1", &[2])], "expected two dimensions, found [2]"),
        (&[("lokr_w1", &[])], "expected two dimensions, found []"),
        (&[("lokr_w1", &[2, 2, 1, 1])], "expected two dimensions, found [2, 2, 1, 1]"),
        (&[("lokr_w1", &[0, 2])], "holds no numbers: its shape is [0, 2]"),
        (&[("lora_down.weight", &[1 << 56, 0]), ("lora_up.weight", &[64, 1])], "holds no numbers"),
        (&[("lora_down.weight", &[0, 1 << 40, 1 << 40])], "holds no numbers"),
        (&[("lora_down.weight", &[1, 32]), ("lora_up.weight", &[])], "expected shape [64, 1]"),
        (&[("hada_w1_b", &[0, 1 << 60]), ("hada_w2_b", &[0])], "holds no numbers"),
        (&[("diff", &[1 << 40, 0, 1 << 40])], "holds no numbers"),
        (&[("weight", &[0, 1 << 60]), ("on_input", &[])], "holds no numbers"),
        (
            &[("lora_down.weight", &[1, 32]), ("lora_up.weight", &[64, 1]), ("alpha", &[4])],
            "expected one number, found [4]",
        ),
        (
            &[
                ("lora_mid.weight", &[9, 9, 1, 1]),
                ("lora_down.weight", &[9, 32]),
                ("lora_up.weight", &[64, 9]),
                ("dora_scale", &[0]),
            ],
            "holds no numbers",
        ),
    ];
    for (k, (tensors, _)) in cases.iter().enumerate() {
        save(folder.path(), &format!("case{k}"), tensors);
    }
    let model = limited(path("v1"), folder.path().to_owned(), Vec::new(), 1 << 20);
    for (k, (tensors, words)) in cases.iter().enumerate() {
        let refusal = refusal(&model, &[&format!("case{k}")]);
        let file = format!("loras: case{k}.safetensors: tensor {MODULE}.");
        assert!(refusal.starts_with(&file) && refusal.contains(words), "{tensors:?}: {refusal}");
    }
}

#[test]
fn loras_that_take_too_much_memory_are_refused_while_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let factors: [Part<'_>; 2] = [("lora_down.weight", &[12, 32]), ("lora_up.weight", &[64, 12])];
    let deep: [Part<'_>; 2] = [("lora_down.weight", &[4096, 32]), ("lora_up.weight", &[64, 4096])];
    let dora = [&factors[..], &[("dora_scale", &[64, 1])]].concat();
    let files: [(&str, &[Part<'_>]); 5] = [
        ("small", &factors),
        ("other", &factors),
        ("dense", &[("diff", &[64, 32])]),
        ("deep", &deep),
        ("dora", &dora),
    ];
    for (name, tensors) in files {
        save(folder.path(), name, tensors);
    }
    // A weight of 64 x 32 takes 8192 bytes; factors of rank 12 less, two such pairs more.
    let model = limited(path("v1"), folder.path().to_owned(), Vec::new(), 8191);
    for name in ["dense", "deep", "dora"] {
        let refusal = refusal(&model, &[name]);
        let words = format!("loras: {name}.safetensors: would take more");
        assert!(
            refusal.starts_with(&words) && refusal.ends_with("(--max-lora-bytes)"),
            "{refusal}"
        );
    }
    assert!(model.begin(&with(&["small"])).is_ok());
    assert!(model.begin(&with(&["small", "small"])).is_ok(), "the same file");
    let refusal = refusal(&model, &["small", "other"]);
    assert!(refusal.contains("names LoRAs that together would take more"), "{refusal}");
    assert!(model.begin(&with(&["other"])).is_ok(), "each alone");
}

#[test]
fn tensors_that_a_method_does_not_use_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (down, up): (Part<'_>, Part<'_>) =
        (("lora_A.weight", &[2, 32]), ("lora_B.weight", &[64, 2]));
    let lokr: [Part<'_>; 2] = [("lokr_w1", &[2, 2]), ("lokr_w2", &[32, 16])];
    let cases: [(&[Part<'_>], &str); 6] = [
        (&[lokr[0], lokr[1], ("lokr_w1_a", &[2, 1])], "1 tensor that its method"),
        (&[lokr[0], lokr[1], ("lokr_t2", &[1]), ("lokr_w2_b", &[1])], "2 tensors that their"),
        (&[down, up, ("dora_scale", &[64]), ("lora_magnitude_vector", &[64])], "1 tensor"),
        (&[down, up, ("diff_b", &[64]), ("lora_B.bias", &[64])], "1 tensor"),
        (&[("diff_b", &[64]), ("dora_scale", &[64])], "1 tensor"),
        (&[lokr[0], lokr[1], ("alpha", &[])], ""),
    ];
    for (k, (tensors, _)) in cases.iter().enumerate() {
        save(folder.path(), &format!("case{k}"), tensors);
    }
    let model = limited(path("v1"), folder.path().to_owned(), Vec::new(), 1 << 20);
    for (k, (tensors, words)) in cases.iter().enumerate() {
        let begun = model.begin(&with(&[&format!("case{k}")])).unwrap();
        let of_file = begun.warnings().iter().filter(|text| text.starts_with("the LoRA"));
        let of_file: Vec<_> = of_file.collect();
        assert_eq!(of_file.len(), usize::from(!words.is_empty()), "{tensors:?}: {of_file:?}");
        assert!(of_file.iter().all(|text| text.contains(words)), "{of_file:?}");
    }
    save(folder.path(), "ada", &[down, up, ("lora_E", &[2, 1])]);
    assert!(refusal(&model, &["ada"]).contains("is of AdaLoRA, which is not supported"));
}
