use std::collections::{HashMap, HashSet};

use keepwarm_types::{Birth, Bytes, Millis, SessionId, SessionKey, TenantName, Timestamp};
use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};
use uuid::Uuid;

use super::{
    DenyReason, EvictReason, NeedId, Residency, ResidencyCommand, ResidencyEvent, ResidencySettings, Resident,
};

fn tenant(name: &str) -> TenantName {
    name.parse().unwrap()
}

fn key(who: &str, n: u128) -> SessionKey {
    SessionKey::new(tenant(who), SessionId::new(Uuid::from_u128(0x4000_8000_0000_0000_0000 + n)).unwrap())
}

fn settings(capacity: u64, inclusive: bool, movable: bool) -> ResidencySettings {
    let shares = HashMap::from([(tenant("half"), 0.5)]);
    ResidencySettings { capacity: Bytes(capacity), low: 0.5, high: 0.9, inclusive, movable, shares }
}

fn tier(capacity: u64, inclusive: bool) -> Residency {
    Residency::new(settings(capacity, inclusive, false))
}

fn resident(bytes: u64) -> Resident {
    let (protected_until, expires_at) = (Timestamp(0), Timestamp::NEVER);
    Resident {
        birth: Birth::from_random(1),
        bytes: Bytes(bytes),
        dirty: false,
        leased: false,
        protected_until,
        expires_at,
    }
}

fn put(key: &SessionKey, resident: Resident) -> ResidencyEvent {
    ResidencyEvent::Put { key: key.clone(), resident, used: true }
}

fn need(n: u64, who: &str, bytes: u64) -> ResidencyEvent {
    ResidencyEvent::Need {
        need: NeedId(n),
        tenant: tenant(who),
        bytes: Bytes(bytes),
        deadline: Timestamp(10_000),
    }
}

fn evicted(commands: &[ResidencyCommand]) -> Vec<SessionKey> {
    let keys = commands.iter().filter_map(|command| match command {
        ResidencyCommand::Evict { key, .. } => Some(key.clone()),
        _ => None,
    });
    keys.collect()
}

const NOW: Timestamp = Timestamp(1000);

#[test]
fn room_that_is_there_is_granted_at_once() {
    let mut tier = tier(100, true);
    assert_eq!(tier.on(NOW, need(1, "a", 80)), [ResidencyCommand::Grant(NeedId(1))]);
    let denied = tier.on(NOW, need(2, "a", 80));
    assert!(
        matches!(denied[..], [ResidencyCommand::Deny { reason: DenyReason::NothingMayMove, .. }]),
        "the first took it"
    );
    let denied = tier.on(NOW, need(3, "a", 101));
    assert!(matches!(denied[..], [ResidencyCommand::Deny { reason: DenyReason::TooLarge, .. }]));
}

#[test]
fn the_oldest_clean_session_leaves_first_and_a_leased_one_never() {
    let mut tier = tier(100, true);
    for n in 1..=4 {
        tier.on(NOW, put(&key("a", n), Resident { leased: n == 1, dirty: n == 2, ..resident(20) }));
    }
    tier.on(NOW, ResidencyEvent::Used(Bytes(80)));
    assert_eq!(evicted(&tier.on(NOW, need(1, "a", 30))), [key("a", 3)]);
    assert_eq!(tier.on(NOW, ResidencyEvent::Gone(key("a", 3))), [ResidencyCommand::Grant(NeedId(1))]);
    assert_eq!(tier.on(NOW, ResidencyEvent::Used(Bytes(90))), []);
    assert_eq!(evicted(&tier.on(NOW, need(2, "a", 50))), [key("a", 4), key("a", 2)], "clean before dirty");
}

//= GUARANTEES.md#G6
#[test]
fn the_only_copy_is_protected_until_its_time() {
    let mut tier = tier(100, false);
    tier.on(NOW, put(&key("a", 1), Resident { protected_until: Timestamp(5000), ..resident(50) }));
    tier.on(NOW, ResidencyEvent::Used(Bytes(50)));
    let denied = tier.on(NOW, need(1, "a", 60));
    assert!(matches!(denied[..], [ResidencyCommand::Deny { retry_after: Millis(4000), .. }]), "{denied:?}");
    assert_eq!(evicted(&tier.on(Timestamp(5000), need(2, "a", 60))), [key("a", 1)]);
}

#[test]
fn a_refused_eviction_looks_for_another() {
    let mut tier = tier(100, true);
    for n in 1..=2 {
        tier.on(NOW, put(&key("a", n), resident(50)));
    }
    tier.on(NOW, ResidencyEvent::Used(Bytes(90)));
    assert_eq!(evicted(&tier.on(NOW, need(1, "a", 30))), [key("a", 1)]);
    assert_eq!(evicted(&tier.on(NOW, ResidencyEvent::Refused(key("a", 1)))), [key("a", 2)]);
}

#[test]
fn what_may_not_be_dropped_may_move_last_and_the_longest_unused_first() {
    let mut tier = Residency::new(settings(100, false, true));
    let protected = Resident { protected_until: Timestamp(5000), ..resident(30) };
    for n in 1..=2 {
        tier.on(NOW, put(&key("a", n), protected.clone()));
    }
    tier.on(NOW, put(&key("a", 3), resident(30)));
    tier.on(NOW, ResidencyEvent::Used(Bytes(90)));
    let proposed = evicted(&tier.on(NOW, need(1, "a", 60)));
    assert_eq!(proposed, [key("a", 3), key("a", 1)], "first what may be dropped");
    assert_eq!(evicted(&tier.on(NOW, ResidencyEvent::Refused(key("a", 1)))), [key("a", 2)]);
    let denied = tier.on(NOW, ResidencyEvent::Refused(key("a", 2)));
    assert!(
        matches!(denied[..], [ResidencyCommand::Deny { reason: DenyReason::NothingMayMove, .. }]),
        "nobody took them: they rest {denied:?}"
    );
    assert_eq!(evicted(&tier.on(NOW + Millis(500), need(2, "a", 60))), []);
    assert_eq!(evicted(&tier.on(NOW + Millis(1000), need(3, "a", 60))), [key("a", 1)], "and are asked again");
}

#[test]
fn where_nobody_takes_what_is_protected_all_of_it_rests() {
    let mut tier = Residency::new(settings(1000, false, true));
    let protected = Resident { protected_until: Timestamp(90_000), ..resident(10) };
    for n in 1..=90 {
        tier.on(NOW, put(&key("a", n), protected.clone()));
    }
    let mut proposed = evicted(&tier.on(NOW, ResidencyEvent::Used(Bytes(950))));
    assert_eq!(proposed.len(), 16, "no more at once: {proposed:?}");
    let mut asked = 16;
    while let Some(key) = proposed.pop() {
        let more = evicted(&tier.on(NOW, ResidencyEvent::Refused(key)));
        asked += more.len();
        proposed.extend(more);
    }
    assert!(asked < 40, "{asked} of 90 were proposed though each was refused");
    // A use is no news for who rests.
    assert_eq!(evicted(&tier.on(NOW + Millis(500), put(&key("a", 1), protected.clone()))), []);
    assert_eq!(evicted(&tier.on(NOW + Millis(1000), ResidencyEvent::Tick)).len(), 16);
}

#[test]
fn room_waits_for_a_checkpoint_that_is_under_way_but_not_for_a_lease() {
    let mut tier = tier(100, true);
    let settling = Resident { leased: true, dirty: true, ..resident(80) };
    tier.on(NOW, put(&key("a", 1), settling));
    tier.on(NOW, ResidencyEvent::Used(Bytes(80)));
    assert_eq!(tier.on(NOW, need(1, "a", 50)), [], "its checkpoint ends soon");
    let denied = tier.on(NOW, put(&key("a", 1), Resident { leased: true, ..resident(80) }));
    assert!(
        matches!(denied[..], [ResidencyCommand::Deny { reason: DenyReason::NothingMayMove, .. }]),
        "a lease may last: {denied:?}"
    );
    tier.on(NOW, put(&key("a", 1), Resident { leased: true, dirty: true, ..resident(80) }));
    assert_eq!(tier.on(NOW, need(2, "a", 50)), []);
    assert_eq!(evicted(&tier.on(NOW, put(&key("a", 1), resident(80)))), [key("a", 1)], "it has ended");
}

#[test]
fn a_tenant_over_its_share_evicts_its_own() {
    let mut tier = tier(100, true);
    tier.on(NOW, put(&key("other", 1), resident(30)));
    tier.on(NOW, put(&key("half", 2), resident(50)));
    tier.on(NOW, ResidencyEvent::Used(Bytes(80)));
    assert_eq!(evicted(&tier.on(NOW, need(1, "half", 30))), [key("half", 2)], "though the other is older");
}

#[test]
fn above_the_high_watermark_sessions_leave_down_to_the_low() {
    let mut tier = tier(100, true);
    for n in 1..=5 {
        tier.on(NOW, put(&key("a", n), resident(19)));
    }
    let commands = tier.on(NOW, ResidencyEvent::Used(Bytes(95)));
    assert_eq!(evicted(&commands), [key("a", 1), key("a", 2), key("a", 3)]);
    assert!(
        commands.iter().all(|c| matches!(c, ResidencyCommand::Evict { why: EvictReason::Watermark, .. }))
    );
    assert!(tier.on(NOW, ResidencyEvent::Tick).is_empty(), "what is leaving is not named twice");
}

#[test]
fn a_waiter_is_answered_by_its_deadline() {
    let mut tier = tier(100, true);
    tier.on(NOW, put(&key("a", 1), resident(90)));
    tier.on(NOW, ResidencyEvent::Used(Bytes(90)));
    assert_eq!(evicted(&tier.on(NOW, need(1, "a", 50))), [key("a", 1)]);
    let late = tier.on(Timestamp(10_000), ResidencyEvent::Tick);
    assert!(matches!(late[..], [ResidencyCommand::Deny { reason: DenyReason::Late, .. }]), "{late:?}");
}

#[derive(Debug, Clone)]
enum Op {
    Put { n: u8, bytes: u8, leased: bool, dirty: bool, protect: u16 },
    Need(u8),
    Carry { yes: bool },
    Pass(u16),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0u8..12, 1u8..30, any::<bool>(), any::<bool>(), 0u16..4000)
            .prop_map(|(n, bytes, leased, dirty, protect)| Op::Put { n, bytes, leased, dirty, protect }),
        3 => (1u8..120).prop_map(Op::Need),
        3 => any::<bool>().prop_map(|yes| Op::Carry { yes }),
        1 => (0u16..2000).prop_map(Op::Pass),
    ]
}

proptest! {
    #[test]
    fn nothing_forbidden_leaves_and_every_need_is_answered_once(ops in prop::collection::vec(op(), 1..150), inclusive in any::<bool>()) {
        let mut tier = tier(100, inclusive);
        let mut now = NOW;
        let (mut here, mut leaving): (HashMap<SessionKey, Resident>, Vec<SessionKey>) = (HashMap::new(), Vec::new());
        let (mut asked, mut answered) = (0u64, HashSet::new());
        let mut queue = Vec::new();
        for op in ops.into_iter().chain([Op::Pass(u16::MAX)]) {
            let event = match op {
                Op::Put { n, bytes, leased, dirty, protect } => {
                    let who = if n % 2 == 0 { "half" } else { "other" };
                    let key = key(who, n.into());
                    if leaving.contains(&key) { continue }
                    let protected_until = now + Millis(protect.into());
                    let resident = Resident { leased, dirty, protected_until, ..resident(bytes.into()) };
                    here.insert(key.clone(), resident.clone());
                    put(&key, resident)
                }
                Op::Need(bytes) => {
                    asked += 1;
                    let (need, bytes) = (NeedId(asked), Bytes(bytes.into()));
                    ResidencyEvent::Need { need, tenant: tenant("half"), bytes, deadline: now + Millis(1000) }
                }
                Op::Carry { yes } => {
                    let Some(key) = leaving.pop() else { continue };
                    if yes { here.remove(&key); ResidencyEvent::Gone(key) } else { ResidencyEvent::Refused(key) }
                }
                Op::Pass(millis) => { now = now + Millis(millis.into()); ResidencyEvent::Tick }
            };
            queue.extend(tier.on(now, event));
            let used: Bytes = here.values().map(|r| r.bytes).sum();
            queue.extend(tier.on(now, ResidencyEvent::Used(used)));
            tier.validate();
            for command in queue.drain(..) {
                match command {
                    ResidencyCommand::Evict { key, .. } => {
                        let resident = &here[&key];
                        assert!(!resident.leased, "a leased session was named");
                        assert!(inclusive || resident.protected_until <= now, "a protected only copy was named");
                        leaving.push(key);
                    }
                    ResidencyCommand::Grant(need) | ResidencyCommand::Deny { need, .. } => {
                        assert!(answered.insert(need), "answered twice");
                    }
                }
            }
        }
        assert_eq!(answered.len() as u64, asked, "somebody still waits after every deadline");
    }
}
