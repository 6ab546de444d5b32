//! Prompts with emphasis and of several chunks, against the algorithm written out in Python.

use sd_models::networks::{ClipTextConfig, ClipTextModel};
use sd_models::pipeline::encode_chunks;
use sd_models::text::{ClipTokenizer, PromptChunk, chunks};
use sd_models::{LoraStack, PromptSyntax, Source, Spec};

use crate::img2img::{finish, load, spec};
use crate::{fixture, path, read, relative_error};

const TOLERANCE: f32 = 1e-4;

#[derive(serde::Deserialize)]
struct Row {
    prompt: String,
    ids: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
    v2: Vec<Vec<u32>>,
}

fn rows() -> Vec<Row> {
    serde_json::from_slice(&read("emphasis.json")).unwrap()
}

fn tokenizer(root: &str) -> ClipTokenizer {
    ClipTokenizer::load(&Source::Directory(path(root)), 77).unwrap()
}

#[test]
fn chunks_and_weights_are_those_of_the_reference() {
    let (v1, v2) = (tokenizer(""), tokenizer("v2"));
    let mut failures = Vec::new();
    for row in rows() {
        let (ours, cut) = chunks(&row.prompt, &v1).unwrap();
        assert_eq!(ours.len() + cut, row.ids.len(), "{}", row.prompt);
        let (others, _) = chunks(&row.prompt, &v2).unwrap();
        for (k, PromptChunk { ids, weights }) in ours.iter().enumerate() {
            let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
            let weighed = weights.iter().zip(&row.weights[k]).all(close);
            if *ids != row.ids[k] || others[k].ids != row.v2[k] || !weighed {
                failures.push(format!("{:?} chunk {k}: {ids:?} {weights:?}", row.prompt));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn contexts_are_those_of_the_reference() {
    let source = Source::Directory(path("v1"));
    let weights = source.weights("text_encoder", "model", false).unwrap();
    let config = ClipTextConfig::read(&source).unwrap();
    let (cpu, f32) = (&candle_core::Device::Cpu, candle_core::DType::F32);
    let encoder = ClipTextModel::load(config, &weights, cpu, f32).unwrap();
    let (tokenizer, expected) = (tokenizer(""), fixture("emphasis.safetensors"));
    let mut compared = 0;
    for (i, row) in rows().iter().enumerate() {
        let Some(reference) = expected.get(&format!("context.{i}")) else { continue };
        let (ours, _) = chunks(&row.prompt, &tokenizer).unwrap();
        let error = relative_error(
            &encode_chunks(ours, &encoder, 0, &LoraStack::default()).unwrap(),
            reference,
        );
        println!("{:?}: {error:.1e}", row.prompt);
        assert!(error <= TOLERANCE, "{:?}: {error:.1e}", row.prompt);
        compared += 1;
    }
    assert!(compared >= 15);
}

#[test]
fn rows_of_unequal_contexts_share_a_step() {
    let model = load(path("v1"));
    let of = |prompt: &str, prompt_syntax| Spec {
        prompt: prompt.into(),
        prompt_syntax,
        steps: 5,
        ..spec(None)
    };
    let long = of("a house BREAK the sea", PromptSyntax::A1111);
    let plain = of("a house BREAK the sea", PromptSyntax::Plain);
    let weighed = of("a (red) house", PromptSyntax::A1111);
    let specs = [&long, &plain, &weighed, &long];
    let drawn = finish(&model, specs.iter().map(|spec| model.begin(spec).unwrap()).collect());
    let error = relative_error(&drawn[0], &fixture("emphasis.safetensors")["latents"]);
    println!("an image by two chunks: {error:.1e}");
    assert!(error <= TOLERANCE, "{error:.1e}");
    for (spec, company) in specs.iter().zip(&drawn) {
        let alone = finish(&model, vec![model.begin(spec).unwrap()]);
        assert_eq!(relative_error(&alone[0], company), 0.0, "{spec:?}");
    }
    assert!(relative_error(&drawn[0], &drawn[1]) > 0.0);
}
