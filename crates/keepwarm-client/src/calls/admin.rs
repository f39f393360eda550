//! What operators and probes ask.

use reqwest::Method;
use serde::{Deserialize, Serialize};

use crate::client::{Client, read};
use crate::cluster::{Cluster, Gpu, Node, ShardMap};
use crate::error::ClientError;
use crate::verbs::Deleted;

/// Longest metrics text.
const METRICS_BYTES_MAX: usize = 16 << 20;

/// Whether a node serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// It does.
    pub ready: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

#[derive(Deserialize)]
struct Receipts {
    receipts: Vec<Deleted>,
}

#[derive(Deserialize)]
struct Gpus {
    gpus: Vec<Gpu>,
}

impl Client {
    /// The cluster, as the node sees it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn cluster(&self) -> Result<Cluster, ClientError> {
        self.call(Method::GET, &["v1", "cluster"]).answer().await
    }

    /// The shard map.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn shards(&self) -> Result<ShardMap, ClientError> {
        self.call(Method::GET, &["v1", "cluster", "shards"]).answer().await
    }

    /// The node's GPUs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn gpus(&self) -> Result<Vec<Gpu>, ClientError> {
        let answer: Gpus = self.call(Method::GET, &["v1", "gpus"]).here().answer().await?;
        Ok(answer.gpus)
    }

    /// A node, by its name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn node(&self, name: &str) -> Result<Node, ClientError> {
        self.call(Method::GET, &["v1", "nodes", name]).answer().await
    }

    /// Ends each session of a tenant (admin).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn purge(&self, tenant: &str) -> Result<Vec<Deleted>, ClientError> {
        let call = self.call(Method::POST, &["v1", "tenants", tenant, "purge"]);
        let answer: Receipts = call.repeatable().answer().await?;
        Ok(answer.receipts)
    }

    /// Whether the node serves; with `full`, also has every copy in place. A node that does not is an
    /// answer, not an error.
    ///
    /// # Errors
    /// [`ClientError`] where the node cannot be asked.
    pub async fn ready(&self, full: bool) -> Result<Readiness, ClientError> {
        let call = self.call(Method::GET, &["readyz"]).here();
        let call = if full { call.query("full", true) } else { call };
        match call.single().answer().await {
            Err(ClientError::Refused(problem)) if problem.status == 503 => {
                let reasons = problem.members.get("reasons").and_then(|value| value.as_array().cloned());
                let reasons = reasons.unwrap_or_default();
                let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
                Ok(Readiness { ready: false, reasons: reasons.iter().filter_map(text).collect() })
            }
            answer => answer,
        }
    }

    /// The metrics, as Prometheus reads them.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let response = self.call(Method::GET, &["metrics"]).here().send().await?;
        let url = response.url().to_string();
        let body = read(&url, response, METRICS_BYTES_MAX).await?;
        String::from_utf8(body.into()).map_err(|error| ClientError::Answer { url, reason: error.to_string() })
    }
}
