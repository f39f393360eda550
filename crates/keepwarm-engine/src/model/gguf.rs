//! Loading a Llama-type model from a GGUF file (format:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Seek};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Tensor};

use super::weights::{Geometry, Layer, Model, TOKENS_PER_BLOCK};
use crate::text::{Tokenizer, TokenizerError};

/// Largest number that any size in a header may have.
const SIZE_MAX: usize = 1 << 24;

/// Why a file gave no model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It could not be read.
    #[error("cannot read the model {path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// It is no GGUF file, or a broken one.
    #[error("{path} is not a usable GGUF file: {reason}; fetch it again")]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It holds another kind of model.
    #[error("{path} holds a model of architecture '{found}'; the built-in engine runs 'llama'")]
    Architecture {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// Its vocabulary or template cannot be used.
    #[error("{path}: {cause}")]
    Text {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: TokenizerError,
    },
}

struct Reader<'a> {
    path: &'a Path,
    content: Content,
    file: BufReader<File>,
}

impl Model {
    /// Reads a model and holds its weights as f32.
    ///
    /// # Errors
    /// [`LoadError`]: not a GGUF file, cut short, of another architecture, with sizes that cannot be.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let io = |cause| LoadError::Io { path: path.to_owned(), cause };
        let bytes = std::fs::read(path).map_err(io)?;
        let broken = |reason: String| LoadError::Broken { path: path.to_owned(), reason };
        super::header::check(&bytes).map_err(broken)?;
        let hash = blake3::hash(&bytes);
        drop(bytes);
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let content = Content::read(&mut file).map_err(|error| broken(error.to_string()))?;
        file.rewind().map_err(io)?;
        let mut reader = Reader { path, content, file };
        reader.check_length()?;
        let geometry = reader.geometry()?;
        let tokenizer = Tokenizer::from_gguf(&reader.content.metadata)
            .map_err(|cause| LoadError::Text { path: path.to_owned(), cause })?;
        if tokenizer.size() != geometry.vocab {
            return Err(broken(format!(
                "{} tokens are named, {} have embeddings",
                tokenizer.size(),
                geometry.vocab
            )));
        }
        let layers =
            (0..geometry.layers).map(|layer| reader.layer(layer, &geometry)).collect::<Result<_, _>>()?;
        let embedding = reader.tensor("token_embd.weight", &[geometry.vocab, geometry.width])?;
        let unembedding = match reader.content.tensor_infos.contains_key("output.weight") {
            true => reader.tensor("output.weight", &[geometry.vocab, geometry.width])?,
            false => embedding.clone(),
        };
        let unembedding = unembedding.t().map_err(|error| broken(error.to_string()))?;
        let embeddings = reader.values(&embedding)?;
        let norm = reader.tensor("output_norm.weight", &[geometry.width])?;
        let norm = reader.values(&norm)?;
        // The engine's own layout of keys and values is part of what the bytes mean.
        let fingerprint = format!("blake3:{}+kv-f16-1", hash.to_hex());
        Ok(Self { geometry, embeddings, layers, norm, unembedding, tokenizer, fingerprint, random: false })
    }
}

impl Reader<'_> {
    fn broken(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Broken { path: self.path.to_owned(), reason: reason.into() }
    }

    /// Every tensor must lie inside the file: a download that was cut short is found before it is used.
    fn check_length(&self) -> Result<(), LoadError> {
        let file = self
            .file
            .get_ref()
            .metadata()
            .map_err(|cause| LoadError::Io { path: self.path.to_owned(), cause })?;
        for (name, info) in &self.content.tensor_infos {
            let values = info.shape.elem_count();
            let bytes = values / info.ggml_dtype.block_size() * info.ggml_dtype.type_size();
            let end =
                self.content.tensor_data_offset.saturating_add(info.offset).saturating_add(bytes as u64);
            if end > file.len() {
                return Err(self.broken(format!(
                    "it has {} bytes, and '{name}' ends at {end}: it was cut short",
                    file.len()
                )));
            }
        }
        Ok(())
    }

    fn value(&self, key: &str) -> Result<&Value, LoadError> {
        self.content.metadata.get(key).ok_or_else(|| self.broken(format!("'{key}' is missing")))
    }

    fn size(&self, key: &str) -> Result<usize, LoadError> {
        let value = self.value(key)?;
        let number = value.to_u32().map(u64::from).or_else(|_| value.to_u64());
        match number {
            Ok(number) if number > 0 && number <= SIZE_MAX as u64 => Ok(number as usize),
            _ => Err(self.broken(format!("'{key}' is not a size: {value:?}"))),
        }
    }

    fn float(&self, key: &str, default: Option<f32>) -> Result<f32, LoadError> {
        match (self.content.metadata.get(key), default) {
            (Some(value), _) => value.to_f32().map_err(|error| self.broken(format!("'{key}': {error}"))),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.broken(format!("'{key}' is missing"))),
        }
    }

    fn geometry(&self) -> Result<Geometry, LoadError> {
        let architecture = self
            .value("general.architecture")?
            .to_string()
            .map_err(|error| self.broken(error.to_string()))?;
        if architecture != "llama" {
            return Err(LoadError::Architecture { path: self.path.to_owned(), found: architecture.clone() });
        }
        let (width, heads) = (self.size("llama.embedding_length")?, self.size("llama.attention.head_count")?);
        let kv_heads = self.size("llama.attention.head_count_kv").unwrap_or(heads);
        let embedding = self.content.tensor_infos.get("token_embd.weight");
        let vocab =
            embedding.map(|info| info.shape.dims()).filter(|dims| dims.len() == 2).map(|dims| dims[0]);
        let vocab = vocab.ok_or_else(|| self.broken("'token_embd.weight' is missing"))?;
        if width % heads != 0 || heads % kv_heads != 0 || (width / heads) % 2 != 0 {
            return Err(self
                .broken(format!("{heads} heads and {kv_heads} KV heads do not divide a width of {width}")));
        }
        let rotated = self.size("llama.rope.dimension_count").unwrap_or(width / heads);
        if rotated != width / heads {
            return Err(
                self.broken(format!("a rotation of {rotated} of {} values is not served", width / heads))
            );
        }
        Ok(Geometry {
            layers: self.size("llama.block_count")?,
            width,
            heads,
            kv_heads,
            head_dim: width / heads,
            ffn: self.size("llama.feed_forward_length")?,
            vocab,
            context: self.size("llama.context_length")?,
            rope_base: self.float("llama.rope.freq_base", Some(10_000.0))?,
            epsilon: self.float("llama.attention.layer_norm_rms_epsilon", None)?,
            tokens_per_block: TOKENS_PER_BLOCK,
        })
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let loaded = self.content.tensor(&mut self.file, name, &Device::Cpu);
        let loaded = loaded.and_then(|tensor| tensor.dequantize(&Device::Cpu));
        let tensor = loaded.map_err(|error| self.broken(format!("'{name}': {error}")))?;
        if tensor.dims() != shape {
            return Err(self.broken(format!("'{name}' is {:?}, not {shape:?}", tensor.dims())));
        }
        Ok(tensor)
    }

    fn values(&self, tensor: &Tensor) -> Result<Vec<f32>, LoadError> {
        tensor.flatten_all().and_then(|flat| flat.to_vec1()).map_err(|error| self.broken(error.to_string()))
    }

    /// Matrices of the same input side by side, as `inner x columns`.
    fn beside(&self, tensors: &[Tensor]) -> Result<Tensor, LoadError> {
        let joined =
            Tensor::cat(tensors, 0).and_then(|joined| joined.t()).and_then(|turned| turned.contiguous());
        joined.map_err(|error| self.broken(error.to_string()))
    }

    fn layer(&mut self, layer: usize, g: &Geometry) -> Result<Layer, LoadError> {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let (kv, width) = (g.kv_width(), g.width);
        let query = self.tensor(&name("attn_q"), &[width, width])?;
        let key = self.tensor(&name("attn_k"), &[kv, width])?;
        let value = self.tensor(&name("attn_v"), &[kv, width])?;
        let output = self.tensor(&name("attn_output"), &[width, width])?;
        let gate = self.tensor(&name("ffn_gate"), &[g.ffn, width])?;
        let up = self.tensor(&name("ffn_up"), &[g.ffn, width])?;
        let down = self.tensor(&name("ffn_down"), &[width, g.ffn])?;
        let attention_norm = self.tensor(&name("attn_norm"), &[width])?;
        let ffn_norm = self.tensor(&name("ffn_norm"), &[width])?;
        Ok(Layer {
            attention_norm: self.values(&attention_norm)?,
            qkv: self.beside(&[query, key, value])?,
            output: self.beside(&[output])?,
            ffn_norm: self.values(&ffn_norm)?,
            gate_up: self.beside(&[gate, up])?,
            down: self.beside(&[down])?,
        })
    }
}

/// Metadata of a GGUF file.
pub(crate) type Metadata = HashMap<String, Value>;
