//! Histories that are good, and such that are bad in one way each: the checker tells them apart.

use super::*;

fn id() -> Uuid {
    Uuid::from_u128(7)
}

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn run(write: u64) -> Run {
    Run { write, cells: write + 1 }
}

fn record(client: &str, op: Op, (begin, end): (u64, u64), outcome: Outcome) -> Record {
    let (client, node) = (client.to_owned(), "n1".to_owned());
    Record { client, node, session: id(), op, begin: at(begin), end: at(end), outcome }
}

fn put(base: u64, write: u64, time: (u64, u64), outcome: Outcome) -> Record {
    record("writer", Op::Put { base, run: run(write) }, time, outcome)
}

fn append(base: u64, write: u64, time: (u64, u64), outcome: Outcome) -> Record {
    record("writer", Op::Append { base, run: run(write) }, time, outcome)
}

fn ok(revision: u64) -> Outcome {
    Outcome::Written { revision }
}

fn no() -> Outcome {
    Outcome::No("503".to_owned())
}

fn unknown() -> Outcome {
    Outcome::Unknown("gone".to_owned())
}

fn read(time: (u64, u64), revision: u64, writes: &[u64]) -> Record {
    let runs = writes.iter().map(|write| run(*write)).collect();
    record("reader", Op::Read, time, Outcome::Bytes { revision, runs })
}

fn look(time: (u64, u64), revision: u64, cold: bool) -> Record {
    record("reader", Op::Look, time, Outcome::Seen { revision, cold })
}

/// A put, an append, a "no", an unclear write that was applied, and readers that fit.
fn good() -> Vec<Record> {
    vec![
        put(0, 1, (0, 10), ok(1)),
        read((11, 12), 1, &[1]),
        append(1, 2, (20, 30), ok(2)),
        append(2, 3, (40, 50), no()),
        append(2, 4, (60, 70), unknown()),
        read((65, 80), 2, &[1, 2]),
        read((81, 90), 3, &[1, 2, 4]),
        put(3, 5, (100, 110), ok(4)),
        read((105, 120), 4, &[5]),
        look((121, 122), 4, false),
    ]
}

fn promises(history: &[Record]) -> Vec<Promise> {
    check(history, None).into_iter().map(|violation| violation.promise).collect()
}

/// The good history with one thing changed breaks exactly this promise.
#[track_caller]
fn breaks(promise: Promise, change: impl FnOnce(&mut Vec<Record>)) {
    let mut history = good();
    change(&mut history);
    let found = check(&history, None);
    assert!(found.iter().all(|violation| violation.promise == promise), "{found:#?}");
    assert!(!found.is_empty(), "{promise:?} was not noticed");
}

#[test]
fn a_good_history_breaks_nothing() {
    assert_eq!(promises(&good()), []);
    assert_eq!(promises(&[]), []);
}

#[test]
fn an_acknowledged_revision_that_is_gone_is_lost() {
    breaks(Promise::Lost, |history| history.push(look((130, 131), 3, false)));
    breaks(Promise::Lost, |history| history.push(read((130, 131), 3, &[1, 2, 4])));
}

#[test]
fn a_read_that_overlaps_the_acknowledgement_may_have_either() {
    let mut history = good();
    history.push(read((109, 140), 3, &[1, 2, 4]));
    assert_eq!(promises(&history), []);
}

#[test]
fn an_unacknowledged_revision_that_was_seen_does_not_go_back() {
    breaks(Promise::WentBack, |history| history.insert(7, read((91, 95), 2, &[1, 2])));
}

#[test]
fn bytes_of_two_revisions_are_mixed() {
    let changes: [fn(&mut Vec<Record>); 4] = [
        // An append upon a replacement that came after it.
        |history| history[8] = read((105, 120), 4, &[1, 5]),
        // A write is missing in the middle.
        |history| history[6] = read((81, 90), 3, &[1, 4]),
        // A write that nobody made.
        |history| history[6] = read((81, 90), 3, &[1, 2, 99]),
        // Half of a write.
        |history| {
            let runs = vec![run(1), run(2), Run { write: 4, cells: 2 }];
            history[6] = record("reader", Op::Read, (81, 90), Outcome::Bytes { revision: 3, runs });
        },
    ];
    for change in changes {
        let mut history = good();
        change(&mut history);
        let found = promises(&history);
        assert!(found.iter().any(|promise| *promise == Promise::Mixed || *promise == Promise::TwoContents));
    }
    breaks(Promise::Mixed, |history| history[8] = read((105, 120), 4, &[1, 5]));
}

#[test]
fn a_no_that_was_applied_is_told() {
    breaks(Promise::AppliedNo, |history| {
        history[4] = append(2, 4, (60, 70), no());
    });
    // Sent twice, once without an answer: it may be there.
    let mut history = good();
    history.insert(5, append(2, 4, (71, 72), no()));
    assert_eq!(promises(&history), []);
}

#[test]
fn a_revision_has_one_content() {
    breaks(Promise::TwoContents, |history| {
        history.insert(5, append(2, 6, (71, 72), unknown()));
        history.push(read((81, 95), 3, &[1, 2, 6]));
    });
    breaks(Promise::TwoContents, |history| history[2] = append(1, 2, (20, 30), ok(3)));
}

#[test]
fn a_repeated_write_has_its_first_answer() {
    let mut history = good();
    history.insert(5, append(2, 4, (71, 72), ok(3)));
    history.push(append(2, 4, (140, 141), ok(3)));
    assert_eq!(promises(&history), []);
    breaks(Promise::TwoContents, |history| history.insert(5, append(2, 4, (71, 72), ok(7))));
}

#[test]
fn bytes_may_be_gone_only_after_all_nodes_were_killed() {
    breaks(Promise::Cold, |history| history.push(look((130, 131), 4, true)));
    breaks(Promise::Cold, |history| history.push(record("reader", Op::Read, (130, 131), Outcome::Cold)));
    let mut history = good();
    history.push(look((130, 131), 4, true));
    assert_eq!(check(&history, Some(at(125))), []);
    assert_eq!(check(&history, Some(at(132))).len(), 1);
    // Even then the revision is there.
    history.push(look((140, 141), 3, true));
    assert_eq!(check(&history, Some(at(125)))[0].promise, Promise::Lost);
}

#[test]
fn an_answer_without_a_promise_is_told() {
    let broken = Outcome::Broken("404 unknown_session".to_owned());
    breaks(Promise::Strange, |history| history.push(record("reader", Op::Look, (130, 131), broken)));
}
