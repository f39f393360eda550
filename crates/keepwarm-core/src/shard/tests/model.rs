//! Random verbs against a model of what each session must hold, with failing disks and passing time.

use std::collections::HashMap;

use keepwarm_types::{ColdReason, Millis, Tokens};
use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};

use super::bench::{Bench, TOKEN_BYTES, home, key, layout, lease, paged};
use crate::session::Order;
use crate::shard::{Answer, Cut, Event, Fork, PersistError, Precondition, Refusal, Verb, WriteMode};

#[derive(Debug, Clone)]
enum Op {
    Create(u8),
    Append { session: u8, tokens: u8, fail: Option<bool> },
    Replace { session: u8, tokens: u8 },
    Fork { from: u8, to: u8, tokens: Option<u8> },
    Truncate { session: u8, tokens: u8 },
    Cool(u8),
    Lease(u8),
    Delete(u8),
    Pass(u16),
}

fn op() -> impl Strategy<Value = Op> {
    let session = 0u8..5;
    prop_oneof![
        2 => session.clone().prop_map(Op::Create),
        6 => (session.clone(), 1u8..12, prop::option::weighted(0.2, any::<bool>()))
            .prop_map(|(session, tokens, fail)| Op::Append { session, tokens, fail }),
        1 => (session.clone(), 1u8..12).prop_map(|(session, tokens)| Op::Replace { session, tokens }),
        2 => (session.clone(), session.clone(), prop::option::of(0u8..12))
            .prop_map(|(from, to, tokens)| Op::Fork { from, to, tokens }),
        1 => (session.clone(), 0u8..12).prop_map(|(session, tokens)| Op::Truncate { session, tokens }),
        1 => session.clone().prop_map(Op::Cool),
        1 => session.clone().prop_map(Op::Lease),
        1 => session.prop_map(Op::Delete),
        2 => (0u16..3000).prop_map(Op::Pass),
    ]
}

/// What a session must be.
#[derive(Debug, Clone, PartialEq)]
struct Expected {
    tokens: u64,
    revision: u64,
    cold: bool,
}

fn seen(bench: &mut Bench, n: u8) -> Option<Expected> {
    match bench.ask(&key(n.into()), Verb::Get) {
        Ok(answer) => match *answer {
            Answer::Session { view, .. } => Some(Expected {
                tokens: view.manifest.length_tokens.0,
                revision: view.manifest.revision.0,
                cold: view.manifest.state != crate::session::State::Warm,
            }),
            other => panic!("{other:?}"),
        },
        Err(Refusal::UnknownSession | Refusal::Deleted { .. } | Refusal::Expired { .. }) => None,
        Err(other) => panic!("{other:?}"),
    }
}

fn write(bench: &mut Bench, n: u8, mode: WriteMode, tokens: u8, fail: Option<bool>) -> Result<(), Refusal> {
    let plan = bench.plan(&key(n.into()), "kv", mode, Precondition::default())?;
    let bytes = u64::from(tokens) * u64::from(TOKEN_BYTES);
    let write = bench.laid("kv", mode, &plan, bytes, None, Precondition::default());
    let id = bench.send(&key(n.into()), Verb::Write(write));
    match fail {
        Some(unknown) if !bench.catalog.is_empty() => {
            bench.fail_one(if unknown { PersistError::Unknown } else { PersistError::NotApplied });
            let reply = bench.reply(id).map(drop);
            // The catalog recovers: what was in doubt comes through.
            bench.now = bench.now + Millis(600);
            bench.on(Event::Tick);
            bench.persist_all();
            reply
        }
        _ => {
            bench.persist_all();
            bench.reply(id).map(drop)
        }
    }
}

fn apply(bench: &mut Bench, model: &mut HashMap<u8, Expected>, op: Op) {
    match op {
        Op::Create(n) => {
            let kv = layout(vec![paged("kv", Order::Token)]);
            if bench.create(&key(n.into()), &kv).is_ok() {
                model.entry(n).or_insert(Expected { tokens: 0, revision: 0, cold: false });
            }
        }
        Op::Append { session, tokens, fail } => {
            let Some(expected) = model.get(&session).cloned() else { return };
            let offset = if expected.cold { 0 } else { expected.tokens };
            let result = write(bench, session, WriteMode::Append { offset }, tokens, fail);
            if matches!(result, Ok(()) | Err(Refusal::OutcomeUnknown)) {
                let after = Expected {
                    tokens: offset + u64::from(tokens),
                    revision: expected.revision + 1,
                    cold: false,
                };
                model.insert(session, after);
            }
        }
        Op::Replace { session, tokens } => {
            if write(bench, session, WriteMode::Replace, tokens, None).is_ok() {
                let expected = model.get_mut(&session).expect("a write succeeds on a session that is");
                *expected = Expected { tokens: tokens.into(), revision: expected.revision + 1, cold: false };
            }
        }
        Op::Fork { from, to, tokens } => {
            let fork = Fork {
                child: key(to.into()).id,
                birth: keepwarm_types::Birth::from_random(u64::from(to) + 1000),
                length: tokens.map(|n| Tokens(n.into())),
                labels: None,
                keep_messages: None,
                branch: false,
                lease: None,
            };
            if bench.ask(&key(from.into()), Verb::Fork(fork)).is_ok() {
                let parent = model[&from].clone();
                let asked = tokens.map_or(parent.tokens, u64::from);
                let kept = if asked < parent.tokens && !parent.cold { asked - asked % 4 } else { asked };
                assert!(
                    model.insert(to, Expected { tokens: kept, revision: 0, cold: parent.cold }).is_none(),
                    "a fork overwrote"
                );
            }
        }
        Op::Truncate { session, tokens } => {
            let (cut, precondition) = (Cut::Tokens(Tokens(tokens.into())), Precondition::default());
            if bench.ask(&key(session.into()), Verb::Truncate { cut, precondition }).is_ok() {
                let expected = model.get_mut(&session).expect("only what is can be cut");
                let asked = u64::from(tokens);
                if asked < expected.tokens {
                    expected.tokens = if expected.cold { asked } else { asked - asked % 4 };
                }
                expected.revision += 1;
            }
        }
        Op::Cool(session) => {
            let Ok(answer) = bench.ask(&key(session.into()), Verb::Get) else { return };
            let Answer::Session { view, .. } = *answer else { return };
            let birth = view.manifest.birth;
            let cool = Verb::GoCold { birth, reason: ColdReason::Evicted, force: false };
            let had = model[&session].tokens > 0;
            if bench.ask(&key(session.into()), cool).is_ok() && had {
                model.get_mut(&session).expect("only what is can cool").cold = true;
            }
        }
        Op::Lease(session) => {
            drop(bench.ask(
                &key(session.into()),
                Verb::Activate { lease: lease(1), ttl: Millis(800), home: home() },
            ));
        }
        Op::Delete(session) => {
            if bench.ask(&key(session.into()), Verb::Delete).is_ok() {
                model.remove(&session);
            }
        }
        Op::Pass(millis) => {
            bench.now = bench.now + Millis(millis.into());
            bench.on(Event::Tick);
            bench.persist_all();
        }
    }
}

proptest! {
    #[test]
    fn sessions_are_what_was_acknowledged_and_references_balance(ops in prop::collection::vec(op(), 1..120)) {
        let mut bench = Bench::new();
        let mut model: HashMap<u8, Expected> = HashMap::new();
        for op in ops {
            apply(&mut bench, &mut model, op);
            for n in 0..5 {
                assert_eq!(seen(&mut bench, n), model.get(&n).cloned(), "session {n}");
            }
        }
        for n in 0..5u8 {
            drop(bench.ask(&key(n.into()), Verb::Delete));
        }
        assert!(bench.names.is_empty(), "references without a session: {:?}", bench.names);
    }
}
