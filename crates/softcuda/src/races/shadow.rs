//! Who touched which bytes of one allocation last: segments that split where accesses begin and end.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Stamp;

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
        write: bool,
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
                    segment.conflict(stamp, write).map(|(other, kind)| (other, kind, from, segment.end));
            }
            if !write {
                segment.reads.retain(|read| read.agent != stamp.agent);
                segment.reads.push(Arc::clone(stamp));
            }
        }
        if write {
            let inside: Vec<usize> = self.segments.range(start..end).map(|(from, _)| *from).collect();
            for from in inside {
                self.segments.remove(&from);
            }
            let segment = Segment { end, write: Some(Arc::clone(stamp)), reads: Vec::new() };
            self.segments.insert(start, segment);
            return conflict;
        }
        if at < end {
            gaps.push((at, end));
        }
        for (from, end) in gaps {
            self.segments.insert(from, Segment { end, write: None, reads: vec![Arc::clone(stamp)] });
        }
        conflict
    }
}

impl Segment {
    fn conflict(&self, stamp: &Stamp, write: bool) -> Option<(Arc<Stamp>, &'static str)> {
        let unordered = |other: &&Arc<Stamp>| !other.before(&stamp.clock);
        if let Some(other) = self.write.as_ref().filter(unordered) {
            return Some((Arc::clone(other), if write { "write after write" } else { "read after write" }));
        }
        if !write {
            return None;
        }
        self.reads.iter().find(unordered).map(|other| (Arc::clone(other), "write after read"))
    }
}
