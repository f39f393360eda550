//! Sessions at work, and the moves between tiers.

use keepwarm_types::Tier;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use crate::client::Client;
use crate::error::ClientError;
use crate::verbs::{Activation, Checkpoint, Lease, Placement, Verdict};

#[derive(Debug, Deserialize)]
struct Renewed {
    #[serde(flatten)]
    verdict: Verdict,
    lease: Lease,
}

impl Client {
    /// Waits until what is committed has all promised copies.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn checkpoint(&self, id: Uuid) -> Result<Checkpoint, ClientError> {
        self.on_session(Method::POST, id, &["checkpoint"]).json(&json!({}))?.repeatable().answer().await
    }

    /// Brings a session to a GPU and leases it for `ttl_ms` (30,000 where absent).
    ///
    /// # Errors
    /// [`ClientError`]; `leased` while another holds the lease.
    pub async fn activate(
        &self,
        id: Uuid,
        placement: &Placement,
        ttl_ms: Option<u64>,
    ) -> Result<Activation, ClientError> {
        let mut body = json!(placement);
        if let Some(ttl_ms) = ttl_ms {
            body["ttl_ms"] = ttl_ms.into();
        }
        self.on_session(Method::POST, id, &["activate"]).json(&body)?.answer().await
    }

    /// Makes a lease last `ttl_ms` from now.
    ///
    /// # Errors
    /// [`ClientError`]; `lease_expired` once it has ended.
    pub async fn renew(
        &self,
        id: Uuid,
        lease: Uuid,
        ttl_ms: Option<u64>,
    ) -> Result<(Verdict, Lease), ClientError> {
        let body = json!({"lease": lease, "ttl_ms": ttl_ms});
        let call = self.on_session(Method::POST, id, &["renew"]).json(&body)?;
        let renewed: Renewed = call.repeatable().answer().await?;
        Ok((renewed.verdict, renewed.lease))
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn release(&self, id: Uuid, lease: Uuid) -> Result<Verdict, ClientError> {
        self.on_session(Method::POST, id, &["release"]).json(&json!({"lease": lease}))?.answer().await
    }

    /// Brings bytes to a warmer tier ahead of their use.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn prefetch(&self, id: Uuid, tier: Tier) -> Result<Verdict, ClientError> {
        let call = self.on_session(Method::POST, id, &["prefetch"]).json(&json!({"tier": tier}))?;
        call.repeatable().answer().await
    }

    /// Sends bytes to a colder tier; memory is freed once the colder copy is confirmed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn demote(&self, id: Uuid, tier: Tier) -> Result<Verdict, ClientError> {
        let call = self.on_session(Method::POST, id, &["demote"]).json(&json!({"tier": tier}))?;
        call.repeatable().answer().await
    }

    /// Moves a session's home.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn migrate(&self, id: Uuid, placement: &Placement) -> Result<Verdict, ClientError> {
        self.on_session(Method::POST, id, &["migrate"]).json(placement)?.answer().await
    }
}
