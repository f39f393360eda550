//! Who touched which bytes of one allocation last: segments that split where accesses begin and end.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Access, Stamp};

/// Segments of one allocation; beyond this its history starts anew, which can miss a race and never invents one.
const SEGMENTS_MAX: usize = 1 << 16;

/// Two accesses that nothing orders: the other one, what they are, and where they meet.
pub(super) type Conflict = (Arc<Stamp>, &'static str, usize, usize);

#[derive(Debug, Clone, Default)]
struct Segment {
    end: usize,
    write: Option<Arc<Stamp>>,
    /// The last read of each agent since that write.
    reads: Vec<Arc<Stamp>>,
    /// The last atomic change of each agent since that write.
    atomics: Vec<Arc<Stamp>>,
}

/// The history of one allocation's bytes.
#[derive(Debug, Default)]
pub(super) struct Shadow {
    segments: BTreeMap<usize, Segment>,
}

impl Shadow {
    pub(super) fn is_full(&self) -> bool {
        self.segments.len() > SEGMENTS_MAX
    }

    fn split(&mut self, at: usize) {
        let Some((_, segment)) = self.segments.range_mut(..at).next_back() else { return };
        if segment.end > at {
            let right = segment.clone();
            segment.end = at;
            self.segments.insert(at, right);
        }
    }

    /// Takes an access in, and tells the first conflict with what was there.
    pub(super) fn access(
        &mut self,
        stamp: &Arc<Stamp>,
        start: usize,
        end: usize,
        access: Access,
    ) -> Option<Conflict> {
        self.split(start);
        self.split(end);
        let mut conflict: Option<Conflict> = None;
        let mut gaps = Vec::new();
        let mut at = start;
        for (&from, segment) in self.segments.range_mut(start..end) {
            if at < from {
                gaps.push((at, from));
            }
            at = segment.end;
            if conflict.is_none() {
                conflict =
                    segment.conflict(stamp, access).map(|(other, kind)| (other, kind, from, segment.end));
            }
            segment.add(stamp, access);
        }
        if access == Access::Write {
            let inside: Vec<usize> = self.segments.range(start..end).map(|(from, _)| *from).collect();
            for from in inside {
                self.segments.remove(&from);
            }
            let segment = Segment { end, write: Some(Arc::clone(stamp)), ..Segment::default() };
            self.segments.insert(start, segment);
            return conflict;
        }
        if at < end {
            gaps.push((at, end));
        }
        for (from, end) in gaps {
            let mut segment = Segment { end, ..Segment::default() };
            segment.add(stamp, access);
            self.segments.insert(from, segment);
        }
        conflict
    }
}

impl Segment {
    /// Keeps an access besides the last write: the last of each agent is enough.
    fn add(&mut self, stamp: &Arc<Stamp>, access: Access) {
        let others = match access {
            Access::Read => &mut self.reads,
            Access::Atomic => &mut self.atomics,
            Access::Write => return,
        };
        others.retain(|other| other.agent != stamp.agent);
        others.push(Arc::clone(stamp));
    }

    fn conflict(&self, stamp: &Stamp, access: Access) -> Option<(Arc<Stamp>, &'static str)> {
        let unordered = |other: &&Arc<Stamp>| !other.before(&stamp.clock);
        let first = |others: &[Arc<Stamp>]| others.iter().find(unordered).map(Arc::clone);
        let (write, read, atomic) = match access {
            Access::Read => ("read after write", None, Some("read after atomic")),
            Access::Write => ("write after write", Some("write after read"), Some("write after atomic")),
            Access::Atomic => ("atomic after write", Some("atomic after read"), None),
        };
        self.write.as_ref().filter(unordered).map(|other| (Arc::clone(other), write)).or_else(|| {
            let reads = read.and_then(|kind| Some((first(&self.reads)?, kind)));
            reads.or_else(|| atomic.and_then(|kind| Some((first(&self.atomics)?, kind))))
        })
    }
}
