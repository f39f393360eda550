//! Moves to where room is, and members that keep others waiting.

use super::*;

/// A net of so many, with so many copies of bytes.
fn net(count: u64, replication: usize) -> Net {
    let mut net = Net::new(count);
    for replica in &mut net.replicas {
        let settings = ReplicaSettings { replication, ..replica.settings.clone() };
        *replica = Replica::new(settings, [], []);
    }
    net
}

/// A session of eight bytes, protected for ever or not at all, on nodes 1 and 2 of three.
fn written(net: &mut Net, protect: Protect) -> SessionKey {
    let key = written_on(net, protect);
    assert_eq!(holders(net, &key), [member(1), member(2)]);
    key
}

fn written_on(net: &mut Net, protect: Protect) -> SessionKey {
    let part = Part { name: "b".parse().unwrap(), form: Form::Bytes { block_bytes: 8 }, cold: None };
    let layout = Arc::new(Layout::new("m", "f", vec![part]).unwrap());
    let (birth, labels) = (Birth::from_random(7), Labels::new());
    let key = key(1);
    let commands = net.ask(0, 1, &key, Verb::Create(Create { layout, birth, protect, ttl: None, labels }));
    net.run(0, commands);
    let commands = net.ask(0, 2, &key, write(5));
    net.run(0, commands);
    let commands = net.replicas[0].on(NOW + Millis(100), ReplicaEvent::Tick);
    net.run(0, commands);
    net.answers.clear();
    key
}

fn holders(net: &Net, key: &SessionKey) -> Vec<Member> {
    net.replicas[0].manifest(key).expect("it is there").holders.to_vec()
}

fn evict(net: &mut Net, at: usize, key: &SessionKey) {
    let commands = net.replicas[at].on(NOW, ReplicaEvent::Evict(key.clone(), Birth::from_random(7)));
    net.run(at, commands);
}

//= GUARANTEES.md#G6
#[test]
fn what_has_no_room_here_moves_to_a_replica_that_has() {
    let mut net = three();
    let key = written(&mut net, Protect::Forever);
    evict(&mut net, 0, &key);
    assert_eq!(holders(&net, &key), [member(2), member(3)], "the other two hold it");
    assert!(net.released.contains(&(0, InstanceId(5))), "and only then it leaves: {:?}", net.released);
    let commands = net.ask(0, 3, &key, Verb::ReadAll);
    assert!(matches!(commands[..], [ReplicaCommand::Fetch { spare: false, .. }]), "{commands:?}");
    net.run(0, commands);
    assert_eq!(holders(&net, &key), [member(1), member(2)], "who wants it has it fetched");
    assert!(matches!(net.answers.last(), Some((RequestId(3), Ok(_)))), "{:?}", net.answers);
}

#[test]
fn a_secondary_without_room_is_relieved_as_well() {
    let mut net = three();
    let key = written(&mut net, Protect::Forever);
    evict(&mut net, 1, &key);
    assert_eq!(holders(&net, &key), [member(1), member(3)]);
    evict(&mut net, 0, &key);
    assert_eq!(holders(&net, &key), [member(3), member(2)]);
    evict(&mut net, 2, &key);
    assert_eq!(
        holders(&net, &key),
        [member(1), member(2)],
        "the owner takes it back where it is the only one"
    );
    assert_eq!(net.stayed, []);
}

//= GUARANTEES.md#G6
#[test]
fn where_nobody_has_room_the_protected_stays_and_the_other_cools() {
    for (protect, stays) in [(Protect::Forever, true), (Protect::For(Millis(0)), false)] {
        let mut net = three();
        net.full = vec![member(3)];
        let key = written(&mut net, protect);
        evict(&mut net, 0, &key);
        let manifest = net.replicas[0].manifest(&key).unwrap();
        assert_eq!(manifest.state == crate::session::State::Warm, stays);
        assert_eq!(net.stayed == [(0, key.clone())], stays, "{:?}", net.stayed);
        let commands = net.ask(0, 3, &key, Verb::Demote);
        let asked_again = commands.iter().any(|command| matches!(command, ReplicaCommand::Copy { .. }));
        assert!(!asked_again, "a full replica rests: {commands:?}");
    }
}

#[test]
fn what_waits_behind_a_move_finds_the_bytes_gone_and_has_them_fetched() {
    let mut net = three();
    let key = written(&mut net, Protect::Forever);
    let birth = Birth::from_random(7);
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Evict(key.clone(), birth));
    let [ReplicaCommand::Copy { id, to, spare: true, .. }] = &commands[..] else { panic!("{commands:?}") };
    assert_eq!(*to, member(3));
    net.replicas[2].on(NOW, ReplicaEvent::Arrived(key.clone(), vec![InstanceId(5)]));
    let moving = net.replicas[0].on(NOW, ReplicaEvent::Copied(*id, Ok(())));
    let waits = net.ask(
        0,
        9,
        &key,
        Verb::Truncate { cut: crate::shard::Cut::Bytes(Bytes(0)), precondition: Precondition::default() },
    );
    assert!(waits.is_empty(), "{waits:?}");
    net.run(0, moving);
    assert!(matches!(net.answers.last(), Some((RequestId(9), Ok(_)))), "{:?}", net.answers);
    assert_eq!(holders(&net, &key)[0], member(1), "it was fetched first");
}

#[test]
fn who_keeps_a_change_waiting_leaves_the_set_where_enough_stay() {
    let mut net = three();
    let key = net.create(1);
    let commands = copied(&mut net, &key, 5);
    // Node 3 does not answer; the others do.
    let (mut ticket, mut to_second) = (None, None);
    for command in commands {
        match command {
            ReplicaCommand::Persist(id, _) => ticket = Some(id),
            ReplicaCommand::Send(envelope) if envelope.to == member(2) => to_second = Some(envelope),
            _ => {}
        }
    }
    net.replicas[0].on(NOW, ReplicaEvent::Persisted(ticket.unwrap()));
    let commands = net.replicas[1].on(NOW, ReplicaEvent::Peer(to_second.unwrap()));
    net.run(1, commands);
    let soon = net.replicas[0].on(NOW + Millis(4_900), ReplicaEvent::Tick);
    assert!(!soon.iter().any(|command| matches!(command, ReplicaCommand::Propose(_))), "{soon:?}");
    let late = net.replicas[0].on(NOW + Millis(5_000), ReplicaEvent::Tick);
    let proposed = late.iter().find_map(|command| match command {
        ReplicaCommand::Propose(change) => Some(change.clone()),
        _ => None,
    });
    let observers = vec![member(1).node];
    assert_eq!(proposed, Some(Change::Remove { node: member(3).node, observers }));
    let after = net.replicas[0].on(NOW, ReplicaEvent::Set(set(2, &[1, 2], None)));
    let committed = after.iter().any(|command| matches!(command, ReplicaCommand::Shard(Command::Reside(_))));
    assert!(committed, "what the others have is committed: {after:?}");
}

#[test]
fn a_learner_that_does_not_keep_up_is_given_up() {
    let mut net = Net::new(2);
    net.adopt(&set(1, &[1, 2], None));
    let key = net.create(1);
    net.adopt(&set(2, &[1, 2], Some(3)));
    let commands = net.ask(0, 2, &key, write(5));
    net.run(0, commands);
    net.proposed.clear();
    let soon = net.replicas[0].on(NOW + Millis(1_900), ReplicaEvent::Tick);
    assert!(!soon.iter().any(|command| matches!(command, ReplicaCommand::Propose(_))), "{soon:?}");
    let late = net.replicas[0].on(NOW + Millis(2_000), ReplicaEvent::Tick);
    net.run(0, late);
    assert_eq!(net.proposed, [Change::DropLearner]);
}

/// Begins a move of node 1's copy to node 3, which has the bytes; what is left to do.
fn moving(net: &mut Net, key: &SessionKey) -> Vec<ReplicaCommand> {
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Evict(key.clone(), Birth::from_random(7)));
    let [ReplicaCommand::Copy { id, to, spare: true, .. }] = &commands[..] else { panic!("{commands:?}") };
    assert_eq!(*to, member(3));
    net.replicas[2].on(NOW, ReplicaEvent::Arrived(key.clone(), vec![InstanceId(5)]));
    net.replicas[0].on(NOW, ReplicaEvent::Copied(*id, Ok(())))
}

//= GUARANTEES.md#G10
#[test]
fn a_copy_stays_where_its_next_holder_left_before_the_move_was_committed() {
    for (replication, before, after) in [(1, &[1, 3][..], &[1][..]), (2, &[1, 2, 3], &[1, 2])] {
        let mut net = net(3, replication);
        net.adopt(&set(1, before, None));
        let key = written_on(&mut net, Protect::Forever);
        let rest = moving(&mut net, &key).into_iter();
        let to_third = |command: &ReplicaCommand| matches!(command, ReplicaCommand::Send(envelope) if envelope.to == member(3));
        let rest = rest.filter(|command| !to_third(command)).collect();
        net.run(0, rest);
        let commands = net.replicas[0].on(NOW, ReplicaEvent::Set(set(2, after, None)));
        let kept = commands.iter().position(|command| {
            matches!(command, ReplicaCommand::Shard(Command::Retain(kept)) if *kept == [InstanceId(5)])
        });
        let freed = commands.iter().position(|command| {
            matches!(command, ReplicaCommand::Shard(Command::Release(freed)) if *freed == [InstanceId(5)])
        });
        assert!(kept.is_some() && kept < freed, "it never is without a name: {commands:?}");
        net.run(0, commands);
        let manifest = net.replicas[0].manifest(&key).unwrap();
        assert_eq!(manifest.state, crate::session::State::Warm, "{replication}");
        assert_eq!(manifest.holders.len(), replication);
        assert_eq!(manifest.holders[0], member(1));
    }
}

#[test]
fn who_holds_nothing_any_more_makes_nobody_cold() {
    let mut net = three();
    let key = written(&mut net, Protect::For(Millis(0)));
    evict(&mut net, 0, &key);
    assert_eq!(holders(&net, &key), [member(2), member(3)]);
    evict(&mut net, 0, &key);
    assert_eq!(holders(&net, &key), [member(2), member(3)], "a late proposal changes nothing");
    assert_eq!(net.stayed, [(0, key)]);
}

#[test]
fn a_fetch_that_nobody_waits_for_any_more_ends() {
    let mut net = three();
    let key = written(&mut net, Protect::Forever);
    evict(&mut net, 0, &key);
    let commands = net.ask(0, 3, &key, Verb::ReadAll);
    let [ReplicaCommand::Fetch { id, .. }] = &commands[..] else { panic!("{commands:?}") };
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Copied(*id, Err(CopyFailed::NoRoom)));
    assert!(matches!(commands[..], [ReplicaCommand::Reply(RequestId(3), Err(_))]), "{commands:?}");
    for step in 1..100 {
        let commands = net.replicas[0].on(NOW + Millis(50 * step), ReplicaEvent::Tick);
        let fetches = commands.iter().any(|command| matches!(command, ReplicaCommand::Fetch { .. }));
        assert!(!fetches, "{commands:?}");
    }
}

//= GUARANTEES.md#G10
#[test]
fn bytes_that_were_to_be_taken_over_are_the_heads_again_where_that_never_came_to_be() {
    let mut net = net(2, 1);
    net.adopt(&set(1, &[1, 2], None));
    let key = written_on(&mut net, Protect::Forever);
    evict(&mut net, 0, &key);
    assert_eq!(holders(&net, &key), [member(2)]);
    let commands = net.ask(0, 3, &key, Verb::ReadAll);
    let [ReplicaCommand::Fetch { id, .. }] = &commands[..] else { panic!("{commands:?}") };
    // Node 2 prepares that node 1 holds it; node 1 dies before it hears so.
    for command in net.replicas[0].on(NOW, ReplicaEvent::Copied(*id, Ok(()))) {
        if let ReplicaCommand::Send(envelope) = command {
            for command in net.replicas[1].on(NOW, ReplicaEvent::Peer(envelope)) {
                if let ReplicaCommand::Persist(ticket, _) = command {
                    net.replicas[1].on(NOW, ReplicaEvent::Persisted(ticket));
                }
            }
        }
    }
    net.released.clear();
    let commands = net.replicas[1].on(NOW, ReplicaEvent::Set(set(2, &[2], None)));
    net.run(1, commands);
    let manifest = net.replicas[1].manifest(&key).unwrap();
    assert_eq!((manifest.state, &*manifest.holders), (crate::session::State::Warm, &[member(2)][..]));
    assert!(!net.released.contains(&(1, InstanceId(5))), "{:?}", net.released);
}

#[test]
fn only_who_is_silent_is_accused_and_one_who_has_just_come_is_not() {
    let mut net = three();
    let key = net.create(1);
    let mut accused = Vec::new();
    for step in 1..300_u64 {
        let now = NOW + Millis(50 * step);
        let request = Request { id: RequestId(100 + step), key: key.clone(), verb: Verb::Get };
        let mut queue: VecDeque<_> = net.replicas[0].on(now, ReplicaEvent::Request(request)).into();
        queue.extend(net.replicas[0].on(now, ReplicaEvent::Tick));
        while let Some(command) = queue.pop_front() {
            match command {
                ReplicaCommand::Propose(change) => {
                    accused.push(change);
                    queue.extend(net.replicas[0].on(now, ReplicaEvent::ProposalFailed(Generation(1))));
                }
                // Node 2 is silent, node 3 answers at once.
                ReplicaCommand::Send(envelope) if envelope.to == member(3) => {
                    for answer in net.replicas[2].on(now, ReplicaEvent::Peer(envelope)) {
                        if let ReplicaCommand::Send(envelope) = answer {
                            queue.extend(net.replicas[0].on(now, ReplicaEvent::Peer(envelope)));
                        }
                    }
                }
                _ => {}
            }
        }
    }
    assert!((2..20).contains(&accused.len()), "again and again, and no more than once a second: {accused:?}");
    let second = Change::Remove { node: member(2).node, observers: vec![member(1).node] };
    assert!(accused.iter().all(|change| *change == second), "{accused:?}");

    let mut net = Net::new(2);
    net.adopt(&set(1, &[1, 2], None));
    let key = net.create(1);
    drop(copied(&mut net, &key, 5));
    // Node 2 keeps a change waiting; a learner that comes then has done nothing wrong.
    let came = NOW + Millis(2_100);
    net.replicas[0].on(came, ReplicaEvent::Set(set(2, &[1, 2], Some(3))));
    let commands = net.replicas[0].on(came + Millis(1), ReplicaEvent::Tick);
    assert!(!commands.iter().any(|command| matches!(command, ReplicaCommand::Propose(_))), "{commands:?}");
}
