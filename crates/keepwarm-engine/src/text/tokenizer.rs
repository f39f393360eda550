//! Text to tokens and back, from a model's own vocabulary.
//!
//! Special tokens are recognised in the chat template's own text only: what a user writes is always plain
//! text, so nobody can end a message or begin another's by writing `<|im_end|>`.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use serde_json::json;

use super::template::Template;
use crate::model::Metadata;

/// GGUF's word for a token that stands for more than its text.
const CONTROL: u32 = 3;
/// Tokens beyond the bytes of the byte vocabulary.
const BYTE_SPECIALS: [&str; 3] = ["<|end|>", "<|start|>", "<|pad|>"];
/// How messages look in the byte vocabulary.
const BYTE_TEMPLATE: &str = "{% for message in messages %}<|start|>{{ message.role }}:{{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant:{% endif %}";

/// Why a vocabulary cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// Something is missing or of another type.
    #[error("the vocabulary's '{0}' is missing or of another type")]
    Missing(&'static str),
    /// A kind that this engine does not know.
    #[error("a tokenizer of kind '{0}' is not served: only 'gpt2' is")]
    Kind(String),
    /// The tokenizer library refused it.
    #[error("the vocabulary cannot be used: {0}")]
    Build(String),
    /// The chat template cannot be used.
    #[error("the chat template cannot be used: {0}")]
    Template(String),
}

#[derive(Debug)]
enum Vocabulary {
    Bpe(Box<tokenizers::Tokenizer>),
    Bytes,
}

/// A model's vocabulary and chat template.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Vocabulary,
    /// Special tokens, longest first.
    specials: Vec<(String, u32)>,
    ends: Vec<u32>,
    size: usize,
    pub(super) template: Template,
}

fn strings(metadata: &Metadata, key: &'static str) -> Result<Vec<String>, TokenizerError> {
    let missing = || TokenizerError::Missing(key);
    let values = metadata.get(key).and_then(|value| value.to_vec().ok()).ok_or_else(missing)?;
    values.iter().map(|value| value.to_string().cloned().map_err(|_| missing())).collect()
}

impl Tokenizer {
    /// The vocabulary of a GGUF file.
    pub(crate) fn from_gguf(metadata: &Metadata) -> Result<Self, TokenizerError> {
        let text = |key: &'static str| {
            let value = metadata.get(key).and_then(|value| value.to_string().ok());
            value.ok_or(TokenizerError::Missing(key))
        };
        let kind = text("tokenizer.ggml.model")?;
        if kind != "gpt2" {
            return Err(TokenizerError::Kind(kind.clone()));
        }
        let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
        let merges = strings(metadata, "tokenizer.ggml.merges")?;
        let types = metadata.get("tokenizer.ggml.token_type").and_then(|value| value.to_vec().ok());
        let types = types.ok_or(TokenizerError::Missing("tokenizer.ggml.token_type"))?;
        let number =
            |value: &Value| value.to_u32().ok().or_else(|| value.to_i32().ok().map(i32::cast_unsigned));
        let control = |at: usize| types.get(at).and_then(number) == Some(CONTROL);
        let mut specials: Vec<_> = tokens
            .iter()
            .enumerate()
            .filter(|(at, _)| control(*at))
            .map(|(at, token)| (token.clone(), at as u32))
            .collect();
        specials.sort_by_key(|(token, _)| std::cmp::Reverse(token.len()));
        let end = metadata.get("tokenizer.ggml.eos_token_id").and_then(number);
        let end = end.ok_or(TokenizerError::Missing("tokenizer.ggml.eos_token_id"))?;
        let others =
            specials.iter().filter(|(token, _)| matches!(token.as_str(), "<|endoftext|>" | "<|im_end|>"));
        let ends = std::iter::once(end).chain(others.map(|(_, id)| *id)).collect();
        let size = tokens.len();
        let pre = text("tokenizer.ggml.pre").map_or("", String::as_str);
        let bpe = bpe(tokens, &merges, pre)?;
        let template = Template::new(text("tokenizer.chat_template")?)?;
        Ok(Self { vocabulary: Vocabulary::Bpe(Box::new(bpe)), specials, ends, size, template })
    }

    /// A vocabulary of bytes, for models without one of their own.
    pub(crate) fn bytes() -> Self {
        let specials = BYTE_SPECIALS.iter().zip(256..).map(|(token, id)| ((*token).to_owned(), id)).collect();
        let template = Template::new(BYTE_TEMPLATE).expect("the built-in template is valid");
        Self {
            vocabulary: Vocabulary::Bytes,
            specials,
            ends: vec![256],
            size: 256 + BYTE_SPECIALS.len(),
            template,
        }
    }

    /// Tokens of the vocabulary.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Whether a token ends an answer.
    #[must_use]
    pub fn ends(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Plain text to tokens; special tokens in it are plain text too.
    ///
    /// # Errors
    /// [`TokenizerError::Build`] where the library fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match &self.vocabulary {
            Vocabulary::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Vocabulary::Bpe(bpe) => {
                let encoded =
                    bpe.encode_fast(text, false).map_err(|error| TokenizerError::Build(error.to_string()))?;
                Ok(encoded.get_ids().to_vec())
            }
        }
    }

    /// A template's own text to tokens: special tokens in it are special.
    pub(super) fn encode_template(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let found = self
                .specials
                .iter()
                .filter_map(|(special, id)| rest.find(special.as_str()).map(|at| (at, special, id)));
            // The first, and of those that begin together the longest.
            let Some((at, special, id)) =
                found.min_by_key(|(at, special, _)| (*at, std::cmp::Reverse(special.len())))
            else {
                tokens.extend(self.encode(rest)?);
                break;
            };
            tokens.extend(self.encode(&rest[..at])?);
            tokens.push(*id);
            rest = &rest[at + special.len()..];
        }
        Ok(tokens)
    }

    /// The bytes of a token; none for a special one.
    fn token_bytes(&self, token: u32) -> Vec<u8> {
        if self.specials.iter().any(|(_, id)| *id == token) {
            return Vec::new();
        }
        match &self.vocabulary {
            Vocabulary::Bytes => u8::try_from(token).map(|byte| vec![byte]).unwrap_or_default(),
            Vocabulary::Bpe(bpe) => {
                let text = bpe.id_to_token(token).unwrap_or_default();
                text.chars().filter_map(byte_of).collect()
            }
        }
    }

    /// Tokens to text; bytes that are no UTF-8 become replacement characters.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| self.token_bytes(*token)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), as Hugging Face's library runs it.
fn bpe(tokens: Vec<String>, merges: &[String], pre: &str) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let vocab: HashMap<String, usize> =
        tokens.into_iter().enumerate().map(|(id, token)| (token, id)).collect();
    let merges: Vec<_> =
        merges.iter().filter_map(|merge| merge.split_once(' ')).map(|(a, b)| json!([a, b])).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    // SmolLM's vocabulary was made with every digit on its own.
    let pre = if pre == "smollm" {
        json!({"type": "Sequence", "pretokenizers": [digits, byte_level]})
    } else {
        byte_level
    };
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges});
    let whole = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": pre, "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true,
        "trim_offsets": true, "use_regex": true}, "model": model});
    tokenizers::Tokenizer::from_bytes(whole.to_string())
        .map_err(|error| TokenizerError::Build(error.to_string()))
}

/// The byte that a character of a byte-level vocabulary stands for: printable ones for themselves, the others
/// moved behind 255 in order (Radford et al. 2019).
fn byte_of(c: char) -> Option<u8> {
    let plain = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match u32::from(c) {
        code @ 0..=255 if plain(code as u8) => Some(code as u8),
        code => (0..=255u8).filter(|byte| !plain(*byte)).nth(code.checked_sub(256)? as usize),
    }
}

/// Turns tokens into text as they come: only whole characters.
#[derive(Debug, Default)]
pub struct TextStream {
    bytes: Vec<u8>,
}

impl TextStream {
    /// Takes a token; gives the text that is whole now.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        self.bytes.extend(tokenizer.token_bytes(token));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.bytes) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.bytes.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.bytes[..valid]));
                    let Some(broken) = error.error_len() else {
                        self.bytes.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.bytes.drain(..valid + broken);
                }
            }
        }
    }

    /// What is left at the end: a character that never became whole.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;

    #[test]
    fn the_byte_alphabet_is_whole() {
        let mut bytes: Vec<u8> = (0..=323u32).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('a')), (Some(b' '), Some(b'\n'), Some(b'a')));
    }

    #[test]
    fn nobody_writes_a_special_token() {
        let tokenizer = Tokenizer::bytes();
        assert!(tokenizer.encode("<|end|>").unwrap().iter().all(|token| *token < 256));
        assert_eq!(tokenizer.encode_template("a<|end|>b").unwrap(), [97, 256, 98]);
    }

    proptest! {
        #[test]
        fn streamed_text_is_the_text(text in ".{0,40}") {
            let tokenizer = Tokenizer::bytes();
            let mut stream = TextStream::default();
            let mut out = String::new();
            for token in tokenizer.encode(&text).unwrap() {
                out.push_str(&stream.push(&tokenizer, token));
            }
            out.push_str(&stream.finish());
            assert_eq!(out, text);
        }
    }
}
