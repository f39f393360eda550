//! What a CUDA device does for each kind of job: what it asks of the stream, runs of bytes to verify, and the end.

use keepwarm_types::BlockChecksum;

use super::plan::Plan;
use crate::checksum::Corrupt;
use crate::device::regions::{FromRegion, IntoRegion, Strip};
use crate::device::steps::{Ended, FillJob, Step, seal_filled};
use crate::device::{GatherJob, Job, PlaneShape, ScatterJob};
use crate::guard::{BlockMut, Place, next_instance};

/// Equal rows of bytes, a pitch apart.
#[derive(Debug, Clone, Copy)]
pub(in crate::device) struct Rows {
    pub(super) place: Place,
    pub(super) pitch: usize,
    pub(super) bytes: usize,
    pub(super) rows: usize,
    /// Another process may write there.
    pub(super) foreign: bool,
}

impl Rows {
    pub(super) fn run(place: Place, bytes: usize) -> Self {
        Self { place, pitch: bytes, bytes, rows: 1, foreign: false }
    }

    /// The first `tokens` tokens of each plane.
    fn planes(place: Place, shape: &PlaneShape, planes: usize, tokens: usize) -> Self {
        let pitch = shape.tokens_per_block * shape.token_bytes;
        Self { place, pitch, bytes: tokens * shape.token_bytes, rows: planes, foreign: false }
    }

    pub(super) const fn total(&self) -> usize {
        self.bytes * self.rows
    }
}

/// Bytes whose checksum is wanted: rows after rows, as if they lay together.
pub(in crate::device) type Run = Vec<Rows>;

/// A job on a device whose memory the host cannot touch.
pub(in crate::device) trait Moves {
    /// Scratch of the device that it needs until it has landed.
    fn scratch_bytes(&self) -> usize {
        0
    }

    /// Has that scratch, before it is planned.
    fn lend(&mut self, _scratch: Place) {}

    /// Adds what it asks of the stream.
    fn plan(&self, plan: &mut Plan);

    /// The checksums that its end needs, in order; the last is of the bytes that arrived in the target.
    fn runs(&self) -> Vec<Run>;

    /// Compares the checksums that were found, and seals.
    fn land(self, found: &[BlockChecksum]) -> Ended<Self>
    where
        Self: Step;
}

pub(super) fn moved(place: Place, by: usize) -> Place {
    Place { address: place.address + by as u64, ..place }
}

impl Moves for Job {
    fn plan(&self, plan: &mut Plan) {
        plan.copy(self.target.place(), self.source.place(), self.source.length());
    }

    fn runs(&self) -> Vec<Run> {
        vec![vec![Rows::run(self.target.place(), self.source.length())]]
    }

    fn land(self, found: &[BlockChecksum]) -> Ended<Self> {
        let Self { source, mut target } = self;
        let (expected, found) = (source.checksum(), found[0]);
        if expected != found {
            return Err((Corrupt { instance: source.instance(), expected, found }.into(), Some(target)));
        }
        target.reaches(source.length());
        Ok(target.seal_copy(&source))
    }
}

/// Zeroes what another tenant may have left behind the bytes that this one wrote, where the whole block is to count
/// as written.
fn scrub(target: &BlockMut, plan: &mut Plan) {
    if let Some(rest) = target.left_over() {
        plan.scrub(moved(target.place(), rest.start), rest.len());
    }
}

impl Moves for FillJob {
    fn plan(&self, plan: &mut Plan) {
        scrub(&self.target, plan);
        plan.fill(self.target.place(), self.byte, self.target.capacity());
    }

    fn runs(&self) -> Vec<Run> {
        vec![vec![Rows::run(self.target.place(), self.target.capacity())]]
    }

    fn land(self, found: &[BlockChecksum]) -> Ended<Self> {
        let Self { mut target, byte } = self;
        target.filled();
        seal_filled(target, byte, found[0])
    }
}

impl GatherJob {
    /// Each source's place and planes.
    fn parts(&self) -> impl Iterator<Item = (Place, usize)> {
        let stride = self.shape.tokens_per_block * self.shape.token_bytes;
        self.sources.iter().map(move |source| (source.place(), source.length() / stride))
    }
}

impl Moves for GatherJob {
    fn plan(&self, plan: &mut Plan) {
        let used = self.tokens * self.shape.token_bytes;
        let mut at = 0;
        for (place, planes) in self.parts() {
            let from = Rows::planes(place, &self.shape, planes, self.tokens);
            plan.rows(moved(self.target.place(), at), used, from);
            at += from.total();
        }
    }

    fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> =
            self.sources.iter().map(|source| vec![Rows::run(source.place(), source.length())]).collect();
        let planes = |(place, planes)| Rows::planes(place, &self.shape, planes, self.tokens);
        runs.push(self.parts().map(planes).collect());
        runs.push(vec![Rows::run(self.target.place(), self.shape.packed_bytes(self.tokens))]);
        runs
    }

    fn land(self, found: &[BlockChecksum]) -> Ended<Self> {
        let Self { shape, sources, tokens, mut target } = self;
        let (of_sources, of_bytes) = found.split_at(sources.len());
        // The packed block gets a checksum of its own: what is broken before must not come out as sound.
        for (source, found) in sources.iter().zip(of_sources) {
            let (expected, found) = (source.checksum(), *found);
            if expected != found {
                return Err((Corrupt { instance: source.instance(), expected, found }.into(), Some(target)));
            }
        }
        let (expected, found) = (of_bytes[0], of_bytes[1]);
        if expected != found {
            let instance = sources.first().expect("a shape without planes is refused").instance();
            return Err((Corrupt { instance, expected, found }.into(), Some(target)));
        }
        let length = shape.packed_bytes(tokens);
        target.reaches(length);
        Ok(target.into_block(length, next_instance(), found))
    }
}

impl Moves for ScatterJob {
    fn plan(&self, plan: &mut Plan) {
        scrub(&self.target, plan);
        let used = self.tokens * self.shape.token_bytes;
        let to = Rows::planes(self.target.place(), &self.shape, self.shape.planes, self.tokens);
        plan.rows(to.place, to.pitch, Rows { place: self.source.place(), pitch: used, ..to });
    }

    fn runs(&self) -> Vec<Run> {
        vec![vec![Rows::planes(self.target.place(), &self.shape, self.shape.planes, self.tokens)]]
    }

    fn land(self, found: &[BlockChecksum]) -> Ended<Self> {
        let Self { source, mut target, .. } = self;
        let (expected, found) = (source.checksum(), found[0]);
        if expected != found {
            return Err((Corrupt { instance: source.instance(), expected, found }.into(), Some(target)));
        }
        target.filled();
        Ok(target)
    }
}

impl Strip {
    fn rows(&self, used: usize) -> Rows {
        let Self { lease, offset, pitch, planes } = self;
        let place = moved(lease.place(), *offset);
        Rows { place, pitch: *pitch, bytes: used, rows: *planes, foreign: true }
    }
}

impl Moves for FromRegion {
    fn plan(&self, plan: &mut Plan) {
        let (used, mut at) = (self.used(), 0);
        for from in self.sources.iter().map(|strip| strip.rows(used)) {
            plan.rows(moved(self.target.place(), at), used, from);
            at += from.total();
        }
    }

    fn runs(&self) -> Vec<Run> {
        let sources = self.sources.iter().map(|strip| strip.rows(self.used())).collect();
        vec![sources, vec![Rows::run(self.target.place(), self.bytes())]]
    }

    fn land(self, found: &[BlockChecksum]) -> Ended<Self> {
        let length = self.bytes();
        let mut target = self.target;
        target.reaches(length);
        Self::seal(target, length, found[0], found[1])
    }
}

impl Moves for IntoRegion {
    fn plan(&self, plan: &mut Plan) {
        let (used, mut from) = (self.used(), self.source.place());
        for to in self.targets.iter().map(|strip| strip.rows(used)) {
            plan.rows(to.place, to.pitch, Rows { place: from, pitch: used, ..to });
            from = moved(from, to.total());
        }
    }

    fn runs(&self) -> Vec<Run> {
        vec![self.targets.iter().map(|strip| strip.rows(self.used())).collect()]
    }

    fn land(self, found: &[BlockChecksum]) -> Ended<Self> {
        let (expected, found) = (self.source.checksum(), found[0]);
        if expected != found {
            return Err((Corrupt { instance: self.source.instance(), expected, found }.into(), None));
        }
        Ok(())
    }
}
