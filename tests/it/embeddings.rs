//! Textual inversion: words from a folder in every syntax, and files that are of no use.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::Server;
use crate::loras::{file, pixels};

/// A folder with the embeddings of `tests/pictures/` and some that are none.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a directory");
    let good = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/embeddings");
    for entry in good.read_dir().expect("a directory") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copied");
    }
    std::fs::write(folder.path().join("text.safetensors"), "no tensors").expect("written");
    std::fs::write(folder.path().join("text.pt"), "no pickle").expect("written");
    std::fs::write(folder.path().join("notes.txt"), "nothing").expect("written");
    let lora = good.join("../loras/attention.safetensors");
    std::fs::copy(lora, folder.path().join("lora.safetensors")).expect("copied");
    folder
}

#[test]
fn words_stand_for_their_vectors() {
    let folder = folder();
    let server = Server::ready(&["--embeddings-dir", folder.path().to_str().expect("UTF-8")]);
    let draw = |prompt: &str, syntax: &str| {
        let reply = server.json(&json!({
            "prompt": prompt, "prompt_syntax": syntax, "seed": 3, "steps": 2, "width": 64,
            "height": 64, "scheduler": "ddim", "output_format": "png",
        }));
        assert_eq!(reply.status, 200, "{}", reply.json());
        reply.json()
    };
    // Without the parameters in the file, which hold the prompt.
    let data = |prompt: &str, syntax: &str| pixels(&file(&draw(prompt, syntax)["data"]));
    // The word in the file, the file's name, and another case.
    let word = data("a <glow-cat> house", "plain");
    assert!(word != data("a cat house", "plain"));
    for same in ["a glow house", "a GLOW house", "a <Glow-Cat> house"] {
        assert!(word == data(same, "plain"), "{same}");
    }
    assert!(word == data("a glow house", "a1111"));
    assert!(word != data("a (glow:1.5) house", "a1111"));
    assert!(data("ember", "plain") == data("ember", "a1111"));
    // Three vectors that do not fit begin a window; the plain syntax cuts them.
    let long = format!("{}ember", "a ".repeat(74));
    let cut = draw(&long, "plain");
    assert!(cut["warnings"][0].as_str().is_some_and(|text| text.ends_with("\"ember\"")), "{cut}");
    assert_eq!(draw(&long, "a1111")["warnings"], Value::Null);

    let list = server.client.get(server.url("/sdapi/v1/embeddings")).send().expect("an answer");
    let list: Value = list.json().expect("JSON");
    let vectors = |word: &str| list["loaded"][word]["vectors"].as_u64();
    assert_eq!(
        ["glow", "<glow-cat>", "ember", "dusk", "<dusk>"].map(vectors),
        [1, 1, 3, 2, 2].map(Some)
    );
    let skipped = list["skipped"].as_object().expect("an object");
    assert_eq!(skipped.keys().collect::<Vec<_>>(), ["lora", "text"], "{list}");
    let reason = skipped["lora"]["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("lora.safetensors: is no embedding"), "{reason}");
}

#[test]
fn embeddings_beyond_their_memory_are_left_out() {
    let folder = folder();
    let folder = folder.path().to_str().expect("UTF-8");
    let args = ["--embeddings-dir", folder, "--max-embedding-bytes", "1100"];
    let server = Server::ready(&args);
    let list = server.client.get(server.url("/sdapi/v1/embeddings")).send().expect("an answer");
    let list: Value = list.json().expect("JSON");
    // Two vectors of 128 numbers fit, three more do not.
    assert_eq!(list["loaded"]["dusk"]["vectors"], 2, "{list}");
    let reason = list["skipped"]["ember"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("1100 bytes"), "{reason}");
}
