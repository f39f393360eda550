//! What a batch asks of a stream, put together: copies that continue one another are one call, rows within the device and
//! ranges that are scrubbed are a launch for all of them.
#![allow(unsafe_code)]

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::context::{Context, Stream};
use super::driver::CudaError;
use super::kernels::{Kernels, Move, Planes, Range, Table};
use super::moves::{Rows, moved};
use crate::guard::Place;

/// Descriptors of one launch: a session of 1,024 blocks. A batch with more is issued without kernels.
const SHEET_MAX: usize = 1024;

/// A batch's operations. No two write to the same bytes but a scrub and what follows it, so scrubs come first.
#[derive(Debug, Default)]
pub(in crate::device) struct Plan {
    scrubs: Vec<(Place, usize)>,
    fills: Vec<(Place, u8, usize)>,
    /// To, from, bytes.
    copies: Vec<(Place, Place, usize)>,
    /// To, its pitch, and what comes there.
    rows: Vec<(Place, usize, Rows)>,
    /// Blocks of the device whose stored form is made before the copies, and whose raw form after them. A batch has one kind.
    narrowed: Vec<Planes>,
    widened: Vec<Planes>,
}

impl Plan {
    /// Zeroes bytes of the device, before all else.
    pub(super) fn scrub(&mut self, at: Place, bytes: usize) {
        self.scrubs.push((at, bytes));
    }

    pub(super) fn fill(&mut self, at: Place, byte: u8, bytes: usize) {
        self.fills.push((at, byte, bytes));
    }

    pub(super) fn copy(&mut self, to: Place, from: Place, bytes: usize) {
        self.copies.push((to, from, bytes));
    }

    /// Copies rows to places `pitch` apart.
    pub(super) fn rows(&mut self, to: Place, pitch: usize, from: Rows) {
        self.rows.push((to, pitch, from));
    }

    /// Makes the stored form of a block of the device, before the copies.
    pub(super) fn quantise(&mut self, planes: Planes) {
        self.narrowed.push(planes);
    }

    /// Makes the raw form of a block of the device, after the copies.
    pub(super) fn dequantise(&mut self, planes: Planes) {
        self.widened.push(planes);
    }

    /// Blocks that only kernels can do.
    pub(super) fn narrow_blocks(&self) -> usize {
        self.narrowed.len().max(self.widened.len())
    }

    /// The copies, where one goes on at the end of another, at both ends and in the same reservations, as one. No two have a
    /// target in common, so their order is free.
    fn merged(mut copies: Vec<(Place, Place, usize)>) -> Vec<(Place, Place, usize)> {
        copies.sort_unstable_by_key(|(to, ..)| to.address);
        let mut merged: Vec<(Place, Place, usize)> = Vec::new();
        for (to, from, bytes) in copies {
            match merged.last_mut() {
                Some((last_to, last_from, length))
                    if moved(*last_to, *length) == to && moved(*last_from, *length) == from =>
                {
                    *length += bytes;
                }
                _ => merged.push((to, from, bytes)),
            }
        }
        merged
    }

    /// Whether kernels have a part in it.
    pub(super) fn wants_sheets(&self) -> bool {
        !(self.scrubs.is_empty() && self.rows.is_empty() && self.narrow_blocks() == 0)
    }

    /// Puts it on the stream; with sheets, what lies in their device's own memory by their kernels. What only kernels can do is
    /// described in the desk.
    pub(super) fn issue(
        self,
        stream: &Stream,
        mut sheets: Option<&mut Sheets>,
        spare: Option<&mut Desk>,
    ) -> Result<(), CudaError> {
        let is_narrow = self.narrow_blocks() > 0;
        let desk = match (spare, sheets.take_if(|_| is_narrow)) {
            (Some(desk), _) => Some(desk),
            (None, Some(sheets)) => Some(&mut sheets.desk),
            (None, None) => None,
        };
        let mut desk = desk.filter(|desk| desk.room >= self.narrow_blocks());
        assert!(desk.is_some() || !is_narrow, "only kernels can do this, and they have no descriptors");
        let sheets = sheets.filter(|_| self.scrubs.len() <= SHEET_MAX && self.rows.len() <= SHEET_MAX);
        let own = sheets.as_ref().map(|sheets| sheets.context);
        let is_own = |place: Place| own.is_some() && place.context == own;
        let by_kernel = |(to, _, from): &&(Place, usize, Rows)| is_own(*to) && is_own(from.place);
        if let Some(sheets) = sheets {
            let ranges: Vec<_> = self.scrubs.iter().filter(|(at, _)| is_own(*at)).map(range).collect();
            let moves: Vec<_> = self.rows.iter().filter(by_kernel).map(movement).collect();
            sheets.launch_scrub(stream, &ranges)?;
            sheets.launch_moves(stream, &moves)?;
        }
        for (at, bytes) in self.scrubs.iter().filter(|(at, _)| !is_own(*at)) {
            stream.fill(*at, 0, *bytes)?;
        }
        for (at, byte, bytes) in &self.fills {
            stream.fill(*at, *byte, *bytes)?;
        }
        if let Some(desk) = desk.as_mut().filter(|_| !self.narrowed.is_empty()) {
            desk.set(&self.narrowed);
            desk.kernels.quantise(stream, &desk.planes)?;
        }
        for (to, from, bytes) in Self::merged(self.copies) {
            stream.copy(to, from, bytes)?;
        }
        if let Some(desk) = desk.filter(|_| !self.widened.is_empty()) {
            desk.set(&self.widened);
            desk.kernels.dequantise(stream, &desk.planes)?;
        }
        for (to, pitch, from) in self.rows.iter().filter(|row| !by_kernel(row)) {
            stream.copy_rows((*to, *pitch), (from.place, from.pitch), from.bytes, from.rows)?;
        }
        Ok(())
    }
}

fn range((at, bytes): &(Place, usize)) -> Range {
    Range { at: at.address, bytes: *bytes as u64 }
}

fn movement((to, pitch, from): &(Place, usize, Rows)) -> Move {
    Move {
        from: from.place.address,
        to: to.address,
        from_pitch: from.pitch as u64,
        to_pitch: *pitch as u64,
        bytes: from.bytes as u64,
        rows: from.rows as u64,
    }
}

/// Descriptors of one batch. They are read when the kernels run, so they stay with the batch until its event has passed.
#[derive(Debug)]
pub(super) struct Sheets {
    context: usize,
    kernels: Arc<Kernels>,
    ranges: Table<Range>,
    moves: Table<Move>,
    desk: Desk,
}

impl Sheets {
    fn launch_scrub(&mut self, stream: &Stream, ranges: &[Range]) -> Result<(), CudaError> {
        // SAFETY: a batch alone has these sheets, since its last user's event passed, and launches each once.
        unsafe { self.ranges.set(ranges) };
        self.kernels.scrub(stream, &self.ranges)
    }

    fn launch_moves(&mut self, stream: &Stream, moves: &[Move]) -> Result<(), CudaError> {
        // SAFETY: as above.
        unsafe { self.moves.set(moves) };
        self.kernels.move_planes(stream, &self.moves)
    }
}

/// Descriptors of one batch's blocks that become FP8 or come from it: of a sheet, or page-locked for a batch that is too long
/// for one, or met none.
#[derive(Debug)]
pub(super) struct Desk {
    kernels: Arc<Kernels>,
    planes: Table<Planes>,
    room: usize,
}

impl Desk {
    /// Room for so many blocks.
    pub(super) fn reserve(
        context: &Arc<Context>,
        kernels: &Arc<Kernels>,
        blocks: usize,
    ) -> Result<Self, CudaError> {
        Ok(Self { kernels: Arc::clone(kernels), planes: Table::reserve(context, blocks)?, room: blocks })
    }

    fn set(&mut self, blocks: &[Planes]) {
        // SAFETY: a batch alone has this desk, and launches it once.
        unsafe { self.planes.set(blocks) };
    }
}

/// The sheets of a stream, made once: nothing is allocated while it works.
#[derive(Debug)]
pub(super) struct Stack {
    context: Arc<Context>,
    kernels: Option<Arc<Kernels>>,
    back: Sender<Sheets>,
    free: Receiver<Sheets>,
}

impl Stack {
    /// So many sheets; none without kernels.
    pub(super) fn reserve(
        context: &Arc<Context>,
        kernels: Option<&Arc<Kernels>>,
        count: usize,
    ) -> Result<Self, CudaError> {
        let (back, free) = bounded(count);
        for kernels in kernels.into_iter().flat_map(|kernels| std::iter::repeat_n(kernels, count)) {
            let sheets = Sheets {
                context: context.number(),
                kernels: Arc::clone(kernels),
                ranges: Table::reserve(context, SHEET_MAX)?,
                moves: Table::reserve(context, SHEET_MAX)?,
                desk: Desk::reserve(context, kernels, SHEET_MAX)?,
            };
            drop(back.try_send(sheets));
        }
        Ok(Self { context: Arc::clone(context), kernels: kernels.cloned(), back, free })
    }

    /// Descriptors for a batch that only kernels can do, where its sheet has too few or there is none; nothing where the sheet
    /// does.
    pub(super) fn spare(&self, blocks: usize, lent: Option<&Lent>) -> Result<Option<Desk>, CudaError> {
        match &self.kernels {
            Some(kernels) if blocks > SHEET_MAX || blocks > 0 && lent.is_none() => {
                Desk::reserve(&self.context, kernels, blocks).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// A sheet that no batch has, if there is one.
    pub(super) fn lend(&self) -> Option<Lent> {
        let sheets = self.free.try_recv().ok()?;
        Some(Lent { sheets: Some(sheets), back: self.back.clone() })
    }
}

/// Sheets that a batch has; they go back when it ends.
#[derive(Debug)]
pub(super) struct Lent {
    sheets: Option<Sheets>,
    back: Sender<Sheets>,
}

impl Lent {
    pub(super) fn sheets(&mut self) -> Option<&mut Sheets> {
        self.sheets.as_mut()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // There is room for all of them; where the stream has ended, they are given back to the driver.
        self.sheets.take().into_iter().for_each(|sheets| drop(self.back.try_send(sheets)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(address: u64, context: Option<usize>) -> Place {
        Place { address, region: address / 1000, context }
    }

    #[test]
    fn copies_that_continue_one_another_are_one() {
        let mut plan = Plan::default();
        let (device, host) = (|at| place(at, Some(7)), |at| place(at, None));
        plan.copy(device(110), host(1010), 5);
        plan.copy(device(100), host(1000), 10);
        // A gap at the source, one at the target, another device, another reservation.
        plan.copy(device(115), host(1020), 5);
        plan.copy(device(130), host(1025), 5);
        plan.copy(place(135, Some(8)), host(1030), 965);
        plan.copy(place(1100, Some(8)), host(1995), 5);
        plan.copy(place(1105, Some(8)), host(2000), 5);
        let merged = Plan::merged(plan.copies);
        let lengths: Vec<_> = merged.iter().map(|(.., bytes)| *bytes).collect();
        assert_eq!(lengths, [15, 5, 5, 965, 5, 5]);
        assert_eq!(merged[0].0, device(100));
    }
}
