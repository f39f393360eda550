//! `keepwarm status`: nodes, GPUs, memory and models at a glance.

use keepwarm_client::{Arena, Cluster, Model, Readiness};
use keepwarm_types::Bytes;
use serde::Serialize;

use super::client;
use crate::cli::Remote;
use crate::failure::Failure;
use crate::output::{Output, Table};

#[derive(Serialize)]
struct Status {
    readiness: Readiness,
    cluster: Cluster,
    models: Vec<Model>,
}

pub(crate) async fn run(remote: &Remote, output: Output) -> Result<(), Failure> {
    let client = client(remote)?;
    let (readiness, cluster, models) =
        futures::try_join!(client.ready(true), client.cluster(), client.models())?;
    output.show(&Status { readiness, cluster, models }, text)
}

fn fill(arena: &Arena) -> [String; 3] {
    [
        Bytes(arena.used_bytes).to_string(),
        Bytes(arena.reserved_bytes).to_string(),
        format!("{:.0}%", arena.fill() * 100.0),
    ]
}

fn text(status: &Status) -> String {
    let cluster = &status.cluster;
    let ready = if status.readiness.ready {
        "ready".to_owned()
    } else {
        format!("not ready: {}", status.readiness.reasons.join("; "))
    };
    let mut text = format!(
        "cluster {} · {ready} · {} shards, {} not fully replicated · {} sessions not fully replicated · spec {}\n\n",
        cluster.name,
        cluster.shards,
        cluster.under_replicated_shards,
        cluster.under_replicated_sessions,
        cluster.spec.version
    );
    let mut table =
        Table::new(["node", "memory", "device", "state", "used", "of", "fill", "sessions", "leases"]);
    for node in &cluster.nodes {
        for gpu in &node.gpus {
            let state =
                gpu.reason.as_ref().map_or_else(|| gpu.state.clone(), |why| format!("{}: {why}", gpu.state));
            let places = [node.name.clone(), format!("hbm:{}", gpu.gpu), gpu.device.clone(), state];
            let counts = [gpu.sessions.to_string(), gpu.leases.to_string()];
            table.row(places.into_iter().chain(fill(&gpu.arena)).chain(counts));
        }
        let Some(pinned) = &node.pinned else {
            let why = node.reason.as_deref().unwrap_or("");
            let state = if why.is_empty() { node.status.clone() } else { format!("{}: {why}", node.status) };
            let rest = std::iter::repeat_n("-".to_owned(), 5);
            table.row([node.name.clone(), "-".to_owned(), "-".to_owned(), state].into_iter().chain(rest));
            continue;
        };
        let locked = match (pinned.locked, &pinned.reason) {
            (true, _) => "locked".to_owned(),
            (false, Some(why)) => format!("not locked: {why}"),
            (false, None) => "not locked".to_owned(),
        };
        let places = [node.name.clone(), "pinned".to_owned(), "-".to_owned(), locked];
        table.row(
            places
                .into_iter()
                .chain(fill(&pinned.arena))
                .chain([pinned.sessions.to_string(), "-".to_owned()]),
        );
    }
    text.push_str(&table.render());
    for model in &status.models {
        let random = if model.random_weights { " · random weights" } else { "" };
        text.push_str(&format!(
            "\nmodel {} · context {} · {} of state per token{random}\n",
            model.id,
            model.context_length,
            Bytes(model.kv_bytes_per_token)
        ));
    }
    text
}
