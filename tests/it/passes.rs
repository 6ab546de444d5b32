//! Prompts that change on the way, and what the hires pass and the sampler's noise have of their own,
//! in A1111's API and in the native one.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::Server;

/// A small body with more fields.
fn with(extra: &Value) -> Value {
    let mut body = json!({ "prompt": "a cat", "steps": 4, "seed": 3, "width": 64, "height": 64,
                           "sampler_name": "Euler a" });
    let fields = body.as_object_mut().expect("an object");
    fields.extend(extra.as_object().expect("an object").clone());
    body
}

/// The status and reply of txt2img.
fn txt2img(server: &Server, extra: &Value) -> (u16, Value) {
    let request = server.client.post(server.url("/sdapi/v1/txt2img"));
    let reply = request.body(with(extra).to_string()).send().expect("an answer");
    (reply.status().as_u16(), reply.json().expect("JSON"))
}

/// Pixels and `info` of a picture.
fn drawn(server: &Server, extra: &Value) -> (Vec<u8>, Value) {
    let (status, reply) = txt2img(server, extra);
    assert_eq!(status, 200, "{extra}: {reply}");
    let file = BASE64_STANDARD.decode(reply["images"][0].as_str().expect("text"));
    let picture = image::load_from_memory(&file.expect("base64")).expect("a picture");
    let info = serde_json::from_str(reply["info"].as_str().expect("text")).expect("JSON");
    (picture.into_rgb8().into_raw(), info)
}

#[test]
fn a_prompt_changes_on_the_way() {
    let server = Server::ready(&[]);
    let of = |prompt: &str| drawn(&server, &json!({ "prompt": prompt }));
    let (cat, dog) = (of("a cat").0, of("a dog").0);
    let same = [("[a cat:a dog:1.0]", &cat), ("[a cat:a dog:0]", &dog), ("[a cat|a cat]", &cat)];
    for (prompt, pixels) in same {
        let (drawn, info) = of(prompt);
        assert!(drawn == *pixels, "{prompt}");
        assert_eq!((&info["prompt"], &info["warnings"]), (&prompt.into(), &json!([])));
    }
    let others = ["[a cat:a dog:0.5]", "[a cat|a dog]", "a cat AND a dog", "a cat :0.5"];
    let others: Vec<_> = others.iter().map(|prompt| of(prompt).0).collect();
    for (k, other) in others.iter().enumerate() {
        assert!(*other != cat && *other != dog && !others[..k].contains(other), "{k}");
    }
    assert!(of(" a cat AND a dog AND a cat").0 == of(" a cat :2 AND a dog").0, "as one");
    // Rows beyond the batch of other images.
    let joined = (0..16).map(|k| format!("cat {k}")).collect::<Vec<_>>();
    assert_eq!(
        txt2img(&server, &json!({ "prompt": joined.join(" AND "), "batch_size": 2 })).0,
        200
    );
}

#[test]
fn a_schedule_alone_is_that_of_a_sampler_that_is_on_it() {
    let server = Server::ready(&[]);
    let of = |fields: Value| drawn(&server, &fields).1;
    let info = of(json!({ "sampler_name": "", "scheduler": "Karras" }));
    let said = "scheduler karras is none of the model's sampler pndm: euler was taken, the default of \
                AUTOMATIC1111";
    assert_eq!(
        (&info["sampler_name"], &info["warnings"]),
        (&"Euler Karras".into(), &json!([said]))
    );
    let info = of(json!({ "sampler_name": null, "scheduler": "Automatic" }));
    assert_eq!((&info["sampler_name"], &info["warnings"]), (&"PLMS".into(), &json!([])));
}

/// As in AUTOMATIC1111: `u + scale (c - u)` at every scale, where diffusers has no guidance.
#[test]
fn a_guidance_scale_below_1_weakens_the_prompt() {
    let server = Server::ready(&["--dtype", "f32"]);
    let of = |prompt: &str, negative: &str, scale: f64| {
        drawn(
            &server,
            &json!({ "prompt": prompt, "negative_prompt": negative, "cfg_scale": scale }),
        )
    };
    let (none, info) = of("a cat", "a dog", 0.0);
    assert_eq!((&info["cfg_scale"], &info["warnings"]), (&json!(0.0), &json!([])));
    assert!(none == of("a dog", "", 1.0).0, "what it is of at 0 is the negative prompt");
    let half = of("a cat", "a dog", 0.5).0;
    assert!(half == of("a dog", "a cat", 0.5).0, "half of each");
    assert!(half != none && half != of("a cat", "a dog", 1.0).0);
    let hires = |scale: Value| {
        let body = json!({ "enable_hr": true, "hr_scale": 1.5, "hr_cfg": scale, "cfg_scale": 4 });
        drawn(&server, &body).0
    };
    assert!(hires(json!(0.5)) != hires(json!(1)) && hires(json!(0)) == hires(json!(4)));
    // As in diffusers.
    let plain = [0.0, 0.5, 1.0].map(|scale| {
        let body = json!({ "prompt": "a cat", "steps": 2, "seed": 3, "guidance_scale": scale });
        server.json(&body).json()["data"].clone()
    });
    let pixels = |data: &Value| {
        let file = BASE64_STANDARD.decode(data.as_str().expect("text")).expect("base64");
        image::load_from_memory(&file).expect("a picture").into_rgb8().into_raw()
    };
    let plain = plain.each_ref().map(pixels);
    assert!(plain[0] == plain[2] && plain[1] == plain[2]);
}

#[test]
fn what_is_not_read_is_told_and_what_is_too_much_refused() {
    let server = Server::ready(&[]);
    let warned = |fields: Value| drawn(&server, &fields).1["warnings"].to_string();
    let loose = warned(json!({ "prompt": "a | [cat:dog:3]", "steps": 1 }));
    assert!(loose.contains("prompt has \\\"[cat:dog:3]\\\", which was drawn as words"), "{loose}");
    let joined = warned(json!({ "negative_prompt": "cats AND dogs", "steps": 1 }));
    assert!(joined.contains("negative_prompt has \\\"AND\\\""), "{joined}");
    for (field, text, part) in [
        ("hr_prompt", "a (cat:1,2)", "(cat:1,2)"),
        ("hr_prompt", "a (cat:1.2, b", "(cat:1.2"),
        ("hr_negative_prompt", "a [cat|dog", "[cat|dog"),
        ("hr_negative_prompt", "<lora:x:1>", "<lora:x:1>"),
        ("hr_prompt", "a __hat__", "__hat__"),
    ] {
        let body = json!({ "enable_hr": true, "hr_scale": 1.5, "steps": 1, field: text });
        let warnings = warned(body);
        assert!(warnings.contains(&format!("{field} has \\\"{part}\\\", which was")), "{warnings}");
    }
    let weighed = warned(json!({ "enable_hr": true, "steps": 1, "hr_prompt": "a (cat:1.2" }));
    assert!(weighed.contains("hr_prompt is weighed by 1.2"), "{weighed}");
    let plain = server.json(&json!({ "prompt": "a [cat|dog]", "steps": 1 })).json();
    let plain = plain["warnings"].to_string();
    assert!(plain.contains("[cat|dog]") && plain.contains("prompt_syntax a1111"), "{plain}");
    let many = (0..65).map(|k| k.to_string()).collect::<Vec<_>>();
    let hires = |fields: Value| {
        let mut body = json!({ "enable_hr": true, "hr_second_pass_steps": 70, "steps": 70 });
        body.as_object_mut().expect("one").extend(fields.as_object().expect("one").clone());
        body
    };
    for (fields, name) in [
        (json!({ "prompt": format!("[{}]", many.join("|")), "steps": 70 }), "prompt"),
        (json!({ "prompt": many[..17].join(" AND ") }), "prompt"),
        (json!({ "prompt": "a :99999999 AND b" }), "prompt"),
        (hires(json!({ "hr_prompt": format!("[{}]", many.join("|")) })), "hr_prompt"),
        (hires(json!({ "hr_prompt": "a <lora:none:1>" })), "hr_prompt"),
        (hires(json!({ "hr_negative_prompt": "a".repeat(1 << 16) })), "hr_negative_prompt"),
        (hires(json!({ "hr_sampler_name": "Ueler" })), "hr_sampler_name"),
        (hires(json!({ "hr_scheduler": "Karas" })), "hr_scheduler"),
        (hires(json!({ "hr_cfg": 1000 })), "hr_cfg"),
        (
            json!({ "override_settings": { "eta_noise_seed_delta": "many" } }),
            "eta_noise_seed_delta",
        ),
    ] {
        let (status, error) = txt2img(&server, &fields);
        let detail = error["detail"].as_str().expect("a detail");
        assert!((400..500).contains(&status) && detail.contains(name), "{name}: {error}");
    }
}

#[test]
fn a_hires_pass_has_prompts_sampler_and_guidance_of_its_own() {
    let server = Server::ready(&[]);
    let hires = |extra: Value| {
        let mut body = json!({ "enable_hr": true, "hr_scale": 1.5, "denoising_strength": 0.6 });
        body.as_object_mut().expect("one").extend(extra.as_object().expect("one").clone());
        drawn(&server, &body)
    };
    let told = |info: &Value| info["infotexts"][0].as_str().expect("text").to_owned();
    let (same, info) = hires(json!({}));
    assert!(told(&info).contains("Hires upscaler: Latent, Version: "), "{info}");
    for extra in [
        json!({ "hr_prompt": "a cat", "hr_negative_prompt": "", "hr_cfg": 0 }),
        json!({ "hr_sampler_name": "Use same sampler", "hr_scheduler": "Use same scheduler" }),
        json!({ "hr_sampler_name": "k_euler_a", "hr_scheduler": "automatic", "hr_prompt": null }),
    ] {
        let (pixels, info) = hires(extra.clone());
        assert!(pixels == same, "{extra}");
        assert!(told(&info).contains("Hires upscaler: Latent, Version: "), "{info}");
    }
    let mut seen = vec![same];
    for (extra, expected) in [
        (json!({ "hr_prompt": "a [b|c], d" }), "Hires prompt: \"a [b|c], d\", "),
        (json!({ "hr_negative_prompt": "dogs" }), "Hires negative prompt: dogs, "),
        (json!({ "hr_cfg": "3.0" }), "Hires CFG Scale: 3, "),
        (json!({ "hr_sampler_name": "Heun" }), "Hires sampler: Heun, "),
        (json!({ "hr_scheduler": "Karras" }), "Hires sampler: Euler a Karras, "),
    ] {
        let (pixels, info) = hires(extra.clone());
        assert!(told(&info).contains(&format!("Hires upscaler: Latent, {expected}")), "{info}");
        assert!(!seen.contains(&pixels), "{extra}");
        seen.push(pixels);
    }
    let native = json!({ "prompt": "a cat", "hires_prompt": "a dog" });
    let error = server.json(&native).json()["error"]["message"].to_string();
    assert!(error.contains("hires_prompt requires hires_width"), "{error}");
}

#[test]
fn the_second_seed_of_the_sampler_is_told_where_it_has_an_effect() {
    let server = Server::ready(&[]);
    let option = |delta: Value| json!({ "override_settings": { "eta_noise_seed_delta": delta } });
    let field = |delta: Value| json!({ "eta_noise_seed_delta": delta });
    let with = |mut body: Value, sampler: &str| {
        body["sampler_name"] = sampler.into();
        drawn(&server, &body)
    };
    for (body, sampler, told) in [
        (option(json!(31337)), "Euler a", Some("31337")),
        (option(json!("31337.0")), "DPM2 a", Some("31337")),
        (field(json!(-5)), "LCM", Some("-5")),
        (option(json!(31337)), "DDIM", None),
        (option(json!(31337)), "DPM++ 2M SDE", None),
        (option(json!(0)), "Euler a", None),
        (option(json!("")), "Euler a", None),
        (field(json!(null)), "Euler a", None),
    ] {
        let (pixels, info) = with(body.clone(), sampler);
        let (plain, _) = with(json!({}), sampler);
        assert_eq!(info["extra_generation_params"]["ENSD"].as_str(), told, "{body} {sampler}");
        assert_eq!(pixels != plain, told.is_some(), "{body} {sampler}");
        let warns = info["warnings"].to_string().contains("eta_noise_seed_delta has no effect");
        let asks = body.to_string().contains("31337");
        assert_eq!(warns, asks && told.is_none(), "{info}");
        let text = info["infotexts"][0].as_str().expect("text");
        assert_eq!(text.contains("ENSD: "), told.is_some(), "{text}");
    }
}
