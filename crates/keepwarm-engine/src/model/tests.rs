use std::path::PathBuf;

use proptest::prelude::{ProptestConfig, prop, proptest};

use super::{CHUNK_TOKENS_MAX, HeapKv, KvCache, LoadError, Model, Step};

/// Feeds tokens in chunks and gives the last logits.
fn feed(model: &Model, kv: &mut dyn KvCache, from: usize, tokens: &[u32], cuts: &[usize]) -> Vec<f32> {
    let (mut at, mut last) = (0, Vec::new());
    for cut in cuts.iter().cycle() {
        let end = (at + (*cut).min(CHUNK_TOKENS_MAX)).min(tokens.len());
        let step =
            Step { tokens: &tokens[at..end], position: from + at, kv: &mut *kv, logits: end == tokens.len() };
        last = model.step(&mut [step]).unwrap().pop().unwrap().unwrap_or_default();
        at = end;
        if at == tokens.len() {
            return last;
        }
    }
    last
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn chunks_do_not_change_a_bit(tokens in prop::collection::vec(0u32..256, 2..400), cuts in prop::collection::vec(1usize..90, 1..6)) {
        let model = Model::tiny(7);
        let mut whole = HeapKv::new(model.geometry(), tokens.len());
        let mut cut = HeapKv::new(model.geometry(), tokens.len());
        let expected = feed(&model, &mut whole, 0, &tokens, &[CHUNK_TOKENS_MAX]);
        assert!(same(&expected, &feed(&model, &mut cut, 0, &tokens, &cuts)), "logits differ");
        for block in 0..tokens.len() / 16 {
            for plane in 0..4 {
                assert_eq!(whole.plane(block, plane), cut.plane(block, plane), "state differs");
            }
        }
    }

    #[test]
    fn a_batch_of_n_is_n_singles(prompts in prop::collection::vec(prop::collection::vec(0u32..256, 1..60), 2..9)) {
        let model = Model::tiny(8);
        let single: Vec<Vec<f32>> = prompts.iter().map(|prompt| {
            let mut kv = HeapKv::new(model.geometry(), 64);
            feed(&model, &mut kv, 0, prompt, &[CHUNK_TOKENS_MAX])
        }).collect();
        let mut kvs: Vec<_> = prompts.iter().map(|_| HeapKv::new(model.geometry(), 64)).collect();
        let mut steps: Vec<_> = prompts.iter().zip(&mut kvs)
            .map(|(prompt, kv)| Step { tokens: prompt, position: 0, kv, logits: true }).collect();
        for (alone, together) in single.iter().zip(model.step(&mut steps).unwrap()) {
            assert!(same(alone, &together.unwrap()));
        }
    }
}

#[test]
fn impossible_steps_are_errors() {
    let model = Model::tiny(1);
    let mut kv = HeapKv::new(model.geometry(), 16);
    for (tokens, position) in [(&[][..], 0), (&[9999][..], 0), (&[1][..], 1 << 20)] {
        assert!(model.step(&mut [Step { tokens, position, kv: &mut kv, logits: true }]).is_err());
    }
}

#[test]
fn files_that_are_no_models_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    assert!(matches!(Model::load(&path), Err(LoadError::Io { .. })));
    std::fs::write(&path, b"not a model at all").unwrap();
    assert!(matches!(Model::load(&path), Err(LoadError::Broken { .. })));
    if let Some(real) = crate::tests_model() {
        let bytes = std::fs::read(real).unwrap();
        for cut in [100, 2_000_000, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let error = Model::load(&path).unwrap_err();
            assert!(matches!(error, LoadError::Broken { .. }), "cut at {cut}: {error}");
        }
    }
}

#[test]
fn the_real_model_knows_what_comes_next_and_chunks_do_not_change_it() {
    let Some(path): Option<PathBuf> = crate::tests_model() else { return };
    let model = Model::load(&path).unwrap();
    let text = "The capital of France is";
    let tokens = model.tokenizer().encode(text).unwrap();
    let mut kv = HeapKv::new(model.geometry(), 64);
    let logits = feed(&model, &mut kv, 0, &tokens, &[CHUNK_TOKENS_MAX]);
    let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
    assert_eq!(model.tokenizer().decode(&[best as u32]), " Paris");
    let mut cut = HeapKv::new(model.geometry(), 64);
    assert!(same(&logits, &feed(&model, &mut cut, 0, &tokens, &[1, 2])), "decode and prefill differ");
}
