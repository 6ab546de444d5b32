//! `/openapi.json`. The fields of requests are described by the code that reads them, which is run
//! once and noted down; so names, types and limits are those of this server and this model. What
//! is written here is only what no code can say: the sentences, and the shapes of answers.

use axum::Json;
use axum::extract::State;
use sd_models::{
    AddOns, Defaults, Embeddings, MemoryEstimate, ModelInfo, Sampler, SigmaSchedule, Size,
};
use serde_json::{Map, Value, json};

use crate::engine::JobError;
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::http::{a1111, openai};
use crate::request::{Described, Draw, Fields};

/// What the fields mean.
const FIELD_DESCRIPTIONS: [(&str, &str); 34] = [
    ("prompt", "What the picture shows."),
    ("negative_prompt", "What it should not show; only read when guidance is above 1."),
    ("loras", "LoRAs of the server's folder, and how much each counts (1 when absent)."),
    ("image", "A picture to begin with, in base64 or as a data URL."),
    ("mask", "What of it is painted anew: white is, black is kept."),
    ("strength", "How much of it is painted over, 0 to 1."),
    ("width", "In pixels, a multiple of 8."),
    ("height", "In pixels, a multiple of 8."),
    ("num_inference_steps", "Steps of the sampler."),
    ("guidance_scale", "How closely to follow the prompt."),
    ("num_images_per_prompt", "How many pictures; the next has the next seed."),
    ("seed", "The same seed gives the same picture; random when absent."),
    ("scheduler", "The sampler, by any of its names."),
    ("hires_width", "A second pass over the enlarged latents makes the picture this wide."),
    (
        "hires_height",
        "And this high; in the shape of the first pass where one of the two is absent.",
    ),
    (
        "hires_steps",
        "Steps of the second pass, of which hires_strength is the share that is taken.",
    ),
    ("hires_strength", "How much of the enlarged latents is painted over, 0 to 1."),
    ("hires_upscaler", "How latents are enlarged: Latent, Latent (nearest), and so on."),
    (
        "prompt_syntax",
        "plain: as diffusers reads it. a1111: as AUTOMATIC1111 does, (emphasis:1.3), [less], BREAK.",
    ),
    ("output_format", "png, jpeg or webp."),
    ("stream", "Answer with server-sent events."),
    ("preview", "With looks at the pictures in the making among the events."),
    ("model", "The model; OpenAI's names mean the one that is here."),
    ("quality", "Accepted; changes nothing."),
    ("style", "Accepted; changes nothing."),
    ("moderation", "Accepted; changes nothing."),
    ("input_fidelity", "Accepted; changes nothing."),
    ("user", "Accepted; changes nothing."),
    ("safety_identifier", "Accepted; changes nothing."),
    ("size", "Width x height, or auto for the model's own."),
    ("background", "There are no transparent pictures here."),
    ("output_compression", "The quality of JPEG."),
    ("response_format", "The picture itself, or where it can be fetched for a while."),
    ("partial_images", "Looks at the picture in the making, in a stream."),
];

/// `GET /openapi.json`.
pub(crate) async fn document(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let (model, artist) = match state.engine.model() {
        Ok(model) => (ModelInfo::clone(&model), model.name.clone()),
        Err(JobError::Absent) => (any(), "the models that GET /v1/models lists".to_owned()),
        Err(failure) => return Err(failure.into()),
    };
    let limits = state.settings.limits;
    let read = |fields| drop(Draw::read(fields, &limits, &model, || 0));
    let native = Fields::described(read);
    let theirs = Fields::described(|mut fields| {
        // Nothing is given, so nothing can be wrong.
        drop(openai::translate(&mut fields));
        read(fields);
    });
    let mut edit = request(&theirs);
    for name in ["image", "mask"] {
        edit["properties"][name] = json!({ "type": "string", "format": "binary" });
    }
    edit["properties"]["mask"]["description"] = "Its transparent parts are painted anew.".into();
    edit["required"] = json!(["prompt", "image"]);
    let (native, theirs) = (request(&native), request(&theirs));
    let mut paths = Map::new();
    for (path, operations) in
        [native_paths(&native), openai_paths(&theirs, &edit), sdapi_paths(&native), own_paths()]
            .concat()
    {
        paths.insert(path.into(), operations);
    }
    Ok(Json(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "sd-server",
            "version": env!("CARGO_PKG_VERSION"),
            "description": format!("Pictures from prompts, drawn by {artist}."),
        },
        "tags": [
            { "name": "native" }, { "name": "OpenAI" }, { "name": "AUTOMATIC1111" }, { "name": "server" },
        ],
        "paths": paths,
        "components": {
            "schemas": { "Error": error(), "OpenAIError": openai_error(), "A1111Error": sdapi_error() },
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "basic": { "type": "http", "scheme": "basic" },
                "key": { "type": "apiKey", "in": "header", "name": "X-Api-Key" },
            },
        },
    })))
}

/// A model like any other, where there is none yet: the fields of a request are the same for all.
fn any() -> ModelInfo {
    ModelInfo {
        name: String::new(),
        device: String::new(),
        precision: String::new(),
        defaults: Defaults {
            size: Size::SMALLEST,
            steps: 1,
            guidance_scale: 1.0,
            sampler: Sampler::Pndm,
            schedule: SigmaSchedule::Model,
        },
        multiple: 8,
        checked: false,
        memory: MemoryEstimate::default(),
        add_ons: AddOns::default(),
        embeddings: Embeddings::default(),
    }
}

/// The schema of a request's fields.
fn request(described: &[Described]) -> Value {
    let mut properties = Map::new();
    for Described { names, schema } in described {
        let Some((name, aliases)) = names.split_first() else { continue };
        let meaning =
            FIELD_DESCRIPTIONS.iter().find(|(field, _)| field == name).map(|(_, meaning)| *meaning);
        for alias in aliases {
            let mut schema = nullable(schema);
            schema["description"] = format!("The same as {name}.").into();
            properties.insert((*alias).into(), schema);
        }
        let mut schema = nullable(schema);
        if let Some(meaning) = meaning {
            schema["description"] = meaning.into();
        }
        properties.insert((*name).into(), schema);
    }
    json!({
        "type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": false,
    })
}

/// JSON's null means absent everywhere, but not for what is required.
fn nullable(schema: &Value) -> Value {
    let mut schema = schema.clone();
    schema["type"] = json!([schema["type"], "null"]);
    if let Some(words) = schema.get_mut("enum").and_then(Value::as_array_mut) {
        words.push(Value::Null);
    }
    schema
}

type Paths = Vec<(&'static str, Value)>;

/// An operation: what it is, whether it needs a key, what goes in and what comes out.
fn operation(tag: &str, summary: &str, body: Option<Value>, answer: Value) -> Value {
    let failure = match tag {
        "OpenAI" => "OpenAIError",
        "AUTOMATIC1111" => "A1111Error",
        _ => "Error",
    };
    let failure = json!({
        "description": "What went wrong.",
        "content": { "application/json": { "schema": { "$ref": format!("#/components/schemas/{failure}") } } },
    });
    let mut operation =
        json!({ "tags": [tag], "summary": summary, "responses": { "default": failure } });
    operation["responses"]["200"] = answer;
    if let Some(content) = body {
        operation["requestBody"] = json!({ "required": true, "content": content });
    }
    if tag != "server" {
        operation["security"] = json!([{}, { "bearer": [] }, { "basic": [] }, { "key": [] }]);
    }
    operation
}

fn json_body(schema: Value) -> Option<Value> {
    let mut content = json!({ "application/json": {} });
    content["application/json"]["schema"] = schema;
    Some(content)
}

fn answer(description: &str, schema: Value) -> Value {
    let mut answer = json!({ "description": description, "content": { "application/json": {} } });
    answer["content"]["application/json"]["schema"] = schema;
    answer
}

fn object(required: &[&str]) -> Value {
    json!({ "type": "object", "required": required })
}

fn list() -> Value {
    json!({ "type": "array" })
}

fn native_paths(request: &Value) -> Paths {
    let mut pictures = answer("The pictures.", object(&["prompt", "content_type"]));
    for media_type in ["image/png", "image/jpeg", "image/webp", "text/event-stream"] {
        pictures["content"][media_type] = json!({ "schema": {} });
    }
    let mut body = json!({ "application/json": { "schema": request } });
    body["text/plain"] = json!({ "schema": { "type": "string", "minLength": 1 } });
    let draw = |summary| operation("native", summary, Some(body.clone()), pictures.clone());
    let mut job = operation("native", "Draw in the background", Some(body.clone()), json!({}));
    let state = answer("Where the job stands.", object(&["id", "state"]));
    job["responses"]["202"] = state.clone();
    job["responses"].as_object_mut().map(|responses| responses.remove("200"));
    let id = json!([{
        "name": "id", "in": "path", "required": true, "schema": { "type": "string", "minLength": 1 },
    }]);
    let mut look = operation("native", "Where a job stands", None, state.clone());
    let mut fetch = operation("native", "The answer of a job", None, pictures.clone());
    fetch["responses"]["202"] = state;
    let mut forget = operation("native", "End a job and forget it", None, json!({}));
    forget["responses"]["204"] = json!({ "description": "Forgotten." });
    forget["responses"].as_object_mut().map(|responses| responses.remove("200"));
    for operation in [&mut look, &mut fetch, &mut forget] {
        operation["parameters"] = id.clone();
    }
    let mut open = draw("Draw; the dialects of SageMaker's clients are understood too");
    open.as_object_mut().map(|operation| operation.remove("security"));
    vec![
        ("/v1/invocations", json!({ "post": draw("Draw") })),
        ("/invocations", json!({ "post": open })),
        ("/", json!({ "post": draw("Draw, as Hugging Face's client asks") })),
        ("/v1/jobs", json!({ "post": job })),
        ("/v1/jobs/{id}", json!({ "get": look, "delete": forget })),
        ("/v1/jobs/{id}/result", json!({ "get": fetch })),
    ]
}

fn openai_paths(request: &Value, edit: &Value) -> Paths {
    let mut pictures = answer("The pictures.", object(&["created", "data"]));
    pictures["content"]["text/event-stream"] = json!({ "schema": {} });
    let form = Some(json!({ "multipart/form-data": { "schema": edit } }));
    let mut model =
        operation("OpenAI", "One model", None, answer("It.", object(&["id", "object"])));
    model["parameters"] = json!([{
        "name": "id", "in": "path", "required": true, "schema": { "type": "string", "minLength": 1 },
    }]);
    let draw = operation("OpenAI", "Draw", json_body(request.clone()), pictures.clone());
    vec![
        ("/v1/images/generations", json!({ "post": draw })),
        (
            "/v1/images/edits",
            json!({ "post": operation("OpenAI", "Paint over a picture", form, pictures) }),
        ),
        (
            "/v1/models",
            json!({
                "get": operation("OpenAI", "The models", None, answer("They.", object(&["data"]))),
            }),
        ),
        ("/v1/models/{id}", json!({ "get": model })),
    ]
}

fn sdapi_paths(native: &Value) -> Paths {
    let [request, from_picture] = sdapi_requests(native);
    let tag = "AUTOMATIC1111";
    let pictures =
        answer("The pictures, and what made them.", object(&["images", "parameters", "info"]));
    let ask =
        |summary, schema| json!({ "get": operation(tag, summary, None, answer("It.", schema)) });
    let tell = |summary, body, schema| json!({ "post": operation(tag, summary, json_body(body), answer("It.", schema)) });
    let any = json!({ "type": "object" });
    let image =
        json!({ "type": "object", "properties": { "image": native["properties"]["image"] } });
    let task =
        json!({ "type": "object", "properties": { "id_task": { "type": ["string", "null"] } } });
    let mut options = ask("What is set", any.clone());
    options["post"] =
        operation(tag, "Choose the model", json_body(any.clone()), answer("Nothing.", json!({})));
    let draw = operation(tag, "Draw", json_body(request), pictures.clone());
    let redraw = operation(tag, "Draw from a picture", json_body(from_picture), pictures);
    let stop = operation(tag, "End the client's requests", None, answer("Nothing.", any.clone()));
    let mut paths = vec![
        ("/sdapi/v1/txt2img", json!({ "post": draw })),
        ("/sdapi/v1/img2img", json!({ "post": redraw })),
        (
            "/sdapi/v1/progress",
            ask("How far the client's oldest request is", object(&["progress", "state"])),
        ),
        ("/internal/progress", tell("How far a request is", task, object(&["active"]))),
        ("/sdapi/v1/interrupt", json!({ "post": stop })),
        ("/sdapi/v1/options", options),
        (
            "/sdapi/v1/png-info",
            tell("The parameters in a picture's file", image, object(&["info"])),
        ),
        ("/sdapi/v1/embeddings", ask("Embeddings", any.clone())),
        ("/sdapi/v1/scripts", ask("Scripts", any)),
    ];
    for (path, summary) in [
        ("/sdapi/v1/samplers", "Samplers"),
        ("/sdapi/v1/schedulers", "Schedules"),
        ("/sdapi/v1/sd-models", "Models"),
        ("/sdapi/v1/sd-vae", "VAEs"),
        ("/sdapi/v1/upscalers", "Upscalers"),
        ("/sdapi/v1/latent-upscale-modes", "Latent upscalers"),
        ("/sdapi/v1/loras", "LoRAs"),
    ] {
        paths.push((path, ask(summary, list())));
    }
    paths
}

/// The fields of txt2img and of img2img.
fn sdapi_requests(native: &Value) -> [Value; 2] {
    // The fields that have the same meaning have the same limits.
    let mut request = json!({ "type": "object", "properties": {} });
    for (theirs, ours) in a1111::SAME_FIELDS {
        request["properties"][theirs] = native["properties"][ours].clone();
    }
    for (name, schema) in [
        (
            "seed",
            json!({ "type": ["integer", "null"], "minimum": -1, "description": "-1 is chance." }),
        ),
        ("sampler_name", json!({ "type": ["string", "null"] })),
        ("scheduler", json!({ "type": ["string", "null"] })),
        ("batch_size", native["properties"]["num_images_per_prompt"].clone()),
        ("n_iter", native["properties"]["num_images_per_prompt"].clone()),
        ("override_settings", json!({ "type": ["object", "null"] })),
        ("force_task_id", json!({ "type": ["string", "null"] })),
        ("send_images", json!({ "type": ["boolean", "null"] })),
    ] {
        request["properties"][name] = schema;
    }
    let mut from_picture = request.clone();
    for (name, schema) in [
        (
            "enable_hr",
            json!({ "type": ["boolean", "null"], "description": "Draw again over the enlarged latents." }),
        ),
        ("hr_scale", json!({ "type": ["number", "null"], "description": "2 when absent." })),
        (
            "hr_resize_x",
            json!({ "type": ["integer", "null"], "description": "In place of hr_scale." }),
        ),
        (
            "hr_resize_y",
            json!({ "type": ["integer", "null"], "description": "In place of hr_scale." }),
        ),
        ("hr_second_pass_steps", native["properties"]["hires_steps"].clone()),
        ("hr_upscaler", native["properties"]["hires_upscaler"].clone()),
        ("denoising_strength", native["properties"]["hires_strength"].clone()),
    ] {
        request["properties"][name] = schema;
    }
    from_picture["properties"]["init_images"] = json!({ "type": "array", "items": native["properties"]["image"], "minItems": 1, "maxItems": 1 });
    from_picture["properties"]["mask"] = native["properties"]["mask"].clone();
    from_picture["properties"]["denoising_strength"] = native["properties"]["strength"].clone();
    from_picture["required"] = json!(["init_images"]);
    [request, from_picture]
}

fn own_paths() -> Paths {
    let ask = |summary, answer| json!({ "get": operation("server", summary, None, answer) });
    let empty = || json!({ "description": "Ready." });
    let text = json!({ "description": "It.", "content": { "text/plain": { "schema": {} } } });
    let file = json!({
        "description": "The picture.",
        "content": { "image/png": { "schema": {} }, "image/jpeg": { "schema": {} }, "image/webp": { "schema": {} } },
    });
    let mut kept = ask("A picture that was answered with a URL", file);
    kept["get"]["parameters"] = json!([{
        "name": "name", "in": "path", "required": true, "schema": { "type": "string", "minLength": 1 },
    }]);
    vec![
        ("/ping", ask("Whether pictures can be drawn", empty())),
        ("/health/live", ask("Whether the process lives", empty())),
        ("/health/ready", ask("Whether pictures can be drawn", empty())),
        (
            "/execution-parameters",
            ask("For SageMaker's batch transform", answer("They.", object(&[]))),
        ),
        (
            "/info",
            ask(
                "The server, its model and its limits",
                answer("They.", object(&["phase", "limits"])),
            ),
        ),
        ("/metrics", ask("For Prometheus", text)),
        ("/files/{name}", kept),
    ]
}

fn error() -> Value {
    json!({ "type": "object", "required": ["error"], "properties": { "error": {
        "type": "object", "required": ["code", "message", "param"],
        "properties": {
            "code": { "type": "string" }, "message": { "type": "string" }, "param": { "type": ["string", "null"] },
        },
    } } })
}

fn openai_error() -> Value {
    let mut error = error();
    error["properties"]["error"]["properties"]["type"] = json!({ "type": "string" });
    error
}

fn sdapi_error() -> Value {
    json!({ "type": "object", "required": ["error", "detail", "errors"] })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: [&str; 42] = [
        "/",
        "/page.css",
        "/page.js",
        "/docs",
        "/docs.js",
        "/openapi.json",
        "/ping",
        "/invocations",
        "/v1/invocations",
        "/execution-parameters",
        "/models",
        "/models/{name}",
        "/models/{name}/invoke",
        "/models/{*id}",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/models",
        "/v1/models/{*id}",
        "/files/{name}",
        "/v1/jobs",
        "/v1/jobs/{id}",
        "/v1/jobs/{id}/result",
        "/health/live",
        "/health/ready",
        "/info",
        "/metrics",
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
        "/sdapi/v1/progress",
        "/sdapi/v1/interrupt",
        "/sdapi/v1/options",
        "/sdapi/v1/samplers",
        "/sdapi/v1/schedulers",
        "/sdapi/v1/sd-models",
        "/sdapi/v1/sd-vae",
        "/sdapi/v1/upscalers",
        "/sdapi/v1/latent-upscale-modes",
        "/sdapi/v1/loras",
        "/sdapi/v1/embeddings",
        "/sdapi/v1/scripts",
        "/sdapi/v1/png-info",
        "/internal/progress",
    ];

    #[test]
    fn every_route_of_the_dialects_is_described() {
        let none = json!({});
        let paths = [native_paths(&none), openai_paths(&none, &none), sdapi_paths(&none)].concat();
        for route in ROUTES {
            let path = route.replace("{*id}", "{id}");
            let told = paths.iter().any(|(told, _)| *told == path);
            assert!(
                told || !["/v1/", "/sdapi/"].iter().any(|dialect| path.starts_with(dialect)),
                "{path}"
            );
        }
    }

    #[test]
    fn a_field_has_one_meaning() {
        let mut names: Vec<_> = FIELD_DESCRIPTIONS.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FIELD_DESCRIPTIONS.len());
    }

    #[test]
    fn fields_are_described_by_the_code_that_reads_them() {
        let described = Fields::described(|mut fields| {
            drop(fields.whole(&["steps", "n_steps"], 1..=9));
            drop(openai::translate(&mut fields));
        });
        let schema = request(&described);
        let steps = &schema["properties"]["steps"];
        assert_eq!((&steps["minimum"], &steps["maximum"]), (&1.into(), &9.into()));
        assert!(steps.get("enum").is_none());
        assert_eq!(schema["properties"]["n_steps"]["description"], "The same as steps.");
        let format = &schema["properties"]["response_format"];
        assert_eq!(format["enum"], json!(["b64_json", "url", null]));
    }
}
