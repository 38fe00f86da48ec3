//! The text encoder: hidden states of a Qwen3 before its last layer, for a prompt in its chat
//! template.

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::z_image::{TextEncoderConfig, ZImageTextEncoder};

use super::config::{MAX_TOKENS, TEXT_ENCODER, TOKENIZER, ZImageConfig};
use super::var_builder;
use crate::checkpoint::{Source, Weights};
use crate::error::{Error, Result};
use crate::text::Text;

/// A loaded text encoder. It is needed before the transformer, and can be dropped then.
#[derive(Debug)]
pub struct TextEncoder {
    template: Template,
    network: ZImageTextEncoder,
    device: Device,
}

/// The text tokenizer, and the control tokens of ChatML.
#[derive(Debug)]
pub struct Template {
    text: Text,
    start: u32,
    end: u32,
}

impl Template {
    /// Reads the tokenizer of a folder.
    ///
    /// Errors: [`crate::error::Kind::Model`] for one that is missing, broken or not the text
    /// encoder's.
    pub fn read(source: &Source, config: &ZImageConfig) -> Result<Self> {
        let text = Text::from_bytes(&source.bytes(TOKENIZER)?)
            .map_err(|e| Error { message: format!("{} (of {source})", e.message), ..e })?;
        let bad = |what: String| {
            Error::model(format!("{TOKENIZER} of {source} {what}"))
                .hint(format!("copy the folders tokenizer and text_encoder of {} again", super::HUB))
        };
        let id = |word: &str| text.control(word).ok_or_else(|| bad(format!("has no {word}: it is another model's")));
        let (start, end) = (id("<|im_start|>")?, id("<|im_end|>")?);
        let (words, most) = (text.vocab_size().max(start.max(end) as usize + 1), config.text.vocab_size);
        match words > most {
            true => Err(bad(format!("has {words} tokens, the text encoder {most}"))),
            false => Ok(Self { text, start, end }),
        }
    }

    /// Ids of a prompt as one message of a user, and of the beginning of the answer: at most
    /// [`MAX_TOKENS`], the rest is cut off.
    ///
    /// Errors: those of [`Text::encode`].
    pub fn ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = vec![self.start];
        ids.extend(self.text.encode(&format!("user\n{prompt}"))?);
        ids.push(self.end);
        ids.extend(self.text.encode("\n")?);
        ids.push(self.start);
        ids.extend(self.text.encode("assistant\n")?);
        ids.truncate(MAX_TOKENS);
        Ok(ids)
    }
}

impl TextEncoder {
    /// The network on weights whose keys begin with `model.`, or `bare` of it.
    pub(super) fn network(
        w: &Weights,
        config: &TextEncoderConfig,
        bare: bool,
    ) -> candle_core::Result<ZImageTextEncoder> {
        ZImageTextEncoder::new(config, var_builder(w, if bare { "model." } else { "" }))
    }

    /// Whether the keys have no prefix: transformers saves a base model so.
    fn is_bare(source: &Source) -> Result<bool> {
        source.has_tensor(TEXT_ENCODER, "embed_tokens.weight")
    }

    /// Checks that [`TextEncoder::load`] can load the files, by the tokenizer and the headers.
    ///
    /// Errors: those of [`TextEncoder::load`].
    pub fn check(source: &Source, config: &ZImageConfig) -> Result<()> {
        Template::read(source, config)?;
        let bare = Self::is_bare(source)?;
        source.check(TEXT_ENCODER, |w| Self::network(w, &config.text, bare))
    }

    /// Loads the encoder with weights as `dtype`.
    ///
    /// Errors: files that are missing, broken, or do not fit.
    pub fn load(source: &Source, config: &ZImageConfig, dtype: DType, device: &Device) -> Result<Self> {
        let bare = Self::is_bare(source)?;
        Ok(Self {
            template: Template::read(source, config)?,
            network: source.load(TEXT_ENCODER, dtype, device, |w| Self::network(w, &config.text, bare))?,
            device: device.clone(),
        })
    }

    /// Features of a prompt, (tokens, hidden): the output of the last layer but one.
    ///
    /// Errors: those of [`Template::ids`].
    pub fn encode(&self, prompt: &str) -> Result<Tensor> {
        let ids = Tensor::new(self.template.ids(prompt)?, &self.device)?.unsqueeze(0)?;
        Ok(self.network.forward(&ids)?.squeeze(0)?)
    }
}
