//! Shards that this node has given to another replica, where one of their sessions shall run.
//!
//! Each report to the registry's leader names them, so that none comes back for the sake of equal shares: first it is named, then it is
//! proposed. Whoever wants one here again says so; and a process that begins anew takes what it is given.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use keepwarm_core::registry::{CEDED_MAX, Member, NodeStatus};
use keepwarm_core::shard::{Refusal, Verb};
use keepwarm_types::{NodeName, SessionId, SessionKey, ShardId};
use tokio::time::timeout;

use super::Cluster;
use crate::error::Error;
use crate::handle::Handle;

/// How long the registry is asked for a change of a set, and its outcome waited for.
const OUTCOME_WAIT: Duration = Duration::from_secs(6);
/// How long whoever asked waits for that.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// How long the registry may take to show that it answers.
const REGISTRY_WAIT: Duration = Duration::from_millis(500);
/// Reports that go out before a shard is proposed: one may have been on its way.
const REPORTS: u64 = 2;

/// Which shards, by when they were ceded.
#[derive(Debug, Default)]
pub(super) struct Ceded(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    shards: BTreeMap<ShardId, State>,
    next: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It may become another's now.
    Asked(u64),
    /// It is another's.
    Gone(u64),
}

impl Ceded {
    /// Notes that a shard may become another's; the one that was ceded first gives its place where there is none. False where
    /// somebody is at it.
    fn ask(&self, shard: ShardId) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(known.shards.get(&shard), Some(State::Asked(_))) {
            return false;
        }
        known.next += 1;
        let state = State::Asked(known.next);
        known.shards.insert(shard, state);
        if known.shards.len() > CEDED_MAX {
            let gone = known.shards.iter().filter_map(|(shard, state)| match state {
                State::Gone(at) => Some((*at, *shard)),
                State::Asked(_) => None,
            });
            if let Some((_, first)) = gone.min() {
                known.shards.remove(&first);
            }
        }
        true
    }

    fn answered(&self, shard: ShardId, gone: bool) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (gone, known.shards.get(&shard)) {
            (true, Some(State::Asked(at))) => {
                let at = *at;
                known.shards.insert(shard, State::Gone(at));
            }
            _ => drop(known.shards.remove(&shard)),
        }
    }

    /// Those to name: what came back to this node, or is none of its any more, is forgotten.
    fn named(&self, is_another_s: impl Fn(ShardId) -> bool) -> Vec<ShardId> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.shards.retain(|shard, state| matches!(state, State::Asked(_)) || is_another_s(*shard));
        known.shards.keys().copied().take(CEDED_MAX).collect()
    }
}

impl Cluster {
    /// For this node's report.
    pub(super) fn ceded(&self) -> Vec<ShardId> {
        let map = self.map();
        self.ceded.named(|shard| {
            map.set(shard).is_some_and(|set| set.replicas.iter().skip(1).any(|member| *member == self.member))
        })
    }

    /// The other replicas of a session's shard that are up and not being emptied.
    pub(crate) fn others_of(&self, id: SessionId) -> Vec<NodeName> {
        let map = self.told.borrow().clone();
        let Some(set) = map.set(self.count.shard_of(id)) else { return Vec::new() };
        let able = |member: &Member| {
            *member != self.member && map.node(&member.node).is_some_and(|node| node.status == NodeStatus::Up)
        };
        set.replicas.into_iter().filter(able).map(|member| member.node).collect()
    }

    fn leads(&self, shard: ShardId) -> bool {
        self.told.borrow().primary(shard).as_ref() == Some(&self.member)
    }

    /// Gives a session's shard to another replica of it; whether it is another's now. The error says what stands in the way; none
    /// in time is no answer of the registry's. Dropped, it goes on.
    pub(crate) async fn cede(
        self: &Arc<Self>,
        handle: &Handle,
        key: &SessionKey,
        to: NodeName,
    ) -> Result<bool, Error> {
        let shard = self.count.shard_of(key.id);
        if !self.leads(shard) {
            return Ok(true);
        }
        if !self.ceded.ask(shard) {
            return Err(Refusal::Conflict("its shard is about to go to another node".to_owned()).into());
        }
        let (cluster, handle, key) = (Arc::clone(self), handle.clone(), key.clone());
        let task = tokio::spawn(async move {
            let asked = cluster.ask_to_cede(&handle, &key, shard, to).await;
            if asked.is_ok() {
                cluster.gone_in_time(shard).await;
            }
            // Whatever was answered: who leads it now?
            let gone = !cluster.leads(shard);
            cluster.ceded.answered(shard, gone);
            asked.map(|()| gone)
        });
        match timeout(ANSWER_WAIT, task).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => Err(Error::Internal(format!("ceding a shard: {error}"))),
            Err(_) => Ok(false),
        }
    }

    /// Has the shard's primary propose another one, where the registry would take that and remember why.
    async fn ask_to_cede(
        &self,
        handle: &Handle,
        key: &SessionKey,
        shard: ShardId,
        to: NodeName,
    ) -> Result<(), Error> {
        // A leader that cannot read which shards were ceded gives them back at once.
        let deaf = |leader: &NodeName| {
            *leader != self.member.node
                && self.transport.version(leader).is_none_or(|version| version.number() < 2)
        };
        if self.registry.leader().as_ref().is_none_or(deaf) {
            return Err(
                Refusal::Conflict("the registry has no leader that could remember it".to_owned()).into()
            );
        }
        // While nobody answers, the shard would take no change for nothing.
        if self.registry.confirm(REGISTRY_WAIT).await.is_err() {
            return Err(Refusal::Conflict("the registry does not answer".to_owned()).into());
        }
        // It knows before the shard moves: it would give it back, or another one in its place.
        let mut reports = self.reports.subscribe();
        let until = *reports.borrow_and_update() + REPORTS;
        drop(timeout(OUTCOME_WAIT, reports.wait_for(|sent| *sent >= until)).await);
        if handle.inner().uploads.any(shard) {
            return Err(
                Refusal::Conflict("bytes of its shard's sessions are being written".to_owned()).into()
            );
        }
        handle.ask(key, Verb::Cede(to), Vec::new(), None).await.map(|_| ())
    }

    /// Waits until this node does not lead a shard any more, or for as long as that may take.
    async fn gone_in_time(&self, shard: ShardId) {
        let mut told = self.told.subscribe();
        let gone = told.wait_for(|map| map.primary(shard).as_ref() != Some(&self.member));
        drop(timeout(OUTCOME_WAIT, gone).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_named_at_once_and_what_came_back_no_more() {
        let ceded = Ceded::default();
        assert!(ceded.ask(ShardId(1)) && ceded.ask(ShardId(2)) && !ceded.ask(ShardId(1)), "one at a time");
        let none = |_| false;
        assert_eq!(ceded.named(none), [ShardId(1), ShardId(2)]);
        ceded.answered(ShardId(1), true);
        ceded.answered(ShardId(2), false);
        assert_eq!(ceded.named(|_| true), [ShardId(1)]);
        assert!(ceded.ask(ShardId(1)), "again, after it came back");
        ceded.answered(ShardId(1), true);
        assert_eq!(ceded.named(none), []);
    }

    #[test]
    fn of_too_many_the_first_is_forgotten() {
        let ceded = Ceded::default();
        let most = u32::try_from(CEDED_MAX).unwrap();
        for shard in (0..=most).rev() {
            assert!(ceded.ask(ShardId(shard)));
            ceded.answered(ShardId(shard), true);
        }
        let named = ceded.named(|_| true);
        assert_eq!((named.len(), named[CEDED_MAX - 1]), (CEDED_MAX, ShardId(most - 1)));
    }
}
