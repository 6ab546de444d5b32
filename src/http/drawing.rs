//! Image generation for all APIs: from the typed request to the encoded images, whether the client
//! waits for them, receives a stream of events or polls a job.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::{Control, Img2Img, ModelInfo, Rgb, Spec};
use tokio::sync::watch;
use tokio::time::timeout_at;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{error, info, info_span};

use super::admission::RequestSlot;
use super::deadline::Deadline;
use super::error::{ApiError, Result};
use super::ids;
use super::slots::Share;
use super::state::AppState;
use crate::engine::{
    Client, Engine, GeneratedImage, Job, JobError, JobMonitor, Preview, Previews, Priority, Ticket,
    Uncounted,
};
use crate::image::{self, Format, Hashes, Origin, Overlay};
use crate::registry::ModelLease;
use crate::request::{ControlMaps, DrawRequest, Limits, Names, ValidationError};

/// Interval at which a job or JSON Lines record retries a full queue.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// The format of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReplyFormat {
    /// JSON with base64 of this format.
    Json(Format),
    /// The bytes of one image.
    Bytes(Format),
    /// Events, the last of which holds the JSON.
    Events(Format),
}

impl ReplyFormat {
    /// The format of the image files.
    pub(crate) fn format(self) -> Format {
        let (Self::Json(format) | Self::Bytes(format) | Self::Events(format)) = self;
        format
    }
}

/// A valid request and the format of its response.
#[derive(Debug)]
pub(crate) struct Drawing {
    pub(crate) specs: Vec<Spec>,
    pub(crate) reply: ReplyFormat,
    /// Quality of JPEG and WebP, 1 to 100, if one is asked for.
    pub(crate) quality: Option<u8>,
    /// The previews that the client receives.
    pub(crate) previews: Previews,
    /// What is laid over each image.
    overlay: Option<Overlay>,
    /// The room for it and for the input images.
    _room: Share,
    /// What became of the control pictures.
    pub(crate) control_maps: ControlMaps,
    /// How the input files were prepared, for the generation parameters.
    pub(crate) parameters: Vec<(&'static str, String)>,
    /// What each image's warnings say of the request's fields.
    pub(crate) warnings: Vec<String>,
    /// The client's names of these, where all images are of one request.
    names: Names,
    /// The order among the client's own images.
    pub(crate) priority: Priority,
    /// Held until the response is encoded, even if the client has disconnected. None for work that
    /// is bounded otherwise.
    pub(crate) slot: Option<RequestSlot>,
    /// The model that generates the images.
    pub(crate) model: Arc<ModelInfo>,
    /// Until the images are encoded, a draining server does not close the connection.
    _accepted: TaskTrackerToken,
    engine: Engine,
    /// Held until the response is encoded: a job may be submitted again.
    _lease: Option<ModelLease>,
    hashes: Hashes,
    /// Set when they are first submitted with [`Self::submit_with_retry`].
    uncounted: OnceLock<Arc<Uncounted>>,
}

/// Memory that the input images of requests take at most, until they are specs.
fn most_input_bytes(requests: &[DrawRequest], limits: &Limits) -> usize {
    let each = requests.iter().map(|request| request.input_bytes(limits));
    each.fold(0, usize::saturating_add)
}

/// Memory of the input images of specs, of which several may have one.
fn input_bytes(specs: &[Spec]) -> usize {
    let mut inputs: Vec<_> = specs.iter().filter_map(|spec| spec.img2img.as_ref()).collect();
    inputs.sort_by_key(|input| Arc::as_ptr(input));
    inputs.dedup_by(|a, b| Arc::ptr_eq(a, b));
    let bytes =
        |input: &Img2Img| input.picture.data.len() + input.mask.as_ref().map_or(0, Vec::len);
    let mut controls: Vec<_> = specs.iter().flat_map(|spec| &spec.controls).collect();
    controls.sort_by_key(|control| Arc::as_ptr(&control.picture));
    controls.dedup_by(|a, b| Arc::ptr_eq(&a.picture, &b.picture));
    let of_control = |control: &Control| {
        let hires = control.hires_picture.as_ref().map_or(0, |picture| picture.data.len());
        control.picture.data.len() + hires
    };
    let controls: usize = controls.into_iter().map(of_control).sum();
    let adapters = specs.iter().flat_map(|spec| &spec.ip_adapters);
    let mut seen: Vec<_> = adapters.flat_map(|adapter| &adapter.pictures).collect();
    seen.sort_by_key(|picture| Arc::as_ptr(picture));
    seen.dedup_by(|a, b| Arc::ptr_eq(a, b));
    let adapters: usize = seen.into_iter().map(|picture| picture.data.len()).sum();
    inputs.into_iter().map(|input| bytes(input)).sum::<usize>() + controls + adapters
}

/// The requests, with the ControlNets and IP-Adapters that they name. Each is an image at least; those
/// beyond the most images are refused later.
async fn with_nets(
    state: &AppState,
    slot: &RequestSlot,
    mut requests: Vec<DrawRequest>,
    model: Arc<ModelInfo>,
) -> Result<Vec<DrawRequest>> {
    let limits = state.settings.limits;
    let find = move || {
        let (nets, adapters) = (&model.add_ons.controlnets, &model.add_ons.ip_adapters);
        let mut first = requests.iter_mut().take(limits.max_images);
        first.try_for_each(|request| {
            request.find_controlnets(nets, &limits)?;
            request.find_ip_adapters(adapters)
        })?;
        Ok(requests)
    };
    state.reader.look_up(slot.deadline, slot.clone(), find).await
}

/// Finds the files of the refiners that requests name.
async fn find_refiners(
    state: &AppState,
    slot: &RequestSlot,
    requests: &mut [DrawRequest],
) -> Result<()> {
    let deadline = slot.deadline;
    for request in requests.iter_mut().filter(|request| request.refiner_files.is_none()) {
        let Some(name) = request.refiner.clone() else { continue };
        if state.engine.model()?.name == name {
            continue;
        }
        // As the model itself.
        if !slot.may_choose() {
            let reason = "needs an API key: send the request to /v1/invocations";
            return Err(ValidationError::range("refiner", reason).into());
        }
        let find = timeout_at(deadline.at, state.models.source(&name));
        let files = find.await.map_err(|_| deadline.missed())?;
        let known = if matches!(files, Ok(None)) { state.model_names().await? } else { Vec::new() };
        request.set_refiner(files.map_err(|error| error.to_string()), &known)?;
    }
    Ok(())
}

/// The images and their request, once the files that they name are there.
async fn with_files(
    state: &AppState,
    slot: &RequestSlot,
    (specs, request): (Vec<Spec>, DrawRequest),
    model: Arc<ModelInfo>,
) -> Result<(Vec<Spec>, DrawRequest)> {
    let check = move || {
        request.check_files(&specs, &model)?;
        Ok((specs, request))
    };
    state.reader.look_up(slot.deadline, slot.clone(), check).await
}

impl Drawing {
    /// Whether it holds input images.
    pub(crate) fn has_inputs(&self) -> bool {
        let has_nets = |spec: &Spec| !spec.controls.is_empty() || !spec.ip_adapters.is_empty();
        self.specs.iter().any(|spec| spec.img2img.is_some() || has_nets(spec))
    }

    /// Validates requests, one for each prompt, on a blocking thread that decodes their images.
    /// `choose` selects the response format, given the number of images. Then nothing is left of
    /// the body.
    pub(crate) async fn prepare(
        state: &AppState,
        slot: &mut RequestSlot,
        mut requests: Vec<DrawRequest>,
        choose: impl FnOnce(&DrawRequest, usize) -> Result<ReplyFormat>,
    ) -> Result<Self> {
        let (engine, settings) = (state.engine.clone(), &state.settings);
        let (model, seed) = (engine.model()?, ids::seed()?);
        let (limits, own, reader) = (settings.limits, Arc::clone(&model), state.reader.clone());
        let (deadline, is_one) = (slot.deadline, requests.len() == 1);
        find_refiners(state, slot, &mut requests).await?;
        // Before their pictures are decoded.
        if requests.iter().any(|own| own.controlnets.is_some() || own.ip_adapter.is_some()) {
            requests = with_nets(state, slot, requests, Arc::clone(&model)).await?;
        }
        let room = slot.hold_inputs(state, most_input_bytes(&requests, &limits)).await?;
        let read = move || {
            let specs = |request: &mut DrawRequest| {
                let _weighed = reader.weigh(deadline, request.weigh(&limits))?;
                Ok(request.specs(&limits, &own, seed)?)
            };
            specs_of(requests, specs)
        };
        let (specs, mut request) = state.reader.run(deadline, slot.clone(), read).await?;
        slot.release_body();
        let (count, most) = (specs.len(), settings.limits.max_images);
        if count > most {
            let reason = format!("requests {count} images in total; the maximum is {most}");
            return Err(ValidationError::range("prompt", reason).into());
        }
        let mut warnings = std::mem::take(&mut request.warnings);
        warnings.extend(slot.unread().iter().cloned());
        let parameters = std::mem::take(&mut request.parameters);
        let names = if is_one { request.names.clone() } else { Names::default() };
        let (mut specs, mut request) = match specs.iter().any(Spec::has_files) {
            false => (specs, request),
            true => with_files(state, slot, (specs, request), Arc::clone(&model)).await?,
        };
        // Several prompts are one request, whose images have consecutive seeds.
        if let Some(first) = specs.first().cloned() {
            specs.iter_mut().zip(0..).for_each(|(spec, k)| spec.set_number(&first, k));
        }
        let reply = choose(&request, count)?;
        specs.iter().try_for_each(|spec| request.check_format(spec, reply.format()))?;
        let (overlay, maps) = (request.overlay.take(), std::mem::take(&mut request.control_maps));
        room.shrink_to(input_bytes(&specs) + overlay.as_ref().map_or(0, Overlay::bytes));
        let live = request.preview == Some(true) && matches!(reply, ReplyFormat::Events(_));
        let previews = if live { Previews::Live } else { Previews::None };
        if settings.log_prompts {
            info!(prompt = specs[0].prompt, "accepted");
        }
        let (quality, hashes) = (None, state.hashes.clone());
        hash_files(&hashes, &model);
        hash_refiner(&hashes, specs.first());
        let (_accepted, slot) = (slot.accept(), Some(slot.clone()));
        let (priority, _lease) = (Priority::default(), state.lease.clone());
        Ok(Self {
            specs,
            reply,
            quality,
            previews,
            overlay,
            _room: room,
            control_maps: maps,
            parameters,
            warnings,
            names,
            priority,
            slot,
            model,
            _accepted,
            engine,
            _lease,
            hashes,
            uncounted: OnceLock::new(),
        })
    }

    /// Submits the images to the engine.
    pub(crate) fn submit(&self, client: &Client, deadline: Deadline) -> Result<Ticket> {
        let (specs, client) = (self.specs.clone(), client.clone());
        let (deadline, previews, priority) = (Some(deadline.at), self.previews, self.priority);
        let uncounted = self.uncounted.get().cloned();
        Ok(self.engine.submit(Job { specs, client, deadline, previews, priority, uncounted })?)
    }

    /// Submits the images to the engine as soon as the queue has room, and again after they were
    /// evicted from it. They are counted in the metrics once, by how they end.
    pub(crate) async fn submit_with_retry(
        &self,
        client: &Client,
        deadline: Deadline,
    ) -> Result<Ticket> {
        self.uncounted.get_or_init(|| self.engine.uncounted(self.specs.len()));
        loop {
            match self.submit(client, deadline) {
                Err(ApiError::Job(JobError::Full { .. })) => {
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
                submitted => return submitted,
            }
            if tokio::time::Instant::now() >= deadline.at {
                return Err(deadline.missed());
            }
        }
    }

    /// The error of its images, in the client's names of the fields and of the limit.
    pub(crate) fn failed(&self, error: JobError, deadline: Deadline) -> ApiError {
        match error {
            JobError::Spec { field, reason } => {
                ValidationError::range(self.names.of(field), reason).into()
            }
            other => deadline.name(other),
        }
    }

    /// A view of a job of this drawing.
    pub(crate) fn monitor(&self, ticket: &Ticket) -> JobMonitor {
        self.engine.monitor(ticket)
    }

    /// Encodes the images and renders the response, on a blocking thread.
    pub(crate) async fn encode<T: Send + 'static>(
        self,
        mut images: Vec<GeneratedImage>,
        render: impl FnOnce(&Self, &[GeneratedImage], Vec<Vec<u8>>) -> T + Send + 'static,
    ) -> Result<T> {
        let span = info_span!(parent: tracing::Span::current(), "encode");
        for image in &mut images {
            for warning in &mut image.warnings {
                *warning = self.names.told(warning);
            }
            image.warnings.splice(0..0, self.warnings.iter().cloned());
        }
        let work = move || {
            let _inside = span.enter();
            if let Some(overlay) = &self.overlay {
                images.iter_mut().for_each(|image| image.rgb = overlay.over(&image.rgb));
            }
            let files = self.files(&images)?;
            Ok(render(&self, &images, files))
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::Encode)?
    }

    /// The LoRAs of an image by their hashes. Blocks: reads files.
    pub(crate) fn loras(&self, image: &GeneratedImage) -> String {
        self.hashes.of(&image.loras)
    }

    /// The files of the control pictures. Blocks.
    pub(crate) fn map_files(&self) -> Result<Vec<Vec<u8>>> {
        let file = |map: &Arc<Rgb>| image::encode(map, self.reply.format(), self.quality, "");
        self.control_maps.returned.iter().map(|map| file(map).map_err(unwritten)).collect()
    }

    /// The generation parameters of an image.
    pub(crate) fn infotext(&self, spec: &Spec, loras: &str) -> String {
        let (model_hash, vae) = (self.model_hash(), self.vae_hash());
        let refiner_hash = self.refiner_hash(spec);
        let origin = Origin {
            model: &self.model.name,
            model_hash: model_hash.as_deref(),
            vae: vae.as_ref().map(|(name, hash)| (*name, hash.as_str())),
            loras,
            refiner_hash: refiner_hash.as_deref(),
            parameters: &self.parameters,
            controls: &self.control_maps.origins,
        };
        image::infotext(spec, origin)
    }

    /// SHA-256 of the refiner's file, once it is known. Looks at the file.
    pub(crate) fn refiner_hash(&self, spec: &Spec) -> Option<String> {
        self.hashes.known(&spec.refiner.as_ref()?.file()?)
    }

    /// SHA-256 of the model's file, once it is known: it is read beside the first images.
    pub(crate) fn model_hash(&self) -> Option<String> {
        self.hashes.known(self.model.files.checkpoint.as_ref()?)
    }

    /// Name and SHA-256 of the VAE's file, once that is known.
    pub(crate) fn vae_hash(&self) -> Option<(&str, String)> {
        let file = self.model.files.vae.as_ref()?;
        Some((&file.name, self.hashes.known(file)?))
    }

    fn files(&self, images: &[GeneratedImage]) -> Result<Vec<Vec<u8>>> {
        let file = |(spec, generated): (&Spec, &GeneratedImage)| {
            let began = Instant::now();
            let infotext = self.infotext(spec, &self.loras(generated));
            let file = image::encode(&generated.rgb, self.reply.format(), self.quality, &infotext);
            self.engine.metrics().stage_duration.time(["image_encode"], began.elapsed());
            file.map_err(unwritten)
        };
        self.specs.iter().zip(images).map(file).collect()
    }
}

/// The specs of all requests, and the first of them, with the warnings of all.
fn specs_of(
    requests: Vec<DrawRequest>,
    specs: impl Fn(&mut DrawRequest) -> Result<Vec<Spec>>,
) -> Result<(Vec<Spec>, DrawRequest)> {
    let (mut all, mut first) = (Vec::new(), None::<DrawRequest>);
    // One at a time: each has a copy of the input image of all.
    for mut request in requests {
        all.extend(specs(&mut request)?);
        match &mut first {
            None => first = Some(request),
            Some(first) => {
                request.warnings.retain(|warning| !first.warnings.contains(warning));
                first.warnings.append(&mut request.warnings);
            }
        }
    }
    let no_prompt = || ValidationError::body("the request contains no prompt");
    Ok((all, first.ok_or_else(no_prompt)?))
}

/// Hashes the files of a model beside its first images: reading a whole model takes seconds.
fn hash_files(hashes: &Hashes, model: &ModelInfo) {
    let files = [&model.files.checkpoint, &model.files.vae].into_iter().flatten();
    for file in files.filter(|file| hashes.is_new(file)) {
        let (hashes, file) = (hashes.clone(), file.clone());
        tokio::task::spawn_blocking(move || hashes.whole(&file));
    }
}

/// The same of the file of a refiner.
fn hash_refiner(hashes: &Hashes, spec: Option<&Spec>) {
    let Some(refiner) = spec.and_then(|spec| spec.refiner.clone()) else { return };
    let hashes = hashes.clone();
    tokio::task::spawn_blocking(move || {
        if let Some(file) = refiner.file().filter(|file| hashes.is_new(file)) {
            hashes.whole(&file);
        }
    });
}

/// The error of an image that cannot be encoded.
fn unwritten(error: impl std::fmt::Display) -> ApiError {
    error!("{error:#}");
    ApiError::Encode
}

/// The files in base64.
pub(crate) fn base64(files: &[Vec<u8>]) -> Vec<String> {
    files.iter().map(|file| BASE64_STANDARD.encode(file)).collect()
}

/// The warnings of all images, each once.
pub(crate) fn warnings(images: &[GeneratedImage]) -> Vec<&str> {
    let mut warnings = Vec::new();
    for warning in images.iter().flat_map(|image| &image.warnings) {
        if !warnings.contains(&warning.as_str()) {
            warnings.push(warning.as_str());
        }
    }
    warnings
}

/// The next preview. Never completes if there are none.
pub(crate) async fn next_preview(previews: Option<&mut watch::Receiver<Vec<Preview>>>) -> Preview {
    if let Some(previews) = previews
        && previews.changed().await.is_ok()
        && let Some(preview) = previews.borrow_and_update().last().cloned()
    {
        return preview;
    }
    std::future::pending().await
}

/// The file of a preview, in base64.
pub(crate) async fn encode_preview(
    rgb: Arc<Rgb>,
    format: Format,
    quality: Option<u8>,
) -> Option<String> {
    let encode = move || image::encode(&rgb, format, quality, "");
    let file = tokio::task::spawn_blocking(encode).await.ok()?.ok()?;
    Some(BASE64_STANDARD.encode(file))
}
