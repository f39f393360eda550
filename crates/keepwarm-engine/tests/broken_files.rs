//! Model files that are cut short or damaged anywhere are errors with the file's name, never panics.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{Value, ValueType, write};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use keepwarm_engine::model::Model;
use proptest::prelude::{any, prop, proptest};
use proptest::test_runner::Config;

/// A small GGUF file with values of every shape in its header.
fn file(architecture: &str) -> Vec<u8> {
    let tensor = Tensor::zeros((8, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
    let tensor = QTensor::quantize(&tensor, GgmlDType::Q4_1).unwrap();
    let words = ["<s>", "a", "b"].map(|word| Value::String(word.to_owned()));
    let metadata = [
        ("general.architecture", Value::String(architecture.to_owned())),
        ("general.alignment", Value::U32(32)),
        ("llama.embedding_length", Value::U32(32)),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.block_count", Value::U64(1)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("tokenizer.ggml.tokens", Value::Array(words.to_vec())),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
    ];
    assert_eq!(metadata[6].1.value_type(), ValueType::Array);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let mut bytes = Cursor::new(Vec::new());
    write(&mut bytes, &metadata, &[("token_embd.weight", &tensor)]).unwrap();
    bytes.into_inner()
}

/// What loading it says; it is never a model.
fn refused(folder: &Path, bytes: &[u8]) -> String {
    let path = folder.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    match Model::load(&path) {
        Ok(_) => panic!("it was loaded"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_file_that_is_cut_short_or_of_another_kind_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let whole = file("llama");
    let said = refused(folder.path(), &whole[..whole.len() - 40]);
    assert!(said.contains("model.gguf") && said.contains("cut short"), "{said}");
    assert!(refused(folder.path(), &file("mamba")).contains("'mamba'"));
    assert!(refused(folder.path(), b"PK\x03\x04 a zip").contains("GGUF"));
    for length in 0..whole.len() {
        assert!(refused(folder.path(), &whole[..length]).contains("model.gguf"), "cut after {length} bytes");
    }
}

proptest! {
    #![proptest_config(Config { cases: 3_000, failure_persistence: None, ..Config::default() })]

    #[test]
    fn a_damaged_file_is_an_error(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = file("llama");
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        assert!(refused(folder.path(), &bytes).contains("model.gguf"));
    }

    /// Lengths are where damage hurts most: each is eight bytes.
    #[test]
    fn an_absurd_length_is_an_error(at in any::<prop::sample::Index>(), length in any::<u64>(), shift in 0u32..64) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = file("llama");
        let at = at.index(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&(length >> shift).to_le_bytes());
        assert!(refused(folder.path(), &bytes).contains("model.gguf"));
    }
}
