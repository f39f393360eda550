use super::*;

fn stamp(detector: &Detector, agent: usize, after: &[Clock]) -> Arc<Stamp> {
    let (count, clock) = detector.issue(agent, after, &[]);
    let sequence = count;
    Arc::new(Stamp { agent, count, clock, symbol: "test", detail: None, device: 0, stream: 0, sequence })
}

fn clashes(shadow: &mut Shadow, stamp: &Arc<Stamp>, range: (usize, usize), access: Access) -> bool {
    shadow.access(stamp, range.0, range.1, access).is_some()
}

#[test]
fn two_streams_without_a_wait_race_and_with_one_do_not() {
    let detector = Detector::new(Policy::Report);
    let (a, b) = (detector.agent(), detector.agent());
    let mut shadow = Shadow::default();
    let first = stamp(&detector, a, &[]);
    assert!(!clashes(&mut shadow, &first, (0, 100), Access::Write));
    let ordered = stamp(&detector, b, std::slice::from_ref(&first.clock));
    assert!(!clashes(&mut shadow, &ordered, (50, 60), Access::Read));
    let second = stamp(&detector, a, &[]);
    assert!(
        clashes(&mut shadow, &second, (55, 56), Access::Write),
        "b's read is not ordered before a's second write"
    );
    let third = stamp(&detector, b, &[]);
    assert!(!clashes(&mut shadow, &third, (0, 50), Access::Read), "known through the first wait");
    assert!(clashes(&mut shadow, &third, (0, 100), Access::Read), "a's second write lies in this range");
}

#[test]
fn the_host_passes_on_what_it_waited_for() {
    let detector = Detector::new(Policy::Report);
    let (a, b) = (detector.agent(), detector.agent());
    let mut shadow = Shadow::default();
    assert!(!clashes(&mut shadow, &stamp(&detector, a, &[]), (0, 8), Access::Write));
    detector.host_knows(&detector.reached(a));
    assert!(!clashes(&mut shadow, &stamp(&detector, b, &[]), (0, 8), Access::Write));
    let host = detector.host_stamp("host");
    assert!(clashes(&mut shadow, &host, (0, 8), Access::Read), "the host did not wait for b");
}

#[test]
fn a_place_in_clocks_is_used_again_without_forgetting() {
    let detector = Detector::new(Policy::Report);
    let a = detector.agent();
    let first = stamp(&detector, a, &[]);
    detector.retire(a);
    let again = detector.agent();
    assert_eq!(a, again);
    assert!(stamp(&detector, again, &[]).count > first.count);
}

#[test]
fn atomics_conflict_with_plain_accesses_only() {
    let detector = Detector::new(Policy::Report);
    let (a, b) = (detector.agent(), detector.agent());
    let mut shadow = Shadow::default();
    assert!(!clashes(&mut shadow, &stamp(&detector, a, &[]), (0, 8), Access::Atomic));
    assert!(!clashes(&mut shadow, &stamp(&detector, b, &[]), (4, 12), Access::Atomic));
    assert!(!clashes(&mut shadow, &stamp(&detector, a, &[]), (0, 4), Access::Read), "its own");
    assert!(clashes(&mut shadow, &stamp(&detector, b, &[]), (0, 4), Access::Read), "a's atomic");
    assert!(clashes(&mut shadow, &stamp(&detector, a, &[]), (8, 12), Access::Write), "b's atomic");
    assert!(clashes(&mut shadow, &stamp(&detector, b, &[]), (8, 12), Access::Atomic), "a's write");
}
