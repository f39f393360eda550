//! Who is declared failed, and who is the odd one.

use keepwarm_types::{Incarnation, Millis, NodeName, ShardId, Timestamp};

use super::{by_primaries, cluster, down, name, primaries, register, settle};
use crate::registry::{
    Change, Conditions, Detector, DetectorEvent, DetectorSettings, Entry, Finding, Fitness, HealthReport,
    Member, Refused, Registry, Response, Unheard, plan_under,
};

const SUSPECT: Millis = Millis(400);

fn detector() -> Detector {
    Detector::new(DetectorSettings::default(), Timestamp(0))
}

fn incarnation(registry: &Registry, n: u16) -> Incarnation {
    registry.node(&name(n)).unwrap().incarnation
}

fn report(registry: &Registry, from: u16, unheard: &[(u16, Millis)]) -> DetectorEvent<'static> {
    let unheard = unheard
        .iter()
        .map(|(n, silent)| Unheard {
            node: name(*n),
            incarnation: incarnation(registry, *n),
            silent: *silent,
        })
        .collect();
    let from_incarnation = incarnation(registry, from);
    DetectorEvent::Report(HealthReport { unheard, ..HealthReport::well(name(from), from_incarnation) })
}

fn told(detector: &mut Detector, now: u64, registry: &Registry, reports: &[(u16, &[(u16, Millis)])]) {
    for (from, unheard) in reports {
        assert_eq!(detector.on(Timestamp(now), report(registry, *from, unheard)), []);
    }
}

fn tick(detector: &mut Detector, now: u64, registry: &Registry) -> Vec<Finding> {
    detector.on(Timestamp(now), DetectorEvent::Tick(registry))
}

fn failed(registry: &Registry, n: u16, observers: &[u16]) -> Finding {
    let observers: Vec<NodeName> = observers.iter().map(|n| name(*n)).collect();
    Finding::Failed(Entry::Down { node: name(n), incarnation: incarnation(registry, n), observers })
}

#[test]
fn two_that_do_not_hear_a_node_declare_it_once() {
    let mut registry = cluster(3, 4, 2);
    let mut detector = detector();
    told(&mut detector, 10, &registry, &[(1, &[(3, SUSPECT)]), (2, &[(3, SUSPECT)])]);
    let found = tick(&mut detector, 20, &registry);
    assert_eq!(found, [failed(&registry, 3, &[1, 2])]);
    told(&mut detector, 30, &registry, &[(1, &[(3, Millis(450))]), (2, &[(3, Millis(450))])]);
    assert_eq!(tick(&mut detector, 40, &registry), [], "never twice");
    let Finding::Failed(entry) = &found[0] else { panic!("{found:?}") };
    assert_eq!(registry.apply(entry).response, Response::Done);
    assert_eq!(tick(&mut detector, 50, &registry), []);
}

#[test]
fn what_was_certainly_not_applied_is_found_again() {
    let registry = cluster(3, 4, 2);
    let mut detector = detector();
    told(&mut detector, 10, &registry, &[(1, &[(3, SUSPECT)]), (2, &[(3, SUSPECT)])]);
    assert_eq!(tick(&mut detector, 20, &registry).len(), 1);
    let again = DetectorEvent::NotApplied { node: name(3), incarnation: incarnation(&registry, 3) };
    assert_eq!(detector.on(Timestamp(30), again), []);
    assert_eq!(tick(&mut detector, 40, &registry), [failed(&registry, 3, &[1, 2])]);
}

#[test]
fn one_is_never_enough_though_others_are_down() {
    let mut registry = cluster(3, 4, 2);
    let mut detector = detector();
    told(&mut detector, 10, &registry, &[(1, &[(3, SUSPECT)]), (2, &[])]);
    assert_eq!(tick(&mut detector, 400, &registry), [], "the other one hears it");
    down(&mut registry, 2, &[1, 3]);
    told(&mut detector, 410, &registry, &[(1, &[(3, SUSPECT)])]);
    assert_eq!(tick(&mut detector, 420, &registry), [], "it may be the one that is cut off");
    let alone =
        Entry::Down { node: name(3), incarnation: incarnation(&registry, 3), observers: vec![name(1)] };
    assert_eq!(registry.apply(&alone).response, Response::Refused(Refused::Evidence(name(3))));
}

#[test]
fn of_two_nodes_the_other_one_is_enough() {
    let registry = cluster(2, 4, 1);
    let mut detector = detector();
    told(&mut detector, 10, &registry, &[(1, &[(2, SUSPECT)])]);
    assert_eq!(tick(&mut detector, 20, &registry), [failed(&registry, 2, &[1])]);
}

//= GUARANTEES.md#G10
#[test]
fn a_last_copy_that_is_heard_again_returns_once() {
    let mut registry = cluster(3, 1, 1);
    let set = registry.set(ShardId(0)).unwrap();
    let number = |node: &NodeName| node.as_str()[1..].parse::<u16>().unwrap();
    let (gone, last) = (number(&set.replicas[0].node), number(&set.replicas[1].node));
    let third = 6 - gone - last;
    down(&mut registry, gone, &[last, third]);
    register(&mut registry, gone, gone.into());
    down(&mut registry, last, &[gone, third]);
    let mut detector = detector();
    let missed: &[(u16, Millis)] = &[(last, SUSPECT)];
    told(&mut detector, 10, &registry, &[(gone, missed), (third, missed)]);
    assert_eq!(tick(&mut detector, 20, &registry), [], "it is still away");
    told(&mut detector, 30, &registry, &[(gone, missed), (third, &[]), (last, &[])]);
    assert_eq!(tick(&mut detector, 40, &registry), [], "somebody does not hear it");
    told(&mut detector, 50, &registry, &[(gone, &[]), (third, &[]), (last, &[])]);
    let entry = Entry::Return { node: name(last), incarnation: incarnation(&registry, last) };
    assert_eq!(tick(&mut detector, 60, &registry), [Finding::Returned(entry.clone())]);
    assert_eq!(tick(&mut detector, 70, &registry), [], "said once");
    let (node, process) = (name(last), incarnation(&registry, last));
    detector.on(Timestamp(80), DetectorEvent::NotApplied { node, incarnation: process });
    assert_eq!(tick(&mut detector, 90, &registry), [Finding::Returned(entry.clone())]);
    assert_eq!(registry.apply(&entry).response, Response::Done);
    told(&mut detector, 100, &registry, &[(gone, missed), (third, missed), (last, &[])]);
    let (first, second) = (gone.min(third), gone.max(third));
    assert_eq!(
        tick(&mut detector, 110, &registry),
        [failed(&registry, last, &[first, second])],
        "it may fail again"
    );
}

#[test]
fn stale_reports_early_suspicions_and_old_incarnations_do_not_count() {
    let mut registry = cluster(3, 4, 2);
    let mut detector = detector();
    told(&mut detector, 10, &registry, &[(1, &[(3, SUSPECT)])]);
    told(&mut detector, 320, &registry, &[(2, &[(3, SUSPECT)])]);
    assert_eq!(tick(&mut detector, 330, &registry), [], "the first is 320 ms old");
    told(&mut detector, 340, &registry, &[(1, &[(3, Millis(399))]), (2, &[(3, SUSPECT)])]);
    assert_eq!(tick(&mut detector, 350, &registry), [], "unheard for too short a time");
    let old = report(&registry, 1, &[(3, SUSPECT)]);
    let accused = report(&registry, 2, &[(3, SUSPECT)]);
    register(&mut registry, 1, 1);
    detector.on(Timestamp(360), old);
    detector.on(Timestamp(360), accused);
    assert_eq!(tick(&mut detector, 370, &registry), [], "the reporter is another process now");
    let accused: Vec<_> = [1, 2].map(|from| report(&registry, from, &[(3, SUSPECT)])).into();
    register(&mut registry, 3, 3);
    for report in accused {
        detector.on(Timestamp(380), report);
    }
    assert_eq!(tick(&mut detector, 390, &registry), [], "the accused is another process now");
}

#[test]
fn a_late_report_of_an_old_process_does_not_replace_a_new_ones() {
    let mut registry = cluster(3, 4, 2);
    let mut detector = detector();
    let old = report(&registry, 1, &[]);
    register(&mut registry, 1, 1);
    told(&mut detector, 10, &registry, &[(1, &[(3, SUSPECT)]), (2, &[(3, SUSPECT)])]);
    detector.on(Timestamp(20), old);
    assert_eq!(tick(&mut detector, 30, &registry), [failed(&registry, 3, &[1, 2])]);
}

#[test]
fn a_new_leader_waits_for_one_fresh_round() {
    let registry = cluster(5, 4, 2);
    let mut detector = Detector::new(DetectorSettings::default(), Timestamp(1000));
    told(&mut detector, 1010, &registry, &[(1, &[(5, SUSPECT)]), (2, &[(5, SUSPECT)])]);
    assert_eq!(tick(&mut detector, 1020, &registry), [], "3 and 4 have not spoken yet");
    told(&mut detector, 1030, &registry, &[(3, &[(5, SUSPECT)]), (4, &[])]);
    assert_eq!(tick(&mut detector, 1040, &registry), [failed(&registry, 5, &[1, 2, 3])]);
    let mut silent = Detector::new(DetectorSettings::default(), Timestamp(1000));
    told(&mut silent, 1290, &registry, &[(1, &[(5, SUSPECT)]), (2, &[(5, SUSPECT)])]);
    assert_eq!(tick(&mut silent, 1299, &registry), []);
    assert_eq!(tick(&mut silent, 1300, &registry), [failed(&registry, 5, &[1, 2])], "they had the time to");
}

#[test]
fn an_accuser_alone_is_the_odd_one_and_loses_the_lead_where_it_needs_the_accused() {
    let registry = cluster(3, 16, 2);
    let mut detector = detector();
    let long = Millis(1000);
    told(&mut detector, 10, &registry, &[(1, &[(3, Millis(999))]), (2, &[]), (3, &[])]);
    assert_eq!(tick(&mut detector, 20, &registry), [], "others may be about to say the same");
    told(&mut detector, 30, &registry, &[(1, &[(3, long)]), (2, &[]), (3, &[])]);
    let isolated = Finding::Isolated { accuser: name(1), accused: name(3) };
    assert_eq!(tick(&mut detector, 40, &registry), std::slice::from_ref(&isolated));
    told(&mut detector, 50, &registry, &[(1, &[(3, long)]), (2, &[]), (3, &[])]);
    assert_eq!(tick(&mut detector, 60, &registry), [], "said once");
    told(&mut detector, 70, &registry, &[(1, &[])]);
    assert_eq!(tick(&mut detector, 80, &registry), []);
    told(&mut detector, 90, &registry, &[(1, &[(3, long)]), (2, &[])]);
    assert_eq!(tick(&mut detector, 95, &registry), [isolated], "and again after it had ended");

    let apart = detector.conditions();
    assert_eq!(apart, Conditions { apart: [(name(1), name(3))].into(), ..Conditions::default() });
    let mut moved = registry.clone();
    for _ in 0..primaries(&registry)[&name(1)] {
        let entries = plan_under(&moved, 3, 1, &apart);
        assert!(
            matches!(&entries[..], [Entry::Change { change: Change::MakePrimary(to), .. }] if *to != name(1))
        );
        assert_eq!(moved.apply(&entries[0]).response, Response::Done);
    }
    assert!(!primaries(&moved).contains_key(&name(1)), "every set here has both");
    assert!(plan_under(&moved, 3, 64, &apart).iter().all(|entry| {
        matches!(entry, Entry::Change { change: Change::MakePrimary(to), .. } if *to != name(1))
    }));
    settle(&mut moved, 3);
    assert!(primaries(&moved)[&name(1)] >= 5, "its share comes back when it hears again");
}

#[test]
fn what_is_ceded_is_known_for_as_long_as_its_owner_says_so() {
    let registry = cluster(3, 16, 2);
    let mut detector = detector();
    let report = |n: u16| HealthReport::well(name(n), incarnation(&registry, n));
    let ceding = HealthReport { ceded: vec![ShardId(4), ShardId(5)], ..report(1) };
    detector.on(Timestamp(10), DetectorEvent::Report(ceding));
    let other = HealthReport { ceded: vec![ShardId(4)], ..report(2) };
    detector.on(Timestamp(10), DetectorEvent::Report(other));
    let expected = [(ShardId(4), [name(1), name(2)].into()), (ShardId(5), [name(1)].into())].into();
    assert_eq!(detector.conditions().ceded, expected);
    detector.on(Timestamp(20), DetectorEvent::Report(report(1)));
    let left = [(ShardId(4), [name(2)].into())].into();
    assert_eq!(detector.conditions().ceded, left);
}

#[test]
fn who_can_run_nothing_leads_nothing_and_who_can_take_nothing_learns_nothing() {
    let registry = cluster(4, 16, 2);
    let mut detector = detector();
    let fit = |leads, learns| Fitness { leads, learns };
    let report = |detector: &mut Detector, n, fitness| {
        let report = HealthReport { fitness, ..HealthReport::well(name(n), incarnation(&registry, n)) };
        detector.on(Timestamp(10), DetectorEvent::Report(report));
    };
    report(&mut detector, 1, fit(false, true));
    report(&mut detector, 2, fit(true, false));
    let conditions = detector.conditions();
    assert_eq!(conditions.not_leading, [name(1)].into());
    assert_eq!(conditions.not_learning, [name(2)].into());
    let mut moved = registry.clone();
    for _ in 0..64 {
        let Some(entry) = plan_under(&moved, 4, 1, &conditions).into_iter().next() else { break };
        let to_another =
            matches!(&entry, Entry::Change { change: Change::MakePrimary(to), .. } if *to != name(1));
        assert!(to_another, "{entry:?}");
        assert_eq!(moved.apply(&entry).response, Response::Done);
    }
    assert!(!primaries(&moved).contains_key(&name(1)));
    // Where nobody can, the owner stays: it still answers for its sessions.
    report(&mut detector, 2, fit(false, false));
    report(&mut detector, 3, fit(false, true));
    report(&mut detector, 4, fit(false, true));
    assert_eq!(plan_under(&registry, 4, 64, &detector.conditions()), []);
    // A node without a disk that takes anything is given no copies, and one that was copying is relieved.
    let mut short = registry.clone();
    assert_eq!(down(&mut short, 4, &[1, 3]), Response::Done);
    let learners = |conditions: &Conditions| {
        let entries = plan_under(&short, 4, 64, conditions);
        let to = entries.into_iter().filter_map(|entry| match entry {
            Entry::Change { change: Change::AddLearner(to), .. } => Some(to),
            _ => None,
        });
        to.collect::<std::collections::BTreeSet<_>>()
    };
    assert!(learners(&Conditions::default()).contains(&name(2)), "it would be a learner");
    let without = Conditions { not_learning: [name(2)].into(), ..Conditions::default() };
    assert!(!learners(&without).contains(&name(2)));
    let begins = plan_under(&short, 4, 64, &Conditions::default()).into_iter().find(
        |entry| matches!(entry, Entry::Change { change: Change::AddLearner(to), .. } if *to == name(2)),
    );
    let begins = begins.expect("it would be a learner");
    assert_eq!(short.apply(&begins).response, Response::Done);
    let Entry::Change { shard: copied, .. } = begins else { panic!("a change: {begins:?}") };
    let entries = plan_under(&short, 4, 64, &without);
    let dropped = entries.iter().any(
        |entry| matches!(entry, Entry::Change { shard, change: Change::DropLearner, .. } if *shard == copied),
    );
    assert!(dropped, "{entries:?}");
}

#[test]
fn who_is_slow_by_the_word_of_two_is_replaced_first_in_then_out() {
    let registry = cluster(4, 16, 2);
    let mut detector = detector();
    let slow = Member { node: name(2), incarnation: incarnation(&registry, 2) };
    let report = |from: u16, slow: &[&Member]| {
        let slow = slow.iter().map(|member| (*member).clone()).collect();
        DetectorEvent::Report(HealthReport {
            slow,
            ..HealthReport::well(name(from), incarnation(&registry, from))
        })
    };
    detector.on(Timestamp(10), report(1, &[&slow]));
    detector.on(Timestamp(10), report(2, &[&slow]));
    let of_before = Member { incarnation: Incarnation(slow.incarnation.0 + 100), ..slow.clone() };
    detector.on(Timestamp(10), report(3, &[&of_before]));
    assert_eq!(tick(&mut detector, 400, &registry), [], "one, itself, and one who means another process");
    assert!(detector.conditions().slow.is_empty());
    detector.on(Timestamp(410), report(3, &[&slow]));
    let found = Finding::Slow { member: slow.clone(), observers: vec![name(1), name(3)] };
    assert_eq!(tick(&mut detector, 420, &registry), [found]);
    assert_eq!(tick(&mut detector, 430, &registry), [], "said once");
    let two = detector.conditions();
    assert_eq!(two.slow, [(name(2), [name(1), name(3)].into())].into());
    // Who leaves is said by the primary: where that does not find it slow, nobody comes for it.
    for entry in plan_under(&registry, 4, 64, &two) {
        let Entry::Change { shard, change, .. } = entry else { panic!("{entry:?}") };
        let comes = matches!(change, Change::AddLearner(_));
        assert!(!comes || registry.primary(shard).unwrap().node != name(4), "{shard}: {change:?}");
    }
    detector.on(Timestamp(430), report(4, &[&slow]));
    assert_eq!(tick(&mut detector, 440, &registry), [], "it is known already");
    let conditions = detector.conditions();

    let mut moved = registry.clone();
    let has = |registry: &Registry, shard| {
        registry.set(shard).unwrap().replicas.iter().any(|member| member.node == name(2))
    };
    assert!(moved.shards().any(|shard| has(&moved, shard)));
    for _ in 0..400 {
        let mut entries = plan_under(&moved, 4, 64, &conditions);
        entries.extend(by_primaries(&moved, std::slice::from_ref(&slow)));
        for entry in &entries {
            assert_eq!(moved.apply(entry).response, Response::Done, "{entry:?}");
            let Entry::Change { shard, .. } = entry else { panic!("{entry:?}") };
            assert!(moved.set(*shard).unwrap().replicas.len() >= 3, "in first, then out: {entry:?}");
        }
    }
    assert_eq!(plan_under(&moved, 4, 64, &conditions), [], "it ends");
    assert!(!moved.shards().any(|shard| has(&moved, shard)), "and gets nothing back while it is slow");
    // Where there is no other node it stays, and leads nothing.
    let mut three = cluster(3, 16, 2);
    for _ in 0..64 {
        for entry in plan_under(&three, 3, 64, &conditions) {
            assert_eq!(three.apply(&entry).response, Response::Done, "{entry:?}");
        }
    }
    assert!(three.shards().all(|shard| three.set(shard).unwrap().replicas.len() == 3));
    assert!(!primaries(&three).contains_key(&name(2)));
    // It is well again.
    for well in [1, 4] {
        detector.on(Timestamp(500), report(well, &[]));
    }
    assert_eq!(tick(&mut detector, 510, &registry), []);
    assert!(detector.conditions().slow.is_empty());
}

#[test]
fn a_last_copy_that_is_down_for_too_long_is_given_up_once_and_only_if_that_is_wanted() {
    let mut registry = cluster(4, 1, 1);
    let set = registry.set(ShardId(0)).unwrap();
    let others: Vec<_> =
        (1..=4).filter(|n| set.replicas.iter().all(|member| member.node != name(*n))).collect();
    let last: u16 = set.replicas[1].node.as_str()[1..].parse().unwrap();
    let first: u16 = set.replicas[0].node.as_str()[1..].parse().unwrap();
    assert_eq!(down(&mut registry, first, &others), Response::Done);
    assert_eq!(down(&mut registry, last, &others), Response::Done);
    let settings = DetectorSettings { give_up_after: Some(Millis(60_000)), ..DetectorSettings::default() };
    let mut impatient = Detector::new(settings, Timestamp(0));
    assert_eq!(tick(&mut impatient, 10, &registry), []);
    assert_eq!(tick(&mut impatient, 60_009, &registry), []);
    let (node, incarnation) = (name(last), incarnation(&registry, last));
    let overdue = Finding::Overdue { node: node.clone(), incarnation };
    let only = [overdue];
    assert_eq!(tick(&mut impatient, 60_010, &registry), only, "the other one has no last copy");
    assert_eq!(tick(&mut impatient, 60_020, &registry), []);
    impatient.on(Timestamp(60_030), DetectorEvent::NotApplied { node, incarnation });
    assert_eq!(tick(&mut impatient, 60_040, &registry), []);
    assert_eq!(tick(&mut impatient, 120_040, &registry), only);
    let mut patient = detector();
    tick(&mut patient, 10, &registry);
    assert_eq!(tick(&mut patient, u64::MAX - 1, &registry), []);
}
