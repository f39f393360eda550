//! One step: prefill and decode of different sequences together.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::iter::{IndexedParallelIterator, IntoParallelRefIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::attention::{Queries, attend};
use super::math::{product, rms_norm, swiglu};
use super::weights::{Geometry, Layer, Model};
use super::{CHUNK_TOKENS_MAX, Step, StepError};

/// Where a sequence's rows begin among the step's, and where they stand.
struct Span {
    first: usize,
    count: usize,
    position: usize,
}

impl Model {
    /// Computes a step: writes the new tokens' keys and values, and gives the logits of each sequence's last
    /// token where they are wanted.
    ///
    /// # Errors
    /// [`StepError`] for a step that is empty, too long or beyond the context, or if the arithmetic fails;
    /// state of the new positions is undefined then, older state is untouched.
    pub fn step(&self, steps: &mut [Step<'_>]) -> Result<Vec<Option<Vec<f32>>>, StepError> {
        let g = self.geometry;
        let mut spans = Vec::with_capacity(steps.len());
        let mut x = Vec::new();
        for step in steps.iter() {
            let end = step.position + step.tokens.len();
            if step.tokens.is_empty() || step.tokens.len() > CHUNK_TOKENS_MAX || end > g.context {
                return Err(StepError(format!(
                    "{} tokens at {} of {}",
                    step.tokens.len(),
                    step.position,
                    g.context
                )));
            }
            spans.push(Span { first: x.len() / g.width, count: step.tokens.len(), position: step.position });
            for token in step.tokens {
                let row =
                    self.embeddings.get(*token as usize * g.width..).and_then(|rows| rows.get(..g.width));
                x.extend_from_slice(row.ok_or_else(|| StepError(format!("there is no token {token}")))?);
            }
        }
        let angles = Angles::new(&g, &spans);
        for (index, layer) in self.layers.iter().enumerate() {
            self.attention(layer, index, &spans, &angles, steps, &mut x)?;
            feed_forward(&g, layer, &mut x)?;
        }
        self.logits(&spans, steps, &x)
    }

    fn attention(
        &self,
        layer: &Layer,
        index: usize,
        spans: &[Span],
        angles: &Angles,
        steps: &mut [Step<'_>],
        x: &mut [f32],
    ) -> Result<(), StepError> {
        let g = &self.geometry;
        let count = x.len() / g.width;
        let normed = normed(g, x, &layer.attention_norm);
        let (kv, columns) = (g.kv_width(), g.width + 2 * g.kv_width());
        let mut qkv = product(normed, count, g.width, &layer.qkv)?;
        qkv.par_chunks_mut(columns).enumerate().for_each(|(row, values)| {
            angles.rotate(g, row, &mut values[..g.width]);
            angles.rotate(g, row, &mut values[g.width..g.width + kv]);
        });
        for (span, step) in spans.iter().zip(steps.iter_mut()) {
            for at in 0..span.count {
                let values = &qkv[(span.first + at) * columns..][..columns];
                let position = span.position + at;
                let (block, row) = (position / g.tokens_per_block, position % g.tokens_per_block);
                for (plane, from) in [(2 * index, g.width), (2 * index + 1, g.width + kv)] {
                    let to = &mut step.kv.plane_mut(block, plane)[row * kv..][..kv];
                    to.convert_from_f32_slice(&values[from..from + kv]);
                }
            }
        }
        let queries: Vec<Vec<f32>> = spans
            .iter()
            .map(|span| {
                qkv[span.first * columns..][..span.count * columns]
                    .chunks(columns)
                    .flat_map(|row| &row[..g.width])
                    .copied()
                    .collect()
            })
            .collect();
        let jobs: Vec<_> =
            (0..spans.len()).flat_map(|span| (0..g.kv_heads).map(move |head| (span, head))).collect();
        let steps = &*steps;
        let results: Vec<Vec<f32>> = jobs
            .par_iter()
            .map(|(at, head)| {
                let queries =
                    Queries { rows: &queries[*at], count: spans[*at].count, position: spans[*at].position };
                attend(g, &*steps[*at].kv, index, *head, &queries)
            })
            .collect::<Result<_, _>>()?;
        let mut attended = vec![0.0; count * g.width];
        let share = g.width / g.kv_heads;
        for ((at, head), result) in jobs.iter().zip(results) {
            for (row, values) in result.chunks(share).enumerate() {
                attended[(spans[*at].first + row) * g.width + head * share..][..share]
                    .copy_from_slice(values);
            }
        }
        add(x, &product(attended, count, g.width, &layer.output)?);
        Ok(())
    }

    fn logits(
        &self,
        spans: &[Span],
        steps: &[Step<'_>],
        x: &[f32],
    ) -> Result<Vec<Option<Vec<f32>>>, StepError> {
        let g = &self.geometry;
        let mut rows = Vec::new();
        for (span, _) in spans.iter().zip(steps).filter(|(_, step)| step.logits) {
            let last = &x[(span.first + span.count - 1) * g.width..][..g.width];
            let mut row = vec![0.0; g.width];
            rms_norm(last, &self.norm, g.epsilon, &mut row);
            rows.extend(row);
        }
        let wanted = rows.len() / g.width;
        if wanted == 0 {
            return Ok(steps.iter().map(|_| None).collect());
        }
        // The right side lies transposed: eight rows make its order of summation the fixed one.
        rows.resize(wanted.max(8) * g.width, 0.0);
        let all = product(rows, wanted.max(8), g.width, &self.unembedding)?;
        let mut logits = all.chunks(g.vocab).take(wanted).map(<[f32]>::to_vec);
        Ok(steps.iter().map(|step| if step.logits { logits.next() } else { None }).collect())
    }
}

fn normed(g: &Geometry, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    let rows = out.par_chunks_mut(g.width).zip(x.par_chunks(g.width));
    rows.for_each(|(out, row)| rms_norm(row, weight, g.epsilon, out));
    out
}

fn feed_forward(g: &Geometry, layer: &Layer, x: &mut [f32]) -> Result<(), StepError> {
    let count = x.len() / g.width;
    let mut hidden = product(normed(g, x, &layer.ffn_norm), count, g.width, &layer.gate_up)?;
    let gated: Vec<f32> = hidden
        .par_chunks_mut(2 * g.ffn)
        .flat_map_iter(|row| {
            let (gate, up) = row.split_at_mut(g.ffn);
            swiglu(gate, up);
            gate.iter().copied()
        })
        .collect();
    add(x, &product(gated, count, g.ffn, &layer.down)?);
    Ok(())
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// The rotation of each row (Su et al. 2021), on adjacent pairs as GGUF's llama models have them.
struct Angles {
    /// Per row, cosine and sine of each pair.
    rows: Vec<Vec<(f32, f32)>>,
}

impl Angles {
    fn new(g: &Geometry, spans: &[Span]) -> Self {
        let pairs = g.head_dim / 2;
        let frequency: Vec<f64> = (0..pairs)
            .map(|pair| f64::from(g.rope_base).powf(-2.0 * pair as f64 / g.head_dim as f64))
            .collect();
        let row = |position: usize| {
            let angle = |frequency: &f64| {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                (cos as f32, sin as f32)
            };
            frequency.iter().map(angle).collect()
        };
        let rows = spans.iter().flat_map(|span| span.position..span.position + span.count).map(row).collect();
        Self { rows }
    }

    fn rotate(&self, g: &Geometry, row: usize, values: &mut [f32]) {
        for head in values.chunks_mut(g.head_dim) {
            for (pair, (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(&self.rows[row]) {
                let [a, b] = *pair;
                *pair = [a * cos - b * sin, a * sin + b * cos];
            }
        }
    }
}

const _: () = assert!(size_of::<f16>() == 2);
