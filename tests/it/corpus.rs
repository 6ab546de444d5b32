//! The fuzz targets on the inputs in `tests/fuzz/corpus`, among them every one that once failed.
//! Needs no fuzzer; to search for more, see `.ci/drills`.

#[allow(unreachable_pub, reason = "the fuzz targets are another crate")]
#[path = "../fuzz/src/files.rs"]
mod files;
#[allow(unreachable_pub, reason = "the fuzz targets are another crate")]
#[path = "../fuzz/src/http.rs"]
mod http;

use std::path::Path;

/// The top of the repository.
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Its name and its function.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 23] = [
    ("a1111", http::a1111),
    ("archive", files::archive),
    ("controlnet", files::controlnet),
    ("data_url", http::data_url),
    ("embedding", files::embedding),
    ("form", http::form),
    ("gguf", files::gguf),
    ("infotext", http::infotext),
    ("ip_adapter", files::ip_adapter),
    ("json", http::json),
    ("lines", http::lines),
    ("lora", files::lora),
    ("model_files", files::model_files),
    ("multipart", http::multipart),
    ("openai", http::openai),
    ("peft", files::peft),
    ("pickle", files::pickle),
    ("picture", http::picture),
    ("prompt", files::prompt),
    ("request", http::request),
    ("safetensors", files::safetensors),
    ("unet_file", files::unet_file),
    ("upscaler", files::upscaler),
];

/// The names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = folder.read_dir().expect("a folder");
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.expect("an entry").file_name().into_string().expect("UTF-8")
    };
    let mut names: Vec<_> = entries.map(name).collect();
    names.sort();
    names
}

#[test]
fn the_corpus_of_the_fuzzer_is_handled() {
    let folder = Path::new(ROOT).join("tests/fuzz");
    let corpus = folder.join("corpus");
    assert_eq!(names(&corpus), TARGETS.map(|(name, _)| name), "every target has a corpus");
    let programs = TARGETS.map(|(name, _)| format!("{name}.rs"));
    assert_eq!(names(&folder.join("fuzz_targets")), programs, "every target has a program");
    for (target, run) in TARGETS {
        let corpus = corpus.join(target);
        let inputs = names(&corpus);
        assert!(!inputs.is_empty(), "{target}");
        for name in inputs {
            let input = std::fs::read(corpus.join(&name)).expect("an input");
            let ended = std::panic::catch_unwind(|| run(&input));
            assert!(ended.is_ok(), "{target}/{name}");
        }
    }
}
