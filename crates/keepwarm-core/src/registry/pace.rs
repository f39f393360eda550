//! Who takes changes much more slowly than the others do, and for long: a disk that wears out, a link that loses.
//!
//! A node counts how long the members of its shards' sets take to acknowledge changes, and compares them with each
//! other, never with a clock's idea of fast: a slow moment of its own shows at all of them alike. It tells the leader,
//! which believes several ([`Conditions::slow`](super::Conditions::slow)).

use std::collections::BTreeMap;

use keepwarm_types::{Millis, Timestamp};

use super::state::Member;

/// Members are compared this often.
const WINDOW: Millis = Millis::from_secs(10);
/// Whoever was slow in so many windows that counted, with none between in which it was not, is slow: a minute.
const WINDOWS_SLOW: u32 = 6;
/// Fewer answers say nothing.
const ANSWERS_MIN: u32 = 8;
/// Without answers a verdict stands for this long: who has left all sets cannot show that it is well.
const STANDS_FOR: Millis = Millis::from_secs(600);
/// Delays are counted by powers of two, up to 16 s and more; the write deadline is below that.
const BUCKETS: usize = 16;
/// Three powers of two: at least four times, and on the average eight times, what the others take.
const SLOWER: usize = 3;
/// Half of the answers take 64 ms or longer: what is faster is no trouble to anybody.
const SLOW_FROM: usize = 7;

/// One other process.
#[derive(Debug, Default)]
struct Peer {
    /// Answers of this window, by the power of two of their milliseconds.
    answers: [u32; BUCKETS],
    /// Windows in which it was slow.
    slow: u32,
    /// When it last was judged, or first seen.
    judged: Timestamp,
}

impl Peer {
    /// The middle answer's bucket, where there are enough.
    fn median(&self) -> Option<usize> {
        let total: u32 = self.answers.iter().sum();
        let mut seen = 0;
        let middle = self.answers.iter().position(|count| {
            seen += count;
            2 * seen >= total
        });
        middle.filter(|_| total >= ANSWERS_MIN)
    }
}

/// How long others take to acknowledge changes. Holds at most the members that answered in the last ten minutes.
#[derive(Debug)]
pub struct Pace {
    /// When this window began.
    began: Timestamp,
    peers: BTreeMap<Member, Peer>,
}

impl Pace {
    /// Nobody has answered yet.
    #[must_use]
    pub const fn new(now: Timestamp) -> Self {
        Self { began: now, peers: BTreeMap::new() }
    }

    /// A member acknowledged a change so long after it was sent.
    pub fn took(&mut self, now: Timestamp, member: &Member, delay: Millis) {
        let bucket = (u64::BITS - delay.0.leading_zeros()) as usize;
        let at = bucket.min(BUCKETS - 1);
        if let Some(peer) = self.peers.get_mut(member) {
            peer.answers[at] = peer.answers[at].saturating_add(1);
            return;
        }
        let mut peer = Peer { judged: now, ..Peer::default() };
        peer.answers[at] = 1;
        self.peers.insert(member.clone(), peer);
    }

    /// Who is slow. To be asked again and again: that is how windows end.
    pub fn slow(&mut self, now: Timestamp) -> Vec<Member> {
        if now.since(self.began) >= WINDOW {
            self.began = now;
            self.judge(now);
        }
        let slow = self.peers.iter().filter(|(_, peer)| peer.slow >= WINDOWS_SLOW);
        slow.map(|(member, _)| member.clone()).collect()
    }

    fn judge(&mut self, now: Timestamp) {
        let medians: Vec<_> =
            self.peers.iter().filter_map(|(member, peer)| Some((member.clone(), peer.median()?))).collect();
        for (member, median) in &medians {
            let mut others: Vec<_> =
                medians.iter().filter(|(other, _)| other != member).map(|(_, median)| *median).collect();
            others.sort_unstable();
            // With nobody to compare it with there is no verdict.
            let Some(usual) = others.get(others.len().saturating_sub(1) / 2) else { continue };
            let Some(peer) = self.peers.get_mut(member) else { continue };
            let slow = *median >= SLOW_FROM && *median >= usual + SLOWER;
            peer.slow = if slow { peer.slow.saturating_add(1) } else { 0 };
            peer.judged = now;
        }
        self.peers.retain(|_, peer| {
            peer.answers = [0; BUCKETS];
            now.since(peer.judged) <= STANDS_FOR
        });
    }
}

#[cfg(test)]
mod tests {
    use keepwarm_types::Incarnation;

    use super::*;

    fn member(n: u64) -> Member {
        Member { node: format!("n{n}").parse().unwrap(), incarnation: Incarnation(1) }
    }

    /// Windows in each of which every member answers 20 times after its delay; who is slow after each.
    fn windows(pace: &mut Pace, from: u64, count: u64, delays: &[(u64, u64)]) -> Vec<Vec<Member>> {
        let window = |n: u64| {
            let now = Timestamp((from + n) * WINDOW.0);
            for (who, delay) in delays {
                (0..20).for_each(|_| pace.took(now, &member(*who), Millis(*delay)));
            }
            pace.slow(now + WINDOW)
        };
        (0..count).map(window).collect()
    }

    #[test]
    fn who_is_much_slower_for_a_minute_is_slow_and_well_again_when_it_is_not() {
        let mut pace = Pace::new(Timestamp(0));
        let slow = windows(&mut pace, 0, 8, &[(1, 5), (2, 400), (3, 3)]);
        let first = slow.iter().position(|slow| !slow.is_empty());
        assert_eq!(first, Some(WINDOWS_SLOW as usize - 1), "{slow:?}");
        assert!(slow[5..].iter().all(|slow| *slow == [member(2)]), "{slow:?}");
        assert_eq!(windows(&mut pace, 8, 1, &[(1, 5), (2, 6), (3, 3)]), [Vec::new()]);
    }

    #[test]
    fn a_slow_moment_of_all_a_short_one_and_one_that_hurts_nobody_are_no_fault() {
        let mut pace = Pace::new(Timestamp(0));
        let all = windows(&mut pace, 0, 10, &[(1, 400), (2, 500), (3, 300)]);
        assert!(all.iter().all(Vec::is_empty), "the reporter's own link or clock: {all:?}");
        let short = windows(&mut pace, 10, 5, &[(1, 4), (2, 400), (3, 4)]);
        let well = windows(&mut pace, 15, 1, &[(1, 4), (2, 4), (3, 4)]);
        let again = windows(&mut pace, 16, 5, &[(1, 4), (2, 400), (3, 4)]);
        assert!(short.iter().chain(&well).chain(&again).all(Vec::is_empty));
        let fast = windows(&mut pace, 21, 10, &[(1, 0), (2, 50), (3, 0)]);
        assert!(fast.iter().all(Vec::is_empty), "50 ms are no trouble: {fast:?}");
        let alone = windows(&mut Pace::new(Timestamp(0)), 0, 10, &[(2, 400)]);
        assert!(alone.iter().all(Vec::is_empty), "there is nobody to compare it with: {alone:?}");
    }

    #[test]
    fn a_few_slow_answers_among_many_are_not_slow_and_few_answers_say_nothing() {
        let mut pace = Pace::new(Timestamp(0));
        for window in 0..10 {
            let now = Timestamp(window * WINDOW.0);
            for n in 0..20 {
                pace.took(now, &member(1), Millis(4));
                pace.took(now, &member(2), Millis(if n < 9 { 4000 } else { 4 }));
            }
            (1..ANSWERS_MIN).for_each(|_| pace.took(now, &member(3), Millis(4000)));
            assert_eq!(pace.slow(now + WINDOW), []);
        }
    }

    #[test]
    fn a_verdict_stands_without_answers_for_ten_minutes_and_then_nobody_is_remembered() {
        let mut pace = Pace::new(Timestamp(0));
        windows(&mut pace, 0, 6, &[(1, 5), (2, 400)]);
        let last = Timestamp(6 * WINDOW.0);
        assert_eq!(pace.slow(last + STANDS_FOR), [member(2)]);
        assert_eq!(pace.slow(last + STANDS_FOR + WINDOW), []);
        assert!(pace.peers.is_empty());
    }
}
