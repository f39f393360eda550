//! One tier's memory: LRU, watermarks, protection, shares; for gpu and pinned alike.
//!
//! Decides who leaves when room is needed. Whole sessions, never blocks: it knows sizes and times, not
//! memory. A session leaves in two steps: [`ResidencyCommand::Evict`] proposes it, and the tier reports
//! [`ResidencyEvent::Gone`] once the memory is free, or [`ResidencyEvent::Refused`].
//!
//! Order of victims: expired, unprotected or clean, oldest use first; leased never. In the tier that has the
//! only copy, protected sessions never leave to make room, unless their bytes may go to another node's memory
//! (`movable`): then, after all others, those that were not used for the longest time. In a tier whose clean sessions
//! have a colder copy (`inclusive`), protection says nothing and a dirty session must be checkpointed first.
//!
//! Memory per session: one entry of an LRU and one of an ordered set; per decision: logarithmic, plus the
//! leased sessions that are passed over.

mod book;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use keepwarm_types::{Birth, Bytes, Millis, SessionKey, TenantName, Timestamp};

use book::Book;

/// Requests for room that wait at once; each holds a client's or a restore's permit.
pub const NEED_WAITERS_MAX: usize = 256;
/// Victims that one decision names at most, so that a step stays short; the next step names more.
const VICTIMS_MAX: usize = 64;
/// When to ask again for room that nothing known will free.
const RETRY_DEFAULT: Millis = Millis(1000);
/// The longest time that a denial asks to wait.
const RETRY_MAX: Millis = Millis::from_secs(60);
/// A proposal that was neither carried out nor refused is made again after this.
const EVICTION_TIMEOUT: Millis = Millis::from_secs(10);
/// The same for a protected session: a copy holder's proposal is carried out, or not answered at all.
const MOVE_TIMEOUT: Millis = Millis::from_secs(2);
/// A session that may not leave is not proposed again for this long, unless what it is to the tier has changed.
const REST: Millis = Millis(1000);
/// Protected sessions that are proposed to move at once: their copies take a while.
const MOVING_MAX: usize = 16;
/// After so many of them were refused none is proposed for [`REST`]: nobody has room, and looking for the next one
/// costs more the more of them rest.
const REFUSED_MAX: u32 = 8;

/// What a tier is told at its start.
#[derive(Debug, Clone)]
pub struct ResidencySettings {
    /// Bytes of the tier's arena.
    pub capacity: Bytes,
    /// Evict down to this share of the capacity ...
    pub low: f64,
    /// ... once this share is exceeded.
    pub high: f64,
    /// Whether a clean session has a copy in a colder tier.
    pub inclusive: bool,
    /// Whether a session that may not be dropped may still leave, since its bytes can move to another node.
    pub movable: bool,
    /// Share of the capacity beyond which a tenant evicts its own sessions first.
    pub shares: HashMap<TenantName, f64>,
}

/// A session as a tier sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resident {
    /// Which life.
    pub birth: Birth,
    /// Bytes that it takes here.
    pub bytes: Bytes,
    /// Whether it has bytes that no colder tier has.
    pub dirty: bool,
    /// Whether it may not leave now: a lease runs, or its checkpoint reads its bytes (then it is dirty too).
    pub leased: bool,
    /// Never dropped before this, where this is the only copy.
    pub protected_until: Timestamp,
    /// When it expires.
    pub expires_at: Timestamp,
}

/// Names a request for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NeedId(pub u64);

/// What can happen to a tier.
#[derive(Debug, Clone)]
pub enum ResidencyEvent {
    /// A session is here, or changed; it was just used if `used`.
    Put {
        /// Which.
        key: SessionKey,
        /// What it is now.
        resident: Resident,
        /// Whether that was a use.
        used: bool,
    },
    /// A session has left.
    Gone(SessionKey),
    /// A proposed eviction was refused: not now, not this one.
    Refused(SessionKey),
    /// Somebody needs room.
    Need {
        /// Names the request.
        need: NeedId,
        /// For whom.
        tenant: TenantName,
        /// How much.
        bytes: Bytes,
        /// Answered by then.
        deadline: Timestamp,
    },
    /// Bytes of the arena that are in use, as its figures say.
    Used(Bytes),
    /// Time passed.
    Tick,
}

/// Why a session leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EvictReason {
    /// Its TTL has passed.
    Expired,
    /// Somebody waits for room.
    Room,
    /// The tier is above its high watermark.
    Watermark,
}

impl EvictReason {
    /// The word for logs and metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Room => "room",
            Self::Watermark => "watermark",
        }
    }
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenyReason {
    /// More than the tier has.
    TooLarge,
    /// All that is here is leased or protected.
    NothingMayMove,
    /// Room did not come in time.
    Late,
    /// Too many wait already.
    TooManyWait,
}

impl DenyReason {
    /// In words, for an error's detail.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::TooLarge => "it is more than the tier has",
            Self::NothingMayMove => "all that is there is leased, protected or in use",
            Self::Late => "room did not come in time",
            Self::TooManyWait => "too many wait for room already",
        }
    }
}

/// What a tier shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResidencyCommand {
    /// Let this session go; a dirty one is checkpointed first.
    Evict {
        /// Which.
        key: SessionKey,
        /// Which life.
        birth: Birth,
        /// Why.
        why: EvictReason,
    },
    /// There should be room now.
    Grant(NeedId),
    /// There is none.
    Deny {
        /// Who asked.
        need: NeedId,
        /// Why.
        reason: DenyReason,
        /// When to ask again.
        retry_after: Millis,
    },
}

#[derive(Debug)]
struct Waiter {
    need: NeedId,
    tenant: TenantName,
    bytes: Bytes,
    deadline: Timestamp,
}

#[derive(Debug, Clone, Copy)]
struct Leaving {
    bytes: Bytes,
    since: Timestamp,
}

/// One tier's memory.
#[derive(Debug)]
pub struct Residency {
    settings: ResidencySettings,
    books: BTreeMap<TenantName, Book>,
    leaving: HashMap<SessionKey, Leaving>,
    /// Sessions whose leaving was refused, and until when they are let alone.
    resting: HashMap<SessionKey, Timestamp>,
    /// Protected sessions among those that leave.
    moving: HashSet<SessionKey>,
    /// Moves refused since one was last carried out or all rested.
    refused: u32,
    /// Until when no protected session is proposed.
    moves_rest: Timestamp,
    waiters: VecDeque<Waiter>,
    used: Bytes,
}

impl Residency {
    /// An empty tier.
    #[must_use]
    pub fn new(settings: ResidencySettings) -> Self {
        Self {
            settings,
            books: BTreeMap::new(),
            leaving: HashMap::new(),
            resting: HashMap::new(),
            moving: HashSet::new(),
            refused: 0,
            moves_rest: Timestamp(0),
            waiters: VecDeque::new(),
            used: Bytes::ZERO,
        }
    }

    /// Sessions that are here.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.books.values().map(Book::len).sum()
    }

    /// What is known of a session.
    #[must_use]
    pub fn get(&self, key: &SessionKey) -> Option<&Resident> {
        self.books.get(&key.tenant)?.get(key)
    }

    /// Requests that wait for room.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// Takes one event and says what to do, in order.
    pub fn on(&mut self, now: Timestamp, event: ResidencyEvent) -> Vec<ResidencyCommand> {
        let mut out = Vec::new();
        match event {
            ResidencyEvent::Put { key, resident, used } => self.put(now, key, resident, used),
            ResidencyEvent::Gone(key) => {
                // An estimate until the arena's figures come: else its room would be looked for once more.
                if let Some(leaving) = self.leaving.remove(&key) {
                    self.used = self.used.saturating_sub(leaving.bytes);
                }
                self.resting.remove(&key);
                if self.moving.remove(&key) {
                    self.refused = 0;
                }
                if let Some(book) = self.books.get_mut(&key.tenant) {
                    book.remove(&key);
                    if book.len() == 0 {
                        self.books.remove(&key.tenant);
                    }
                }
            }
            ResidencyEvent::Refused(key) => {
                self.leaving.remove(&key);
                if self.moving.remove(&key) {
                    self.refused += 1;
                    if self.refused >= REFUSED_MAX {
                        (self.refused, self.moves_rest) = (0, now + REST);
                    }
                }
                if self.get(&key).is_some() {
                    self.resting.insert(key, now + REST);
                }
            }
            ResidencyEvent::Need { need, tenant, bytes, deadline } => {
                let denied = if bytes > self.settings.capacity {
                    Some(DenyReason::TooLarge)
                } else if self.waiters.len() >= NEED_WAITERS_MAX {
                    Some(DenyReason::TooManyWait)
                } else {
                    None
                };
                match denied {
                    Some(reason) => {
                        out.push(ResidencyCommand::Deny { need, reason, retry_after: RETRY_DEFAULT })
                    }
                    None => self.waiters.push_back(Waiter { need, tenant, bytes, deadline }),
                }
            }
            ResidencyEvent::Used(used) => self.used = used,
            ResidencyEvent::Tick => {
                let moving = &self.moving;
                self.leaving.retain(|key, leaving| {
                    let timeout = if moving.contains(key) { MOVE_TIMEOUT } else { EVICTION_TIMEOUT };
                    now.since(leaving.since) < timeout
                });
                self.moving.retain(|key| self.leaving.contains_key(key));
                self.resting.retain(|_, until| *until > now);
            }
        }
        self.serve(now, &mut out);
        self.lower(now, &mut out);
        out
    }

    fn put(&mut self, now: Timestamp, key: SessionKey, resident: Resident, used: bool) {
        let inclusive = self.settings.inclusive;
        let news = self.get(&key).is_none_or(|old| {
            let free = |resident: &Resident| resident.protected_until.min(resident.expires_at) <= now;
            old.birth != resident.birth || old.leased != resident.leased || free(old) != free(&resident)
        });
        if news {
            self.resting.remove(&key);
        }
        if let Some(leaving) = self.leaving.get_mut(&key) {
            leaving.bytes = leaving.bytes.min(resident.bytes);
        }
        self.books.entry(key.tenant.clone()).or_insert_with(|| Book::new(inclusive)).put(key, resident, used);
    }

    fn free(&self) -> Bytes {
        self.settings.capacity.saturating_sub(self.used)
    }

    fn on_the_way(&self) -> Bytes {
        self.leaving.values().map(|leaving| leaving.bytes).sum()
    }

    /// Answers waiters in their order, and finds victims for the first that cannot be answered.
    fn serve(&mut self, now: Timestamp, out: &mut Vec<ResidencyCommand>) {
        while let Some(waiter) = self.waiters.front() {
            let (need, bytes, tenant, late) =
                (waiter.need, waiter.bytes, waiter.tenant.clone(), waiter.deadline <= now);
            if bytes <= self.free() {
                self.waiters.pop_front();
                self.used += bytes;
                out.push(ResidencyCommand::Grant(need));
                continue;
            }
            let short = bytes.saturating_sub(self.free()).saturating_sub(self.on_the_way());
            let found = self.victims(now, short, Some((&tenant, bytes)), EvictReason::Room, out);
            // A session whose checkpoint runs may leave in a moment: that is worth waiting for.
            let settling: Bytes = self.books.values().map(Book::settling).sum();
            if found + settling >= short && !late {
                return;
            }
            self.waiters.pop_front();
            let reason = if late { DenyReason::Late } else { DenyReason::NothingMayMove };
            out.push(ResidencyCommand::Deny { need, reason, retry_after: self.retry_after(now) });
        }
    }

    /// Above the high watermark, names victims down to the low one.
    fn lower(&mut self, now: Timestamp, out: &mut Vec<ResidencyCommand>) {
        let share = |share: f64| Bytes((self.settings.capacity.0 as f64 * share) as u64);
        let (low, high) = (share(self.settings.low), share(self.settings.high));
        let later = self.used.saturating_sub(self.on_the_way());
        if later > high {
            self.victims(now, later.saturating_sub(low), None, EvictReason::Watermark, out);
        }
    }

    /// Names victims for `short` bytes; returns the bytes that they have.
    fn victims(
        &mut self,
        now: Timestamp,
        short: Bytes,
        wanted_by: Option<(&TenantName, Bytes)>,
        why: EvictReason,
        out: &mut Vec<ResidencyCommand>,
    ) -> Bytes {
        let mut found = Bytes::ZERO;
        for _ in 0..VICTIMS_MAX {
            if found >= short {
                break;
            }
            let Some((key, resident)) = self.victim(now, wanted_by) else { break };
            let why = if resident.expires_at <= now { EvictReason::Expired } else { why };
            found += resident.bytes;
            self.leaving.insert(key.clone(), Leaving { bytes: resident.bytes, since: now });
            if !self.settings.inclusive && resident.protected_until.min(resident.expires_at) > now {
                self.moving.insert(key.clone());
            }
            out.push(ResidencyCommand::Evict { key, birth: resident.birth, why });
        }
        found
    }

    /// The next victim: one that may be dropped; where there is none, one that may move.
    fn victim(
        &self,
        now: Timestamp,
        wanted_by: Option<(&TenantName, Bytes)>,
    ) -> Option<(SessionKey, Resident)> {
        let stays = |key: &SessionKey| {
            self.leaving.contains_key(key) || self.resting.get(key).is_some_and(|until| *until > now)
        };
        let dropped = self.victim_among(wanted_by, |book| book.victim(now, &stays));
        let movable = || self.victim_among(wanted_by, |book| book.movable(now, &stays));
        let may_move = self.settings.movable && self.moves_rest <= now && self.moving.len() < MOVING_MAX;
        dropped.or_else(|| may_move.then(movable).flatten())
    }

    /// Of the tenant that wants room, if it is over its share; else of the tenant that is furthest over its own; else
    /// the oldest of all.
    fn victim_among(
        &self,
        wanted_by: Option<(&TenantName, Bytes)>,
        candidate: impl Fn(&Book) -> Option<(SessionKey, Resident, u64)>,
    ) -> Option<(SessionKey, Resident)> {
        if let Some((tenant, bytes)) = wanted_by
            && let Some(book) = self.books.get(tenant)
            && book.bytes() + bytes > self.share(tenant)
            && let Some((key, resident, _)) = candidate(book)
        {
            return Some((key, resident));
        }
        let over = |tenant: &TenantName, book: &Book| book.bytes().saturating_sub(self.share(tenant));
        let candidates = self
            .books
            .iter()
            .filter_map(|(tenant, book)| candidate(book).map(|found| (over(tenant, book), found)));
        candidates
            .min_by_key(|(over, (_, _, order))| (std::cmp::Reverse(*over), *order))
            .map(|(_, (key, resident, _))| (key, resident))
    }

    fn share(&self, tenant: &TenantName) -> Bytes {
        let share = self.settings.shares.get(tenant).copied().unwrap_or(1.0);
        Bytes((self.settings.capacity.0 as f64 * share) as u64)
    }

    /// When the first protection ends, within reason.
    fn retry_after(&self, now: Timestamp) -> Millis {
        let first = self.books.values().filter_map(|book| book.first_release(now)).min();
        first.map_or(RETRY_DEFAULT, |at| at.since(now).clamp(RETRY_DEFAULT, RETRY_MAX))
    }

    /// Checks the state against itself.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn validate(&self) {
        assert!(self.waiters.len() <= NEED_WAITERS_MAX, "too many wait");
        for book in self.books.values() {
            book.validate();
        }
    }
}

#[cfg(test)]
mod tests;
