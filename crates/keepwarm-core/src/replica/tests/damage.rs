//! Copies that are found damaged.

use keepwarm_types::ColdReason;

use super::*;
use crate::session::State;

/// A session with a block of eight bytes, on nodes 1 and 2 of three.
fn written() -> (Net, SessionKey) {
    let mut net = three();
    let key = net.create(1);
    let commands = net.ask(0, 2, &key, write(5));
    net.run(0, commands);
    net.answers.clear();
    assert_eq!(net.replicas[0].manifest(&key).unwrap().holders[..], [member(1), member(2)]);
    (net, key)
}

fn condemn(net: &mut Net, id: u64, key: &SessionKey, damaged: u64) {
    let birth = net.replicas[0].manifest(key).map_or(Birth::from_random(7), |manifest| manifest.birth);
    let commands = net.ask(0, id, key, Verb::Condemn { birth, damaged: InstanceId(damaged) });
    net.run(0, commands);
}

//= GUARANTEES.md#G5
#[test]
fn a_damaged_copy_makes_way_for_another_holders() {
    let (mut net, key) = written();
    condemn(&mut net, 3, &key, 5);
    assert!(matches!(net.answers.last(), Some((RequestId(3), Ok(_)))), "{:?}", net.answers);
    let manifest = net.replicas[0].manifest(&key).unwrap();
    assert_eq!(manifest.state, State::Warm);
    assert!(net.released.contains(&(0, InstanceId(5))), "the damaged bytes are gone: {:?}", net.released);
    let commands = net.ask(0, 4, &key, Verb::ReadAll);
    net.run(0, commands);
    assert!(matches!(net.answers.last(), Some((RequestId(4), Ok(_)))), "{:?}", net.answers);
    let manifest = net.replicas[0].manifest(&key).unwrap();
    assert_eq!(manifest.holders[..], [member(1), member(2)], "as many copies as before, from the whole one");
}

//= GUARANTEES.md#G5
#[test]
fn the_only_copy_that_is_damaged_makes_the_session_cold() {
    let (mut net, key) = written();
    net.adopt(&set(2, &[1], None));
    condemn(&mut net, 3, &key, 5);
    let manifest = net.replicas[0].manifest(&key).unwrap();
    assert_eq!(manifest.state, State::Cold(ColdReason::Corrupt));
    assert!(manifest.holders.is_empty());
}

#[test]
fn a_block_that_the_session_names_no_more_condemns_nothing() {
    let (mut net, key) = written();
    for replicas in [&[1, 2, 3][..], &[1]] {
        net.adopt(&set(replicas.len() as u64 + 4, replicas, None));
        condemn(&mut net, 3, &key, 4);
        assert!(matches!(net.answers.pop(), Some((RequestId(3), Ok(_)))), "{:?}", net.answers);
        let manifest = net.replicas[0].manifest(&key).unwrap();
        assert_eq!((manifest.state, &manifest.holders[0]), (State::Warm, &member(1)));
    }
}

//= GUARANTEES.md#G5
#[test]
fn what_is_found_damaged_of_an_earlier_state_condemns_nothing() {
    let (mut net, key) = written();
    let alone = set(2, &[1, 3], None);
    net.replicas[2].on(NOW, ReplicaEvent::Set(Arc::clone(&alone)));
    let mut copy = None;
    let mut queue: VecDeque<_> = net.replicas[0].on(NOW, ReplicaEvent::Set(alone)).into();
    for step in 0..100 {
        queue.extend(net.replicas[0].on(NOW + Millis(50 * step), ReplicaEvent::Tick));
        let (copies, rest): (Vec<_>, Vec<_>) =
            queue.drain(..).partition(|command| matches!(command, ReplicaCommand::Copy { .. }));
        copy = copy.or(copies.into_iter().next());
        net.run(0, rest);
    }
    let Some(ReplicaCommand::Copy { id, .. }) = copy else { panic!("it is healed") };
    let cut =
        Verb::Truncate { cut: crate::shard::Cut::Bytes(Bytes(4)), precondition: Precondition::default() };
    let commands = net.ask(0, 8, &key, cut);
    net.run(0, commands);
    let head = net.replicas[0].head(&key);
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Copied(id, Err(CopyFailed::Damaged)));
    net.run(0, commands);
    assert_eq!(net.replicas[0].head(&key), head);
    assert_eq!(net.replicas[0].manifest(&key).unwrap().state, State::Warm);
}

//= GUARANTEES.md#G5
#[test]
fn a_move_that_finds_this_nodes_copy_damaged_takes_nothing_from_the_others() {
    let (mut net, key) = written();
    let birth = net.replicas[0].manifest(&key).unwrap().birth;
    // Node 2 has no room; the copy for node 3 is sent from here.
    net.full = Vec::new();
    let commands = net.replicas[1].on(NOW, ReplicaEvent::Evict(key.clone(), birth));
    let [ReplicaCommand::Send(envelope)] = &commands[..] else { panic!("{commands:?}") };
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Peer(envelope.clone()));
    let [ReplicaCommand::Copy { id, .. }] = &commands[..] else { panic!("{commands:?}") };
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Copied(*id, Err(CopyFailed::Damaged)));
    net.run(0, commands);
    let manifest = net.replicas[0].manifest(&key).unwrap();
    assert_eq!((manifest.state, manifest.holders.contains(&member(2))), (State::Warm, true));
    assert!(net.released.contains(&(0, InstanceId(5))), "{:?}", net.released);
}

//= GUARANTEES.md#G5
#[test]
fn what_is_found_damaged_as_it_is_copied_to_another_is_not_copied_for_ever() {
    let (mut net, key) = written();
    // Node 2 leaves: the bytes go to node 3, and are damaged here.
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Set(set(2, &[1, 3], None)));
    net.replicas[2].on(NOW, ReplicaEvent::Set(set(2, &[1, 3], None)));
    let mut queue: VecDeque<_> = commands.into();
    let mut copies = 0;
    for step in 0..100 {
        let now = NOW + Millis(50 * step);
        queue.extend(net.replicas[0].on(now, ReplicaEvent::Tick));
        let mut rest = Vec::new();
        while let Some(command) = queue.pop_front() {
            match command {
                ReplicaCommand::Copy { id, .. } => {
                    copies += 1;
                    queue.extend(net.replicas[0].on(now, ReplicaEvent::Copied(id, Err(CopyFailed::Damaged))));
                }
                other => rest.push(other),
            }
        }
        net.run(0, rest);
    }
    assert_eq!(copies, 1);
    assert_eq!(net.replicas[0].manifest(&key).unwrap().state, State::Cold(ColdReason::Corrupt));
}
