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
    held(revision, &["n1", "n2"])
}

fn held(revision: u64, holders: &[&str]) -> Outcome {
    Outcome::Written { revision, holders: names(holders), full: holders.len() >= REPLICATION }
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn kill(nodes: &[&str], (begin, end): (u64, u64)) -> Kill {
    Kill { nodes: names(nodes), begin: at(begin), end: at(end) }
}

fn no() -> Outcome {
    Outcome::No { stale: false, why: "503".to_owned() }
}

fn stale() -> Outcome {
    Outcome::No { stale: true, why: "412".to_owned() }
}

fn gone(reason: &str) -> Outcome {
    Outcome::Cold(reason.to_owned())
}

fn unknown() -> Outcome {
    Outcome::Unknown("gone".to_owned())
}

fn read(time: (u64, u64), revision: u64, writes: &[u64]) -> Record {
    let runs = writes.iter().map(|write| run(*write)).collect();
    record("reader", Op::Read, time, Outcome::Bytes { revision, runs })
}

fn look(time: (u64, u64), revision: u64) -> Record {
    record("reader", Op::Look, time, Outcome::Seen { revision, cold: None })
}

fn look_cold(time: (u64, u64), revision: u64) -> Record {
    record("reader", Op::Look, time, Outcome::Seen { revision, cold: Some("restarted".to_owned()) })
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
        look((121, 122), 4),
    ]
}

fn promises(history: &[Record]) -> Vec<Promise> {
    check(history, &[]).into_iter().map(|violation| violation.promise).collect()
}

/// The good history with one thing changed breaks this promise, and others only as these follow from it.
#[track_caller]
fn breaks_and(promise: Promise, following: &[Promise], change: impl FnOnce(&mut Vec<Record>)) {
    let mut history = good();
    change(&mut history);
    let found = check(&history, &[]);
    let fits = |violation: &Violation| violation.promise == promise || following.contains(&violation.promise);
    assert!(found.iter().all(fits), "{found:#?}");
    assert!(
        found.iter().any(|violation| violation.promise == promise),
        "{promise:?} was not noticed: {found:#?}"
    );
}

/// The good history with one thing changed breaks exactly this promise.
#[track_caller]
fn breaks(promise: Promise, change: impl FnOnce(&mut Vec<Record>)) {
    breaks_and(promise, &[], change);
}

#[test]
fn a_good_history_breaks_nothing() {
    assert_eq!(promises(&good()), []);
    assert_eq!(promises(&[]), []);
}

#[test]
fn an_acknowledged_revision_that_is_gone_is_lost() {
    breaks(Promise::Lost, |history| history.push(look((130, 131), 3)));
    breaks(Promise::Lost, |history| history.push(read((130, 131), 3, &[1, 2, 4])));
    let missing = Outcome::Missing("404".to_owned());
    breaks(Promise::Lost, |history| history.push(record("reader", Op::Read, (130, 131), missing)));
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
    // Nobody read the bytes, but the revision that it would be was seen.
    breaks(Promise::AppliedNo, |history| {
        history[4] = append(2, 4, (60, 70), no());
        history[6] = look((81, 90), 3);
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
    // What was acknowledged as the third revision is then missed by who sees the second.
    let also = [Promise::Lost];
    breaks_and(Promise::TwoContents, &also, |history| history[2] = append(1, 2, (20, 30), ok(3)));
}

#[test]
fn a_repeated_write_has_its_first_answer() {
    let mut history = good();
    history.insert(5, append(2, 4, (71, 72), ok(3)));
    history.push(append(2, 4, (140, 141), ok(3)));
    assert_eq!(promises(&history), []);
    let another = |history: &mut Vec<Record>| history.insert(5, append(2, 4, (71, 72), ok(7)));
    breaks_and(Promise::TwoContents, &[Promise::Lost], another);
    breaks(Promise::Repeated, |history| history.insert(5, append(2, 4, (71, 72), stale())));
    // That it is another write's revision is no first answer of its own.
    let mut history = good();
    history.insert(5, append(2, 6, (71, 72), stale()));
    assert_eq!(promises(&history), []);
}

#[test]
fn a_revision_that_nobody_wrote_is_told() {
    breaks(Promise::Strange, |history| history.push(look((130, 131), 5)));
}

#[test]
fn bytes_may_be_gone_only_after_their_holders_were_killed() {
    breaks(Promise::Cold, |history| history.push(look_cold((130, 131), 4)));
    breaks(Promise::Cold, |history| history.push(record("reader", Op::Read, (130, 131), gone("restarted"))));
    let mut history = good();
    history.push(look_cold((130, 131), 4));
    let cold = |kills: &[Kill]| check(&history, kills).len();
    assert_eq!(cold(&[kill(&["n1", "n2", "n3"], (124, 125))]), 0);
    assert_eq!(cold(&[kill(&["n1"], (122, 123)), kill(&["n2"], (124, 125))]), 0);
    assert_eq!(cold(&[kill(&["n1", "n3"], (124, 125))]), 1, "n2 had them");
    assert_eq!(cold(&[kill(&["n1", "n2"], (132, 133))]), 1, "they were killed later");
    assert_eq!(cold(&[kill(&["n1", "n2"], (90, 95))]), 1, "they were killed before the last write");
    // A write of fewer copies goes with these.
    history[7] = put(3, 5, (100, 110), held(4, &["n1"]));
    assert_eq!(check(&history, &[kill(&["n1"], (124, 125))]), []);
}

#[test]
fn a_repeated_acknowledgement_says_nothing_of_bytes_that_have_gone_since() {
    let mut history = good();
    history[7] = put(3, 5, (100, 110), unknown());
    history.push(put(3, 5, (122, 128), ok(4)));
    history.push(look_cold((130, 131), 4));
    assert_eq!(check(&history, &[kill(&["n1", "n2"], (121, 121))]), []);
}

#[test]
fn bytes_are_gone_for_a_reason_and_their_revision_is_there() {
    let all = [kill(&["n1", "n2", "n3"], (124, 125))];
    let mut history = good();
    history.push(look_cold((140, 141), 3));
    assert_eq!(check(&history, &all)[0].promise, Promise::Lost);
    history[10] = record("reader", Op::Read, (130, 131), gone("evicted"));
    assert_eq!(check(&history, &all)[0].promise, Promise::Cold);
}

#[test]
fn too_few_copies_are_not_called_full() {
    let few = Outcome::Written { revision: 1, holders: names(&["n1"]), full: true };
    breaks(Promise::Copies, |history| history[0] = put(0, 1, (0, 10), few));
}

#[test]
fn violations_are_told_in_the_order_of_time_whatever_their_session() {
    let broken = |session: u128, end: u64| Record {
        session: Uuid::from_u128(session),
        ..record("reader", Op::Look, (end - 1, end), Outcome::Broken("500".to_owned()))
    };
    let found = check(&[broken(9, 10), broken(1, 20), broken(9, 30), broken(1, 40)], &[]);
    assert_eq!(found.iter().map(|violation| violation.at_ms).collect::<Vec<_>>(), [10, 20, 30, 40]);
}

#[test]
fn an_answer_without_a_promise_is_told() {
    let broken = Outcome::Broken("404 unknown_session".to_owned());
    breaks(Promise::Strange, |history| history.push(record("reader", Op::Look, (130, 131), broken)));
}
