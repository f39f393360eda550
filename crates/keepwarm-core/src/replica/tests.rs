//! Events in, commands out, on a set of three.

mod ceding;
mod damage;
mod forks;
mod leaving;
mod room;

use std::collections::VecDeque;
use std::sync::Arc;

use keepwarm_types::{
    Birth, BlockChecksum, Bytes, Generation, Incarnation, InstanceId, Millis, SessionId, SessionKey,
    ShardCount, ShardId, Timestamp,
};
use uuid::Uuid;

use super::*;
use crate::registry::{Change, Member, ReplicaSet};
use crate::session::{BlockRef, Form, Labels, Layout, Part, Protect};
use crate::shard::{
    Answer, Command, Create, PersistError, Precondition, Refusal, Request, RequestId, Verb, Write, WriteMode,
};

const NOW: Timestamp = Timestamp(1_000);

fn member(n: u64) -> Member {
    Member { node: format!("n{n}").parse().unwrap(), incarnation: Incarnation(n) }
}

fn key(n: u128) -> SessionKey {
    let id = SessionId::new(Uuid::from_u128(0x4000_8000_0000_0000_0000 + n)).unwrap();
    SessionKey::new("acme".parse().unwrap(), id)
}

fn set(generation: u64, replicas: &[u64], learner: Option<u64>) -> Arc<ReplicaSet> {
    let replicas = replicas.iter().map(|n| member(*n)).collect();
    Arc::new(ReplicaSet {
        generation: Generation(generation),
        replicas,
        learner: learner.map(member),
        lost_at: None,
    })
}

/// Replicas that do at once what they are told, but for what a test holds back.
struct Net {
    replicas: Vec<Replica>,
    answers: Vec<(RequestId, Result<Box<Answer>, Refusal>)>,
    held: Vec<(RequestId, Result<Box<Answer>, Refusal>)>,
    proposed: Vec<Change>,
    released: Vec<(usize, InstanceId)>,
    stayed: Vec<(usize, SessionKey)>,
    took: Vec<(usize, Member, Millis)>,
    /// Who has no room to spare.
    full: Vec<Member>,
    /// Whose catalog takes no forks.
    refuses: Option<usize>,
    /// What is sent whole of this session is lost.
    lost: Option<SessionKey>,
}

impl Net {
    fn new(count: u64) -> Self {
        let replica = |n| {
            let settings = ReplicaSettings {
                shard: ShardId(0),
                count: ShardCount::new(1).unwrap(),
                member: member(n),
                begun: 0,
                replication: 2,
                degraded: true,
                cluster: true,
                write_deadline: Millis(5000),
            };
            Replica::new(settings, [], [])
        };
        let replicas = (1..=count).map(replica).collect();
        Self {
            replicas,
            answers: Vec::new(),
            held: Vec::new(),
            proposed: Vec::new(),
            released: Vec::new(),
            stayed: Vec::new(),
            took: Vec::new(),
            full: Vec::new(),
            refuses: None,
            lost: None,
        }
    }

    /// Gives everybody a set.
    fn adopt(&mut self, set: &Arc<ReplicaSet>) {
        for at in 0..self.replicas.len() {
            let commands = self.replicas[at].on(NOW, ReplicaEvent::Set(Arc::clone(set)));
            self.run(at, commands);
        }
    }

    fn ask(&mut self, at: usize, id: u64, key: &SessionKey, verb: Verb) -> Vec<ReplicaCommand> {
        let request = Request { id: RequestId(id), key: key.clone(), verb };
        self.replicas[at].on(NOW, ReplicaEvent::Request(request))
    }

    /// Carries commands out, and whatever follows from them.
    fn run(&mut self, at: usize, commands: Vec<ReplicaCommand>) {
        let mut queue: VecDeque<_> = commands.into_iter().map(|command| (at, command)).collect();
        while let Some((at, command)) = queue.pop_front() {
            let place = |member: &Member| usize::try_from(member.incarnation.0 - 1).unwrap();
            let mut next = Vec::new();
            match command {
                ReplicaCommand::Persist(ticket, records) => {
                    let fork = records.iter().any(|record| saving::parent(record).is_some());
                    let refused = fork && self.refuses == Some(at);
                    next.push((
                        at,
                        if refused {
                            ReplicaEvent::PersistFailed(ticket, PersistError::NotApplied, records)
                        } else {
                            ReplicaEvent::Persisted(ticket)
                        },
                    ));
                }
                ReplicaCommand::Send(Envelope { message: Message::Install(install), .. })
                | ReplicaCommand::SendWhole(Envelope { message: Message::Install(install), .. })
                    if self.lost.as_ref() == Some(&install.key) => {}
                ReplicaCommand::Send(envelope) | ReplicaCommand::SendWhole(envelope) => {
                    if place(&envelope.to) < self.replicas.len() {
                        next.push((place(&envelope.to), ReplicaEvent::Peer(envelope)));
                    }
                }
                ReplicaCommand::Copy { id, to, spare: true, .. } if self.full.contains(&to) => {
                    next.push((at, ReplicaEvent::Copied(id, Err(CopyFailed::NoRoom))));
                }
                ReplicaCommand::Copy { id, to, key, blocks, .. } => {
                    let instances = blocks.iter().map(|block| block.instance).collect();
                    next.push((place(&to), ReplicaEvent::Arrived(key, instances)));
                    next.push((at, ReplicaEvent::Copied(id, Ok(()))));
                }
                ReplicaCommand::Fetch { id, .. } => next.push((at, ReplicaEvent::Copied(id, Ok(())))),
                ReplicaCommand::Reply(id, answer) => self.answers.push((id, answer)),
                ReplicaCommand::Hold(id, answer) => self.held.push((id, answer)),
                ReplicaCommand::Deliver(id) => {
                    let place = self.held.iter().position(|(held, _)| *held == id).unwrap();
                    self.answers.push(self.held.remove(place));
                }
                ReplicaCommand::Refuse(id, refusal) => {
                    self.held.retain(|(held, _)| *held != id);
                    self.answers.push((id, Err(refusal)));
                }
                ReplicaCommand::Propose(change) => self.proposed.push(change),
                ReplicaCommand::Shard(Command::Release(instances)) => {
                    self.released.extend(instances.into_iter().map(|instance| (at, instance)));
                }
                ReplicaCommand::Stays(key) => self.stayed.push((at, key)),
                ReplicaCommand::Took(member, delay) => self.took.push((at, member, delay)),
                ReplicaCommand::Shard(_) | ReplicaCommand::ConfirmRegistry { .. } => {}
            }
            for (at, event) in next {
                let commands = self.replicas[at].on(NOW, event);
                self.replicas[at].validate();
                queue.extend(commands.into_iter().map(|command| (at, command)));
            }
        }
    }

    fn create(&mut self, n: u128) -> SessionKey {
        let part = Part { name: "b".parse().unwrap(), form: Form::Bytes { block_bytes: 8 }, cold: None };
        let create = Create {
            layout: Arc::new(Layout::new("m", "f", vec![part]).unwrap()),
            birth: Birth::from_random(7),
            protect: Protect::Forever,
            ttl: None,
            labels: Labels::new(),
        };
        let key = key(n);
        let commands = self.ask(0, 1, &key, Verb::Create(create));
        self.run(0, commands);
        assert!(matches!(self.answers.pop(), Some((RequestId(1), Ok(_)))), "it is made");
        key
    }
}

fn write(instance: u64) -> Verb {
    Verb::Write(Write {
        part: "b".to_owned(),
        birth: Birth::from_random(7),
        tail: None,
        mode: WriteMode::Replace,
        precondition: Precondition::default(),
        txn: None,
        first_block: 0,
        blocks: vec![BlockRef {
            instance: InstanceId(instance),
            checksum: BlockChecksum::from_u128(1),
            length: 8,
        }],
        length: Bytes(8),
        digest: None,
        asked: 0,
    })
}

fn sent(commands: &[ReplicaCommand]) -> Vec<(&Member, &Message)> {
    let mut sent = Vec::new();
    for command in commands {
        if let ReplicaCommand::Send(envelope) = command {
            sent.push((&envelope.to, &envelope.message));
        }
    }
    sent
}

fn three() -> Net {
    let mut net = Net::new(3);
    net.adopt(&set(1, &[1, 2, 3], None));
    net
}

/// The write's bytes are at their holder: what the primary does next.
fn copied(net: &mut Net, key: &SessionKey, instance: u64) -> Vec<ReplicaCommand> {
    let commands = net.ask(0, 2, key, write(instance));
    assert!(sent(&commands).is_empty(), "nobody is told before the bytes are there");
    let copies: Vec<_> = commands
        .iter()
        .filter_map(|command| match command {
            ReplicaCommand::Copy { id, to, .. } => Some((*id, to.clone())),
            _ => None,
        })
        .collect();
    let [(id, to)] = &copies[..] else { panic!("one other holder: {copies:?}") };
    assert_eq!(*to, member(2));
    net.replicas[1].on(NOW, ReplicaEvent::Arrived(key.clone(), vec![InstanceId(instance)]));
    net.replicas[0].on(NOW, ReplicaEvent::Copied(*id, Ok(())))
}

//= GUARANTEES.md#G10
#[test]
fn bytes_go_first_then_the_change_and_the_last_acknowledgement_commits() {
    let mut net = three();
    let key = net.create(1);
    let commands = copied(&mut net, &key, 5);
    let told: Vec<_> = sent(&commands).into_iter().map(|(to, _)| to.clone()).collect();
    assert_eq!(told, [member(2), member(3)]);
    let mut replies = Vec::new();
    for command in commands {
        match command {
            ReplicaCommand::Persist(ticket, _) => {
                let after = net.replicas[0].on(NOW, ReplicaEvent::Persisted(ticket));
                assert!(after.is_empty(), "the own catalog alone is not enough: {after:?}");
            }
            ReplicaCommand::Send(envelope) => {
                let at = usize::try_from(envelope.to.incarnation.0 - 1).unwrap();
                for command in net.replicas[at].on(NOW, ReplicaEvent::Peer(envelope)) {
                    let ReplicaCommand::Persist(ticket, _) = command else { continue };
                    replies.extend(net.replicas[at].on(NOW, ReplicaEvent::Persisted(ticket)));
                }
            }
            _ => {}
        }
    }
    let [ReplicaCommand::Send(first), ReplicaCommand::Send(last)] = &replies[..] else {
        panic!("two acknowledgements: {replies:?}")
    };
    let later = NOW + Millis(70);
    let after = net.replicas[0].on(later, ReplicaEvent::Peer(first.clone()));
    let [ReplicaCommand::Took(who, delay)] = &after[..] else { panic!("one of two: {after:?}") };
    assert_eq!((who, *delay), (&first.from, Millis(70)));
    let after = net.replicas[0].on(later, ReplicaEvent::Peer(first.clone()));
    assert!(after.is_empty(), "said twice, it is the same: {after:?}");
    let after = net.replicas[0].on(later, ReplicaEvent::Peer(last.clone()));
    let answered = after.iter().any(|command| matches!(command, ReplicaCommand::Reply(RequestId(2), Ok(_))));
    assert!(answered, "{after:?}");
}

//= GUARANTEES.md#G11
#[test]
fn a_primary_of_an_earlier_generation_is_told_so_and_not_obeyed() {
    let mut net = three();
    let key = net.create(1);
    let commands = copied(&mut net, &key, 5);
    net.replicas[2].on(NOW, ReplicaEvent::Set(set(2, &[2, 3], None)));
    let before = net.replicas[2].head(&key);
    let to_third = commands.into_iter().find_map(|command| match command {
        ReplicaCommand::Send(envelope) if envelope.to == member(3) => Some(envelope),
        _ => None,
    });
    let answer = net.replicas[2].on(NOW, ReplicaEvent::Peer(to_third.unwrap()));
    let [ReplicaCommand::Send(stale)] = &answer[..] else { panic!("{answer:?}") };
    assert_eq!((&stale.message, stale.set.generation), (&Message::Stale, Generation(2)));
    assert_eq!(net.replicas[2].head(&key), before);
    let after = net.replicas[0].on(NOW, ReplicaEvent::Peer(stale.clone()));
    let unknown = |command: &ReplicaCommand| {
        matches!(command, ReplicaCommand::Reply(RequestId(2), Err(Refusal::OutcomeUnknown)))
    };
    assert!(after.iter().any(unknown), "others may have it: {after:?}");
    assert_ne!(net.replicas[0].role(), Role::Primary);
}

//= GUARANTEES.md#G11
#[test]
fn a_new_primary_installs_what_differs_and_others_drop_what_it_lacks() {
    let mut net = three();
    let key = net.create(1);
    // The third alone takes a change and a session that the first never acknowledged to anybody.
    let commands = copied(&mut net, &key, 5);
    for command in commands {
        if let ReplicaCommand::Send(envelope) = command
            && envelope.to == member(3)
        {
            for command in net.replicas[2].on(NOW, ReplicaEvent::Peer(envelope)) {
                if let ReplicaCommand::Persist(ticket, _) = command {
                    net.replicas[2].on(NOW, ReplicaEvent::Persisted(ticket));
                }
            }
        }
    }
    let committed = net.replicas[1].head(&key);
    assert_ne!(net.replicas[2].head(&key), committed);
    let gone = net.replicas.remove(0);
    assert_eq!(gone.role(), Role::Primary);
    net.replicas.insert(0, Net::new(1).replicas.remove(0));
    net.adopt(&set(2, &[2, 3], None));
    assert_eq!(net.replicas[1].role(), Role::Primary);
    assert_eq!(net.replicas[2].head(&key), committed, "what the new primary has wins");
}

//= GUARANTEES.md#G11
#[test]
fn an_answer_is_kept_until_every_secondary_has_confirmed_the_generation() {
    let mut net = three();
    let key = net.create(1);
    let commands = net.ask(0, 3, &key, Verb::Get);
    assert!(commands.iter().any(|command| matches!(command, ReplicaCommand::Hold(RequestId(3), Ok(_)))));
    let mut confirmed = Vec::new();
    for command in commands {
        if let ReplicaCommand::Send(envelope) = command {
            let at = usize::try_from(envelope.to.incarnation.0 - 1).unwrap();
            confirmed.extend(net.replicas[at].on(NOW, ReplicaEvent::Peer(envelope)));
        }
    }
    let [ReplicaCommand::Send(one), ReplicaCommand::Send(two)] = &confirmed[..] else {
        panic!("{confirmed:?}")
    };
    assert!(net.replicas[0].on(NOW, ReplicaEvent::Peer(one.clone())).is_empty());
    let after = net.replicas[0].on(NOW, ReplicaEvent::Peer(two.clone()));
    assert!(matches!(after[..], [ReplicaCommand::Deliver(RequestId(3))]), "{after:?}");
}

//= GUARANTEES.md#G11
#[test]
fn a_learner_is_proposed_only_when_it_has_every_manifest() {
    let mut net = Net::new(2);
    net.adopt(&set(1, &[1], None));
    let commands = net.ask(0, 9, &key(9), Verb::Get);
    net.run(0, commands);
    net.create(1);
    net.create(2);
    let joint = set(2, &[1], Some(2));
    net.replicas[1].on(NOW, ReplicaEvent::Set(Arc::clone(&joint)));
    let commands = net.replicas[0].on(NOW, ReplicaEvent::Set(joint));
    let proposes = |command: &ReplicaCommand| matches!(command, ReplicaCommand::Propose(_));
    assert!(!commands.iter().any(proposes), "it has nothing yet");
    net.run(0, commands);
    assert_eq!(net.proposed, [Change::Promote]);
    for n in 1..=2 {
        assert_eq!(net.replicas[1].head(&key(n)), net.replicas[0].head(&key(n)));
    }
}

//= GUARANTEES.md#G10
#[test]
fn what_is_sent_whole_has_the_change_that_is_on_its_way() {
    let mut net = Net::new(4);
    net.adopt(&set(1, &[1, 2, 3], None));
    let key = net.create(1);
    let change = copied(&mut net, &key, 5);
    assert!(!change.is_empty(), "nobody has it yet");
    let next = set(2, &[1, 2, 3], Some(4));
    net.replicas[3].on(NOW, ReplicaEvent::Set(Arc::clone(&next)));
    let mut needs = Vec::new();
    for command in net.replicas[0].on(NOW, ReplicaEvent::Set(next)) {
        if let ReplicaCommand::Send(envelope) = command
            && envelope.to == member(4)
            && matches!(envelope.message, Message::Prepare(_))
        {
            needs.extend(net.replicas[3].on(NOW, ReplicaEvent::Peer(envelope)));
        }
    }
    let [ReplicaCommand::Send(need)] = &needs[..] else { panic!("{needs:?}") };
    assert!(matches!(need.message, Message::NeedWhole { .. }), "{need:?}");
    let whole = net.replicas[0].on(NOW, ReplicaEvent::Peer(need.clone()));
    let [(_, Message::Install(install))] = &sent(&whole)[..] else { panic!("{whole:?}") };
    assert_eq!(install.content.head(), net.replicas[0].head(&key), "not what was before it");
}

//= GUARANTEES.md#G11
#[test]
fn a_comparison_that_comes_late_drops_nothing_that_came_since() {
    let mut net = Net::new(2);
    let one = set(1, &[1, 2], None);
    net.replicas[1].on(NOW, ReplicaEvent::Set(Arc::clone(&one)));
    let first = net.replicas[0].on(NOW, ReplicaEvent::Set(one));
    let [ReplicaCommand::Send(late)] = &first[..] else { panic!("{first:?}") };
    let late = late.clone();
    net.run(0, first);
    let key = net.create(1);
    assert!(net.replicas[1].head(&key).is_some());
    net.replicas[1].on(NOW, ReplicaEvent::Peer(late));
    assert_eq!(net.replicas[1].head(&key), net.replicas[0].head(&key));
}

//= GUARANTEES.md#G10
#[test]
fn a_busy_primary_looks_at_what_is_late_all_the_same() {
    let mut net = three();
    let key = net.create(1);
    // The learner never hears the comparison, and the session is read every 5 ms.
    net.replicas[0].on(NOW, ReplicaEvent::Set(set(2, &[1, 2, 3], Some(4))));
    let asked = |command: &ReplicaCommand| {
        let ReplicaCommand::Send(envelope) = command else { return false };
        envelope.to == member(4) && matches!(envelope.message, Message::Compare(_))
    };
    let (mut now, mut id, mut asks) = (NOW, 10, 0);
    while now < NOW + Millis(2_000) {
        now = now + Millis(5);
        id += 1;
        let request = Request { id: RequestId(id), key: key.clone(), verb: Verb::Get };
        let mut commands = net.replicas[0].on(now, ReplicaEvent::Request(request));
        if net.replicas[0].next_deadline() <= now {
            commands.extend(net.replicas[0].on(now, ReplicaEvent::Tick));
        }
        asks += commands.iter().filter(|command| asked(command)).count();
    }
    assert!((4..=7).contains(&asks), "once every RESEND: {asks}");
}
