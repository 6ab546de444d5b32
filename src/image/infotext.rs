//! Generation parameters as text (infotext), in AUTOMATIC1111's format: written and parsed. Files with
//! them are read by [`super::embedded`].

use sd_models::{
    Control, ControlRule, Hires, IpAdapter, IpScale, LoraUse, Pass, Preprocessor, PromptSyntax,
    Sampler, SamplerOptions, Spec, Variation,
};

use super::fit::Fit;

/// AUTOMATIC1111's name of the list of LoRAs with their hashes.
pub(crate) const LORA_HASHES: &str = "Lora hashes";

/// Maximum number of lines read from a text.
const MAX_LINES: usize = 1 << 12;

/// Maximum number of parameters read from a text; each takes far more memory than its text.
const MAX_PARAMETERS: usize = 256;

/// What begins the negative prompt, at the beginning of a line.
const NEGATIVE: &str = "Negative prompt:";

/// What an image was made with, beside its spec.
#[derive(Debug, Clone, Copy, Default)]
pub struct Origin<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// SHA-256 of the model's file.
    pub model_hash: Option<&'a str>,
    /// Name and SHA-256 of the VAE's file.
    pub vae: Option<(&'a str, &'a str)>,
    /// The result of `Hashes::of`.
    pub loras: &'a str,
    /// SHA-256 of the refiner's file.
    pub refiner_hash: Option<&'a str>,
    /// AUTOMATIC1111's names and values of how the image's files were prepared.
    pub parameters: &'a [(&'static str, String)],
    /// How its control pictures were.
    pub controls: &'a [ControlOrigin],
}

/// How a control picture was prepared.
#[derive(Debug, Clone, Copy)]
pub struct ControlOrigin {
    /// How it fills the size of the images.
    pub fit: Fit,
    /// Of a unit of AUTOMATIC1111's extension: length of the shorter side at which its preprocessor
    /// works, and whether that is the images' instead.
    pub resolution: Option<(usize, bool)>,
}

/// The part of a file's hash that AUTOMATIC1111 writes.
pub fn short_hash(hash: &str) -> &str {
    hash.get(..10).unwrap_or(hash)
}

/// The infotext of an image.
pub fn infotext(spec: &Spec, origin: Origin<'_>) -> String {
    // A zero byte would terminate the text inside the file.
    let clean = |text: &str| text.replace('\0', "");
    let mut text = clean(&spec.prompt);
    // So that the prompt can be pasted into AUTOMATIC1111.
    for LoraUse { name, scale, text_encoder_scale } in &spec.loras {
        let text_encoder = match text_encoder_scale {
            same if same == scale => String::new(),
            other => format!("{other}:"),
        };
        text += &clean(&format!(" <lora:{name}:{text_encoder}{scale}>"));
    }
    if !spec.negative_prompt.is_empty() {
        text += &format!("\n{NEGATIVE} {}", clean(&spec.negative_prompt));
    }
    let Origin { model, model_hash, vae, loras, refiner_hash, parameters, controls } = origin;
    let model_hash = model_hash.map(|hash| ("Model hash", short_hash(hash).to_owned()));
    let vae = vae.into_iter().flat_map(|(name, hash)| {
        [("VAE hash", short_hash(hash).to_owned()), ("VAE", name.to_owned())]
    });
    let strength = spec.strength().map(|strength| ("Denoising strength", strength.to_string()));
    let all = [
        ("Steps", spec.steps.to_string()),
        ("Sampler", spec.sampler_name().title()),
        ("CFG scale", spec.guidance_scale.to_string()),
        ("Seed", spec.seed.to_string()),
        ("Size", spec.size.to_string()),
    ];
    let all = all.into_iter().chain(model_hash).chain([("Model", model.to_owned())]).chain(vae);
    let all = all.chain(variation_parameters(spec)).chain(strength).chain(clip_skip(spec));
    // The noise of A1111's setting of this name.
    let all = all.chain([("RNG", "CPU".to_owned())]).chain(extra_parameters(spec));
    let refiner = refiner_parameters(spec, refiner_hash);
    let all = all.chain(refiner).chain(parameters.iter().cloned());
    let all = all.map(|(name, value)| format!("{name}: {}, ", quoted(&value)));
    let controls = control_parameters(spec, controls).into_iter();
    let controls = controls.map(|(name, value)| format!("{name}: \"{value}\", "));
    let loras = (!loras.is_empty()).then(|| format!("{LORA_HASHES}: \"{loras}\", "));
    let version = format!("Version: sd-server {}", env!("CARGO_PKG_VERSION"));
    text += "\n";
    text.extend(all.chain(controls).chain(loras).chain([version]));
    text
}

/// AUTOMATIC1111's names and values of a refiner.
pub(crate) fn refiner_parameters(spec: &Spec, hash: Option<&str>) -> Vec<(&'static str, String)> {
    let parameters = spec.refiner.iter().flat_map(|refiner| {
        let hash = hash.map_or_else(String::new, |hash| format!(" [{}]", short_hash(hash)));
        [
            ("Refiner", format!("{}{hash}", refiner.name)),
            ("Refiner switch at", refiner.switch_at.to_string()),
        ]
    });
    parameters.collect()
}

/// AUTOMATIC1111's names and values of a variation.
fn variation_parameters(spec: &Spec) -> Vec<(&'static str, String)> {
    let variation = spec.variation.iter().flat_map(|Variation { seed, strength }| {
        [("Variation seed", seed.to_string()), ("Variation seed strength", strength.to_string())]
    });
    variation.collect()
}

/// AUTOMATIC1111's name and value of the layers that are skipped.
fn clip_skip(spec: &Spec) -> Option<(&'static str, String)> {
    (spec.clip_skip > 0).then(|| ("Clip skip", (spec.clip_skip + 1).to_string()))
}

/// AUTOMATIC1111's names and values of the parameters that only some images have.
pub(crate) fn extra_parameters(spec: &Spec) -> Vec<(&'static str, String)> {
    // The name is that of an extension.
    let rescale = (spec.guidance_rescale > 0.0)
        .then(|| ("CFG Rescale phi", spec.guidance_rescale.to_string()));
    let tiling = spec.tiling.then(|| ("Tiling", "True".to_owned()));
    let hires = spec.hires.iter().flat_map(|hires| hires_parameters(spec, hires));
    // Theirs is the other, which needs no name.
    let syntax =
        (spec.prompt_syntax == PromptSyntax::Plain).then(|| ("Prompt syntax", "plain".to_owned()));
    let others = rescale.into_iter().chain(syntax).chain(xl_parameters(spec));
    sampler_parameters(spec).into_iter().chain(tiling).chain(hires).chain(others).collect()
}

/// What only some models take, which AUTOMATIC1111 has no names for.
fn xl_parameters(spec: &Spec) -> impl Iterator<Item = (&'static str, String)> {
    let text = |text: &String| Some(text.clone()).filter(|text| !text.trim().is_empty());
    let number = |number: Option<f64>| number.map(|number| number.to_string());
    let (xl, span) = (&spec.xl, spec.span);
    let all = [
        ("Prompt 2", text(&xl.prompt_2)),
        ("Negative prompt 2", text(&xl.negative_prompt_2)),
        ("Aesthetic score", number(xl.aesthetic_score)),
        ("Negative aesthetic score", number(xl.negative_aesthetic_score)),
        ("Denoising start", number(span.start)),
        ("Denoising end", number(span.end)),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name, value?)))
}

/// The ControlNets and IP-Adapters, as AUTOMATIC1111's extension names and writes its units.
pub(crate) fn control_parameters(spec: &Spec, origins: &[ControlOrigin]) -> Vec<(String, String)> {
    let unit = |(k, control): (usize, &Control)| {
        let mode = match &control.rule {
            ControlRule::Extension(extension) => extension.mode.title(),
            // diffusers' mode of the same idea has no name there.
            ControlRule::Diffusers { guess: true } => "Guess",
            ControlRule::Diffusers { guess: false } => "Balanced",
        };
        let model = bare(&control.model);
        let Control { preprocessor, scale, start, end, .. } = control;
        let thresholds = match *preprocessor {
            Preprocessor::Canny { low, high } => {
                format!("Threshold A: {low}, Threshold B: {high}, ")
            }
            Preprocessor::Threshold { above } => format!("Threshold A: {above}, "),
            Preprocessor::None | Preprocessor::Invert => String::new(),
        };
        let origin = origins.get(k);
        let resized = origin.map_or_else(String::new, |ControlOrigin { fit, resolution }| {
            let side = resolution.map(|(side, _)| format!("Processor Res: {side}, "));
            format!("Resize Mode: {}, {}", fit.title(), side.unwrap_or_default())
        });
        let perfect = origin.and_then(|origin| origin.resolution).map_or("", |(_, perfect)| {
            if perfect { "Pixel Perfect: True, " } else { "Pixel Perfect: False, " }
        });
        let value = format!(
            "Module: {}, Model: {model}, Weight: {scale}, {resized}{thresholds}Guidance Start: \
             {start}, Guidance End: {end}, {perfect}Control Mode: {mode}",
            preprocessor.name(),
        );
        (format!("ControlNet {k}"), value)
    };
    let controls = spec.controls.iter().enumerate().map(unit);
    controls.chain(adapter_parameters(spec)).collect()
}

/// The IP-Adapters, whose numbers follow those of the ControlNets.
fn adapter_parameters(spec: &Spec) -> impl Iterator<Item = (String, String)> {
    let unit = |(k, adapter): (usize, &IpAdapter)| {
        let IpAdapter { model, scale, start, end, .. } = adapter;
        let scale = match scale {
            IpScale::All(scale) => scale.to_string(),
            // There is no name for it there.
            IpScale::Blocks(_) | IpScale::Transformers(_) => "by block".to_owned(),
        };
        let value = format!(
            "Module: ip-adapter-auto, Model: {}, Weight: {scale}, Guidance Start: {start}, \
             Guidance End: {end}, Control Mode: Balanced",
            bare(model),
        );
        (format!("ControlNet {k}"), value)
    };
    (spec.controls.len()..).zip(&spec.ip_adapters).map(unit)
}

/// A name without what ends a value.
fn bare(name: &str) -> String {
    name.replace([',', ':', '"'], "")
}

/// AUTOMATIC1111's names and values of the sampler's parameters that the request gives and that
/// have an effect.
fn sampler_parameters(spec: &Spec) -> Vec<(&'static str, String)> {
    let SamplerOptions { eta, s_noise, churn } = spec.sampler_options;
    let eta_name = if spec.sampler == Sampler::Ddim { "Eta DDIM" } else { "Eta" };
    let idle = |option| spec.passes().all(|pass| pass.is_idle(option));
    let added = churn.amount > 0.0 && !idle("s_churn");
    let delta = spec.passes().map(Pass::seed_delta).find(|delta| *delta != 0);
    let given = [
        (eta_name, eta.filter(|_| !idle("eta"))),
        ("Sigma churn", added.then_some(churn.amount)),
        ("Sigma tmin", (added && churn.from > 0.0).then_some(churn.from)),
        ("Sigma tmax", (added && churn.to.is_finite()).then_some(churn.to)),
        ("Sigma noise", s_noise.filter(|_| !idle("s_noise"))),
    ];
    let given = given.into_iter().filter_map(|(name, value)| Some((name, value?.to_string())));
    given.chain(delta.map(|delta| ("ENSD", delta.to_string()))).collect()
}

fn hires_parameters(spec: &Spec, hires: &Hires) -> Vec<(&'static str, String)> {
    let (width, height) = (hires.size.width(), hires.size.height());
    let (w, h) = (spec.size.width(), spec.size.height());
    let enlarged = match width * h == height * w {
        true => ("Hires upscale", (width as f64 / w as f64).to_string()),
        false => ("Hires resize", hires.size.to_string()),
    };
    let rest = [
        // The steps that are run, as in AUTOMATIC1111.
        ("Hires steps", (hires.steps - hires.skipped_steps()).to_string()),
        ("Hires upscaler", hires.upscaler.title().to_owned()),
    ];
    let own = [
        ("Hires sampler", hires.sampler.map(|(name, _)| name.title())),
        // The name is Forge's.
        ("Hires CFG Scale", hires.guidance_scale.map(|scale| scale.to_string())),
        ("Hires prompt", hires.prompt.clone()),
        ("Hires negative prompt", hires.negative_prompt.clone()),
    ];
    let own = own.into_iter().filter_map(|(name, value)| Some((name, value?)));
    std::iter::once(enlarged).chain(rest).chain(own).collect()
}

/// A value as AUTOMATIC1111 writes it: in quotes where it would end early.
fn quoted(value: &str) -> String {
    match value.contains([',', ':', '\n', '"']) {
        true => serde_json::Value::from(value.replace('\0', "")).to_string(),
        false => value.replace('\0', ""),
    }
}

/// Parses an infotext as AUTOMATIC1111 does: `Prompt`, `Negative prompt`, and by name the parameters
/// of the last line that has at least three, then those of the lines that extensions add below it.
pub(crate) fn parse(text: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = text.trim().lines().take(MAX_LINES).collect();
    let has_parameters = |line: &&str| pairs(line).len() >= 3;
    let at = lines.iter().rposition(has_parameters).filter(|at| are_added(&lines[at + 1..]));
    let (above, below) = lines.split_at(at.unwrap_or(lines.len()));
    let is_negative = |line: &&str| line.trim_start().starts_with(NEGATIVE);
    let negative_at = above.iter().position(is_negative).unwrap_or(above.len());
    let (prompt, negative) = above.split_at(negative_at);
    let (prompt, negative) = (prompt.join("\n"), negative.join("\n"));
    let negative = negative.trim_start().strip_prefix(NEGATIVE).unwrap_or_default();
    let mut parameters = vec![
        ("Prompt".to_owned(), prompt.trim().to_owned()),
        ("Negative prompt".to_owned(), negative.trim().to_owned()),
    ];
    if let Some((line, added)) = below.split_first() {
        parameters.extend(pairs(line));
        add_lines(&mut parameters, added);
    }
    // Not of the prompts.
    let sides: Vec<_> = parameters[2..].iter().flat_map(sides).collect();
    parameters.extend(sides);
    parameters
}

/// The sides of a size such as `512x768`, by AUTOMATIC1111's names.
fn sides((name, value): &(String, String)) -> Vec<(String, String)> {
    let Some((width, height)) = value.split_once('x') else { return Vec::new() };
    let is_side = |side: &str| !side.is_empty() && side.bytes().all(|byte| byte.is_ascii_digit());
    if !is_side(width) || !is_side(height) {
        return Vec::new();
    }
    vec![(format!("{name}-1"), width.to_owned()), (format!("{name}-2"), height.to_owned())]
}

/// Whether lines below the parameters are those of extensions: the first names its value.
fn are_added(lines: &[&str]) -> bool {
    lines.first().is_none_or(|line| named(line).is_some())
}

/// Adds lines such as `Template: a {red|blue} house`, whose values may have further lines.
fn add_lines(parameters: &mut Vec<(String, String)>, lines: &[&str]) {
    for line in lines {
        let has_room = parameters.len() < MAX_PARAMETERS;
        match (named(line).filter(|_| has_room), parameters.last_mut()) {
            (Some((name, value)), _) => {
                parameters.push((name.to_owned(), value.trim().to_owned()));
            }
            (_, Some((_, value))) => {
                value.push('\n');
                value.push_str(line);
            }
            _ => {}
        }
    }
}

/// The name before a colon, of letters, digits, spaces and `-/_`, and the text behind it.
fn named(text: &str) -> Option<(&str, &str)> {
    let (name, rest) = text.split_once(':')?;
    let name = name.trim();
    let is_named = |c: char| c.is_alphanumeric() || " -/_".contains(c);
    let is_name = name.starts_with(char::is_alphanumeric) && name.chars().all(is_named);
    (is_name && name.len() > 1).then_some((name, rest))
}

/// `Name: value, Name: "value, with commas and \"quotes\""`.
fn pairs(line: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = line;
    while pairs.len() < MAX_PARAMETERS && !rest.is_empty() {
        // A name ends before the next comma, and so the text is walked once.
        let end = rest.find(',').unwrap_or(rest.len());
        let Some((name, _)) = named(&rest[..end]) else {
            // As there, what is no parameter is passed over.
            rest = rest.get(end + 1..).unwrap_or_default();
            continue;
        };
        let after = rest.split_once(':').map_or("", |(_, after)| after);
        let (value, next) = value(after.trim_start());
        pairs.push((name.to_owned(), value));
        rest = next;
    }
    pairs
}

/// The value at the beginning of a text, and what follows the comma behind it.
fn value(text: &str) -> (String, &str) {
    let mut strings = serde_json::Deserializer::from_str(text).into_iter::<String>();
    if text.starts_with('"')
        && let Some(Ok(value)) = strings.next()
    {
        let rest = text.get(strings.byte_offset()..).unwrap_or_default().trim_start();
        if let Some(next) = rest.strip_prefix(',').or(rest.is_empty().then_some("")) {
            return (value, next);
        }
    }
    let (value, next) = text.split_once(',').unwrap_or((text, ""));
    (value.trim().to_owned(), next)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use sd_models::{Refiner, SigmaSchedule, Size, Span, XlOptions};

    use super::super::embedded::MAX_TEXT_BYTES;
    use super::*;

    fn spec(prompt: &str, negative_prompt: &str, seed: u64, steps: usize, scale: f64) -> Spec {
        Spec {
            prompt: prompt.into(),
            prompt_syntax: PromptSyntax::Plain,
            loras: Vec::new(),
            negative_prompt: negative_prompt.into(),
            size: Size::new(64, 128).expect("multiples of 8"),
            steps,
            guidance_scale: scale,
            seed,
            sampler: Sampler::Euler,
            schedule: SigmaSchedule::Model,
            sampler_options: SamplerOptions::default(),
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

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(500)
        })]

        #[test]
        fn what_is_written_is_read_back(
            prompt in "[^\0]{0,80}",
            negative in "[^\0]{0,80}",
            seed in any::<u64>(),
            steps in 1..1000_usize,
            scale in 0.0..100.0_f64,
        ) {
            // The format marks the negative prompt by a line that begins with these words.
            prop_assume!(!prompt.lines().any(|line| line.trim_start().starts_with(NEGATIVE)));
            let source = sd_models::Source::Demo;
            let refiner = Refiner { name: "xl".into(), source, switch_at: 0.8 };
            let prompt_2 = "a tree, \"large\"".to_owned();
            let spec = Spec {
                refiner: Some(Arc::new(refiner)),
                xl: XlOptions { prompt_2: prompt_2.clone(), ..XlOptions::default() },
                ..spec(&prompt, &negative, seed, steps, scale)
            };
            let hash = "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa";
            let parameters = [("Mask blur", "4".to_owned()), ("Inpaint area", "Only masked".into())];
            let read = parse(&infotext(&spec, Origin {
                model: "model",
                model_hash: Some(hash),
                vae: Some(("vae.safetensors", hash)),
                refiner_hash: Some(hash),
                loras: "style: 0123456789ab",
                parameters: &parameters,
                controls: &[],
            }));
            let value = |name: &str| {
                let mut found = read.iter().filter(|(known, _)| known == name);
                found.next().map(|(_, value)| value.as_str()).unwrap_or_default().to_owned()
            };
            let lines = |text: &str| text.trim().lines().collect::<Vec<_>>().join("\n");
            prop_assert_eq!(value("Prompt"), lines(&prompt));
            prop_assert_eq!(value("Negative prompt"), lines(&negative));
            prop_assert_eq!(value("Seed"), seed.to_string());
            prop_assert_eq!(value("Steps"), steps.to_string());
            prop_assert_eq!(value("CFG scale"), scale.to_string());
            prop_assert_eq!(value("Size"), "64x128");
            prop_assert_eq!(value("Sampler"), "Euler");
            prop_assert_eq!(value("Model"), "model");
            prop_assert_eq!(value("Model hash"), "6ce0161689");
            prop_assert_eq!(value("VAE hash"), "6ce0161689");
            prop_assert_eq!(value("VAE"), "vae.safetensors");
            prop_assert_eq!(value("RNG"), "CPU");
            prop_assert_eq!(value("Refiner"), "xl [6ce0161689]");
            prop_assert_eq!(value("Refiner switch at"), "0.8");
            prop_assert_eq!(value("Prompt 2"), prompt_2);
            prop_assert_eq!(value("Mask blur"), "4");
            prop_assert_eq!(value("Inpaint area"), "Only masked");
            prop_assert_eq!(value(LORA_HASHES), "style: 0123456789ab");
            prop_assert_eq!(value("Prompt syntax"), "plain");
        }

        #[test]
        fn any_text_is_read(text in ".{0,200}") {
            let read = parse(&text);
            prop_assert!(read.len() >= 2);
            prop_assert!(read.iter().map(|(_, value)| value.len()).sum::<usize>() <= 2 * text.len());
        }
    }

    #[test]
    fn infotexts_of_others_are_read() {
        const LAST: &str = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768";
        let read = |text: &str, name: &str| {
            let found = parse(text).into_iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value)
        };
        for text in [
            format!("a cat\nNegative prompt: dog\n{LAST}\n\n"),
            format!("a cat\r\nNegative prompt: dog\r\n{LAST}\r\n"),
            format!("\u{a0}a cat\n  Negative prompt:dog\n{LAST}, Version: v1"),
            format!("a cat\nNegative prompt: dog\n{LAST}\nTemplate: a {{cat|dog}}, Steps: 9"),
        ] {
            let found =
                ["Prompt", "Negative prompt", "Steps", "Size-2"].map(|name| read(&text, name));
            assert_eq!(
                found.map(Option::unwrap_or_default),
                ["a cat", "dog", "20", "768"],
                "{text}"
            );
        }
        let quoted = format!(r#"a{LAST}"#);
        assert_eq!(
            read(&quoted, "Prompt").as_deref(),
            Some(""),
            "one line is that of the parameters"
        );
        let quoted = format!(
            r#"a, Steps: none{}{LAST}, ADetailer prompt: "a \"red, blue\" face", Lora hashes: "x: 1, y: 2", Note: "un, Version: v1"#,
            "\n"
        );
        for (name, value) in [
            ("Prompt", "a, Steps: none"),
            ("ADetailer prompt", "a \"red, blue\" face"),
            ("Lora hashes", "x: 1, y: 2"),
            ("Note", "\"un"),
            ("Version", "v1"),
        ] {
            assert_eq!(read(&quoted, name).as_deref(), Some(value), "{name}");
        }
        let sign = format!("a sign that says Negative prompt: none\n{LAST}");
        assert_eq!(
            read(&sign, "Prompt").as_deref(),
            Some("a sign that says Negative prompt: none")
        );
        assert_eq!(read(&sign, "Negative prompt").as_deref(), Some(""));
        let added = format!("a\n{LAST}\nTemplate: one\ntwo\nNegative Template: three: 3");
        assert_eq!(read(&added, "Template").as_deref(), Some("one\ntwo"));
        assert_eq!(read(&added, "Negative Template").as_deref(), Some("three: 3"));
        assert_eq!(
            read("just a prompt: of, no: parameters", "Prompt").as_deref(),
            Some("just a prompt: of, no: parameters")
        );
    }

    #[test]
    fn a_long_text_is_read_in_one_pass() {
        for text in [
            ",".repeat(MAX_TEXT_BYTES),
            "a,".repeat(MAX_TEXT_BYTES / 2),
            "\n".repeat(MAX_TEXT_BYTES),
        ] {
            assert!(parse(&text).len() < 3 + MAX_PARAMETERS);
        }
    }
}
