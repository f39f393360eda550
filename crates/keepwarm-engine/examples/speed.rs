//! Tokens per second of the built-in engine: `cargo run --release -p keepwarm-engine --example speed`.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that prints figures")]

use std::time::Instant;

use keepwarm_engine::model::{HeapKv, Model, Step};

fn main() {
    let Some(path) = keepwarm_engine::weights::cached() else {
        println!("no weights: run `keepwarm model fetch` first");
        return;
    };
    let started = Instant::now();
    let model = Model::load(&path).unwrap();
    println!("load {:.2} s", started.elapsed().as_secs_f64());
    let tokens: Vec<u32> = (0..2048).map(|n| 1000 + n * 7 % 20_000).collect();
    for context in [256, 1000, 2000] {
        let mut kv = HeapKv::new(model.geometry(), context + 1);
        let started = Instant::now();
        for (at, chunk) in tokens[..context].chunks(128).enumerate() {
            model
                .step(&mut [Step { tokens: chunk, position: at * 128, kv: &mut kv, logits: false }])
                .unwrap();
        }
        println!("prefill {context}: {:.0} tokens/s", context as f64 / started.elapsed().as_secs_f64());
    }
    for batch in [1, 8] {
        let mut kvs: Vec<_> = (0..batch).map(|_| HeapKv::new(model.geometry(), 600)).collect();
        for kv in &mut kvs {
            model.step(&mut [Step { tokens: &tokens[..256], position: 0, kv, logits: false }]).unwrap();
        }
        let started = Instant::now();
        for position in 256..320 {
            let steps = kvs.iter_mut().map(|kv| Step {
                tokens: &tokens[position..=position],
                position,
                kv,
                logits: true,
            });
            model.step(&mut steps.collect::<Vec<_>>()).unwrap();
        }
        println!(
            "decode of {batch}: {:.0} tokens/s",
            64.0 * f64::from(batch) / started.elapsed().as_secs_f64()
        );
    }
}
