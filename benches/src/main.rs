//! Benchmarks, each with its peer or limit in the same run: `cargo xtask bench [NAME ...]`.
//!
//! Rounds of the two sides alternate, so that a machine whose speed drifts is fair to both; the figures are
//! medians, the ratios medians of the rounds' ratios.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a program that prints figures and may fail"
)]

mod brain;
mod engine;
mod gpu;
mod parts;
mod peers;
mod redis_tls;
mod registry;
mod restore;
mod resume;
mod steady;
mod takeover;

/// Rounds of each side.
pub(crate) const ROUNDS: usize = 5;

/// The middle value.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

type Bench = (&'static str, fn());

const BENCHES: [Bench; 10] = [
    ("parts", parts::run),
    ("restore", restore::run),
    ("engine", engine::run),
    ("resume", resume::run),
    ("core", brain::run),
    ("steady", steady::run),
    ("registry", registry::run),
    ("peers", peers::run),
    ("takeover", takeover::run),
    ("gpu", gpu::run),
];

fn main() {
    if peers::is_child() {
        return peers::child();
    }
    let names: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = names.iter().find(|name| BENCHES.iter().all(|(known, _)| known != name)) {
        let known: Vec<_> = BENCHES.iter().map(|(name, _)| *name).collect();
        println!("there is no bench '{unknown}'; there is: {}", known.join(", "));
        std::process::exit(2);
    }
    for (name, bench) in BENCHES {
        if names.is_empty() || names.iter().any(|wanted| wanted == name) {
            println!("\n== {name}");
            bench();
        }
    }
}
