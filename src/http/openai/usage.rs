//! The `usage` of responses: what clients and gateways account by. Text is counted by the model's
//! tokenizer. Images are counted as OpenAI publishes it for gpt-image-1, whatever they cost here.

use sd_models::Spec;
use serde_json::{Value, json};

use crate::engine::GeneratedImage;

/// The tokens of a response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    /// Tokens of the prompt and the negative prompt.
    text: usize,
    /// Tokens of the input image; 0 without one.
    input_image: usize,
    /// Tokens of one image of the response.
    output_image: usize,
}

impl Usage {
    /// The tokens of a response of images like this. `quality` is that of the request.
    pub(crate) fn of(spec: &Spec, image: &GeneratedImage, quality: Option<&str>) -> Self {
        let size = spec.final_size();
        let input = spec.img2img.as_ref().map(|_| (spec.size.width(), spec.size.height()));
        Self {
            text: image.text_tokens,
            input_image: input.map_or(0, input_tokens),
            output_image: output_tokens((size.width(), size.height()), quality),
        }
    }

    /// The JSON of a response of so many images.
    pub(crate) fn json(self, images: usize) -> Value {
        let Self { text, input_image, output_image } = self;
        let (input, output) = (text + input_image, images * output_image);
        json!({
            "total_tokens": input + output,
            "input_tokens": input,
            "output_tokens": output,
            "input_tokens_details": { "text_tokens": text, "image_tokens": input_image },
            "output_tokens_details": { "text_tokens": 0, "image_tokens": output },
        })
    }
}

/// OpenAI's table of sizes and qualities, 272 to 6240 tokens, is a token for each square of 64, 32
/// or 16 pixels, and one more in each row.
fn output_tokens((width, height): (usize, usize), quality: Option<&str>) -> usize {
    let side = match quality.map(str::to_ascii_lowercase).as_deref() {
        Some("low") => 64,
        Some("high" | "hd") => 16,
        _ => 32,
    };
    (width.div_ceil(side) + 1) * height.div_ceil(side)
}

/// OpenAI's count of input images: 65, and 129 for each tile of 512 pixels of an image whose shorter
/// side is scaled to that.
fn input_tokens((width, height): (usize, usize)) -> usize {
    let (longer, shorter) = (width.max(height), width.min(height).max(1));
    65 + 129 * longer.div_ceil(shorter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_counted_as_openai_publishes_it() {
        let sizes = [(1024, 1024), (1024, 1536), (1536, 1024)];
        for (quality, tokens) in [
            (Some("low"), [272, 408, 400]),
            (Some("Medium"), [1056, 1584, 1568]),
            (None, [1056, 1584, 1568]),
            (Some("high"), [4160, 6240, 6208]),
        ] {
            assert_eq!(sizes.map(|size| output_tokens(size, quality)), tokens, "{quality:?}");
        }
        assert_eq!(sizes.map(input_tokens), [194, 323, 323]);
        assert_eq!(output_tokens((72, 64), None), 8);
    }
}
