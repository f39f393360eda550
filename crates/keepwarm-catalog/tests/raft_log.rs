//! The registry's log: what was acknowledged is there again, and what is wrong with it is said.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use keepwarm_catalog::{
    Catalog, CatalogSettings, LogError, LogStep, OpenError, RaftLog, ReadError, Slot, Sync,
};
use keepwarm_types::ShardCount;

const FILE: &str = "registry.redb";
const DEADLINE: Duration = Duration::from_secs(20);

fn settings() -> CatalogSettings {
    CatalogSettings { cluster: "test".to_owned(), shards: ShardCount::new(4).unwrap(), sync: Sync::Always }
}

fn open(folder: &Path) -> Result<RaftLog, OpenError> {
    Catalog::open(folder, &settings()).unwrap().0.raft_log()
}

fn write(log: &RaftLog, steps: Vec<LogStep>) -> Result<(), LogError> {
    let (done, outcome) = mpsc::channel();
    log.submit(steps, Box::new(move |result| done.send(result).unwrap()));
    outcome.recv_timeout(DEADLINE).unwrap()
}

fn append(range: std::ops::Range<u64>) -> LogStep {
    LogStep::Append(range.map(|index| (index, format!("entry {index}").into_bytes())).collect())
}

fn indices(log: &RaftLog) -> Vec<u64> {
    log.entries(0..u64::MAX).unwrap().into_iter().map(|(index, _)| index).collect()
}

#[test]
fn what_was_acknowledged_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path()).unwrap();
    write(&log, vec![append(0..10), LogStep::Put(Slot::Vote, b"vote".to_vec())]).unwrap();
    write(&log, vec![LogStep::TruncateFrom(8), LogStep::PurgeTo(2)]).unwrap();
    write(&log, vec![append(8..9), LogStep::Put(Slot::Committed, b"seven".to_vec())]).unwrap();
    log.close();
    let log = open(folder.path()).unwrap();
    assert_eq!(indices(&log), [3, 4, 5, 6, 7, 8]);
    assert_eq!(log.entries(4..6).unwrap(), [(4, b"entry 4".to_vec()), (5, b"entry 5".to_vec())]);
    assert_eq!(log.value(Slot::Vote).unwrap(), Some(b"vote".to_vec()));
    assert_eq!(log.value(Slot::Committed).unwrap(), Some(b"seven".to_vec()));
    assert_eq!(log.value(Slot::Snapshot).unwrap(), None);
}

#[test]
fn steps_are_written_in_the_order_of_their_submission() {
    let log = RaftLog::ephemeral().unwrap();
    for round in 0..200u64 {
        log.submit(vec![append(round..round + 3)], Box::new(drop));
        log.submit(vec![LogStep::TruncateFrom(round + 1)], Box::new(drop));
    }
    write(&log, vec![append(200..201)]).unwrap();
    assert_eq!(indices(&log), (0..=200).collect::<Vec<_>>());
}

#[test]
fn a_closed_log_takes_nothing_and_gives_the_folder_back() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path()).unwrap();
    log.clone().close();
    assert_eq!(write(&log, vec![append(0..1)]), Err(LogError::Failed));
    assert!(log.entries(0..1).is_err());
    open(folder.path()).unwrap();
}

#[test]
fn the_log_keeps_the_folders_lock() {
    let folder = tempfile::tempdir().unwrap();
    let _log = open(folder.path()).unwrap();
    let again = Catalog::open(folder.path(), &settings());
    assert!(matches!(again, Err(OpenError::InUse { .. })));
}

#[test]
fn a_full_disk_is_said_and_nothing_is_taken_afterwards() {
    let log = RaftLog::limited(4 << 20).unwrap();
    let big = |index| LogStep::Append(vec![(index, vec![7; 256 << 10])]);
    let failed = (0..64).find_map(|index| write(&log, vec![big(index)]).err()).unwrap();
    assert!(matches!(&failed, LogError::Write(_)), "{failed}");
    assert!(failed.to_string().contains("free space"), "{failed}");
    assert_eq!(write(&log, vec![append(0..1)]), Err(LogError::Failed));
}

#[test]
fn a_log_that_is_gone_or_of_another_folder_is_refused() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    open(one.path()).unwrap().close();
    open(other.path()).unwrap().close();
    fs::copy(other.path().join(FILE), one.path().join(FILE)).unwrap();
    let error = open(one.path()).unwrap_err().to_string();
    assert!(error.contains("another data_dir"), "{error}");
    fs::remove_file(one.path().join(FILE)).unwrap();
    let error = open(one.path()).unwrap_err().to_string();
    assert!(error.contains("votes"), "a node that forgot them must not vote again: {error}");
}

#[test]
fn a_damaged_entry_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path()).unwrap();
    let marker = b"a value that can be found in the file";
    write(&log, vec![LogStep::Append(vec![(41, marker.to_vec()), (42, marker.to_vec())])]).unwrap();
    log.close();
    let path = folder.path().join(FILE);
    let mut bytes = fs::read(&path).unwrap();
    let places: Vec<_> =
        (0..bytes.len() - marker.len()).filter(|at| bytes[*at..].starts_with(marker)).collect();
    for at in places {
        bytes[at + 5] ^= 1;
    }
    fs::write(&path, bytes).unwrap();
    // The database may notice first, at the start; else the entry's own sum does.
    match open(folder.path()) {
        Err(OpenError::Damaged { path: named, .. }) => assert_eq!(named, path),
        Err(other) => panic!("{other}"),
        Ok(log) => {
            let error = log.entries(0..u64::MAX).unwrap_err();
            assert!(matches!(&error, ReadError::Damaged(what) if what.contains("entry 41")), "{error}");
        }
    }
}

#[test]
fn a_file_cut_short_is_refused_or_whole_and_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path()).unwrap();
    write(&log, vec![append(0..500)]).unwrap();
    log.close();
    let path = folder.path().join(FILE);
    let whole = fs::read(&path).unwrap();
    for cut in [0, 100, 4096, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..cut]).unwrap();
        match open(folder.path()) {
            Ok(log) => {
                let found = indices(&log);
                assert_eq!(found, (0..500).collect::<Vec<_>>(), "{cut} bytes");
                log.close();
            }
            Err(OpenError::Damaged { .. }) => {}
            Err(other) => panic!("{cut} bytes: {other}"),
        }
    }
}

/// Not a test of its own: the process that the next one kills.
#[test]
fn writer_that_is_killed() {
    let Ok(folder) = std::env::var("KEEPWARM_TEST_LOG") else { return };
    let log = open(Path::new(&folder)).unwrap();
    let mut out = std::io::stdout();
    for index in 0.. {
        write(&log, vec![append(index..index + 1), LogStep::Put(Slot::Vote, index.to_le_bytes().to_vec())])
            .unwrap();
        writeln!(out, "\nacknowledged {index}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    for stop in [3, 40] {
        let _ = fs::remove_dir_all(folder.path());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writer_that_is_killed", "--exact", "--nocapture"])
            .env("KEEPWARM_TEST_LOG", folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let acknowledged = lines
            .map_while(Result::ok)
            .filter_map(|line| line.strip_prefix("acknowledged ").and_then(|n| n.parse::<u64>().ok()))
            .find(|index| *index >= stop)
            .unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let log = open(folder.path()).unwrap();
        let found = indices(&log);
        assert!(found.len() as u64 > acknowledged, "{acknowledged} acknowledged, {found:?}");
        assert_eq!(found, (0..found.len() as u64).collect::<Vec<_>>(), "without a hole");
        let vote = u64::from_le_bytes(log.value(Slot::Vote).unwrap().unwrap().try_into().unwrap());
        assert_eq!(vote + 1, found.len() as u64, "one transaction, one outcome");
    }
}
