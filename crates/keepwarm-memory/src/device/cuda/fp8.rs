//! FP8 on a CUDA device: kernels read and write its own memory, and what crosses the link is the stored form.
//!
//! The stored form lies in a piece of scratch on the device while it leaves or has come. So both ends of the crossing are
//! hashed, as for a copy; a kernel that read or wrote the host's memory itself would leave nothing to compare with.

use keepwarm_types::BlockChecksum;

use super::kernels::Planes;
use super::moves::{Moves, Rows, Run, moved};
use super::plan::Plan;
use crate::checksum::Corrupt;
use crate::device::fp8::{Dequantise, Quantise};
use crate::device::steps::Ended;
use crate::device::{DequantiseJob, QuantiseJob};
use crate::fp8::Shape;
use crate::guard::{Block, BlockMut, Place};

/// The kernels' descriptor of a block whose raw form lies at one place and whose stored one at another.
fn planes(shape: &Shape, raw: Place, stored: Place, numbers: usize) -> Planes {
    let places = [raw.address, moved(stored, shape.codes_at()).address, stored.address];
    Planes::new(shape.number, places, numbers as u64, shape.planes as u32)
}

fn whole(place: Place, bytes: usize) -> Run {
    vec![Rows::run(place, bytes)]
}

fn differs(
    source: &Block,
    target: BlockMut,
    expected: BlockChecksum,
    found: BlockChecksum,
) -> Ended<Quantise> {
    Err((Corrupt { instance: source.instance(), expected, found }.into(), Some(target)))
}

impl Quantise {
    fn numbers(&self) -> usize {
        self.job.shape.numbers(self.job.source.length()).expect("the shape was checked")
    }

    fn via(&self) -> Place {
        self.via.expect("a batch has its scratch before it is planned")
    }
}

impl Moves for Quantise {
    fn scratch_bytes(&self) -> usize {
        self.job.shape.stored_bytes(self.numbers())
    }

    fn lend(&mut self, scratch: Place) {
        self.via = Some(scratch);
    }

    fn plan(&self, plan: &mut Plan) {
        let QuantiseJob { shape, source, target } = &self.job;
        plan.quantise(planes(shape, source.place(), self.via(), self.numbers()));
        plan.copy(target.place(), self.via(), self.scratch_bytes());
    }

    fn runs(&self) -> Vec<Run> {
        let QuantiseJob { source, target, .. } = &self.job;
        let stored = self.scratch_bytes();
        vec![whole(source.place(), source.length()), whole(self.via(), stored), whole(target.place(), stored)]
    }

    fn land(self, found: &[BlockChecksum]) -> Ended<Self> {
        let stored = self.scratch_bytes();
        let QuantiseJob { source, mut target, .. } = self.job;
        // The stored form gets a checksum of its own: what is broken before must not come out as sound.
        for (expected, found) in [(source.checksum(), found[0]), (found[1], found[2])] {
            if expected != found {
                return differs(&source, target, expected, found);
            }
        }
        target.reaches(stored);
        Ok(target.seal_form(&source, stored, found[2]))
    }
}

impl Dequantise {
    fn numbers(&self) -> usize {
        self.job.shape.numbers_stored(self.job.source.length()).expect("the shape was checked")
    }

    fn via(&self) -> Place {
        self.via.expect("a batch has its scratch before it is planned")
    }

    fn raw_bytes(&self) -> usize {
        self.job.shape.raw_bytes(self.numbers())
    }
}

impl Moves for Dequantise {
    fn scratch_bytes(&self) -> usize {
        self.job.source.length()
    }

    fn lend(&mut self, scratch: Place) {
        self.via = Some(scratch);
    }

    fn plan(&self, plan: &mut Plan) {
        let DequantiseJob { shape, source, target } = &self.job;
        plan.copy(self.via(), source.place(), source.length());
        plan.dequantise(planes(shape, target.place(), self.via(), self.numbers()));
    }

    fn runs(&self) -> Vec<Run> {
        // What crossed comes last.
        vec![whole(self.job.target.place(), self.raw_bytes()), whole(self.via(), self.job.source.length())]
    }

    fn land(self, found: &[BlockChecksum]) -> Ended<Self> {
        let raw = self.raw_bytes();
        let DequantiseJob { source, mut target, .. } = self.job;
        if source.checksum() != found[1] {
            let expected = source.checksum();
            return differs(&source, target, expected, found[1]);
        }
        target.reaches(raw);
        Ok(target.seal_form(&source, raw, found[0]))
    }
}
