//! Each verb once or more, with what it must answer and what must not change.

use keepwarm_types::{BlockChecksum, Bytes, ColdReason, Millis, Timestamp, Tokens, WriteId};
use uuid::Uuid;

use super::bench::{Bench, home, key, layout, lease, paged, settings, txn, written};
use crate::session::{Form, Fp8, Manifest, Number, Order, Part, Planes, State, TranscriptDelta};
use crate::shard::{
    Answer, Commit, Cut, Event, Fork, PersistError, Precondition, Record, Refusal, Shard, Turn, Verb,
    WriteMode, WritePlan,
};

fn one_part() -> (Bench, std::sync::Arc<crate::session::Layout>) {
    (Bench::new(), layout(vec![paged("kv", Order::Token)]))
}

fn manifest(bench: &mut Bench, n: u128) -> Manifest {
    match *bench.ask(&key(n), Verb::Get).unwrap() {
        Answer::Session { view, .. } => Manifest::clone(&view.manifest),
        other => panic!("not a session: {other:?}"),
    }
}

#[test]
fn creating_again_confirms_and_differing_conflicts() {
    let (mut bench, kv) = one_part();
    assert!(matches!(*bench.create(&key(1), &kv).unwrap(), Answer::Session { new: true, .. }));
    assert!(matches!(*bench.create(&key(1), &kv).unwrap(), Answer::Session { new: false, .. }));
    let other = layout(vec![paged("other", Order::Token)]);
    assert_eq!(bench.create(&key(1), &other).unwrap_err(), Refusal::LayoutMismatch);
}

#[test]
fn an_append_continues_a_part_full_tail_in_a_new_instance() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    let first = bench.append(&key(1), "kv", 0, 60).unwrap();
    assert_eq!((first.length_tokens, first.manifest.parts[0].blocks.len()), (Tokens(6), 2));
    let second = bench.append(&key(1), "kv", 6, 10).unwrap();
    assert_eq!(second.length_tokens, Tokens(7));
    let (old, new) = (&first.manifest.parts[0].blocks, &second.manifest.parts[0].blocks);
    assert_eq!(old[0], new[0], "the full block is shared");
    assert_ne!(old[1].instance, new[1].instance, "the tail is another instance");
    assert_eq!(new[1].length, 30);
    assert!(!bench.names.contains_key(&old[1].instance), "the old tail is let go");
}

#[test]
fn an_append_elsewhere_names_the_length() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    bench.append(&key(1), "kv", 0, 60).unwrap();
    match bench.append(&key(1), "kv", 4, 10).unwrap_err() {
        Refusal::OffsetMismatch { length_tokens, .. } => assert_eq!(length_tokens, Tokens(6)),
        other => panic!("{other:?}"),
    }
    assert!(matches!(bench.append(&key(1), "kv", u64::MAX, 10), Err(Refusal::OffsetMismatch { .. })));
    assert!(matches!(bench.append(&key(1), "kv", 6, 11), Err(Refusal::InvalidField { .. })), "half a token");
    assert!(matches!(bench.append(&key(1), "nope", 0, 10), Err(Refusal::UnknownPart(_))));
    assert!(matches!(bench.append(&key(2), "kv", 0, 10), Err(Refusal::UnknownSession)));
}

#[test]
fn a_plane_ordered_part_is_rewritten_from_a_block_boundary() {
    let mut bench = Bench::new();
    bench.create(&key(1), &layout(vec![paged("kv", Order::Plane)])).unwrap();
    bench.append(&key(1), "kv", 0, 60).unwrap();
    let rewritten = bench.append(&key(1), "kv", 4, 30).unwrap();
    assert_eq!(rewritten.length_tokens, Tokens(7));
    assert!(matches!(bench.append(&key(1), "kv", 5, 10), Err(Refusal::OffsetMismatch { .. })));
}

#[test]
fn two_writers_at_one_offset_get_one_yes() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    let mode = WriteMode::Append { offset: 0 };
    let plan = bench.plan(&key(1), "kv", mode, Precondition::default()).unwrap();
    let write = bench.laid("kv", mode, &plan, 40, None, Precondition::default());
    let other = bench.laid("kv", mode, &plan, 80, None, Precondition::default());
    let (first, second) = (bench.send(&key(1), Verb::Write(write)), bench.send(&key(1), Verb::Write(other)));
    bench.persist_all();
    assert!(written(bench.reply(first)).is_ok());
    assert!(matches!(bench.reply(second), Err(Refusal::OffsetMismatch { .. })));
    assert_eq!(bench.names.len(), 1, "only the winner's block is named");
}

#[test]
fn a_repeated_write_id_gets_the_first_answer() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    let precondition =
        Precondition { write_id: Some(WriteId(Uuid::from_u128(7))), ..Precondition::default() };
    let mode = WriteMode::Append { offset: 0 };
    let plan = bench.plan(&key(1), "kv", mode, precondition).unwrap();
    let write = bench.laid("kv", mode, &plan, 40, None, precondition);
    let first = written(bench.ask(&key(1), Verb::Write(write))).unwrap();
    bench.append(&key(1), "kv", 4, 40).unwrap();
    let again = bench.plan(&key(1), "kv", mode, precondition).unwrap().repeated.expect("the write was seen");
    assert_eq!((again.revision, again.length_tokens), (first.revision, Tokens(4)));
    let other = bench.laid("kv", WriteMode::Replace, &plan, 80, None, precondition);
    assert!(
        matches!(bench.ask(&key(1), Verb::Write(other)), Err(Refusal::Conflict(_))),
        "the id stands for other content"
    );
}

#[test]
fn two_parts_commit_together_or_not_at_all() {
    let mut bench = Bench::new();
    bench.create(&key(1), &layout(vec![paged("a", Order::Token), paged("b", Order::Token)])).unwrap();
    assert!(matches!(bench.append(&key(1), "a", 0, 40), Err(Refusal::Incomplete { .. })));
    let stage = |bench: &mut Bench, part: &str| {
        let mode = WriteMode::Append { offset: 0 };
        let plan = bench.plan(&key(1), part, mode, Precondition::default()).unwrap();
        let write = bench.laid(part, mode, &plan, 40, Some(txn(1)), Precondition::default());
        bench.ask(&key(1), Verb::Write(write)).unwrap();
    };
    let commit = |keep, tokens: &[u32]| {
        let delta = TranscriptDelta {
            keep_tokens: Tokens(keep),
            tokens: tokens.to_vec(),
            ..TranscriptDelta::default()
        };
        Verb::Commit(Commit {
            txn: txn(1),
            length_tokens: Tokens(4),
            transcript: Some(delta),
            precondition: Precondition::default(),
            asked: 1,
        })
    };
    stage(&mut bench, "a");
    match bench.ask(&key(1), commit(0, &[1, 2, 3, 4])).unwrap_err() {
        Refusal::Incomplete { part, have, need } => {
            assert_eq!((part.as_str(), have, need), ("b", Tokens(0), Tokens(4)))
        }
        other => panic!("{other:?}"),
    }
    stage(&mut bench, "b");
    let done = written(bench.ask(&key(1), commit(0, &[1, 2, 3, 4]))).unwrap();
    assert_eq!(
        (done.revision.0, done.length_tokens, done.manifest.transcript_tokens),
        (1, Tokens(4), Tokens(4))
    );
    assert!(
        matches!(bench.ask(&key(1), commit(3, &[])), Err(Refusal::InvalidField { .. })),
        "state needs a token each"
    );
    // The token that was sampled last is not state yet.
    let ahead = written(bench.ask(&key(1), commit(4, &[5]))).unwrap();
    assert_eq!((ahead.length_tokens, ahead.manifest.transcript_tokens), (Tokens(4), Tokens(5)));
}

#[test]
fn staged_bytes_expire() {
    let mut bench = Bench::new();
    bench.create(&key(1), &layout(vec![paged("a", Order::Token), paged("b", Order::Token)])).unwrap();
    let mode = WriteMode::Append { offset: 0 };
    let plan = bench.plan(&key(1), "a", mode, Precondition::default()).unwrap();
    let write = bench.laid("a", mode, &plan, 40, Some(txn(1)), Precondition::default());
    bench.ask(&key(1), Verb::Write(write)).unwrap();
    assert_eq!(bench.names.len(), 1);
    bench.ask(&key(1), Verb::Touch).unwrap();
    bench.now = bench.shard.next_deadline();
    while !bench.names.is_empty() {
        assert!(bench.shard.next_deadline() < Timestamp::NEVER, "the stage has no deadline");
        bench.now = bench.shard.next_deadline();
        bench.ask(&key(1), Verb::Touch).unwrap();
        bench.on(Event::Tick);
    }
}

#[test]
fn a_lease_shuts_out_others_until_it_ends() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    let activate = |n| Verb::Activate { lease: lease(n), ttl: Millis(5000), home: home() };
    bench.ask(&key(1), activate(1)).unwrap();
    assert!(matches!(bench.ask(&key(1), activate(2)), Err(Refusal::Leased { .. })));
    assert!(matches!(bench.append(&key(1), "kv", 0, 40), Err(Refusal::Leased { .. })));
    assert_eq!(bench.ask(&key(1), Verb::Release { lease: lease(9) }).unwrap_err(), Refusal::LeaseExpired);
    bench.now = bench.now + Millis(6000);
    bench.append(&key(1), "kv", 0, 40).unwrap();
    assert_eq!(
        bench.ask(&key(1), Verb::Renew { lease: lease(1), ttl: Millis(10) }).unwrap_err(),
        Refusal::LeaseExpired
    );
    assert!(
        matches!(*bench.ask(&key(1), activate(3)).unwrap(), Answer::Lease(grant) if grant.epoch().0 > 2 << 40)
    );
}

#[test]
fn a_turn_commits_the_transcript_and_a_checkpoint_brings_the_state() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    bench.ask(&key(1), Verb::Activate { lease: lease(1), ttl: Millis(5000), home: home() }).unwrap();
    let turn = |keep, tokens: &[u32]| {
        let transcript = TranscriptDelta {
            keep_tokens: Tokens(keep),
            tokens: tokens.to_vec(),
            ..TranscriptDelta::default()
        };
        Verb::Turn(Turn { lease: lease(1), transcript })
    };
    bench.ask(&key(1), turn(0, &[1, 2, 3, 4, 5])).unwrap();
    bench.ask(&key(1), Verb::Release { lease: lease(1) }).unwrap();
    assert_eq!(bench.append(&key(1), "kv", 0, 50).unwrap().length_tokens, Tokens(5));
    assert!(
        matches!(bench.append(&key(1), "kv", 5, 10), Err(Refusal::Conflict(_))),
        "state beyond the transcript"
    );
    bench.ask(&key(1), Verb::Activate { lease: lease(1), ttl: Millis(5000), home: home() }).unwrap();
    let replaced = written(bench.ask(&key(1), turn(4, &[9]))).unwrap();
    assert_eq!((replaced.manifest.transcript_tokens, replaced.length_tokens), (Tokens(5), Tokens(4)));
    assert_eq!(replaced.manifest.transcript_revision, replaced.revision);
    assert_eq!(bench.names.len(), 1, "the block behind the cut is let go");
}

#[test]
fn going_cold_keeps_the_manifest_and_frees_the_blocks() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    let birth = bench.append(&key(1), "kv", 0, 60).unwrap().birth;
    let cool = |force| Verb::GoCold { birth, reason: ColdReason::Evicted, force };
    assert!(matches!(bench.ask(&key(1), cool(false)), Err(Refusal::Conflict(_))), "still protected");
    bench.now = bench.now + Millis(1500);
    bench.ask(&key(1), cool(false)).unwrap();
    assert!(bench.names.is_empty());
    let cold = manifest(&mut bench, 1);
    assert_eq!(
        (cold.state, cold.length_tokens, cold.revision.0),
        (State::Cold(ColdReason::Evicted), Tokens(6), 1)
    );
    let read = bench.ask(&key(1), Verb::Read { part: "kv".to_owned() }).unwrap_err();
    assert_eq!(read, Refusal::Cold { reason: ColdReason::Evicted });
    assert!(matches!(bench.append(&key(1), "kv", 6, 10), Err(Refusal::Cold { .. })));
    assert_eq!(
        bench.append(&key(1), "kv", 0, 20).unwrap().length_tokens,
        Tokens(2),
        "warm again, from nothing"
    );
}

#[test]
fn a_fork_shares_whole_blocks_and_outlives_its_parent() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    bench.append(&key(1), "kv", 0, 100).unwrap();
    let fork = |child: u128, length| {
        let fork = Fork {
            child: key(child).id,
            birth: keepwarm_types::Birth::from_random(99),
            length,
            labels: None,
            keep_messages: None,
            branch: false,
            lease: None,
        };
        Verb::Fork(fork)
    };
    assert!(matches!(
        *bench.ask(&key(1), fork(2, None)).unwrap(),
        Answer::Session { new: true, clipped: false, .. }
    ));
    assert!(matches!(
        *bench.ask(&key(1), fork(3, Some(Tokens(6)))).unwrap(),
        Answer::Session { clipped: true, .. }
    ));
    assert_eq!(manifest(&mut bench, 3).length_tokens, Tokens(4));
    bench.ask(&key(1), Verb::Delete).unwrap();
    assert_eq!(manifest(&mut bench, 2).length_tokens, Tokens(10));
    assert_eq!(bench.names.len(), 3);
    bench.append(&key(2), "kv", 10, 10).unwrap();
    bench.ask(&key(2), Verb::Delete).unwrap();
    bench.ask(&key(3), Verb::Delete).unwrap();
    assert!(bench.names.is_empty());
}

#[test]
fn truncation_keeps_whole_blocks_and_says_clipped() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    bench.append(&key(1), "kv", 0, 100).unwrap();
    let cut = |n| Verb::Truncate { cut: Cut::Tokens(Tokens(n)), precondition: Precondition::default() };
    assert!(matches!(*bench.ask(&key(1), cut(6)).unwrap(), Answer::Session { clipped: true, .. }));
    assert_eq!(manifest(&mut bench, 1).length_tokens, Tokens(4));
    assert!(matches!(bench.ask(&key(1), cut(5)), Err(Refusal::InvalidField { .. })));
}

#[test]
fn a_window_lets_old_blocks_go() {
    let mut bench = Bench::new();
    let Form::Paged(planes) = paged("w", Order::Token).form else { unreachable!() };
    let part =
        Part { name: "w".parse().unwrap(), form: Form::Window { planes, window_tokens: 5 }, cold: None };
    bench.create(&key(1), &layout(vec![part])).unwrap();
    let done = bench.append(&key(1), "w", 0, 140).unwrap();
    let state = &done.manifest.parts[0];
    assert_eq!((state.first_block, state.blocks.len(), done.length_tokens), (2, 2, Tokens(14)));
    assert_eq!(bench.names.len(), 2);
    assert_eq!(bench.append(&key(1), "w", 14, 20).unwrap().length_tokens, Tokens(16));
}

#[test]
fn a_snapshot_is_replaced_whole() {
    let mut bench = Bench::new();
    let part = Part { name: "s".parse().unwrap(), form: Form::Snapshot { bytes: 50 }, cold: None };
    bench.create(&key(1), &layout(vec![part])).unwrap();
    assert!(matches!(bench.append(&key(1), "s", 0, 50), Err(Refusal::InvalidField { .. })));
    let plan = bench.plan(&key(1), "s", WriteMode::Replace, Precondition::default()).unwrap();
    for (bytes, fits) in [(49, false), (50, true), (50, true)] {
        let write = bench.laid("s", WriteMode::Replace, &plan, bytes, None, Precondition::default());
        assert_eq!(bench.ask(&key(1), Verb::Write(write)).is_ok(), fits, "{bytes} bytes");
    }
    assert_eq!(bench.names.len(), 1);
}

#[test]
fn a_lossy_part_is_named_by_its_stored_blocks_and_measured_by_its_raw_bytes() {
    let mut bench = Bench::new();
    let planes = Planes { tokens_per_block: 4, planes: 2, plane_bytes_per_token: 8, order: Order::Plane };
    let cold = Some(Fp8 { from: Number::F16 });
    let part = Part { name: "kv".parse().unwrap(), form: Form::Paged(planes), cold };
    bench.create(&key(1), &layout(vec![part.clone()])).unwrap();
    // 10 tokens of 16 bytes: two full blocks of 8 + 32, and 2 tokens in 8 + 16.
    let done = bench.append(&key(1), "kv", 0, 160).unwrap();
    assert_eq!((done.length, done.length_tokens), (Bytes(160), Tokens(10)));
    let lengths: Vec<_> = done.manifest.instances().map(|block| block.length).collect();
    assert_eq!(lengths, [40, 40, 24]);
    assert_eq!((done.manifest.stored_bytes(), done.manifest.raw_bytes()), (Bytes(104), Bytes(160)));
    // A tail that is rounded already is written anew, never added to.
    let inside = bench.append(&key(1), "kv", 10, 16).unwrap_err();
    assert!(matches!(&inside, Refusal::InvalidField { field, .. } if field == "offset"), "{inside:?}");
    let done = bench.append(&key(1), "kv", 8, 48).unwrap();
    assert_eq!((done.length, done.manifest.stored_bytes()), (Bytes(176), Bytes(40 + 40 + 8 + 24)));
    // Blocks of raw lengths are not this part's, and a digest would be that of other bytes.
    let mode = WriteMode::Append { offset: 12 };
    assert!(matches!(
        bench.plan(&key(1), "kv", mode, Precondition::default()),
        Err(Refusal::OffsetMismatch { .. })
    ));
    let plan = bench.plan(&key(1), "kv", WriteMode::Replace, Precondition::default()).unwrap();
    let exact = WritePlan { part: Part { cold: None, ..part }, ..plan.clone() };
    let raw = bench.laid("kv", WriteMode::Replace, &exact, 64, None, Precondition::default());
    let refused = bench.ask(&key(1), Verb::Write(raw)).unwrap_err();
    assert!(matches!(&refused, Refusal::InvalidField { field, .. } if field == "body"), "{refused:?}");
    let mut whole = bench.laid("kv", WriteMode::Replace, &plan, 64, None, Precondition::default());
    whole.digest = Some(BlockChecksum::from_u128(7));
    let done = written(bench.ask(&key(1), Verb::Write(whole))).unwrap();
    assert_eq!((done.length, done.manifest.parts[0].digest), (Bytes(64), None));
    // Cuts are whole blocks, whatever a block's length is.
    bench.append(&key(1), "kv", 4, 96).unwrap();
    let cut = Verb::Truncate { cut: Cut::Tokens(Tokens(9)), precondition: Precondition::default() };
    bench.ask(&key(1), cut).unwrap();
    let cut = manifest(&mut bench, 1);
    assert_eq!((cut.length_tokens, cut.stored_bytes(), cut.raw_bytes()), (Tokens(8), Bytes(80), Bytes(128)));
}

#[test]
fn an_ended_session_says_how_it_ended_for_a_day() {
    let (mut bench, kv) = one_part();
    for n in [1, 2] {
        bench.create(&key(n), &kv).unwrap();
    }
    assert!(matches!(*bench.ask(&key(1), Verb::Delete).unwrap(), Answer::Deleted(_)));
    assert!(matches!(bench.ask(&key(1), Verb::Get), Err(Refusal::Deleted { .. })));
    assert!(matches!(bench.create(&key(1), &kv), Err(Refusal::Deleted { .. })));
    bench.now = bench.now + Millis(61_000);
    bench.on(Event::Tick);
    bench.persist_all();
    assert!(matches!(bench.ask(&key(2), Verb::Get), Err(Refusal::Expired { .. })));
    bench.now = bench.now + Millis::from_secs(86_500);
    bench.on(Event::Tick);
    bench.persist_all();
    for n in [1, 2] {
        assert_eq!(bench.ask(&key(n), Verb::Get).unwrap_err(), Refusal::UnknownSession);
    }
}

#[test]
fn a_write_that_the_disk_refused_never_was() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    let mode = WriteMode::Append { offset: 0 };
    let plan = bench.plan(&key(1), "kv", mode, Precondition::default()).unwrap();
    let write = bench.laid("kv", mode, &plan, 40, None, Precondition::default());
    let id = bench.send(&key(1), Verb::Write(write));
    bench.fail_one(PersistError::NotApplied);
    assert!(matches!(bench.reply(id), Err(Refusal::Unavailable(_))));
    assert!(bench.names.is_empty());
    assert_eq!(manifest(&mut bench, 1).revision.0, 0);
}

//= GUARANTEES.md#G3
#[test]
fn a_write_of_unknown_outcome_is_never_answered_no() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    let mode = WriteMode::Append { offset: 0 };
    let plan = bench.plan(&key(1), "kv", mode, Precondition::default()).unwrap();
    let write = bench.laid("kv", mode, &plan, 40, None, Precondition::default());
    let id = bench.send(&key(1), Verb::Write(write));
    bench.fail_one(PersistError::Unknown);
    assert_eq!(bench.reply(id).unwrap_err(), Refusal::OutcomeUnknown);
    assert!(
        matches!(bench.append(&key(1), "kv", 0, 10), Err(Refusal::Unavailable(_))),
        "its revision is not reused"
    );
    bench.now = bench.now + Millis(1000);
    bench.on(Event::Tick);
    let Some((_, records)) = bench.catalog.front() else { panic!("it is tried again") };
    assert!(matches!(&records[..], [Record::Manifest(manifest, _)] if manifest.revision.0 == 1));
    bench.persist_all();
    assert_eq!(manifest(&mut bench, 1).length_tokens, Tokens(4));
}

#[test]
fn after_a_restart_sessions_are_cold_and_leases_newer() {
    let (mut bench, kv) = one_part();
    bench.create(&key(1), &kv).unwrap();
    bench.append(&key(1), "kv", 0, 60).unwrap();
    bench.create(&key(2), &kv).unwrap();
    let manifests = vec![manifest(&mut bench, 1), manifest(&mut bench, 2)];
    let mut shard = Shard::recover(settings(), bench.now, manifests, []);
    shard.validate();
    std::mem::swap(&mut bench.shard, &mut shard);
    let back = manifest(&mut bench, 1);
    assert_eq!((back.state, back.length_tokens), (State::Cold(ColdReason::Restarted), Tokens(6)));
    assert_eq!(manifest(&mut bench, 2).state, State::Warm, "an empty session has nothing to lose");
}
