//! Nodes that do not vote: they ask any voter for what has changed, and wait there for news.

use std::sync::Arc;
use std::time::Duration;

use keepwarm_core::registry::{Delta, Registry};
use tokio::time::sleep;

use crate::shared::{Shared, millis};
use crate::wire::{Answer, Request};

/// After a voter that could not be asked.
const RETRY: Duration = Duration::from_millis(50);
/// What an answer may take beyond the wait that was asked for.
const SLACK: Duration = Duration::from_secs(1);

impl Shared {
    /// Follows for as long as the node lives. Asks another voter whenever one has no news: it may be the one
    /// that is cut off.
    pub(crate) async fn follow(self: Arc<Self>) {
        let poll = self.settings.timers.poll;
        let mut registry = Registry::new(self.settings.registry);
        let mut turn = 0;
        loop {
            let Some(voter) = self.next_voter(turn) else { return };
            let request = Request::Follow { since: registry.version(), wait_ms: millis(poll) };
            let answer = self.network.call(&voter, &request, poll + SLACK).await;
            let Ok(Answer::Delta { delta, leader }) = answer else {
                if let Ok(Answer::Refused(why)) = &answer {
                    tracing::warn!(%voter, %why, "a voter does not let this node follow");
                }
                turn += 1;
                sleep(RETRY).await;
                continue;
            };
            if let Some(leader) = leader.and_then(|name| name.parse().ok()) {
                self.set_hint(Some(leader));
            }
            let merged = Delta::try_from(delta)
                .map_err(|error| error.to_string())
                .and_then(|delta| registry.merge(&delta).map_err(|error| error.to_string()));
            match merged {
                Ok(true) => drop(self.registry.send_replace(Arc::new(registry.clone()))),
                Ok(false) => turn += 1,
                Err(error) => {
                    tracing::error!(%voter, %error, "what a voter says of the registry does not fit");
                    turn += 1;
                    sleep(RETRY).await;
                }
            }
        }
    }
}
