//! A shard that goes to another replica where one of its sessions shall run.

use super::*;

fn proposes(commands: &[ReplicaCommand]) -> Vec<&Change> {
    let mut changes = Vec::new();
    for command in commands {
        if let ReplicaCommand::Propose(change) = command {
            changes.push(change);
        }
    }
    changes
}

fn reply(commands: &[ReplicaCommand], id: u64) -> Result<(), Refusal> {
    let of = |command: &ReplicaCommand| match command {
        ReplicaCommand::Reply(RequestId(found), answer) if *found == id => Some(answer.clone()),
        _ => None,
    };
    commands.iter().find_map(of).expect("it is answered").map(|_| ())
}

fn cede(to: u64) -> Verb {
    Verb::Cede(member(to).node)
}

fn activate() -> Verb {
    let home = crate::session::Home { node: member(1).node, gpu: keepwarm_types::GpuIndex(0) };
    Verb::Activate { lease: keepwarm_types::LeaseId(Uuid::from_u128(9)), ttl: Millis(30_000), home }
}

fn conflict(answer: Result<(), Refusal>, about: &str) {
    let Err(Refusal::Conflict(why)) = answer else { panic!("{answer:?}") };
    assert!(why.contains(about), "{why}");
}

//= GUARANTEES.md#G11
#[test]
fn a_shard_is_ceded_when_none_of_its_sessions_is_at_work_and_none_begins_until_that_is_known() {
    let mut net = three();
    let (key, other) = (net.create(1), net.create(2));
    for (to, about) in [(1, "has no replica"), (7, "has no replica")] {
        let commands = net.ask(0, 50, &key, cede(to));
        conflict(reply(&commands, 50), about);
    }
    assert_eq!(reply(&net.ask(0, 51, &super::key(9), cede(2)), 51), Err(Refusal::UnknownSession));
    assert_eq!(reply(&net.ask(1, 52, &key, cede(2)), 52), Err(Refusal::Moving("another node owns it")));

    // A lease of its own, then another's.
    let commands = net.ask(0, 53, &other, activate());
    net.run(0, commands);
    assert!(matches!(reply(&net.ask(0, 54, &other, cede(2)), 54), Err(Refusal::Leased { .. })));
    conflict(reply(&net.ask(0, 55, &key, cede(2)), 55), "leased (1)");
    let lease = keepwarm_types::LeaseId(Uuid::from_u128(9));
    let commands = net.ask(0, 56, &other, Verb::Release { lease });
    net.run(0, commands);
    // A change on its way.
    let held = net.ask(0, 57, &other, write(5));
    conflict(reply(&net.ask(0, 58, &key, cede(2)), 58), "changes of its shard's sessions");
    net.run(0, held);

    let commands = net.ask(0, 60, &key, cede(2));
    assert_eq!(proposes(&commands), [&Change::MakePrimary(member(2).node)]);
    assert_eq!(reply(&commands, 60), Ok(()));
    for verb in [activate(), write(6), Verb::Delete, cede(3)] {
        let waits = net.ask(0, 61, &key, verb);
        assert_eq!(reply(&waits, 61), Err(Refusal::Moving("its shard goes to another node")));
        assert_eq!(waits.len(), 1, "and nothing else: {waits:?}");
    }
    let reads = net.ask(0, 62, &key, Verb::Get);
    net.run(0, reads);
    assert!(matches!(net.answers.last(), Some((RequestId(62), Ok(_)))), "{:?}", net.answers);

    // One of a generation before was refused: that says nothing of this one.
    let commands = net.replicas[0].on(NOW, ReplicaEvent::ProposalFailed(Generation(0)));
    net.run(0, commands);
    assert_eq!(
        reply(&net.ask(0, 70, &key, write(6)), 70),
        Err(Refusal::Moving("its shard goes to another node"))
    );
    // The registry refused it: all goes on.
    let commands = net.replicas[0].on(NOW, ReplicaEvent::ProposalFailed(Generation(1)));
    net.run(0, commands);
    let commands = net.ask(0, 64, &key, write(7));
    net.run(0, commands);
    assert!(
        net.answers.iter().any(|(id, answer)| *id == RequestId(64) && answer.is_ok()),
        "{:?}",
        net.answers
    );

    // It took it: the other one answers.
    let commands = net.ask(0, 65, &key, cede(2));
    assert_eq!(reply(&commands, 65), Ok(()));
    net.adopt(&set(2, &[2, 1, 3], None));
    let commands = net.ask(1, 66, &key, activate());
    net.run(1, commands);
    assert!(
        net.answers.iter().any(|(id, answer)| *id == RequestId(66) && answer.is_ok()),
        "{:?}",
        net.answers
    );
    assert_eq!(reply(&net.ask(0, 67, &key, activate()), 67), Err(Refusal::Moving("another node owns it")));
}

#[test]
fn a_proposal_to_cede_that_nobody_answers_is_over_after_a_while() {
    let mut net = three();
    let key = net.create(1);
    assert_eq!(reply(&net.ask(0, 1, &key, cede(3)), 1), Ok(()));
    assert!(reply(&net.ask(0, 2, &key, write(5)), 2).is_err());
    assert!(net.replicas[0].next_deadline() <= NOW + Millis(5000), "it looks again by itself");
    let commands = net.replicas[0].on(NOW + Millis(5000), ReplicaEvent::Tick);
    net.run(0, commands);
    let request = Request { id: RequestId(3), key, verb: write(5) };
    let commands = net.replicas[0].on(NOW + Millis(5001), ReplicaEvent::Request(request));
    net.run(0, commands);
    assert!(
        net.answers.iter().any(|(id, answer)| *id == RequestId(3) && answer.is_ok()),
        "{:?}",
        net.answers
    );
}
