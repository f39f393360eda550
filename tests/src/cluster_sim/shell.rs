//! What the shell of a node does: it gives events to its replicas and carries their commands out.

use std::panic::{AssertUnwindSafe, catch_unwind};

use keepwarm_core::registry::Entry;
use keepwarm_core::replica::{Content, Envelope, Message, Replica, ReplicaCommand, ReplicaEvent};
use keepwarm_core::session::TranscriptDelta;
use keepwarm_core::shard::{Answer, Command, Record, Refusal, Request, RequestId, Verb};
use keepwarm_types::{ColdReason, InstanceId, SessionKey, ShardId, Timestamp, Tokens};

use super::bug::Bug;
use super::invariants;
use super::node::Asked;
use super::world::{Happening, Local, Pins, Proposer, Reply, Transfer, World, word};

impl World {
    /// A client's request reaches a process.
    pub fn request(&mut self, at: usize, call: u64, key: SessionKey, verb: Verb, brought: Vec<InstanceId>) {
        let shard = self.keys.shard(&key);
        let Some(process) = &mut self.nodes[at].process else { return };
        if process.replicas.is_empty() {
            // Not registered yet: it does not listen.
            return self.lose(call);
        }
        process.next += 1;
        let id = RequestId(process.next);
        process.asked.insert(id, Asked { call, key: key.clone(), brought });
        let verb = match verb {
            Verb::GoCold { birth, .. } => {
                let now = self.now;
                self.promises.evicting(&key, birth, now);
                verb
            }
            Verb::Condemn { birth, .. } => {
                let member = process.member.clone();
                self.promises.damaged.extend(member.map(|member| (key.clone(), birth, member)));
                if self.bug(Bug::DamageTakenForLoss) {
                    Verb::GoCold { birth, reason: ColdReason::Corrupt, force: true }
                } else {
                    verb
                }
            }
            other => other,
        };
        self.on(at, shard, ReplicaEvent::Request(Request { id, key, verb }));
    }

    /// Gives a replica an event and carries its commands out.
    pub fn on(&mut self, at: usize, shard: ShardId, event: ReplicaEvent) {
        let now = self.now;
        let node = &mut self.nodes[at];
        let Some(process) = &mut node.process else { return };
        let (life, clock) = (process.life, node.clock);
        let Some(replica) = process.replicas.get_mut(&shard) else { return };
        let happened = if self.options.traced || self.options.verbose { shown(&event) } else { None };
        let step = AssertUnwindSafe(|| {
            let commands = replica.on(clock.shows(now), event);
            replica.validate();
            commands
        });
        let commands = match catch_unwind(step) {
            Ok(commands) => commands,
            Err(panic) => {
                let why = panic.downcast_ref::<String>().cloned();
                let why = why.or_else(|| panic.downcast_ref::<&str>().map(|why| (*why).to_owned()));
                let why = format!("n{} {shard}: the core panicked: {}", at + 1, why.unwrap_or_default());
                return self.check(Err(why));
            }
        };
        if let Some(happened) = happened {
            let generation =
                self.replica(at, shard).map(|replica| (replica.set().generation, replica.role()));
            self.say(|| format!("  n{} {shard} {generation:?} {happened}", at + 1));
        }
        for command in commands {
            self.carry_out(at, life, shard, command);
        }
        self.schedule(at, shard);
    }

    #[must_use]
    pub fn replica(&self, at: usize, shard: ShardId) -> Option<&Replica> {
        self.nodes[at].process.as_ref()?.replicas.get(&shard)
    }

    fn schedule(&mut self, at: usize, shard: ShardId) {
        let (now, clock) = (self.now, self.nodes[at].clock);
        let Some(process) = &mut self.nodes[at].process else { return };
        let Some(replica) = process.replicas.get(&shard) else { return };
        let due = replica.next_deadline();
        if due == Timestamp::NEVER {
            return;
        }
        let wait = clock.until(now, due);
        let (due, life) = (Timestamp(now.0.saturating_add(wait)), process.life);
        if process.ticks.get(&shard).is_none_or(|planned| due < *planned) {
            process.ticks.insert(shard, due);
            self.after(wait, Happening::At { node: at, life, what: Local::Tick(shard) });
        }
    }

    pub fn tick(&mut self, at: usize, shard: ShardId) {
        let now = self.now;
        let Some(process) = &mut self.nodes[at].process else { return };
        // An earlier one was planned since, and plans the next.
        if process.ticks.get(&shard).is_some_and(|planned| *planned <= now) {
            process.ticks.remove(&shard);
            self.on(at, shard, ReplicaEvent::Tick);
        }
    }

    fn carry_out(&mut self, at: usize, life: u64, shard: ShardId, command: ReplicaCommand) {
        match command {
            ReplicaCommand::Shard(command) => self.keep(at, command),
            ReplicaCommand::Persist(ticket, records) => {
                for record in &records {
                    if let Record::Manifest(manifest, _) = record {
                        self.promises.placed(manifest);
                    }
                }
                self.free_early(at, shard, &records);
                self.nodes[at].disk.submit(shard, ticket, records);
                if !self.nodes[at].disk.syncing {
                    self.nodes[at].disk.syncing = true;
                    let wait = 1 + self.below(8);
                    self.after(wait, Happening::At { node: at, life, what: Local::Sync });
                }
            }
            ReplicaCommand::Reply(id, result) => {
                let pins = self.ready(at, &result);
                self.answer(at, shard, id, result, pins);
            }
            ReplicaCommand::Hold(id, result) => {
                let pins = self.ready(at, &result);
                if let Some(process) = &mut self.nodes[at].process {
                    process.held.insert(id, (result, pins));
                }
            }
            ReplicaCommand::Deliver(id) => {
                let held = self.nodes[at].process.as_mut().and_then(|process| process.held.remove(&id));
                match held {
                    Some((result, pins)) => self.answer(at, shard, id, result, pins),
                    None => self.check(Err(format!("n{}: {id:?} is delivered and was not held", at + 1))),
                }
            }
            ReplicaCommand::Refuse(id, refusal) => {
                let held = self.nodes[at].process.as_mut().and_then(|process| process.held.remove(&id));
                let instances = held.map(|(_, pins)| pins).unwrap_or_default();
                self.unpin(&Pins { at, life, instances });
                self.answer(at, shard, id, Err(refusal), Vec::new());
            }
            ReplicaCommand::Send(envelope) => self.send(at, envelope),
            ReplicaCommand::SendWhole(envelope) => self.send_whole(at, envelope),
            ReplicaCommand::Copy { id, to: target, key, blocks, spare, .. } => {
                let source = self.nodes[at].member().cloned().expect("a replica has a member");
                let (fetched, pinned) = (false, false);
                let transfer = Transfer { id, shard, key, blocks, source, target, fetched, spare, pinned };
                self.transfer(at, transfer);
            }
            ReplicaCommand::Fetch { id, from: source, key, blocks, spare, .. } => {
                let target = self.nodes[at].member().cloned().expect("a replica has a member");
                let (fetched, pinned) = (true, false);
                let transfer = Transfer { id, shard, key, blocks, source, target, fetched, spare, pinned };
                self.transfer(at, transfer);
            }
            // There is no residency here: whoever proposes does so at random. Nobody is replaced for being slow.
            ReplicaCommand::Stays(_) | ReplicaCommand::Took(..) => {}
            ReplicaCommand::Propose(change) => {
                let Some(generation) = self.replica(at, shard).map(|replica| replica.set().generation) else {
                    return;
                };
                let entry = Entry::Change { shard, generation, change };
                self.propose(entry, Some(Proposer { node: at, life, shard: Some(shard) }));
            }
            ReplicaCommand::ConfirmRegistry { round } => {
                let Some(generation) = self.replica(at, shard).map(|replica| replica.set().generation) else {
                    return;
                };
                let wait = 1 + self.below(10);
                self.after(wait, Happening::Look { node: at, life, shard, generation, round });
            }
        }
    }

    /// Memory follows what the shard says of names.
    fn keep(&mut self, at: usize, command: Command) {
        let mut absent = None;
        let Some(process) = &mut self.nodes[at].process else { return };
        match command {
            Command::Adopt(_, instances) | Command::Retain(instances) => {
                absent = instances.into_iter().find(|instance| !process.memory.name(*instance));
            }
            Command::Release(instances) => {
                instances.into_iter().for_each(|instance| process.memory.unname(instance));
            }
            Command::Persist(..) | Command::Reply(..) | Command::Again(_) => {
                self.check(Err("a command that the replica takes for itself".to_owned()));
            }
            Command::Reside(_) | Command::Invalidate(..) | Command::Ended(_) => {}
        }
        if let Some(instance) = absent {
            self.check(Err(format!("n{}: {instance:?} gets a name and is not there", at + 1)));
        }
    }

    /// Pins what an answer lets its receiver read.
    fn ready(&mut self, at: usize, result: &Result<Box<Answer>, Refusal>) -> Vec<InstanceId> {
        let instances = result.as_ref().map(|answer| readable(answer)).unwrap_or_default();
        let Some(process) = &mut self.nodes[at].process else { return Vec::new() };
        let absent = instances.iter().find(|instance| !process.memory.pin(**instance)).copied();
        if let Some(instance) = absent {
            self.check(Err(format!("n{}: {instance:?} is to be read and is not there", at + 1)));
        }
        instances
    }

    fn answer(
        &mut self,
        at: usize,
        shard: ShardId,
        id: RequestId,
        mut result: Result<Box<Answer>, Refusal>,
        instances: Vec<InstanceId>,
    ) {
        let Some(process) = &mut self.nodes[at].process else { return };
        let life = process.life;
        let Some(asked) = process.asked.remove(&id) else {
            return self.check(Err(format!("n{}: {id:?} is answered twice", at + 1)));
        };
        asked.brought.iter().for_each(|instance| process.memory.unpin(*instance));
        if self.bug(Bug::NoAfterPrepare) && matches!(result, Err(Refusal::OutcomeUnknown)) {
            result = Err(Refusal::Moving("a planted bug"));
        }
        if result.is_ok() {
            let checked = invariants::one_primary::check(self, at, shard);
            self.check(checked);
        }
        let kind = match &result {
            Ok(_) => "done",
            Err(Refusal::OutcomeUnknown) => "unknown",
            Err(_) => "refused",
        };
        *self.answered.entry(kind).or_default() += 1;
        let call = asked.call;
        self.say(|| format!("call {call} answered by n{}: {} {}", at + 1, asked.key, outcome(&result)));
        let reply = Reply::Answered(result, Pins { at, life, instances });
        let wait = self.below(6);
        self.after(wait, Happening::Deliver { call, reply });
    }

    /// Sends a session whole, as the catalog has it together with its transcript.
    fn send_whole(&mut self, at: usize, mut envelope: Envelope) {
        let Message::Install(install) = &mut envelope.message else {
            return self.check(Err("what is sent whole is no install".to_owned()));
        };
        let store = &self.nodes[at].disk.store;
        let Content::Live(manifest, content) = &mut install.content else {
            return self.check(Err("what is sent whole has ended".to_owned()));
        };
        if store.manifests.get(&install.key).is_none_or(|stored| stored.stamp != manifest.stamp) {
            return;
        }
        let tokens =
            store.transcripts.get(&(install.key.clone(), manifest.birth)).cloned().unwrap_or_default();
        *content = TranscriptDelta { keep_tokens: Tokens(0), keep_messages: 0, tokens, messages: Vec::new() };
        self.send(at, envelope);
    }

    pub fn sync(&mut self, at: usize) {
        let luck = self.chance(500);
        for (shard, ticket, outcome) in self.nodes[at].disk.sync(luck) {
            let event = match outcome {
                Ok(()) => ReplicaEvent::Persisted(ticket),
                Err((error, records)) => ReplicaEvent::PersistFailed(ticket, error, records),
            };
            self.on(at, shard, event);
        }
    }
}

/// What the answer lets its receiver read.
fn readable(answer: &Answer) -> Vec<InstanceId> {
    match answer {
        Answer::Read(grant) => grant.manifest.instances().map(|block| block.instance).collect(),
        Answer::Lease(grant) => grant.manifest.instances().map(|block| block.instance).collect(),
        Answer::Plan(plan) => plan.tail.iter().map(|block| block.instance).collect(),
        _ => Vec::new(),
    }
}

fn outcome(result: &Result<Box<Answer>, Refusal>) -> String {
    match result {
        Ok(answer) => match &**answer {
            Answer::Written(written) => format!("revision {} {}", written.revision, written.manifest.stamp),
            Answer::Session { view, .. } => {
                format!("at {} {} {:?}", view.manifest.revision, view.manifest.stamp, view.manifest.state)
            }
            Answer::Read(grant) => format!("read at {} {}", grant.manifest.revision, grant.manifest.stamp),
            other => format!("{other:?}").chars().take(60).collect(),
        },
        Err(refusal) => format!("no: {refusal}"),
    }
}

/// Events that a reader of the history wants to see.
fn shown(event: &ReplicaEvent) -> Option<String> {
    match event {
        ReplicaEvent::Peer(envelope) => Some(format!(
            "<- {} g{} {}",
            envelope.from.node,
            envelope.set.generation,
            brief(&envelope.message)
        )),
        ReplicaEvent::Set(set) => {
            let names = set.replicas.iter().map(|member| format!("{}.{}", member.node, member.incarnation));
            let learner =
                set.learner.as_ref().map(|member| format!("{}.{}", member.node, member.incarnation));
            Some(format!("set g{} {:?} learner {learner:?}", set.generation, names.collect::<Vec<_>>()))
        }
        ReplicaEvent::Request(request) => Some(format!("asked {} {}", request.key, word(&request.verb))),
        ReplicaEvent::Tick => None,
        ReplicaEvent::Persisted(ticket) => Some(format!("persisted {}", ticket.0)),
        ReplicaEvent::PersistFailed(ticket, error, _) => {
            Some(format!("not persisted {} {error:?}", ticket.0))
        }
        other => Some(format!("{other:?}").chars().take(300).collect()),
    }
}

/// One line of a message.
#[must_use]
pub fn brief(message: &Message) -> String {
    match message {
        Message::Prepare(prepare) => {
            let record: String = format!("{:?}", prepare.record).chars().take(9).collect();
            format!(
                "Prepare {} {:?} -> {} {record}",
                prepare.key,
                prepare.previous.map(|s| s.to_string()),
                prepare.stamp
            )
        }
        Message::Install(install) => {
            let tokens = match &install.content {
                Content::Live(_, transcript) => transcript.tokens.len(),
                Content::Ended(_) | Content::Absent => 0,
            };
            let head = install.content.head().map(|stamp| stamp.to_string());
            format!("Install {} {head:?} with {tokens} tokens", install.key)
        }
        Message::Compare(compare) => {
            format!("Compare {} {:?} {} heads", compare.id, compare.span, compare.heads.len())
        }
        other => format!("{other:?}").chars().take(200).collect(),
    }
}
