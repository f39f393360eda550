//! Choosing the next token.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How to choose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Only the most likely tokens that together have this share of the weight.
    pub top_p: f32,
    /// With the position it decides: the same seed gives the same tokens.
    pub seed: u64,
}

/// Chooses tokens for one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Sampler(Sampling);

impl Sampler {
    /// A sampler.
    #[must_use]
    pub const fn new(sampling: Sampling) -> Self {
        Self(sampling)
    }

    /// The token for `position`: a function of the logits, the seed and the position alone, so that a
    /// conversation that was interrupted goes on as it would have.
    ///
    /// # Panics
    /// If there are no logits.
    #[must_use]
    pub fn choose(&self, logits: &[f32], position: usize) -> u32 {
        let best = |a: &(usize, f32), b: &(usize, f32)| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0));
        let indexed = || logits.iter().copied().enumerate();
        let greedy = indexed().max_by(best).expect("a vocabulary is not empty");
        if self.0.temperature <= 0.0 {
            return greedy.0 as u32;
        }
        let mut weights: Vec<(usize, f32)> = indexed()
            .map(|(token, logit)| (token, ((logit - greedy.1) / self.0.temperature).exp()))
            .collect();
        let total: f32 = weights.iter().map(|(_, weight)| weight).sum();
        if self.0.top_p < 1.0 {
            weights.sort_unstable_by(|a, b| best(b, a));
            let mut sum = 0.0;
            let kept = weights.iter().take_while(|(_, weight)| {
                let before = sum;
                sum += weight;
                before < self.0.top_p * total
            });
            let kept = kept.count().max(1);
            weights.truncate(kept);
        }
        let total: f32 = weights.iter().map(|(_, weight)| weight).sum();
        let mut random = ChaCha8Rng::seed_from_u64(self.0.seed);
        random.set_stream(position as u64);
        let mut left = random.random::<f32>() * total;
        for (token, weight) in &weights {
            left -= weight;
            if left <= 0.0 {
                return *token as u32;
            }
        }
        weights.last().map_or(greedy.0, |(token, _)| *token) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(Sampling { temperature, top_p, seed })
    }

    #[test]
    fn greedy_takes_the_first_of_the_best() {
        assert_eq!(sampler(0.0, 1.0, 1).choose(&[1.0, 3.0, 3.0, 2.0], 9), 1);
    }

    #[test]
    fn a_seed_and_a_position_give_one_token() {
        let logits: Vec<f32> = (0..50).map(|n| (n as f32).sin()).collect();
        let draw = |seed| {
            (0..20).map(|position| sampler(1.0, 0.9, seed).choose(&logits, position)).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn a_small_nucleus_leaves_the_best() {
        let logits = [0.0, 5.0, 1.0];
        assert!((0..50).all(|position| sampler(1.0, 0.1, 7).choose(&logits, position) == 1));
        let seen: std::collections::HashSet<_> =
            (0..500).map(|position| sampler(5.0, 1.0, 7).choose(&logits, position)).collect();
        assert_eq!(seen.len(), 3, "a high temperature takes each at times");
    }
}
