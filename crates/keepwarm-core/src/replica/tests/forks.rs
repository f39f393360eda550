//! Forks whose beginning a catalog refuses at first.

use keepwarm_types::{GpuIndex, LeaseId, Tokens};

use super::*;
use crate::session::{Home, TranscriptDelta};
use crate::shard::{Fork, Turn};

/// A session with a transcript of `tokens` tokens.
fn with_transcript(net: &mut Net, tokens: u32) -> SessionKey {
    let key = net.create(1);
    turn(net, 0, &key, tokens);
    key
}

fn answer(net: &mut Net, at: usize, key: &SessionKey, verb: Verb) -> Option<Result<Box<Answer>, Refusal>> {
    let commands = net.ask(at, 7, key, verb);
    net.run(at, commands);
    let place = net.answers.iter().rposition(|(id, _)| *id == RequestId(7))?;
    Some(net.answers.remove(place).1)
}

fn turn(net: &mut Net, at: usize, key: &SessionKey, tokens: u32) {
    let lease = LeaseId(Uuid::from_u128(5));
    let home = Home { node: member(1).node, gpu: GpuIndex(0) };
    let activate = Verb::Activate { lease, ttl: Millis(10_000), home };
    assert!(matches!(answer(net, at, key, activate), Some(Ok(_))), "it is leased");
    let transcript = TranscriptDelta {
        keep_tokens: Tokens::ZERO,
        keep_messages: 0,
        tokens: (0..tokens).collect(),
        messages: Vec::new(),
    };
    let done = answer(net, at, key, Verb::Turn(Turn { lease, transcript }));
    assert!(matches!(done, Some(Ok(_))), "{done:?}");
    answer(net, at, key, Verb::Release { lease });
}

fn fork() -> Verb {
    Verb::Fork(Fork {
        child: key(2).id,
        birth: Birth::from_random(99),
        length: None,
        labels: None,
        keep_messages: None,
        branch: true,
        lease: None,
    })
}

fn branches(net: &Net, at: usize, key: &SessionKey) -> usize {
    net.replicas[at].manifest(key).unwrap().branches.len()
}

//= GUARANTEES.md#G2
#[test]
fn a_parent_stays_as_it_is_until_its_fork_is_in_every_catalog() {
    let mut net = three();
    let parent = with_transcript(&mut net, 4);
    let before = net.replicas[0].head(&parent);
    net.refuses = Some(0);
    let forked = answer(&mut net, 0, &parent, fork());
    assert!(matches!(forked, Some(Err(Refusal::OutcomeUnknown))), "others have it: {forked:?}");
    assert_eq!(net.replicas[0].head(&parent), before);
    // Nobody changes it now.
    let refused = answer(&mut net, 0, &parent, Verb::Delete);
    assert!(matches!(refused, Some(Err(Refusal::Unavailable(_)))), "{refused:?}");
    let read = answer(&mut net, 0, &parent, Verb::Get);
    assert!(matches!(read, Some(Ok(_))), "it is read all the same: {read:?}");
    net.refuses = None;
    let commands = net.replicas[0].on(NOW + Millis(500), ReplicaEvent::Tick);
    net.run(0, commands);
    for at in 0..3 {
        assert_eq!(net.replicas[at].manifest(&key(2)).map(|child| child.transcript_tokens), Some(Tokens(4)));
        assert_eq!(branches(&net, at, &parent), 1, "the parent lists it where it is");
    }
    assert!(matches!(answer(&mut net, 0, &parent, Verb::Delete), Some(Ok(_))));
}

//= GUARANTEES.md#G2
#[test]
fn a_fork_that_a_new_primary_cannot_have_any_more_never_was() {
    let mut net = three();
    let parent = with_transcript(&mut net, 4);
    // Node 2 never gets it to its disk, and nobody can send it whole.
    (net.refuses, net.lost) = (Some(1), Some(key(2)));
    answer(&mut net, 0, &parent, fork());
    net.adopt(&set(2, &[3, 2], None));
    assert_eq!(net.replicas[2].role(), Role::Primary);
    turn(&mut net, 2, &parent, 9);
    let moved_on = net.replicas[2].head(&parent);
    assert_eq!(net.replicas[1].head(&parent), moved_on);
    net.adopt(&set(3, &[2, 3], None));
    assert!(net.replicas[1].head(&key(2)).is_some(), "its catalog is asked once more");
    let commands = net.replicas[1].on(NOW + Millis(500), ReplicaEvent::Tick);
    net.run(1, commands);
    assert_eq!(net.replicas[1].head(&key(2)), None);
    net.answers.clear();
    let early = answer(&mut net, 1, &key(2), Verb::Get);
    assert!(early.is_none(), "node 3 still has it: {early:?}");
    net.lost = None;
    let commands = net.replicas[1].on(NOW + Millis(1_000), ReplicaEvent::Tick);
    net.run(1, commands);
    assert_eq!(net.replicas[2].head(&key(2)), None);
    let late = net.answers.pop();
    assert!(matches!(late, Some((RequestId(7), Err(Refusal::UnknownSession)))), "{late:?}");
    // The parent was lent for it, and is free.
    turn(&mut net, 1, &parent, 3);
}
