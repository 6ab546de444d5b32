//! The tokenizer against transformers' `CLIPTokenizer`, on prompts that are hard to cut.

use sd_models::Source;
use sd_models::text::ClipTokenizer;

use crate::{path, read};

#[derive(serde::Deserialize)]
struct Row {
    prompt: String,
    ids: Vec<u32>,
    cut: bool,
}

/// Checks the tokenizer under `root` against the rows of a fixture.
fn check(root: &str, rows: &str) {
    let tokenizer = ClipTokenizer::load(&Source::Directory(path(root)), 77).unwrap();
    let rows: Vec<Row> = serde_json::from_slice(&read(rows)).unwrap();
    assert!(rows.len() >= 40);
    let mut failures = Vec::new();
    for row in rows {
        let tokens = tokenizer.encode(&row.prompt).unwrap();
        if tokens.ids != row.ids || tokens.cut.is_some() != row.cut {
            failures.push(format!("{:?}: {:?} and {:?}", row.prompt, tokens.ids, row.ids));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn ids_from_vocabulary_and_merges_are_transformers() {
    check("", "tokenizer.json");
}

#[test]
fn ids_from_tokenizer_json_are_transformers() {
    check("v1", "tokenizer.json");
}

#[test]
fn ids_with_another_padding_are_transformers() {
    check("v2", "v2/tokenizer.json");
}
