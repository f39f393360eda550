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

/// Numbers that a seed repeats.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }
}

/// An operation of a random program, with all that happened before it.
struct Issued {
    stamp: Arc<Stamp>,
    before: Vec<bool>,
    range: (usize, usize),
    access: Access,
}

impl Issued {
    fn conflicts(&self, other: &Self) -> bool {
        let apart = self.range.1 <= other.range.0 || other.range.1 <= self.range.0;
        let kinds = (self.access, other.access);
        !apart && kinds != (Access::Read, Access::Read) && kinds != (Access::Atomic, Access::Atomic)
    }
}

/// A program of three streams, waits for earlier operations, and waits of the host.
fn program(dice: &mut Dice) -> Vec<Issued> {
    const OPERATIONS: usize = 10;
    let detector = Detector::new(Policy::Report);
    let agents = [detector.agent(), detector.agent(), detector.agent()];
    let (mut issued, mut host) = (Vec::<Issued>::new(), vec![false; OPERATIONS]);
    let include = |before: &mut Vec<bool>, issued: &[Issued], operation: usize| {
        before[operation] = true;
        for (place, earlier) in issued[operation].before.iter().enumerate() {
            before[place] |= earlier;
        }
    };
    for _ in 0..OPERATIONS {
        if dice.roll(5) == 0 {
            let agent = agents[dice.roll(3)];
            detector.host_knows(&detector.reached(agent));
            for operation in 0..issued.len() {
                if issued[operation].stamp.agent == agent {
                    include(&mut host, &issued, operation);
                }
            }
        }
        let agent = agents[dice.roll(3)];
        let (mut before, mut after) = (host.clone(), Vec::new());
        for operation in 0..issued.len() {
            let waited = dice.roll(4) == 0;
            if waited {
                after.push(issued[operation].stamp.clock.clone());
            }
            if waited || issued[operation].stamp.agent == agent {
                include(&mut before, &issued, operation);
            }
        }
        let start = dice.roll(24);
        let access = [Access::Read, Access::Write, Access::Atomic][dice.roll(3)];
        let range = (start, start + 1 + dice.roll(3));
        issued.push(Issued { stamp: stamp(&detector, agent, &after), before, range, access });
    }
    issued
}

/// Whether a run in a random order that the program allows finds a race.
fn finds(program: &[Issued], dice: &mut Dice) -> bool {
    let (mut shadow, mut done) = (Shadow::default(), vec![false; program.len()]);
    let mut found = false;
    for _ in 0..program.len() {
        let ready: Vec<usize> = (0..program.len())
            .filter(|next| {
                !done[*next] && program[*next].before.iter().zip(&done).all(|(need, done)| !need || *done)
            })
            .collect();
        let next = ready[dice.roll(ready.len())];
        done[next] = true;
        let Issued { stamp, range, access, .. } = &program[next];
        found |= clashes(&mut shadow, stamp, *range, *access);
    }
    found
}

#[test]
fn random_programs_race_exactly_where_nothing_orders_a_conflict() {
    let mut racy = 0;
    for seed in 1..=3000_u64 {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let program = program(&mut dice);
        let expected = (0..program.len()).any(|later| {
            (0..later)
                .any(|earlier| !program[later].before[earlier] && program[later].conflicts(&program[earlier]))
        });
        racy += u32::from(expected);
        for run in 0..3 {
            assert_eq!(finds(&program, &mut dice), expected, "seed {seed}, run {run}");
        }
    }
    assert!((300..2700).contains(&racy), "both kinds of programs are made: {racy} of 3000 race");
}
