//! Who is to leave, and when it may.

use super::*;

/// Four nodes, one of them to leave, and a session whose bytes are at nodes 1 and 2.
fn four() -> (Net, SessionKey) {
    let mut net = Net::new(4);
    net.adopt(&set(1, &[1, 2, 3, 4], None));
    let key = net.create(1);
    let commands = net.ask(0, 2, &key, write(5));
    net.run(0, commands);
    assert_eq!(holders(&net, &key), [member(1), member(2)]);
    (net, key)
}

fn holders(net: &Net, key: &SessionKey) -> Vec<Member> {
    net.replicas[0].manifest(key).unwrap().holders.to_vec()
}

fn leaves(net: &mut Net, generation: u64, who: u64) -> Vec<ReplicaCommand> {
    net.replicas[0].on(NOW, ReplicaEvent::Leaves(Generation(generation), Some(member(who))))
}

fn removes(who: u64) -> Change {
    Change::Remove { node: member(who).node, observers: Vec::new() }
}

/// The commands without copies of bytes, which are given separately.
fn without_copies(commands: Vec<ReplicaCommand>) -> (Vec<CopyId>, Vec<ReplicaCommand>) {
    let mut copies = Vec::new();
    let mut rest = Vec::new();
    for command in commands {
        match command {
            ReplicaCommand::Copy { id, .. } => copies.push(id),
            other => rest.push(other),
        }
    }
    (copies, rest)
}

//= GUARANTEES.md#G10
#[test]
fn who_is_to_leave_does_once_others_have_what_it_has() {
    let (mut net, key) = four();
    let commands = leaves(&mut net, 1, 2);
    let (copies, rest) = without_copies(commands);
    net.run(0, rest);
    assert_eq!(copies.len(), 1, "the session needs another copy first");
    assert_eq!(net.proposed, []);
    assert_eq!(net.replicas[0].under_replicated(), 0, "for as long as it is there, its copy is one");
    // There is no room yet: it stays.
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Copied(copies[0], Err(CopyFailed::NoRoom)));
    net.run(0, commands);
    for step in 1..15 {
        let commands = net.replicas[0].on(NOW + Millis(50 * step), ReplicaEvent::Tick);
        net.run(0, commands);
    }
    assert_eq!(net.proposed, []);
    for step in 20..60 {
        let commands = net.replicas[0].on(NOW + Millis(50 * step), ReplicaEvent::Tick);
        net.run(0, commands);
    }
    assert_eq!(net.proposed, [removes(2)]);
    let after = holders(&net, &key);
    assert_eq!(after.len(), 2, "{after:?}");
    assert!(after.contains(&member(1)) && !after.contains(&member(2)), "{after:?}");
}

//= GUARANTEES.md#G10
#[test]
fn new_bytes_do_not_go_to_who_is_to_leave() {
    let (mut net, _) = four();
    let commands = leaves(&mut net, 1, 2);
    net.run(0, commands);
    let commands = net.replicas[0].on(NOW + Millis(50), ReplicaEvent::Tick);
    net.run(0, commands);
    assert_eq!(net.proposed, [removes(2)], "the copy was made at once");
    // The registry changes its mind, and may yet hear of it.
    for other in [Some(member(3)), None] {
        let commands = net.replicas[0].on(NOW, ReplicaEvent::Leaves(Generation(1), other));
        assert!(commands.is_empty(), "{commands:?}");
    }
    let key = net.create(3);
    let commands = net.ask(0, 5, &key, write(9));
    net.run(0, commands);
    assert_eq!(holders(&net, &key), [member(1), member(3)]);
    // In the next set nobody leaves until that is said.
    net.proposed.clear();
    net.adopt(&set(2, &[1, 3, 4], None));
    for stale in [(1, 3), (2, 2), (2, 1)] {
        let commands = leaves(&mut net, stale.0, stale.1);
        assert!(
            commands.is_empty(),
            "another set's, one that is not in it, the primary itself: {commands:?}"
        );
    }
    let commands = leaves(&mut net, 2, 4);
    net.run(0, commands);
    assert_eq!(net.proposed, [removes(4)], "nobody counts on its copy");
}

//= GUARANTEES.md#G10
#[test]
fn a_move_that_was_under_way_does_not_end_at_who_is_to_leave() {
    let (mut net, key) = four();
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Evict(key.clone(), Birth::from_random(7)));
    let [ReplicaCommand::Copy { id, to, spare: true, .. }] = &commands[..] else { panic!("{commands:?}") };
    assert_eq!(*to, member(3));
    let commands = leaves(&mut net, 1, 3);
    net.run(0, commands);
    assert_eq!(net.proposed, [removes(3)]);
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Copied(*id, Ok(())));
    net.run(0, commands);
    assert_eq!(holders(&net, &key), [member(1), member(2)]);
    assert_eq!(net.stayed, [(0, key)]);
}

//= GUARANTEES.md#G10
#[test]
fn nobody_leaves_a_set_that_is_as_large_as_replication() {
    let mut net = Net::new(2);
    net.adopt(&set(1, &[1, 2], None));
    let commands = leaves(&mut net, 1, 2);
    assert!(commands.is_empty(), "{commands:?}");
}
