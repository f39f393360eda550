//! Who asks: the bearer token names the tenant.

use std::net::SocketAddr;

use axum::extract::{ConnectInfo, FromRequestParts};
use axum::http::header;
use axum::http::request::Parts;
use keepwarm_config::TenantConfig;
use keepwarm_node::RelayedCaller;
use keepwarm_types::TenantName;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::problem::Problem;
use crate::routes::ApiState;

/// The tenant of a node without tenants.
const DEFAULT_TENANT: &str = "default";

/// The tenants' tokens, as hashes.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    tenants: Vec<(TenantName, [u8; 32], bool)>,
}

impl Credentials {
    /// The tenants of a configuration; none: loopback serves the tenant `default`, as an admin.
    #[must_use]
    pub fn new(tenants: &[TenantConfig]) -> Self {
        Self {
            tenants: tenants
                .iter()
                .map(|tenant| (tenant.name.clone(), tenant.token_sha256, tenant.admin))
                .collect(),
        }
    }

    /// Looks a token up by its hash, at the same cost for every tenant and token.
    fn find(&self, token: &str) -> Option<Caller> {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let mut found = None;
        for (tenant, expected, admin) in &self.tenants {
            if bool::from(hash.ct_eq(expected)) {
                found = Some(Caller { tenant: tenant.clone(), admin: *admin });
            }
        }
        found
    }
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Acts for this tenant.
    pub tenant: TenantName,
    /// May make admin calls.
    pub admin: bool,
}

impl Caller {
    /// Refuses all but admins.
    ///
    /// # Errors
    /// `forbidden`.
    pub fn require_admin(&self) -> Result<(), Problem> {
        if self.admin {
            return Ok(());
        }
        Err(Problem::new(
            "forbidden",
            format!("tenant '{}' may not make admin calls: set admin = true in its [[tenant]]", self.tenant),
        ))
    }
}

impl FromRequestParts<ApiState> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, Problem> {
        // The node that was asked first has looked at the token.
        if let Some(relayed) = parts.extensions.get::<RelayedCaller>() {
            return Ok(Self { tenant: relayed.tenant.clone(), admin: relayed.admin });
        }
        if state.credentials.tenants.is_empty() {
            let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
            if peer.is_some_and(|ConnectInfo(peer)| !peer.ip().is_loopback()) {
                return Err(Problem::new(
                    "forbidden",
                    "without tenants only loopback is served: add a [[tenant]]",
                ));
            }
            let tenant = DEFAULT_TENANT.parse().expect("a plain word is a name");
            return Ok(Self { tenant, admin: true });
        }
        let value = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = value
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let Some((_, token)) = token else {
            return Err(Problem::new("unauthenticated", "send Authorization: Bearer TOKEN"));
        };
        state
            .credentials
            .find(token.trim())
            .ok_or_else(|| Problem::new("unauthenticated", "no tenant has this token"))
    }
}
