//! Waiting for room in an arena: what gpu and pinned have in common.
//!
//! The residency decides who leaves; the arena decides whether blocks fit. A request that the residency has
//! granted but the arena cannot serve (its free bytes lie in extents of another size) asks again for an
//! extent more, a few times, and then at each tick until its deadline: what left may still be read by somebody.

use std::collections::HashMap;

use keepwarm_core::residency::{
    DenyReason, NEED_WAITERS_MAX, NeedId, Residency, ResidencyCommand, ResidencyEvent,
};
use keepwarm_memory::{Arena, BlockMut, OutOfMemory};
use keepwarm_types::{Bytes, Millis, Owner, Tier, Timestamp};
use tokio::sync::oneshot;

use crate::error::Error;

/// How often a granted request may find that its blocks still do not fit.
const ATTEMPTS_MAX: u32 = 4;

/// Blocks that somebody waits for.
pub(crate) struct Want {
    pub(crate) owner: Owner,
    pub(crate) sizes: Vec<(Bytes, usize)>,
    /// Bytes that must stay free besides.
    pub(crate) kept: Bytes,
    pub(crate) deadline: Timestamp,
    pub(crate) reply: oneshot::Sender<Result<Vec<BlockMut>, Error>>,
}

impl Want {
    fn bytes(&self) -> Bytes {
        Bytes(self.sizes.iter().map(|(size, count)| size.0.next_multiple_of(64) * *count as u64).sum())
    }
}

/// An arena, its residency, and who waits for room.
pub(crate) struct Room {
    pub(crate) arena: Arena,
    pub(crate) residency: Residency,
    tier: Tier,
    wants: HashMap<NeedId, (Want, u32)>,
    /// Granted, and still without blocks: tried again at the next tick.
    parked: Vec<Want>,
    next: u64,
}

impl Room {
    pub(crate) fn new(arena: Arena, residency: Residency, tier: Tier) -> Self {
        Self { arena, residency, tier, wants: HashMap::new(), parked: Vec::new(), next: 0 }
    }

    /// Serves a want now, or lets it wait. Returns what the residency wants done.
    pub(crate) fn want(&mut self, now: Timestamp, want: Want) -> Vec<ResidencyCommand> {
        self.try_serve(now, want, 0)
    }

    /// Serves a want from what is free, or refuses it: nobody leaves for it.
    pub(crate) fn at_once(&self, want: Want) {
        let (figures, bytes) = (self.arena.figures(), want.bytes());
        let fits = figures.used + bytes + want.kept <= figures.reserved;
        let blocks = if fits {
            allocate(&self.arena, &want.owner, &want.sizes).map_err(|error| error.to_string())
        } else {
            Err("there is none to spare".to_owned())
        };
        let refused = |reason: String| self.no_capacity(bytes, &reason, Millis(1000));
        let _ = want.reply.send(blocks.map_err(refused));
    }

    /// Feeds the residency and answers whoever it grants or denies; evictions are the caller's to carry out.
    pub(crate) fn on(&mut self, now: Timestamp, event: ResidencyEvent) -> Vec<ResidencyCommand> {
        let mut evictions = Vec::new();
        let mut commands = self.residency.on(now, event);
        commands.extend(self.residency.on(now, self.used()));
        self.carry(now, commands, &mut evictions);
        evictions
    }

    /// Time passed: tries again for those who were granted room and found no blocks.
    pub(crate) fn tick(&mut self, now: Timestamp) -> Vec<ResidencyCommand> {
        let mut evictions = self.on(now, ResidencyEvent::Tick);
        for want in std::mem::take(&mut self.parked) {
            evictions.extend(self.try_serve(now, want, ATTEMPTS_MAX - 1));
        }
        evictions
    }

    fn used(&self) -> ResidencyEvent {
        ResidencyEvent::Used(self.arena.figures().used)
    }

    fn carry(
        &mut self,
        now: Timestamp,
        commands: Vec<ResidencyCommand>,
        evictions: &mut Vec<ResidencyCommand>,
    ) {
        for command in commands {
            match command {
                ResidencyCommand::Evict { .. } => evictions.push(command),
                ResidencyCommand::Grant(need) => {
                    if let Some((want, attempts)) = self.wants.remove(&need) {
                        evictions.extend(self.try_serve(now, want, attempts + 1));
                    }
                }
                ResidencyCommand::Deny { need, reason, retry_after } => {
                    if let Some((want, attempts)) = self.wants.remove(&need) {
                        // Granted once: who left for it is gone, but somebody still reads the bytes.
                        if attempts > 0 && self.park(now, reason, &want) {
                            self.parked.push(want);
                            continue;
                        }
                        let wanted = want.bytes();
                        let _ = want.reply.send(Err(self.no_capacity(wanted, reason.text(), retry_after)));
                    }
                }
            }
        }
    }

    /// Whether trying again at the next tick may help.
    fn park(&self, now: Timestamp, reason: DenyReason, want: &Want) -> bool {
        reason == DenyReason::NothingMayMove && now < want.deadline && self.parked.len() < NEED_WAITERS_MAX
    }

    fn no_capacity(&self, wanted: Bytes, reason: &str, retry_after: Millis) -> Error {
        Error::NoCapacity { tier: self.tier, wanted, reason: reason.to_owned(), retry_after }
    }

    fn try_serve(&mut self, now: Timestamp, want: Want, attempts: u32) -> Vec<ResidencyCommand> {
        if want.reply.is_closed() {
            return Vec::new();
        }
        let figures = self.arena.figures();
        let bytes = want.bytes();
        if figures.used + bytes + want.kept <= figures.reserved {
            match allocate(&self.arena, &want.owner, &want.sizes) {
                Ok(blocks) => {
                    let _ = want.reply.send(Ok(blocks));
                    return Vec::new();
                }
                Err(OutOfMemory::Full { .. }) => {}
                Err(error) => {
                    let _ = want.reply.send(Err(self.no_capacity(bytes, &error.to_string(), Millis(1000))));
                    return Vec::new();
                }
            }
        }
        if attempts >= ATTEMPTS_MAX {
            if self.park(now, DenyReason::NothingMayMove, &want) {
                self.parked.push(want);
            } else {
                let reason = DenyReason::NothingMayMove.text();
                let _ = want.reply.send(Err(self.no_capacity(bytes, reason, Millis(1000))));
            }
            return Vec::new();
        }
        // Blocks of this size may be short although bytes are not: ask for more than the free bytes.
        let free = figures.reserved.saturating_sub(figures.used);
        let fits = attempts == 0 && bytes + want.kept > free;
        let asked = if fits { bytes + want.kept } else { (free + bytes).max(bytes + want.kept) };
        self.next += 1;
        let need = NeedId(self.next);
        let event = ResidencyEvent::Need {
            need,
            tenant: want.owner.tenant.clone(),
            bytes: Bytes(asked.0.min(figures.reserved.0)),
            deadline: want.deadline,
        };
        self.wants.insert(need, (want, attempts));
        self.on(now, event)
    }
}

/// All blocks or none.
pub(crate) fn allocate(
    arena: &Arena,
    owner: &Owner,
    sizes: &[(Bytes, usize)],
) -> Result<Vec<BlockMut>, OutOfMemory> {
    let mut blocks = Vec::new();
    for (size, count) in sizes {
        blocks.extend(arena.allocate(owner, *size, *count)?);
    }
    Ok(blocks)
}
