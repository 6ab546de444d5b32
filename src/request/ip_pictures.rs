//! The IP-Adapters of a request: their files, and the pictures as they see them.

use std::path::PathBuf;
use std::sync::Arc;

use sd_models::files::IpAdapterFile;
use sd_models::networks::IpAdapterModel;
use sd_models::{AssetDir, IpAdapter, Rgb};

use super::draw::DrawRequest;
use super::error::{ValidationError, brief};
use super::images::{ImageFile, Transparency};
use super::ip_adapter::{IpAdapterFields, MAX_IP_ADAPTERS, OneOrMany};
use super::limits::Limits;
use crate::image;

impl DrawRequest {
    /// Finds the files of the IP-Adapters and their image encoders, which tell how large a picture they
    /// see. Blocks, on a network folder for as long as that does.
    pub(crate) fn find_ip_adapters(&mut self, files: &AssetDir) -> Result<(), ValidationError> {
        let field = self.names.of("ip_adapter").to_owned();
        let adapters = self.ip_adapter.iter_mut().flat_map(OneOrMany::all_mut);
        // More are refused.
        for adapter in adapters.take(MAX_IP_ADAPTERS) {
            let Some(name) = &mut adapter.model else { continue };
            let field = match &mut adapter.unit {
                Some(unit) => {
                    let field = format!("{}.model", unit.name);
                    if let Some((found, is_same)) = files.closest(name) {
                        if !is_same {
                            let asked = brief(name);
                            let warning = format!("{field} {asked:?} was taken for {found:?}");
                            unit.warnings.push(warning);
                        }
                        *name = found;
                    }
                    field
                }
                None => field.clone(),
            };
            let refuse = |reason: String| ValidationError::range(&field, reason);
            let unknown = |reason| refuse(format!("names the IP-Adapter {reason}"));
            let path: PathBuf = files.find(name).map_err(unknown)?;
            let side = IpAdapterModel::side(&IpAdapterFile { path });
            adapter.side = Some(side.map_err(|error| refuse(error.to_string()))?);
        }
        Ok(())
    }

    /// Memory that the pictures of the IP-Adapters take, decoded, in bytes.
    pub(super) fn weigh_ip_pictures(&mut self, limits: &Limits) -> usize {
        /// Bytes of a pixel beside its decoded ones: a copy.
        const COPY: usize = 3;
        let most = limits.max_input_pixels;
        let weigh = |picture: &mut ImageFile| {
            let decoded = picture.weigh(most);
            let own = picture.dimensions(most).map_or(0, |(w, h)| w as usize * h as usize);
            decoded.saturating_add(own.saturating_mul(COPY))
        };
        // One is decoded after the other.
        let mut bytes = 0;
        for adapter in self.ip_adapter.iter_mut().flat_map(OneOrMany::all_mut) {
            // A unit without a picture decodes the input image for itself.
            let mut input = self.image.clone().filter(|_| adapter.unit.is_some());
            let pictures = match &mut adapter.image {
                Some(pictures) => pictures.all_mut(),
                None => input.as_mut_slice(),
            };
            bytes = pictures.iter_mut().map(weigh).fold(bytes, usize::max);
        }
        bytes
    }

    /// Memory that the pictures take as the adapters see them, in bytes.
    pub(super) fn ip_picture_bytes(&self) -> usize {
        let bytes = |adapter: &IpAdapterFields| {
            let pictures = adapter.image.as_ref().map_or(0, |pictures| pictures.all().len());
            let side = adapter.side.unwrap_or(0);
            pictures.saturating_mul(side.saturating_mul(side).saturating_mul(3))
        };
        self.ip_adapter.iter().flat_map(OneOrMany::all).map(bytes).fold(0, usize::saturating_add)
    }

    /// The IP-Adapters with their pictures as they see them.
    pub(super) fn ip_adapters(
        &mut self,
        limits: &Limits,
    ) -> Result<Vec<IpAdapter>, ValidationError> {
        let Some(adapters) = self.ip_adapter.take() else { return Ok(Vec::new()) };
        let all = adapters.all();
        if all.len() > MAX_IP_ADAPTERS {
            let (count, most) = (all.len(), MAX_IP_ADAPTERS);
            let reason = format!("has {count} IP-Adapters; at most {most} are allowed");
            return Err(self.range("ip_adapter", reason));
        }
        let is_list = matches!(adapters, OneOrMany::Many(_));
        let read = all.iter().enumerate().map(|(k, own)| {
            let field = self.names.of("ip_adapter");
            let name = match &own.unit {
                Some(unit) => unit.name.clone(),
                None if is_list => format!("{field}[{k}]"),
                None => field.to_owned(),
            };
            self.read_ip_adapter(&name, own, limits)
        });
        let read = read.collect::<Result<Vec<_>, _>>()?;
        self.ip_adapter = Some(adapters);
        let (read, warnings): (Vec<_>, Vec<_>) = read.into_iter().unzip();
        self.warnings.extend(warnings.into_iter().flatten());
        Ok(read)
    }

    fn read_ip_adapter(
        &self,
        name: &str,
        own: &IpAdapterFields,
        limits: &Limits,
    ) -> Result<(IpAdapter, Vec<String>), ValidationError> {
        let mut warnings = own.unit.as_ref().map_or_else(Vec::new, |unit| unit.warnings.clone());
        let field = format!("{name}.image");
        // As in the extension, the input image is the default.
        let input = self.image.as_ref().filter(|_| own.unit.is_some());
        let files = match (&own.image, input) {
            (Some(files), _) => files.all(),
            (None, Some(input)) => std::slice::from_ref(input),
            (None, None) => &[],
        };
        if files.is_empty() {
            return Err(ValidationError::malformed(&field, "is required"));
        }
        let required = || ValidationError::malformed(&format!("{name}.model"), "is required");
        let model = own.model.clone().ok_or_else(required)?;
        // Without, there are too many requests, which is refused later.
        let side = own.side.unwrap_or(1);
        let mut pictures = Vec::new();
        for (k, file) in files.iter().enumerate() {
            let field = match own.image {
                Some(OneOrMany::Many(_)) => format!("{field}[{k}]"),
                _ => field.clone(),
            };
            let of = (side, own.unit.is_some());
            let seen = self.seen(&field, file, of, limits, &mut warnings)?;
            pictures.push(Arc::new(seen));
        }
        let scale = own.scale.as_ref().map(|scale| scale.read(&format!("{name}.scale")));
        let adapter = IpAdapter {
            model,
            pictures,
            scale: scale.transpose()?.unwrap_or_else(|| 1.0.into()),
            start: own.start.unwrap_or(0.0),
            end: own.end.unwrap_or(1.0),
            unit: own.unit.as_ref().map(|unit| unit.passes),
        };
        Ok((adapter, warnings))
    }

    /// What an adapter sees of the file in a field: so many pixels a side, and in a unit of
    /// AUTOMATIC1111's extension the whole picture.
    fn seen(
        &self,
        field: &str,
        file: &ImageFile,
        (side, is_unit): (usize, bool),
        limits: &Limits,
        warnings: &mut Vec<String>,
    ) -> Result<Rgb, ValidationError> {
        let mut picture = file.decode(field, limits.max_input_pixels)?;
        match self.transparency {
            Transparency::White => picture = image::on_white(picture),
            Transparency::Ignored if image::is_transparent(&picture) => warnings
                .push(format!("{field} is transparent in places: their hidden colours were used")),
            Transparency::Ignored => {}
        }
        let picture = image::rgb(&picture);
        Ok(match is_unit {
            true => IpAdapterModel::stretched(&picture, side),
            false => IpAdapterModel::picture(&picture, side),
        })
    }
}
