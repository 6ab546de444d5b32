//! Content negotiation: JSON with the images in it, or the bytes of one image.

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;

use super::body::BodyKind;
use crate::http::drawing::ReplyFormat;
use crate::http::error::{ApiError, Result};
use crate::image::Format;

/// SageMaker's name of the header on some of its paths.
pub(crate) const SAGEMAKER_ACCEPT: &str = "x-amzn-sagemaker-accept";

/// The range that clients send by default.
const ANY_MEDIA_TYPE: &str = "*/*";

/// The properties of a request that select the response format, besides the headers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReplyPreferences {
    pub(crate) kind: BodyKind,
    /// The format of image files in JSON if the body has no `output_format`.
    pub(crate) usual: Format,
    /// The body's `output_format`.
    pub(crate) format: Option<Format>,
    pub(crate) count: usize,
    /// The body's `stream`.
    pub(crate) stream: bool,
}

/// Selects the possible response format that the client prefers.
pub(crate) fn choose(headers: &HeaderMap, preferences: ReplyPreferences) -> Result<ReplyFormat> {
    if preferences.stream {
        return Ok(ReplyFormat::Events(preferences.format.unwrap_or(preferences.usual)));
    }
    let header = |name: &str| -> Vec<String> {
        let values = headers.get_all(name).iter();
        let text: Vec<_> = values.map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
        let items = text.join(",").to_ascii_lowercase();
        items.split(',').map(str::trim).filter(|s| !s.is_empty()).map(Into::into).collect()
    };
    let mut ranges = header(ACCEPT.as_str());
    if ranges.iter().all(|range| range == ANY_MEDIA_TYPE) {
        ranges = header(SAGEMAKER_ACCEPT);
    }
    if ranges.is_empty() {
        ranges.push(ANY_MEDIA_TYPE.into());
    }
    let mut ranges: Vec<(&str, f32)> = ranges.iter().map(|range| weighed(range)).collect();
    ranges.retain(|(_, weight)| *weight > 0.0);
    ranges.sort_by(|a, b| b.1.total_cmp(&a.1));
    ranges
        .iter()
        .find_map(|(range, _)| preferences.accept(range))
        .ok_or_else(|| ApiError::NotAcceptable(preferences.rejection(&ranges)))
}

/// A media range without its parameters, and its weight.
fn weighed(range: &str) -> (&str, f32) {
    let mut parts = range.split(';').map(str::trim);
    let media = parts.next().unwrap_or_default();
    let weight = parts.find_map(|part| part.strip_prefix("q=")).map(str::parse);
    let weight = weight.and_then(Result::ok).filter(|w| (0.0..=1.0).contains(w)).unwrap_or(1.0);
    (media, weight)
}

impl ReplyPreferences {
    fn accept(self, range: &str) -> Option<ReplyFormat> {
        let json = ReplyFormat::Json(self.format.unwrap_or(self.usual));
        let bytes = |format| (self.count == 1).then_some(ReplyFormat::Bytes(format));
        let free = self.format.unwrap_or(Format::Png);
        match range {
            ANY_MEDIA_TYPE if self.kind == BodyKind::Text => Some(bytes(free).unwrap_or(json)),
            ANY_MEDIA_TYPE | "application/*" | "application/json" => Some(json),
            "image/*" => bytes(free),
            "text/event-stream" => Some(ReplyFormat::Events(self.format.unwrap_or(self.usual))),
            _ => {
                let format = named(range)?;
                bytes(format).filter(|_| self.format.is_none_or(|requested| requested == format))
            }
        }
    }

    fn rejection(self, ranges: &[(&str, f32)]) -> String {
        let image = ranges.iter().any(|(range, _)| *range == "image/*" || named(range).is_some());
        match self.format {
            _ if image && self.count > 1 => {
                let count = self.count;
                format!("{count} images cannot be returned as one file; accept application/json")
            }
            Some(format) if image => {
                format!("output_format is {}, which Accept does not include", format.media_type())
            }
            _ => "Accept includes no supported media type: application/json, \
                  text/event-stream, image/png, image/jpeg or image/webp"
                .into(),
        }
    }
}

fn named(range: &str) -> Option<Format> {
    let range = if range == "image/jpg" { "image/jpeg" } else { range };
    Format::ALL.into_iter().find(|format| format.media_type() == range)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn reply(accept: &'static str, kind: BodyKind, count: usize) -> Option<ReplyFormat> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        let usual = Format::Jpeg;
        choose(&headers, ReplyPreferences { kind, usual, format: None, count, stream: false }).ok()
    }

    #[test]
    fn the_preferred_possible_reply_is_chosen() {
        use BodyKind::{Json as J, Text as T};
        use ReplyFormat::{Bytes, Events, Json};
        let table = [
            ("", J, 1, Some(Json(Format::Jpeg))),
            ("", T, 1, Some(Bytes(Format::Png))),
            ("*/*", T, 2, Some(Json(Format::Jpeg))),
            ("application/json", T, 1, Some(Json(Format::Jpeg))),
            ("application/json;jpeg", J, 1, Some(Json(Format::Jpeg))),
            ("IMAGE/PNG", J, 1, Some(Bytes(Format::Png))),
            ("image/png", J, 2, None),
            ("image/png, application/json;q=0.1", J, 2, Some(Json(Format::Jpeg))),
            ("application/json;q=0.1, image/webp; q=0.7", J, 1, Some(Bytes(Format::Webp))),
            ("image/png;q=0, image/jpeg", J, 1, Some(Bytes(Format::Jpeg))),
            ("text/html,*/*;q=0.8", T, 1, Some(Bytes(Format::Png))),
            ("text/html", J, 1, None),
            ("text/event-stream", J, 2, Some(Events(Format::Jpeg))),
            ("image/*", J, 1, Some(Bytes(Format::Png))),
            ("image/png;q=nonsense", J, 1, Some(Bytes(Format::Png))),
        ];
        for (accept, kind, count, expected) in table {
            assert_eq!(reply(accept, kind, count), expected, "{accept:?} {kind:?} {count}");
        }
    }

    /// A reply that a media range allows.
    fn allows(range: &str, reply: ReplyFormat) -> bool {
        match reply {
            ReplyFormat::Json(_) => ["*/*", "application/*", "application/json"].contains(&range),
            ReplyFormat::Events(_) => range == "text/event-stream",
            ReplyFormat::Bytes(format) => {
                ["*/*", "image/*"].contains(&range) || named(range) == Some(format)
            }
        }
    }

    fn any_range() -> impl Strategy<Value = (String, u32)> {
        let media = [
            "*/*",
            "application/*",
            "application/json",
            "image/*",
            "image/png",
            "image/jpeg",
            "image/jpg",
            "image/webp",
            "text/event-stream",
            "text/html",
        ];
        let media = prop::sample::select(media.to_vec()).prop_map(str::to_owned);
        let media = prop_oneof![4 => media, 1 => "[a-z*]{1,5}/[a-z*]{1,5}"];
        (media, 0..=10_u32)
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(500)
        })]

        /// No allowed range of a possible reply weighs more than one that allows the chosen reply.
        #[test]
        fn no_possible_reply_is_preferred_to_the_chosen_one(
            ranges in prop::collection::vec(any_range(), 1..6),
            is_text in any::<bool>(),
            count in 1..3_usize,
        ) {
            let kind = if is_text { BodyKind::Text } else { BodyKind::Json };
            let item = |(media, tenths): &(String, u32)| {
                format!("{media} ; q={}", f64::from(*tenths) / 10.0)
            };
            let accept = ranges.iter().map(item).collect::<Vec<_>>().join(" , ");
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(&accept).expect("a header"));
            let usual = Format::Jpeg;
            let preferences =
                ReplyPreferences { kind, usual, format: None, count, stream: false };
            let possible = |media: &str| preferences.accept(media).is_some();
            let heaviest = ranges.iter().filter(|(media, _)| possible(media)).map(|(_, w)| *w).max();
            match choose(&headers, preferences) {
                Ok(reply) => {
                    let of_reply = ranges.iter().filter(|(media, _)| allows(media, reply));
                    prop_assert_eq!(of_reply.map(|(_, weight)| *weight).max(), heaviest);
                    prop_assert!(heaviest > Some(0));
                }
                Err(_) => prop_assert!(heaviest.unwrap_or(0) == 0, "{}", accept),
            }
        }

        #[test]
        fn any_header_is_understood_or_refused(accept in "[ -~]{0,60}") {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(&accept).expect("a header"));
            let kind = BodyKind::Json;
            let preferences = ReplyPreferences {
                kind, usual: Format::Png, format: None, count: 1, stream: false,
            };
            let _ = choose(&headers, preferences);
        }
    }
}
