//! The core: time of a step, and memory of a million idle sessions.

use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use keepwarm_core::registry::Member;
use keepwarm_core::session::{Form, Labels, Layout, Part, Protect};
use keepwarm_core::shard::{
    Command, Create, Event, ListQuery, Request, RequestId, Shard, ShardSettings, Verb,
};
use keepwarm_types::{
    Birth, Generation, Incarnation, Millis, SessionId, SessionKey, ShardCount, ShardId, Timestamp,
};
use uuid::Uuid;

const SESSIONS: u64 = 1_000_000;

/// Counts what is allocated.
struct Counting;
static LIVE: AtomicUsize = AtomicUsize::new(0);

/// Bytes allocated now.
pub(crate) fn live_bytes() -> usize {
    LIVE.load(Ordering::Relaxed)
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[allow(unsafe_code, reason = "an allocator can be counted in no other way; it only forwards")]
// SAFETY: every call is forwarded unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Memory) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Memory) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn persist_all(shard: &mut Shard, now: Timestamp, commands: Vec<Command>) {
    for command in commands {
        if let Command::Persist(ticket, _) = command {
            shard.on(now, Event::Persisted(ticket));
        }
    }
}

pub(crate) fn run() {
    let count = ShardCount::new(1).unwrap();
    let settings = ShardSettings {
        shard: ShardId(0),
        count,
        member: Member { node: "n1".parse().unwrap(), incarnation: Incarnation(1) },
        generation: Generation(1),
        begun: 0,
    };
    let mut shard = Shard::new(settings);
    let part = Part { name: "b".parse().unwrap(), form: Form::Bytes { block_bytes: 1 << 20 }, cold: None };
    let layout = Arc::new(Layout::new("m", "f", vec![part]).unwrap());
    let tenant: keepwarm_types::TenantName = "bench".parse().unwrap();
    let key = |n: u64| {
        let id = Uuid::from_u128(
            0x4000_8000_0000_0000_0000
                | (u128::from(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 2)
                | (u128::from(n) << 96),
        );
        SessionKey::new(tenant.clone(), SessionId::new(id).unwrap())
    };
    let now = Timestamp(1_000_000);
    let before = LIVE.load(Ordering::Relaxed);
    let started = Instant::now();
    for n in 0..SESSIONS {
        let create = Create {
            layout: Arc::clone(&layout),
            birth: Birth::from_random(n),
            protect: Protect::For(Millis(900_000)),
            ttl: None,
            labels: Labels::new(),
        };
        let request = Request { id: RequestId(n), key: key(n), verb: Verb::Create(create) };
        let commands = shard.on(now, Event::Request(request));
        persist_all(&mut shard, now, commands);
    }
    let create = started.elapsed().as_secs_f64() / SESSIONS as f64;
    let bytes = (LIVE.load(Ordering::Relaxed) - before) as f64 / SESSIONS as f64;
    println!(
        "{SESSIONS} idle sessions: {bytes:.0} bytes each (limit 512), create and commit {:.2} us",
        create * 1e6
    );
    let step = |shard: &mut Shard, verb: fn(u64) -> Verb| {
        let started = Instant::now();
        for n in 0..200_000u64 {
            let at = n.wrapping_mul(7919) % SESSIONS;
            std::hint::black_box(
                shard.on(now, Event::Request(Request { id: RequestId(n), key: key(at), verb: verb(n) })),
            );
        }
        started.elapsed().as_secs_f64() / 200_000.0 * 1e6
    };
    let get = step(&mut shard, |_| Verb::Get);
    let touch = step(&mut shard, |_| Verb::Touch);
    println!("a step among them: get {get:.2} us, touch {touch:.2} us (limit 2)");
    let started = Instant::now();
    for n in 0..1000u64 {
        let after = Some(key(n.wrapping_mul(7919) % SESSIONS).id);
        let list = Verb::List(ListQuery { after, limit: 100, labels: Vec::new() });
        std::hint::black_box(
            shard.on(now, Event::Request(Request { id: RequestId(n), key: key(0), verb: list })),
        );
    }
    println!("a page of 100 among them: {:.1} us", started.elapsed().as_secs_f64() / 1000.0 * 1e6);
}
