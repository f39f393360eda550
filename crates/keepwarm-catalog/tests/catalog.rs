//! What is acknowledged is there after any end of the process, and what is wrong with a folder is said.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use keepwarm_catalog::{Catalog, CatalogSettings, OpenError, Sync, Transcript};
use keepwarm_core::registry::Member;
use keepwarm_core::session::{
    Form, Fp8, Layout, Manifest, Message, Number, Order, Part, PartState, Planes, Protect, Stamp, State,
    TranscriptDelta, WriteMemo,
};
use keepwarm_core::shard::{Record, TranscriptChange};
use keepwarm_types::{
    Birth, BlockChecksum, Bytes, ColdReason, Generation, Incarnation, Millis, PlacementSeq, Revision,
    SessionId, SessionKey, ShardCount, ShardId, Timestamp, Tokens, WriteId,
};
use proptest::prelude::{prop, proptest};
use uuid::Uuid;

fn settings(sync: Sync) -> CatalogSettings {
    CatalogSettings { cluster: "test".to_owned(), shards: ShardCount::new(4).unwrap(), sync }
}

fn key(n: u64) -> SessionKey {
    let id = SessionId::new(Uuid::from_u128(0x4000_8000_0000_0000_0000 | u128::from(n))).unwrap();
    SessionKey::new("acme".parse().unwrap(), id)
}

fn shard(key: &SessionKey) -> ShardId {
    settings(Sync::Always).shards.shard_of(key.id)
}

fn manifest(n: u64, revision: u64) -> Manifest {
    let planes = Planes { tokens_per_block: 16, planes: 60, plane_bytes_per_token: 384, order: Order::Plane };
    let cold = Some(Fp8 { from: Number::ALL[n as usize % 3] });
    let parts = vec![
        Part { name: "kv".parse().unwrap(), form: Form::Paged(planes), cold: None },
        Part { name: "w".parse().unwrap(), form: Form::Window { planes, window_tokens: 9 }, cold: None },
        Part { name: "s".parse().unwrap(), form: Form::Snapshot { bytes: 77 }, cold: None },
        Part { name: "b".parse().unwrap(), form: Form::Bytes { block_bytes: 1 << 20 }, cold: None },
        Part { name: "c".parse().unwrap(), form: Form::Paged(planes), cold },
    ];
    let states = (0..5).map(|p| PartState {
        length: Bytes(p * 1000),
        digest: Some(BlockChecksum([p, n])),
        ..PartState::default()
    });
    Manifest {
        key: key(n),
        birth: Birth::from_random(n),
        layout: Arc::new(Layout::new("model", "blake3:00", parts).unwrap()),
        protect: if n.is_multiple_of(2) { Protect::Forever } else { Protect::For(Millis(900_000)) },
        ttl: Some(Millis(n)),
        labels: [("user".into(), n.to_string().into())].into(),
        stamp: Stamp { generation: Generation(4), sequence: 9 },
        revision: Revision(revision),
        placement_seq: PlacementSeq(2),
        length_tokens: Tokens(0),
        parts: states.collect(),
        transcript_tokens: Tokens(0),
        transcript_messages: 0,
        transcript_revision: Revision(1),
        parent: None,
        branches: vec![key(n + 1).id],
        state: State::Cold(ColdReason::HoldersLost),
        holders: Arc::from([Member { node: "n1".parse().unwrap(), incarnation: Incarnation(1) }]),
        writes: vec![WriteMemo {
            id: WriteId(Uuid::from_u128(5)),
            asked: 1,
            revision: Revision(2),
            length_tokens: Tokens(3),
            length: Bytes(4),
        }],
        created_at: Timestamp(10),
        last_used_at: Timestamp(20),
    }
}

fn submit(catalog: &Catalog, records: Vec<Record>) {
    let (send, receive) = mpsc::channel();
    catalog.submit(records, Box::new(move |outcome| send.send(outcome.is_ok()).unwrap())).unwrap();
    assert!(receive.recv_timeout(Duration::from_secs(30)).unwrap(), "the records were not taken");
}

#[test]
fn manifests_and_tombstones_survive_a_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let (catalog, first) = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap();
    for n in 0..20 {
        submit(&catalog, vec![Record::Manifest(Arc::new(manifest(n, 7)), TranscriptChange::Keep)]);
    }
    let gone = manifest(3, 7);
    let (birth, revision, at) = (gone.birth, gone.revision, Timestamp(99));
    submit(
        &catalog,
        vec![Record::Tombstone { key: key(3), birth, revision, at, expired: true, stamp: Stamp::default() }],
    );
    drop(catalog);
    let (catalog, second) = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap();
    assert_eq!((second.incarnation.0, second.disk_id), (first.incarnation.0 + 1, first.disk_id));
    let mut found: Vec<_> = (0..4).flat_map(|s| catalog.manifests(ShardId(s)).unwrap()).collect();
    found.sort_by(|a, b| a.key.cmp(&b.key));
    let expected: Vec<_> = (0..20).filter(|n| *n != 3).map(|n| manifest(n, 7)).collect();
    assert_eq!(found, expected);
    let graves = catalog.tombstones(shard(&key(3))).unwrap();
    assert!(matches!(&graves[..], [(k, grave)] if *k == key(3) && grave.expired && grave.birth == birth));
    submit(&catalog, vec![Record::Forget(key(3))]);
    assert!(catalog.tombstones(shard(&key(3))).unwrap().is_empty());
}

proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
    #[test]
    fn transcripts_follow_their_deltas(steps in prop::collection::vec((0u64..3000, 0usize..2500), 1..8)) {
        let (catalog, _) = Catalog::ephemeral(&settings(Sync::Always)).unwrap();
        let mut model = Transcript::default();
        for (round, (keep, add)) in steps.into_iter().enumerate() {
            let keep = keep.min(model.tokens.len() as u64);
            let tokens: Vec<u32> = (0..add as u32).map(|n| n * 31 + round as u32).collect();
            model.tokens.truncate(keep as usize);
            model.tokens.extend(&tokens);
            model.messages.retain(|message| message.tokens_end.0 <= keep);
            let keep_messages = model.messages.len() as u32;
            let tokens_end = Tokens(model.tokens.len() as u64);
            let message = Message { role: "user".to_owned(), content: format!("round {round}"), tokens_end };
            model.messages.push(message.clone());
            let delta = TranscriptDelta { keep_tokens: Tokens(keep), keep_messages, tokens, messages: vec![message] };
            submit(&catalog, vec![Record::Manifest(Arc::new(manifest(1, 1)), TranscriptChange::Delta(delta))]);
            assert_eq!(catalog.transcript(&key(1), manifest(1, 1).birth).unwrap(), model);
        }
        let cut = Tokens(model.tokens.len() as u64 / 2);
        let child = Manifest { key: key(5), ..manifest(2, 0) };
        let copy = TranscriptChange::CopyFrom { parent: key(1), birth: manifest(1, 1).birth, stamp: Stamp::default(), tokens: cut, messages: u32::MAX };
        submit(&catalog, vec![Record::Manifest(Arc::new(child), copy)]);
        submit(&catalog, vec![Record::Manifest(Arc::new(manifest(1, 2)), TranscriptChange::CutTokens(cut))]);
        model.tokens.truncate(cut.as_usize());
        model.messages.retain(|message| message.tokens_end <= cut);
        assert_eq!(catalog.transcript(&key(1), manifest(1, 1).birth).unwrap(), model);
        assert_eq!(catalog.transcript(&key(5), manifest(2, 0).birth).unwrap(), model);
    }
}

#[test]
fn commits_under_load_are_grouped() {
    let (catalog, _) = Catalog::ephemeral(&settings(Sync::Always)).unwrap();
    let (send, receive) = mpsc::channel();
    for n in 0..2000 {
        let send = send.clone();
        let records = vec![Record::Manifest(Arc::new(manifest(n, 1)), TranscriptChange::Keep)];
        catalog.submit(records, Box::new(move |outcome| send.send(outcome.is_ok()).unwrap())).unwrap();
    }
    drop(send);
    assert!(receive.iter().take(2000).all(|taken| taken));
    let (transactions, submissions) = catalog.counts();
    assert!(
        submissions >= 2000 && transactions * 4 < submissions,
        "{transactions} transactions for {submissions}"
    );
}

#[test]
fn a_folder_in_use_of_others_or_newer_is_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (catalog, _) = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap();
    let error = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap_err();
    assert!(
        matches!(&error, OpenError::InUse { pid, .. } if *pid == std::process::id().to_string()),
        "{error}"
    );
    drop(catalog);
    let other = CatalogSettings { shards: ShardCount::new(8).unwrap(), ..settings(Sync::Always) };
    let error = Catalog::open(folder.path(), &other).unwrap_err();
    assert!(matches!(error, OpenError::OtherCluster { .. }) && error.to_string().contains("cluster.shards"));
    let file = folder.path().join("not-a-folder");
    std::fs::write(&file, "x").unwrap();
    assert!(matches!(Catalog::open(&file, &settings(Sync::Always)), Err(OpenError::NotAFolder(_))));
    {
        let table: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("meta");
        let database = redb::Database::create(folder.path().join("catalog.redb")).unwrap();
        let begin = database.begin_write().unwrap();
        begin.open_table(table).unwrap().insert("format", 99u64.to_le_bytes().as_slice()).unwrap();
        begin.commit().unwrap();
    }
    let error = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap_err();
    assert!(matches!(error, OpenError::Newer { found: 99, .. }), "{error}");
}

#[test]
fn a_torn_file_is_an_error_or_the_truth_never_a_panic() {
    let whole = tempfile::tempdir().unwrap();
    let (catalog, _) = Catalog::open(whole.path(), &settings(Sync::Always)).unwrap();
    for n in 0..200 {
        submit(&catalog, vec![Record::Manifest(Arc::new(manifest(n, 1)), TranscriptChange::Keep)]);
    }
    drop(catalog);
    let bytes = std::fs::read(whole.path().join("catalog.redb")).unwrap();
    for cut in [0, 1, 100, 4096, bytes.len() / 3, bytes.len() / 2, bytes.len() - 1] {
        let torn = tempfile::tempdir().unwrap();
        std::fs::write(torn.path().join("catalog.redb"), &bytes[..cut]).unwrap();
        std::fs::copy(whole.path().join("catalog.id"), torn.path().join("catalog.id")).unwrap();
        let Ok((catalog, _)) = Catalog::open(torn.path(), &settings(Sync::Always)) else { continue };
        let found: Result<Vec<_>, _> = (0..4).map(|s| catalog.manifests(ShardId(s))).collect();
        if let Ok(found) = found {
            let count: usize = found.iter().map(Vec::len).sum();
            assert!(count == 200, "cut at {cut} of {}: {count} sessions without an error", bytes.len());
        }
    }
}

#[test]
fn a_database_that_is_gone_empty_or_anothers_is_an_error_and_stays_one() {
    let folder = tempfile::tempdir().unwrap();
    let (catalog, _) = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap();
    submit(&catalog, vec![Record::Manifest(Arc::new(manifest(1, 1)), TranscriptChange::Keep)]);
    drop(catalog);
    let (file, kept) = (folder.path().join("catalog.redb"), folder.path().join("kept"));
    std::fs::rename(&file, &kept).unwrap();
    let other = tempfile::tempdir().unwrap();
    drop(Catalog::open(other.path(), &settings(Sync::Always)).unwrap());
    let damage: [&dyn Fn(); 4] = [
        &|| drop(std::fs::remove_file(&file)),
        &|| std::fs::write(&file, []).unwrap(),
        // What the database itself makes of nothing.
        &|| {
            std::fs::remove_file(&file).unwrap();
            drop(redb::Database::create(&file).unwrap());
        },
        &|| {
            std::fs::copy(other.path().join("catalog.redb"), &file).unwrap();
        },
    ];
    for damage in damage {
        damage();
        for _ in 0..2 {
            let error = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap_err();
            let told = error.to_string();
            assert!(matches!(error, OpenError::Damaged { .. }) && told.contains("restore it"), "{told}");
        }
    }
    std::fs::rename(&kept, &file).unwrap();
    let (catalog, _) = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap();
    assert_eq!((0..4).map(|s| catalog.manifests(ShardId(s)).unwrap().len()).sum::<usize>(), 1);
}

const CHILD: &str = "KEEPWARM_CATALOG_CHILD";
/// How many sessions the child writes in turn.
const SESSIONS: &str = "KEEPWARM_CATALOG_SESSIONS";

/// Not a test of its own: the process that the next tests start and kill.
#[test]
fn child_writes_until_it_is_killed() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    let (catalog, _) = Catalog::open(folder.as_ref(), &settings(Sync::Always)).unwrap();
    let sessions: u64 = std::env::var(SESSIONS).unwrap().parse().unwrap();
    let mut out = std::io::stdout();
    for round in 1.. {
        for n in 0..sessions {
            let record = Record::Manifest(Arc::new(manifest(n, round)), TranscriptChange::Keep);
            let (send, receive) = mpsc::channel();
            let taken = catalog.submit(
                vec![record],
                Box::new(move |outcome| {
                    let _ = send.send(outcome.is_ok());
                }),
            );
            if taken.is_err() || !receive.recv().unwrap() {
                writeln!(out, "refused").unwrap();
                return;
            }
            writeln!(out, "ack {n} {round}").unwrap();
            out.flush().unwrap();
        }
    }
}

fn child(folder: &std::path::Path, sessions: u64, limit: Option<u64>) -> std::process::Child {
    let binary = std::env::current_exe().unwrap();
    let line = format!(
        "{} '{}' --exact child_writes_until_it_is_killed --nocapture",
        limit.map_or("exec".to_owned(), |blocks| format!("trap '' XFSZ; ulimit -f {blocks}; exec")),
        binary.display()
    );
    Command::new("sh")
        .args(["-c", &line])
        .env(CHILD, folder)
        .env(SESSIONS, sessions.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

//= GUARANTEES.md#G1
#[test]
fn what_was_acknowledged_is_there_after_kill_minus_nine() {
    let folder = tempfile::tempdir().unwrap();
    for kill_after in [1, 5, 17, 40] {
        let mut child = child(folder.path(), 8, None);
        let mut acknowledged = [0u64; 8];
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for line in lines.map_while(Result::ok).filter(|line| line.starts_with("ack")).take(kill_after) {
            let mut words = line.split(' ').skip(1).map(|word| word.parse::<u64>().unwrap());
            let n = words.next().unwrap() as usize;
            acknowledged[n] = words.next().unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let (catalog, _) = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap();
        for (n, revision) in acknowledged.iter().enumerate().filter(|(_, revision)| **revision > 0) {
            let key = key(n as u64);
            let found = catalog
                .manifests(shard(&key))
                .unwrap()
                .into_iter()
                .find(|m| m.key == key)
                .expect("acknowledged and gone");
            assert!(found.revision.0 >= *revision, "acknowledged {revision}, found {}", found.revision.0);
        }
    }
}

#[test]
fn a_full_disk_refuses_and_keeps_what_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    // 512-byte blocks: some 4 MiB, enough to open and to write for a while.
    let mut child = child(folder.path(), 1_000_000, Some(8192));
    let mut acknowledged = 0;
    let mut refused = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
        acknowledged += usize::from(line.starts_with("ack"));
        refused |= line == "refused";
    }
    child.wait().unwrap();
    assert!(acknowledged > 0 && refused, "{acknowledged} acknowledged, refused: {refused}");
    let (catalog, _) = Catalog::open(folder.path(), &settings(Sync::Always)).unwrap();
    let found: usize = (0..4).map(|s| catalog.manifests(ShardId(s)).unwrap().len()).sum();
    assert!(found >= acknowledged, "{acknowledged} acknowledged, {found} found");
}
