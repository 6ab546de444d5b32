//! The fields that only models of Stable Diffusion XL follow.

use sd_models::XlOptions;

use super::draw::{DrawRequest, MAX_SIDE};
use super::error::ValidationError;

/// A text of the second text encoder that is not the first's again.
pub(super) fn another<'a>(own: &'a Option<String>, first: &Option<String>) -> Option<&'a String> {
    own.as_ref().filter(|own| Some(*own) != first.as_ref())
}

impl DrawRequest {
    /// What only Stable Diffusion XL takes.
    pub(super) fn xl(&self) -> Result<XlOptions, ValidationError> {
        let text = |own: Option<&String>| own.cloned().unwrap_or_default();
        let crop = self.pair("crop", self.crop.as_deref(), 0)?;
        Ok(XlOptions {
            prompt_2: text(another(&self.prompt_2, &self.prompt)),
            negative_prompt_2: text(another(&self.negative_prompt_2, &self.negative_prompt)),
            encodes_empty: self.negative_prompt.is_some(),
            original_size: self.pair("original_size", self.original_size.as_deref(), 1)?,
            crop: crop.unwrap_or_default(),
            target_size: self.pair("target_size", self.target_size.as_deref(), 1)?,
            aesthetic_score: self.aesthetic_score,
            negative_aesthetic_score: self.negative_aesthetic_score,
        })
    }

    /// Two numbers of pixels, of at least so many.
    fn pair(
        &self,
        name: &'static str,
        list: Option<&[usize]>,
        least: usize,
    ) -> Result<Option<[usize; 2]>, ValidationError> {
        let Some(list) = list else { return Ok(None) };
        let Ok(pair) = <[usize; 2]>::try_from(list) else {
            let what = if least == 0 { "top and left" } else { "height and width" };
            return Err(self.range(name, format!("must be two numbers, {what}")));
        };
        if let Some(pixels) = pair.into_iter().find(|pixels| !(least..=MAX_SIDE).contains(pixels)) {
            let reason = format!("must be numbers from {least} to {MAX_SIDE}, not {pixels}");
            return Err(self.range(name, reason));
        }
        Ok(Some(pair))
    }
}

#[cfg(test)]
mod tests {
    use super::super::fields::Fields;
    use super::super::limits::LIMITS;
    use super::*;

    fn read(fields: &str) -> Result<XlOptions, ValidationError> {
        let body = format!(r#"{{"prompt":"a",{fields}}}"#);
        DrawRequest::read(Fields::json(&body)?, &LIMITS)?.xl()
    }

    #[test]
    fn sizes_are_pairs_in_the_order_of_diffusers() {
        let fields = r#""original_size":[512,768],"crops_coords_top_left":[0,8],"prompt_2":"b""#;
        let options = read(fields).expect("options");
        assert_eq!((options.original_size, options.crop), (Some([512, 768]), [0, 8]));
        assert_eq!((options.prompt_2.as_str(), options.target_size), ("b", None));
        let nothing = read(r#""original_size":null,"crop":[0,0],"prompt_2":" ""#).expect("options");
        assert_eq!(nothing, XlOptions::default());
        for (fields, words) in [
            (r#""original_size":[512]"#, "original_size must be two numbers, height and width"),
            (r#""target_size":[0,8]"#, "target_size must be numbers from 1 to 65536, not 0"),
            (r#""crop":[1,2,3]"#, "crop has 3 entries; at most 2 are allowed"),
            (r#""crop":[]"#, "crop must be two numbers, top and left"),
            (r#""crop":"left""#, "crop must be a list"),
        ] {
            let error = read(fields).expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn an_empty_negative_prompt_is_one() {
        assert!(!read(r#""steps":4"#).expect("options").encodes_empty);
        assert!(!read(r#""negative_prompt":null"#).expect("options").encodes_empty);
        assert!(read(r#""negative_prompt":"""#).expect("options").encodes_empty);
    }
}
