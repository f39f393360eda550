//! Messages of version 1 as its first encoder wrote them: they are written and read the same for as long as that
//! version is spoken.

use std::fmt::Write;

use keepwarm_core::registry::{Fitness, HealthReport, Member, Unheard};
use keepwarm_types::Millis;
use openraft::{CommittedLeaderId, EntryPayload, LogId, Membership, SnapshotMeta, StoredMembership, Vote};

use super::*;
use crate::codec::domain::{RawDelta, RawReport};
use crate::codec::raft::{RawLogEntry, RawVote};
use crate::raft_types::{LogEntry, Proposal, RaftPeer};

/// One message a line: its name, then all of it in hexadecimal.
const KEPT: &str = include_str!("version-1.txt");
const CLUSTER: u128 = 0xfeed;

fn log_id(index: u64) -> LogId<u64> {
    LogId::new(CommittedLeaderId::new(3, 7), index)
}

fn membership() -> Membership<u64, RaftPeer> {
    let peer = |n: u16| RaftPeer { name: Some(name(n)), disk: Uuid::from_u128(n.into()) };
    Membership::new(vec![[7, 8].into()], std::collections::BTreeMap::from([(7, peer(1)), (8, peer(2))]))
}

fn delta() -> RawDelta {
    let mut registry = Registry::new(settings());
    for n in 1..=2 {
        registry.apply(&Entry::Register { registration: registration(n), at: Timestamp(1) });
    }
    registry.apply(&Entry::Assign(vec![(ShardId(1), vec![name(2), name(1)]), (ShardId(2), vec![name(1)])]));
    (&registry.delta_since(0)).into()
}

fn requests() -> Vec<(String, Request)> {
    let entry = |index, payload| RawLogEntry::from(&LogEntry { log_id: log_id(index), payload });
    let log = vec![
        entry(4, EntryPayload::Blank),
        entry(5, EntryPayload::Normal(Proposal(Arc::new(entries().remove(1))))),
        entry(6, EntryPayload::Membership(membership())),
    ];
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(6)),
        last_membership: StoredMembership::new(Some(log_id(6)), membership()),
        snapshot_id: "s-6".to_owned(),
    };
    let vote = || RawVote::from(&Vote::new_committed(3, 7));
    let (prev, commit) = (Some((&log_id(3)).into()), Some((&log_id(2)).into()));
    let unheard = vec![Unheard { node: name(2), incarnation: Incarnation(2), silent: Millis(900) }];
    let report = HealthReport { unheard, ..HealthReport::well(name(1), Incarnation(1)) };
    let named = [
        ("append", Request::Append { to: 8, vote: vote(), prev, entries: log, commit }),
        ("vote", Request::Vote { to: 8, vote: RawVote::from(&Vote::new(4, 7)), last: None }),
        ("snapshot", Request::Snapshot { to: 8, vote: vote(), meta: (&meta).into(), bytes: vec![1, 2, 3] }),
        ("confirm", Request::Confirm { wait_ms: 70 }),
        ("report", Request::Report(RawReport::from(&report))),
        ("follow", Request::Follow { since: 9, wait_ms: 70 }),
        ("probe", Request::Probe),
        ("join", Request::Join { node: "n1".to_owned(), disk: 11 }),
    ];
    let proposed = entries().into_iter().enumerate().map(|(at, entry)| {
        (format!("propose-{at}"), Request::Propose { entry: (&entry).into(), wait_ms: 70 })
    });
    named.into_iter().map(|(name, request)| (name.to_owned(), request)).chain(proposed).collect()
}

fn answers() -> Vec<(String, Answer)> {
    let vote = || RawVote::from(&Vote::new_committed(3, 7));
    let voted = Answer::Voted { vote: vote(), granted: true, last: Some((&log_id(6)).into()) };
    let named = [
        ("appended", Answer::Appended),
        ("appended-part", Answer::AppendedPart(Some((&log_id(5)).into()))),
        ("conflict", Answer::Conflict),
        ("higher-vote", Answer::HigherVote(vote())),
        ("voted", voted),
        ("installed", Answer::Installed(vote())),
        ("confirmed", Answer::Confirmed(12)),
        ("not-leader", Answer::NotLeader(Some("n2".to_owned()))),
        ("unavailable", Answer::Unavailable("later".to_owned())),
        ("unknown", Answer::Unknown),
        ("taken", Answer::Taken),
        ("delta", Answer::Delta { delta: delta(), leader: Some("n1".to_owned()) }),
        ("probed", Answer::Probed { disk: 11, in_cluster: true }),
        ("joined", Answer::Joined { votes: false }),
        ("refused", Answer::Refused("no".to_owned())),
    ];
    let applied = responses()
        .into_iter()
        .enumerate()
        .map(|(at, response)| (format!("applied-{at}"), Answer::Applied(RawResponse::from(&response))));
    named.into_iter().map(|(name, answer)| (name.to_owned(), answer)).chain(applied).collect()
}

fn kept(name: &str) -> Vec<u8> {
    let hex = KEPT.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap();
    let byte = |hex: &[u8]| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap();
    hex.as_bytes().chunks(2).map(byte).collect()
}

fn line(name: &str, bytes: &[u8]) -> String {
    let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    });
    format!("{name} {hex}")
}

/// Every message in a version, as lines.
fn written(version: Version) -> Vec<String> {
    let requests =
        requests().into_iter().map(|(name, request)| line(&name, &request.encode(CLUSTER, version)));
    let answers = answers().into_iter().map(|(name, answer)| line(&name, &answer.encode(CLUSTER, version)));
    requests.chain(answers).collect()
}

#[test]
fn version_1_is_written_byte_for_byte_as_it_was() {
    let one = versions().find(|version| version.number() == 1).unwrap();
    assert_eq!(written(one), KEPT.lines().collect::<Vec<_>>());
}

#[test]
fn version_2_is_version_1_but_for_its_number() {
    let two = versions().find(|version| version.number() == 2).unwrap();
    let renumbered: Vec<_> = KEPT.lines().map(|line| line.replacen(" 0100", " 0200", 1)).collect();
    assert_eq!(written(two), renumbered);
}

#[test]
fn both_versions_are_read_as_they_were_meant() {
    for number in [1, 2] {
        let kept = |name: &str| {
            let mut bytes = kept(name);
            bytes[0] = number;
            bytes
        };
        for (name, meant) in requests() {
            assert_eq!(Request::decode(CLUSTER, &kept(&name)), Ok(meant), "{name}");
        }
        for (name, meant) in answers() {
            assert_eq!(Answer::decode(CLUSTER, &kept(&name)), Ok(meant), "{name}");
        }
    }
}

#[test]
fn what_a_node_can_do_is_said_to_those_who_read_it() {
    let fitness = Fitness { leads: false, learns: true };
    let well = HealthReport::well(name(1), Incarnation(1));
    let slow = vec![Member { node: name(2), incarnation: Incarnation(7) }];
    let ceded = vec![ShardId(3)];
    let report = HealthReport { slow, fitness, ceded, ..well.clone() };
    for version in versions() {
        let request = Request::report(&report, version);
        let read = Request::decode(CLUSTER, &request.encode(CLUSTER, version)).unwrap();
        match (version.number(), read) {
            (1, Request::Report(raw)) => {
                assert_eq!(HealthReport::try_from(raw), Ok(well.clone()));
            }
            (2, Request::Standing { report: raw, leads: false, learns: true, slow, ceded }) => {
                assert_eq!((raw, slow), (RawReport::from(&report), vec![("n2".to_owned(), 7)]));
                assert_eq!(ceded, [3]);
            }
            other => panic!("{other:?}"),
        }
    }
}
