//! A tiny model with seeded random weights: the same code path, for tests and where no weights can be had.

use candle_core::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::weights::{Geometry, Layer, Model, TOKENS_PER_BLOCK};
use crate::text::Tokenizer;

const WIDTH: usize = 64;
const KV_WIDTH: usize = 32;
const FFN: usize = 128;

impl Model {
    /// A model of two layers over bytes, with weights from `seed`.
    #[must_use]
    pub fn tiny(seed: u64) -> Self {
        let tokenizer = Tokenizer::bytes();
        let geometry = Geometry {
            layers: 2,
            width: WIDTH,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn: FFN,
            vocab: tokenizer.size(),
            context: 8192,
            rope_base: 10_000.0,
            epsilon: 1e-5,
            tokens_per_block: TOKENS_PER_BLOCK,
        };
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut values = |count: usize, scale: f32| -> Vec<f32> {
            (0..count).map(|_| (random.random::<f32>() - 0.5) * 2.0 * scale).collect()
        };
        let mut matrix = |rows: usize, columns: usize| {
            let scale = (3.0 / rows as f32).sqrt();
            let values = values(rows * columns, scale);
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("the sizes agree")
        };
        let layers = (0..geometry.layers)
            .map(|_| Layer {
                attention_norm: vec![1.0; WIDTH],
                qkv: matrix(WIDTH, WIDTH + 2 * KV_WIDTH),
                output: matrix(WIDTH, WIDTH),
                ffn_norm: vec![1.0; WIDTH],
                gate_up: matrix(WIDTH, 2 * FFN),
                down: matrix(FFN, WIDTH),
            })
            .collect();
        let unembedding = matrix(geometry.vocab, WIDTH).t().expect("a matrix has a transpose");
        let embeddings = values(geometry.vocab * WIDTH, 1.0);
        let fingerprint = format!("random:{seed}+kv-f16-1");
        Self {
            geometry,
            embeddings,
            layers,
            norm: vec![1.0; WIDTH],
            unembedding,
            tokenizer,
            fingerprint,
            random: true,
        }
    }
}
