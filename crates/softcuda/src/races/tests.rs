use super::*;

fn stamp(detector: &Detector, agent: usize, after: &[Clock]) -> Arc<Stamp> {
    let (count, clock) = detector.issue(agent, after, &[]);
    let sequence = count;
    Arc::new(Stamp { agent, count, clock, symbol: "test", detail: None, device: 0, stream: 0, sequence })
}

fn clashes(shadow: &mut Shadow, stamp: &Arc<Stamp>, range: (usize, usize), write: bool) -> bool {
    shadow.access(stamp, range.0, range.1, write).is_some()
}

#[test]
fn two_streams_without_a_wait_race_and_with_one_do_not() {
    let detector = Detector::new(Policy::Report);
    let (a, b) = (detector.agent(), detector.agent());
    let mut shadow = Shadow::default();
    let first = stamp(&detector, a, &[]);
    assert!(!clashes(&mut shadow, &first, (0, 100), true));
    let ordered = stamp(&detector, b, std::slice::from_ref(&first.clock));
    assert!(!clashes(&mut shadow, &ordered, (50, 60), false));
    let second = stamp(&detector, a, &[]);
    assert!(clashes(&mut shadow, &second, (55, 56), true), "b's read is not ordered before a's second write");
    let third = stamp(&detector, b, &[]);
    assert!(!clashes(&mut shadow, &third, (0, 50), false), "known through the first wait");
    assert!(clashes(&mut shadow, &third, (0, 100), false), "a's second write lies in this range");
}

#[test]
fn the_host_passes_on_what_it_waited_for() {
    let detector = Detector::new(Policy::Report);
    let (a, b) = (detector.agent(), detector.agent());
    let mut shadow = Shadow::default();
    assert!(!clashes(&mut shadow, &stamp(&detector, a, &[]), (0, 8), true));
    detector.host_knows(&detector.reached(a));
    assert!(!clashes(&mut shadow, &stamp(&detector, b, &[]), (0, 8), true));
    let host = detector.host_stamp("host");
    assert!(clashes(&mut shadow, &host, (0, 8), false), "the host did not wait for b");
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
