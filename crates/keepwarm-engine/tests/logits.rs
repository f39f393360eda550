//! Logits against another implementation's on the same file: `candle-transformers`' quantised Llama.
//!
//! Its matrix products are told to work on dequantised weights (`CANDLE_DEQUANTIZE_ALL`), as ours do; with its
//! own quantised products its activations are rounded to 8 bits, which is another model. The variable is read
//! from the environment, so the comparison runs in a process of its own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and shows its figures"
)]

use std::fs::File;
use std::path::Path;
use std::process::Command;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use keepwarm_engine::model::{HeapKv, Model, Step};

const TEXT: &str = "The tide rises twice a day because the moon pulls at the nearer sea more than at the earth, \
    and at the earth more than at the farther sea. Newton explained it in 1687; Laplace made it a matter of waves.";
/// Lengths of the prefixes that are compared; each is computed anew.
const PREFIXES: [usize; 5] = [1, 2, 9, 31, 48];
/// Tokens that are then decoded one by one on both sides.
const DECODED: usize = 16;
/// Largest difference of a logit. Logits reach about 30, 0.0103 was seen; the keys and values here are f16 (11 bits), there f32.
const TOLERANCE: f32 = 0.03;
const CHILD: &str = "KEEPWARM_LOGITS_CHILD";

fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap()
}

fn theirs(model: &mut ModelWeights, tokens: &[u32], position: usize) -> Vec<f32> {
    let input = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.forward(&input, position).unwrap().squeeze(0).unwrap().to_vec1().unwrap()
}

fn ours(model: &Model, kv: &mut HeapKv, tokens: &[u32], position: usize) -> Vec<f32> {
    model.step(&mut [Step { tokens, position, kv, logits: true }]).unwrap().remove(0).unwrap()
}

fn compare(at: &str, ours: &[f32], theirs: &[f32]) -> f32 {
    let largest = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!(
        "{at}: largest difference {largest:.4}, likeliest token {} and {}",
        argmax(ours),
        argmax(theirs)
    );
    assert!(largest < TOLERANCE, "{at}: a logit differs by {largest}");
    largest
}

fn child(path: &Path) {
    let model = Model::load(path).unwrap();
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut other = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let tokens = model.tokenizer().encode(TEXT).unwrap();
    assert!(tokens.len() >= PREFIXES[4], "{} tokens", tokens.len());
    for length in PREFIXES {
        let mut kv = HeapKv::new(model.geometry(), length + DECODED);
        let mine = ours(&model, &mut kv, &tokens[..length], 0);
        let mut logits = theirs(&mut other, &tokens[..length], 0);
        compare(&format!("prefix of {length}"), &mine, &logits);
        if length == PREFIXES[4] {
            for step in 0..DECODED {
                let token = argmax(&logits) as u32;
                let position = length + step;
                let mine = ours(&model, &mut kv, &[token], position);
                logits = theirs(&mut other, &[token], position);
                compare(&format!("decoded {}", step + 1), &mine, &logits);
                assert_eq!(argmax(&mine), argmax(&logits), "greedy decoding parts after {} tokens", step + 1);
            }
        }
    }
}

#[test]
fn logits_are_those_of_another_implementation() {
    let Some(path) = keepwarm_engine::weights::cached() else {
        println!("skipped: there are no weights (keepwarm model fetch)");
        return;
    };
    if std::env::var_os(CHILD).is_some() {
        return child(&path);
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "logits_are_those_of_another_implementation", "--nocapture"])
        .env(CHILD, "1")
        .env("CANDLE_DEQUANTIZE_ALL", "1")
        .status()
        .unwrap();
    assert!(status.success(), "the comparison failed: see above");
}
