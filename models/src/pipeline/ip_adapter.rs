//! The IP-Adapters of images in progress: what each image keeps of its pictures, and the adapters that
//! requests can name.
//!
//! Reference: diffusers 0.42 `encode_image` and `prepare_ip_adapter_image_embeds` of
//! `pipelines/stable_diffusion/pipeline_stable_diffusion.py`.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{DType, Device, Tensor};

use super::control_spec::active;
use super::ip_adapter_spec::{IpAdapter, MAX_IP_SCALE};
use super::options::AddOns;
use super::pass::Pass;
use crate::error::{Error, Result};
use crate::files::{AssetCache, AssetFile, IpAdapterFile};
use crate::networks::{EncoderFolder, ImageEncoder, IpAdapterModel, UNetConfig};
use crate::picture::Rgb;
use crate::sampling::SamplerState;

/// The field of a spec, for errors.
const FIELD: &str = "ip_adapter";

/// Maximum number of pictures whose tokens are kept.
const KEPT: usize = 32;

/// The adapters that requests can name, with an LRU cache. Usable from any thread.
pub(super) struct IpAdapterCache {
    cache: AssetCache<IpAdapterModel>,
    /// The image encoders in use, of which several adapters have one.
    encoders: Mutex<Vec<(AssetFile, Weak<ImageEncoder>)>>,
    encoded: Mutex<Encoded>,
    unet: UNetConfig,
    device: Device,
    dtype: DType,
}

/// The adapters of a spec, one for each of its own.
#[derive(Clone, Default)]
pub struct IpAdapters(Vec<Arc<IpAdapterModel>>);

/// What adapters made of pictures last; none is the unconditional row's.
#[derive(Default)]
struct Encoded {
    tokens: Vec<(u64, Option<Arc<Rgb>>, Tensor)>,
    /// Keys and values, as long as an image has them.
    kv: Vec<(Seen, Weak<Tensor>)>,
}

/// What keys and values are of: adapter, pictures, and the bits of the factors.
#[derive(PartialEq)]
struct Seen {
    adapter: u64,
    pictures: Vec<Option<Arc<Rgb>>>,
    factors: Vec<u64>,
}

impl IpAdapterCache {
    /// An empty cache for a UNet.
    pub(super) fn new(
        add_ons: &AddOns,
        unet: &UNetConfig,
        (device, dtype): (&Device, DType),
    ) -> Self {
        let AddOns { ip_adapters, max_ip_adapter_bytes, .. } = add_ons;
        Self {
            cache: AssetCache::new(ip_adapters.clone(), *max_ip_adapter_bytes),
            encoders: Mutex::default(),
            encoded: Mutex::default(),
            unet: unet.clone(),
            device: device.clone(),
            dtype,
        }
    }

    /// The adapters of these names, read if they are not cached. Blocks.
    pub(super) fn get(&self, names: &[String]) -> Result<IpAdapters> {
        let mut adapters = Vec::<Arc<IpAdapterModel>>::new();
        for name in names {
            let read = |file: &AssetFile| {
                let adapter = self.read(file)?;
                let bytes = adapter.bytes().saturating_add(adapter.encoder().bytes());
                Ok((adapter, bytes))
            };
            adapters.push(self.cache.get(FIELD, name, read)?);
            self.check_bytes(&adapters)?;
        }
        Ok(IpAdapters(adapters))
    }

    fn read(&self, file: &AssetFile) -> Result<IpAdapterModel> {
        let file = IpAdapterFile { path: file.path.clone() };
        let most = self.cache.max_bytes();
        let place = (&self.device, self.dtype);
        let bytes = IpAdapterModel::file_bytes(&file, self.dtype)?;
        let left = most.checked_sub(bytes).ok_or_else(|| {
            let reason = format!(
                "takes {bytes} bytes of memory; at most {most} are allowed (--max-ip-adapter-bytes)"
            );
            Error::config(file.path.file_name().unwrap_or_default().to_string_lossy(), reason)
        })?;
        let encoder = self.encoder(&EncoderFolder::find(&file)?, left)?;
        IpAdapterModel::read(&file, encoder, &self.unet, place)
    }

    /// The image encoder of a folder, of at most so many bytes.
    fn encoder(&self, folder: &EncoderFolder, max_bytes: u64) -> Result<Arc<ImageEncoder>> {
        // Held while it is read, so that each is read once.
        let mut encoders = self.encoders.lock().unwrap_or_else(PoisonError::into_inner);
        encoders.retain(|(_, encoder)| encoder.strong_count() > 0);
        let file = AssetFile::new(FIELD, folder.path.clone())?;
        let known = encoders.iter().find(|(known, _)| *known == file);
        if let Some(encoder) = known.and_then(|(_, encoder)| encoder.upgrade()) {
            return Ok(encoder);
        }
        let encoder = ImageEncoder::read(folder, (&self.device, self.dtype), max_bytes)?;
        let encoder = Arc::new(encoder);
        encoders.push((file, Arc::downgrade(&encoder)));
        Ok(encoder)
    }

    /// Checks what adapters take together, with each image encoder once.
    fn check_bytes(&self, adapters: &[Arc<IpAdapterModel>]) -> Result<()> {
        let most = self.cache.max_bytes();
        let mut bytes = 0_u64;
        for (k, adapter) in adapters.iter().enumerate() {
            let before = &adapters[..k];
            if before.iter().all(|other| other.id() != adapter.id()) {
                bytes = bytes.saturating_add(adapter.bytes());
            }
            if before.iter().all(|other| !Arc::ptr_eq(other.encoder(), adapter.encoder())) {
                bytes = bytes.saturating_add(adapter.encoder().bytes());
            }
        }
        if bytes <= most {
            return Ok(());
        }
        let reason = format!(
            "names adapters that with their image encoders take {bytes} bytes; at most {most} are \
             allowed (--max-ip-adapter-bytes)"
        );
        Err(Error::Spec { field: FIELD, reason })
    }

    /// The keys and values of pictures (1, M, W), one behind the other, by an adapter; of none the
    /// unconditional row's.
    fn keys_values(
        &self,
        adapter: &IpAdapterModel,
        pictures: &[Option<&Arc<Rgb>>],
        factors: &[f64],
    ) -> Result<Arc<Tensor>> {
        let mut encoded = self.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        encoded.kv.retain(|(_, kv)| kv.strong_count() > 0);
        let seen = Seen {
            adapter: adapter.id(),
            pictures: pictures.iter().map(|picture| picture.cloned()).collect(),
            factors: factors.iter().map(|factor| factor.to_bits()).collect(),
        };
        let known = encoded.kv.iter().find(|(known, _)| *known == seen);
        if let Some(kv) = known.and_then(|(_, kv)| kv.upgrade()) {
            return Ok(kv);
        }
        let tokens = pictures.iter().map(|picture| encoded.tokens(adapter, *picture));
        let tokens = Tensor::cat(&tokens.collect::<Result<Vec<_>>>()?, 1)?;
        let kv = Arc::new(adapter.keys_values(&tokens, factors)?);
        encoded.kv.push((seen, Arc::downgrade(&kv)));
        Ok(kv)
    }
}

impl Encoded {
    /// The tokens of a picture (1, N, D).
    fn tokens(&mut self, adapter: &IpAdapterModel, picture: Option<&Arc<Rgb>>) -> Result<Tensor> {
        let is_it = |(id, known, _): &(u64, Option<Arc<Rgb>>, Tensor)| {
            *id == adapter.id() && known.as_ref() == picture
        };
        if let Some(place) = self.tokens.iter().position(is_it) {
            // The least recently used is the first.
            let entry = self.tokens.remove(place);
            let tokens = entry.2.clone();
            self.tokens.push(entry);
            return Ok(tokens);
        }
        let tokens = adapter.tokens(picture.map(|picture| &**picture))?;
        if self.tokens.len() >= KEPT {
            self.tokens.remove(0);
        }
        self.tokens.push((adapter.id(), picture.cloned(), tokens.clone()));
        Ok(tokens)
    }
}

impl IpAdapters {
    /// What is odd about their files.
    pub(super) fn warnings(&self) -> impl Iterator<Item = String> {
        self.0.iter().flat_map(|adapter| adapter.warnings().iter().cloned())
    }
}

/// What the rows of an image see beside their prompts in one pass.
#[derive(Default)]
pub(super) struct ActiveImages(Vec<ActiveImage>);

/// The pictures of an adapter.
struct ActiveImage {
    /// Whether it takes part in each evaluation.
    active: Vec<bool>,
    /// Keys and values (1, M, W) of a conditional row.
    conditional: Arc<Tensor>,
    /// Those of the unconditional row, if there is one.
    unconditional: Option<Arc<Tensor>>,
}

impl ActiveImages {
    /// The pictures of a pass, which begins with the sampler. Warns of those that act at no step.
    pub(super) fn begin(
        (IpAdapters(models), cache): (&IpAdapters, &IpAdapterCache),
        pass: Pass<'_>,
        sampler: &SamplerState,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        let spec = pass.spec;
        let refuse = |reason| Err(Error::Spec { field: FIELD, reason });
        if models.len() != spec.ip_adapters.len() {
            return refuse("was not read".into());
        }
        let stages = pass.sampler().sampler.evaluations_of_a_step();
        let mut begun = Vec::new();
        for (model, adapter) in models.iter().zip(&spec.ip_adapters) {
            let IpAdapter { pictures, scale, start, end, unit, .. } = adapter;
            let factors = match scale.of(&cache.unet) {
                Ok(factors) => factors,
                Err(reason) => return refuse(format!("{:?} {reason}", model.name())),
            };
            let is_in = adapter.is_in(pass.is_hires(), spec.hires.is_some());
            if !is_in || factors.iter().all(|factor| *factor == 0.0) {
                continue;
            }
            // Shares are of the whole run, also where another model takes it over.
            let mut active = active((*start, *end), unit.is_some(), sampler.whole(), stages);
            active.truncate(sampler.evaluations());
            if !active.contains(&true) {
                let of = if pass.is_hires() { " of the hires pass" } else { "" };
                warnings.push(format!(
                    "ip_adapter: {:?} has no effect: no step{of} is between its start {start} and \
                     its end {end}",
                    model.name()
                ));
                continue;
            }
            let shown: Vec<_> = pictures.iter().map(Some).collect();
            let none = vec![None; shown.len()];
            let unconditional = pass.is_guided();
            begun.push(ActiveImage {
                active,
                conditional: cache.keys_values(model, &shown, &factors)?,
                unconditional: unconditional
                    .then(|| cache.keys_values(model, &none, &factors))
                    .transpose()?,
            });
        }
        Ok(Self(begun))
    }

    /// What a row sees at an evaluation.
    pub(super) fn at(&self, evaluation: usize, is_unconditional: bool) -> Vec<Arc<Tensor>> {
        let acts = |image: &&ActiveImage| image.active.get(evaluation) == Some(&true);
        let kv = |image: &ActiveImage| match is_unconditional {
            true => image.unconditional.clone(),
            false => Some(Arc::clone(&image.conditional)),
        };
        self.0.iter().filter(acts).filter_map(kv).collect()
    }
}

/// Checks adapters against the limits of every model.
pub(super) fn check(adapters: &[IpAdapter]) -> Result<()> {
    let refuse = |reason: String| Err(Error::Spec { field: FIELD, reason });
    for IpAdapter { model, pictures, scale, start, end, unit } in adapters {
        let range = -MAX_IP_SCALE..=MAX_IP_SCALE;
        if !scale.numbers().iter().all(|scale| range.contains(scale)) {
            let most = MAX_IP_SCALE;
            return refuse(format!("{model:?} must have a scale from -{most} to {most}"));
        }
        if pictures.is_empty() {
            return refuse(format!("{model:?} must have a picture"));
        }
        if !(0.0..=1.0).contains(start) || !(0.0..=1.0).contains(end) {
            return refuse(format!("{model:?} must have a start and an end from 0 to 1"));
        }
        if start > end || unit.is_none() && start == end {
            return refuse(format!(
                "{model:?} must have a start before its end; {start} is not before {end}"
            ));
        }
    }
    Ok(())
}
