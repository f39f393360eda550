//! The built-in engine: prefill, and decode of eight sessions together next to one alone.

use std::time::Instant;

use keepwarm_engine::model::{HeapKv, KvCache, Model, Step};

use crate::{ROUNDS, median};

const CHUNK: usize = 128;

fn prefill(model: &Model, kv: &mut dyn KvCache, from: usize, tokens: &[u32]) -> f64 {
    let started = Instant::now();
    for (at, chunk) in tokens.chunks(CHUNK).enumerate() {
        let position = from + at * CHUNK;
        let last = (at + 1) * CHUNK >= tokens.len();
        model.step(&mut [Step { tokens: chunk, position, kv: &mut *kv, logits: last }]).unwrap();
    }
    started.elapsed().as_secs_f64()
}

fn decode(model: &Model, tokens: &[u32], batch: usize) -> f64 {
    let mut kvs: Vec<_> = (0..batch).map(|_| HeapKv::new(model.geometry(), 400)).collect();
    for kv in &mut kvs {
        prefill(model, kv, 0, &tokens[..256]);
    }
    let started = Instant::now();
    for position in 256..288 {
        let steps = kvs.iter_mut().map(|kv| Step {
            tokens: &tokens[position..=position],
            position,
            kv,
            logits: true,
        });
        model.step(&mut steps.collect::<Vec<_>>()).unwrap();
    }
    32.0 * batch as f64 / started.elapsed().as_secs_f64()
}

pub(crate) fn run() {
    let Some(path) = keepwarm_engine::weights::cached() else {
        println!("skipped: there are no weights (keepwarm model fetch)");
        return;
    };
    let model = Model::load(&path).unwrap();
    let tokens: Vec<u32> = (0..2000).map(|n| 1000 + n * 7 % 20_000).collect();
    for context in [256, 1000, 2000] {
        let mut speeds = Vec::new();
        for _ in 0..3 {
            let mut kv = HeapKv::new(model.geometry(), context);
            speeds.push(context as f64 / prefill(&model, &mut kv, 0, &tokens[..context]));
        }
        println!("prefill of {context}: {:.0} tokens/s", median(speeds));
    }
    let (mut one, mut eight) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        one.push(decode(&model, &tokens, 1));
        eight.push(decode(&model, &tokens, 8));
    }
    let ratio = median(eight.iter().zip(&one).map(|(a, b)| a / b).collect());
    println!(
        "decode: one {:.0} tokens/s, eight together {:.0} tokens/s, ratio {ratio:.1}",
        median(one),
        median(eight)
    );
}
